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
