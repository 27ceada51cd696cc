"""What is done along a direction at a block's output, at every token position, of the prompt and of the reply. Demands
directions of the model at hand (directions.check_fits); leaves the running of it to `steered`.

With h the output of block L at a token, v the direction there, u = v/‖v‖, s the strength and m the unit's length:

    add      h + s·m·u                              m = ‖v‖ (unit direction), or the mean length of centroids (residual)
    project  h − s·(h·u)·u                          s = 1 takes the component out, 0 leaves it
    cap      h − max(0, h·u − s·m)·u                the component along u is s·m at most

The component is of h itself, not of h less a mean. Computed in float32 whatever the model's dtype, then rounded to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from leakfast.errors import InputError
from leakfast.steering.directions import Directions, described
from leakfast.storage.disk import hash_of
from leakfast.storage.layout import STEERED_BY

Mode = Literal["add", "project", "cap"]
Unit = Literal["direction", "residual"]
MODES: tuple[Mode, ...] = get_args(Mode)

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """One intervention: a direction under a name, what is done along it, how strongly, at which of its layers (None: all).

    strength: in multiples of the direction's length, or of the mean length of the personas' centroids at the layer (unit);
    of project the share of the component that is taken out, 0–1. Raises InputError for a strength or a layer that cannot
    be meant."""

    name: str
    directions: Directions
    mode: Mode = "add"
    strength: float = 1.0
    unit: Unit = "direction"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"steering: mode {self.mode!r} given. Use one of: {', '.join(MODES)}.")
        if not math.isfinite(self.strength) or (self.mode == "project" and not 0 <= self.strength <= 1):
            needed = "from 0 to 1" if self.mode == "project" else "a finite number"
            raise InputError(
                f"steering: strength {self.strength} of {self.mode} given, but {needed} is needed. Give another --strength."
            )
        lacking = sorted(set(self.at) - set(self.directions.layers))
        if lacking:
            raise InputError(
                f"steering: layer {lacking[0]} asked, but the direction {self.name} has layers "
                f"{', '.join(map(str, self.directions.layers))}. Make it there too: leakfast directions --layers …"
            )
        if self.unit == "residual" and self.mode != "project":
            without = [layer for layer in self.at if layer not in self.directions.residual_norms]
            if without:
                raise InputError(
                    f"steering: strength in residual lengths asked, but the direction {self.name} does not know them at "
                    f"layer {without[0]}. Use --unit direction."
                )

    @property
    def at(self) -> tuple[int, ...]:
        """The layers steered, rising."""
        return tuple(sorted(self.directions.layers if self.layers is None else self.layers))

    @property
    def label(self) -> str:
        """What stands behind an adapter's name: `+steer-villain-add-1`."""
        some = list(self.at) != self.directions.layers
        where = f"-L{'.'.join(map(str, self.at))}" if some else ""
        unit = "r" if self.unit == "residual" and self.mode != "project" else ""
        return f"{STEERED_BY}{self.name}{where}-{self.mode}-{self.strength:g}{unit}"

    @property
    def digest(self) -> str:
        """Of everything that the steered model's output follows from."""
        unit = None if self.mode == "project" else self.unit
        return hash_of(
            "steering", self.directions.digest, self.mode, float(self.strength), unit, list(self.at)
        )

    def described(self) -> dict[str, Any]:
        """What a run keeps of it in the manifest, for the table `steering`."""
        return {
            "direction": self.name,
            **described(self.directions),
            "mode": self.mode,
            "strength": float(self.strength),
            "unit": self.unit,
            "layers": list(self.at),
        }

    def edits(self, device: Any) -> dict[int, Edit]:
        """Layer → what becomes of its output, (…, D) in and out."""
        return {layer: self._edit(layer, device) for layer in self.at}

    def _edit(self, layer: int, device: Any) -> Edit:
        vector = torch.from_numpy(self.directions.vectors[layer]).to(device, torch.float32)
        length = float(vector.double().norm())
        along = vector / length
        many = (
            self.directions.residual_norms[layer]
            if self.unit == "residual" and self.mode != "project"
            else length
        )
        if self.mode == "add":
            step = along * (self.strength * many)
            return lambda h: (h.float() + step).to(h.dtype)
        if self.mode == "project":
            return lambda h: _less(h, along, lambda c: self.strength * c)
        return lambda h: _less(h, along, lambda c: (c - self.strength * many).clamp(min=0))


def _less(
    h: torch.Tensor, along: torch.Tensor, taken: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """h less `taken` of its component. The component is summed along the last axis alone, so that a token's result does
    not depend on how many others stand beside it."""
    whole = h.float()
    component = (whole * along).sum(-1, keepdim=True)
    return (whole - taken(component) * along).to(h.dtype)


def arms_of(
    name: str, given: Directions, mode: Mode = "add", strengths: Sequence[float] = (1.0,), **how: Any
) -> list[Arm]:
    """An arm a strength, each strength once. how: unit, layers."""
    return [Arm(name, given, mode, strength, **how) for strength in dict.fromkeys(map(float, strengths))]
