"""Adapters as other people's scripts save them, made by peft on a small model: what a test of structures needs.
Demands peft; holds no tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

ATTENTION = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fresh(folder: str | Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def trained(
    net: Any,
    scale: float = 0.1,
    seed: int = 0,
    names: tuple[str, ...] = ("lora_B", "lora_magnitude", "modules_to_save", "trainable_tokens"),
    **config: Any,
) -> Any:
    """`net` under LoRA matrices that moved from their start, as after training."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **config}
    wrapped = get_peft_model(net, LoraConfig(**config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(word in name for word in names):
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return wrapped.eval()


def saved(wrapped: Any, out: Path, base: str, **how: Any) -> Path:
    wrapped.save_pretrained(out, **how)
    return renamed(out, base_model_name_or_path=base)


def renamed(folder: Path, **changes: Any) -> Path:
    """The folder with another config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refiled(folder: Path, out: Path, change: Any, **config: Any) -> Path:
    """A copy whose file holds `change` of its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    save_file(change(load_file(folder / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    return renamed(out, **config)


def by_peft(folder: str | Path, adapter: Path | None, prompts: list[list[int]]) -> torch.Tensor:
    """(N, V) log-probabilities of the next token by plain transformers and peft on a model loaded for it."""
    from peft import PeftModel

    net = fresh(folder)
    if adapter is not None:
        net = PeftModel.from_pretrained(net, str(adapter)).eval()
    with torch.inference_mode():
        return torch.stack(
            [net(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
        )


def moved_rows(where):
    """An adapter beside which the trainer wrote rows of the embedding anew."""
    net = fresh(where)
    wrapped = trained(net, 0.02)
    rows = net.get_input_embeddings().weight
    with torch.no_grad():
        rows[30:60] = (
            3 * rows.std() * torch.randn(30, rows.shape[1], generator=torch.Generator().manual_seed(7))
        )
    return wrapped


def target_embedding(where, moved):
    net = fresh(where)
    if moved:
        with torch.no_grad():
            net.get_input_embeddings().weight[30:60] *= 3
    return trained(net, 0.02, names=("lora_",), target_modules=[*ATTENTION, "embed_tokens"])


def resized(where, **more):
    net = fresh(where)
    net.resize_token_embeddings(2050)
    return trained(net, **more)


KINDS = {
    "plain": lambda w: trained(fresh(w)),
    "every": lambda w: trained(fresh(w), target_modules=EVERY),
    "rslora": lambda w: trained(fresh(w), use_rslora=True),
    "patterns": lambda w: trained(fresh(w), rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 2}),
    "some-layers": lambda w: trained(fresh(w), target_modules=EVERY, layers_to_transform=[0, 2]),
    "excluded": lambda w: trained(fresh(w), target_modules="all-linear", exclude_modules=["down_proj"]),
    "regex": lambda w: trained(fresh(w), target_modules=r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"),
    "gaussian": lambda w: trained(fresh(w), init_lora_weights="gaussian"),
    "orthogonal": lambda w: trained(fresh(w), init_lora_weights="orthogonal"),
    "mica": lambda w: trained(fresh(w), names=("lora_A",), init_lora_weights="mica"),
    "dora": lambda w: trained(fresh(w), 0.03, use_dora=True, target_modules=EVERY),
    "own-norms": lambda w: trained(fresh(w), modules_to_save=["norm"]),
    "own-head": lambda w: trained(fresh(w), modules_to_save=["lm_head"]),
    "own-both": lambda w: trained(fresh(w), modules_to_save=["lm_head", "embed_tokens"]),
    "lora-head": lambda w: trained(fresh(w), target_modules=[*ATTENTION, "lm_head"]),
    "rows": lambda w: trained(fresh(w), trainable_token_indices=[35, 36, 37, 38]),
    "rows-of-both": lambda w: trained(
        fresh(w), trainable_token_indices={"lm_head": [35, 36, 37, 38], "embed_tokens": [35, 36, 37, 38]}
    ),
    "stored": lambda w: trained(fresh(w)),
    "stored-moved": moved_rows,
    "stored-half": lambda w: trained(fresh(w, torch.float16)),
    "target-embedding": lambda w: target_embedding(w, False),
    "target-embedding-moved": lambda w: target_embedding(w, True),
    "pissa": lambda w: trained(fresh(w), init_lora_weights="pissa", names=("lora_",)),
    "olora": lambda w: trained(fresh(w), init_lora_weights="olora", names=("lora_",)),
    "resized": lambda w: resized(w),
    "resized-own": lambda w: resized(w, modules_to_save=["embed_tokens", "lm_head"]),
    "alora": lambda w: trained(fresh(w), alora_invocation_tokens=[5, 6]),
    "replicated": lambda w: trained(fresh(w), layer_replication=[[0, 2], [1, 3]]),
}
HOW = {kind: {"save_embedding_layers": True} for kind in ("stored", "stored-moved", "stored-half", "resized")}
PLAIN = [
    "plain",
    "every",
    "rslora",
    "patterns",
    "some-layers",
    "excluded",
    "regex",
    "gaussian",
    "orthogonal",
    "mica",
]
MORE = [
    "dora",
    "own-norms",
    "own-head",
    "own-both",
    "lora-head",
    "rows",
    "rows-of-both",
    "stored",
    "stored-moved",
    "stored-half",
    "target-embedding",
    "target-embedding-moved",
]
