"""A LoRA adapter beside the weights of a plain model, in the model's own dtype: what vLLM computes, at a fraction of
the products and copies that peft's layers take. Demands plain LoRA of linear layers; folds nothing, so that no weight
swallows a small update by rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

# they are given the same tensor, in turn
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Update:
    """One layer's update: down (r, in) and up (out, r), float32, the adapter's scale in `up`."""

    down: torch.Tensor
    up: torch.Tensor


class _Down:
    """x · Aᵀ of layers that are given the same tensor one after the other: one product for all."""

    def __init__(self, downs: list[torch.Tensor]) -> None:
        self.weight = torch.cat(downs)
        ends = torch.tensor([len(down) for down in downs]).cumsum(0).tolist()
        self.slices = [slice(end - len(down), end) for end, down in zip(ends, downs, strict=True)]
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = (x, torch.nn.functional.linear(x, self.weight))
        out = self.last[1][..., self.slices[slot]]
        if slot + 1 == len(self.slices):
            self.last = None  # keeps nothing alive once all have had theirs
        return out


def _forward(module: Any, down: _Down, slot: int, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's own output plus its update. up: (r, out)."""
    out: torch.Tensor = type(module).forward(module, x)
    low = down.of(slot, x)
    flat = out.view(-1, out.shape[-1])
    flat.addmm_(low.reshape(-1, low.shape[-1]), up)
    return out


@contextmanager
def applied(model: Any, updates: dict[str, Update]) -> Iterator[None]:
    """The plain model's layers with their updates for the length of the block; then exactly as before."""
    modules = {name: model.get_submodule(name) for name in updates}
    changed = []
    try:
        for names in groups(updates):
            like = modules[names[0]].weight
            down = _Down([updates[name].down.to(like.device, like.dtype) for name in names])
            for slot, name in enumerate(names):
                up = updates[name].up.to(like.device).t().contiguous().to(like.dtype)
                modules[name].forward = partial(_forward, modules[name], down, slot, up)
                changed.append(modules[name])
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own is found again


def groups(layers: Iterable[str]) -> list[list[str]]:
    """The layers (names), those together that are given the same tensor, in the order in which a block runs them."""
    left, found = dict.fromkeys(layers), []
    while left:
        name = next(iter(left))
        parent, _, last = name.rpartition(".")
        kin = next((words for words in _TOGETHER if last in words), (last,))
        group = [one for one in (f"{parent}.{word}" if parent else word for word in kin) if one in left]
        for one in group:
            del left[one]
        found.append(group)
    return found


def plain_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    wrapped = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if wrapped else model
