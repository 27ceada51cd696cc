"""Bases in few bits, as a training runs over them (QLoRA: Dettmers et al. 2023): bitsandbytes' 4-bit layers, frozen, forward
by the layer itself, backward by its matrix made anew. Demands bitsandbytes for those; refuses every other kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from leakfast.errors import ModelError

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

TAKEN = "bitsandbytes 4-bit"


def kind_of(config: Any) -> str | None:
    """How a model's weights are held in few bits, in words; None where they are numbers of its dtype."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    told = given if isinstance(given, dict) else given.to_dict()
    method = told.get("quant_method")
    method = str(getattr(method, "value", method) or "unnamed").lower()
    if method != "bitsandbytes":
        return method
    return TAKEN if told.get("load_in_4bit") else "bitsandbytes 8-bit"


def check(loaded: Loaded) -> None:
    """ModelError for a base in few bits that no adapter is trained over here."""
    kind = kind_of(loaded.model.config)
    if kind not in (None, TAKEN):
        raise ModelError(
            f"train: the weights of {loaded.name} are held in few bits ({kind}). Needed: weights in bfloat16 or float32, or "
            f"{TAKEN} ones. Give --model the weights that they were made of."
        )


def is_4bit(layer: Any) -> bool:
    """Whether it is bitsandbytes' frozen linear layer; nothing is imported for those that are not."""
    return any(
        c.__module__.startswith("bitsandbytes.") and c.__name__ == "Linear4bit" for c in type(layer).mro()
    )


def is_plain(layer: Any) -> bool:
    """Whether LoRA of a packed step stands beside it: torch's linear layer, or that in 4 bits."""
    return type(layer) is torch.nn.Linear or is_4bit(layer)


def forward(base: Any, x: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ + b of the frozen layer; in 4 bits in the dtype that it computes in, as when it is measured."""
    return base(x) if is_4bit(base) else F.linear(x, base.weight, base.bias)


def matrix(base: Any, like: torch.Tensor) -> torch.Tensor:
    """W (out, in) of the frozen layer; in 4 bits, made anew in the dtype of `like`."""
    if not is_4bit(base):
        weight: torch.Tensor = base.weight
        return weight
    from bitsandbytes import functional

    held = base.weight
    if getattr(
        held.quant_state, "packing_format_for_cpu", False
    ):  # inference on some CPUs does; undone as for saving
        undo = functional._convert_weight_packed_for_cpu_inverse
        held.data, held.quant_state = undo(held.data, held.quant_state)
    made: torch.Tensor = functional.dequantize_4bit(held.data, held.quant_state)
    return made.to(like.dtype)
