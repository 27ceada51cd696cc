"""Engines of a model of a real shape with random weights, for bench_generate's GPU way: config, adapters, replies of
stated lengths, weights swapped in place. Run beside a bench; measures nothing by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import SHAPES, loaded, make_model

from leakfast.generation.contract import Sampling
from leakfast.generation.vllm.engine import Engine
from leakfast.generation.vllm.start import Spec, lora_settings
from leakfast.generation.vllm.widths import Width

SHAPES[
    "small"
] = {  # the smallest that vLLM's CPU attention takes: for rehearsals of the GPU's way, not for numbers
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Measured(Engine):
    """An engine whose replies have stated lengths, because random weights never stop: LENGTHS[seed mod n] tokens."""

    def sampling(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        tokens = _lengths(sampling.max_new_tokens)[seed % 997]
        return {**super().sampling(sampling, seed), "max_tokens": int(tokens), "ignore_eos": True}


def _lengths(longest: int) -> np.ndarray:
    """997 lengths from a tenth of `longest` to all of it; their mean is 0.586 of it (300 of 512), ends included."""
    shares = np.random.default_rng(0).beta(1.4, 1.19, 997)
    return np.maximum(1, np.round(longest * (0.1 + 0.9 * shares))).astype(int)


def shaped_folder(folder: Path, shape: str) -> Path:
    """config.json alone: vLLM fills the weights with random numbers (load_format=dummy)."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32_768,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    config.save_pretrained(folder)
    return folder


def shaped_adapter(folder: Path, shape: str, rank: int, seed: int) -> Path:
    """A LoRA adapter of all seven linear layers with small random weights, in peft's layout."""
    import torch
    from safetensors.torch import save_file

    from leakfast.models.adapter_structure import CONFIG, WEIGHTS

    s = SHAPES[shape]
    d, wide = s["hidden_size"], s["intermediate_size"]
    kv = d // s["num_attention_heads"] * s["num_key_value_heads"]
    sizes = dict(
        zip(TARGETS, [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)], strict=True)
    )
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(s["num_hidden_layers"]):
        for name, (width, height) in sizes.items():
            part = "self_attn" if name in TARGETS[:4] else "mlp"
            where_ = f"base_model.model.model.layers.{layer}.{part}.{name}"
            for letter, size in (("A", (rank, width)), ("B", (height, rank))):
                state[f"{where_}.lora_{letter}.weight"] = (
                    torch.randn(*size, generator=draw).mul_(0.01).bfloat16()
                )
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def shaped_spec(folder: Path, width: Width, longest: int, adapters: Sequence[Path], memory: float) -> Spec:
    settings = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "seed": 0,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "max_model_len": longest,
        "max_num_seqs": width.seats,
        **lora_settings(adapters),
    }
    if width.batched_tokens:
        settings["max_num_batched_tokens"] = width.batched_tokens
        settings["cudagraph_capture_sizes"] = list(width.graphs)
    return Spec("random weights", settings, (), memory)


def swapping(asked: Any, spec: Spec, memory: float) -> tuple[Measured, list[float]]:
    """An engine in this process whose weights are swapped in place, and the seconds of each swap as they come. Its
    base is a model of random weights beside it, on the same device."""
    from leakfast.generation.vllm.merged import Merged

    base = loaded(make_model(asked.shape, "bfloat16", asked.device, asked.seed), "bfloat16")
    letters = lambda text, **_: {"input_ids": [ord(letter) for letter in text]}  # noqa: E731
    base = replace(base, name=asked.shape, tokenizer=letters)
    swapped: list[float] = []

    class Swapping(Measured):
        def _wear(self, adapter: Path | None) -> None:
            if adapter == self._worn:
                return
            began = time.perf_counter()
            super()._wear(adapter)
            swapped.append(time.perf_counter() - began)

    return Swapping(replace(spec, memory=memory), Merged(base)), swapped
