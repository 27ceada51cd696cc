"""Steering while an adapter is trained: its rows run in the edited model, and the adapter is kept and measured without. Demands
an arm of the base's directions; leaves making the direction to the pipeline, and steps to packed.py and padded.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from leakfast.steering.directions import check_fits

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.steering.arms import Arm, Edit
    from leakfast.study.config import TrainConfig
    from leakfast.train.layers import Company


@dataclass(frozen=True)
class Steer:
    """What is done to the model while one adapter is trained, known by its hash: two are equal where they do the same."""

    digest: str
    arm: Arm = field(compare=False)

    @classmethod
    def along(cls, arm: Arm) -> Steer:
        return cls(arm.digest, arm)

    @property
    def told(self) -> dict[str, Any]:
        """What the card says of it: how the direction was made, its hash and lengths, mode, strength, unit, layers."""
        return self.arm.described()


def check(loaded: Loaded, steer: Steer | None, cfg: TrainConfig) -> None:
    """Raises InputError for a direction that does not fit the model, ValueError where the settings ask for steering and no
    direction was made, or the reverse."""
    if (steer is None) != (cfg.steering is None):
        raise ValueError("a recipe's steer is made of its train.steering: pipeline.steered_training.steer_of")
    if steer is not None:
        check_fits(steer.arm.directions, loaded, steer.arm.name)


def label_of(steers: Sequence[Steer | None]) -> str:
    """What a message calls them."""
    return ", ".join(dict.fromkeys(steer.arm.label for steer in steers if steer is not None))


def edits_of(steers: Sequence[Steer | None], device: Any, company: Company | None = None) -> dict[int, Edit]:
    """Layer → what becomes of its output while adapters are trained, one of `steers` each. Where they differ, each
    adapter's own rows alone are edited by its own: company says which these are."""
    if len(set(steers)) <= 1:
        first = next(iter(steers), None)
        return {} if first is None else first.arm.edits(device)
    if company is None:
        raise ValueError("adapters that are steered differently need the company that they are trained in")
    own = [{} if steer is None else steer.arm.edits(device) for steer in steers]
    return {layer: partial(_each, own, layer, company) for layer in sorted({n for its in own for n in its})}


def _each(
    own: Sequence[Mapping[int, Edit]], layer: int, company: Company, states: torch.Tensor
) -> torch.Tensor:
    """(1, T, D) states of packed rows, each adapter's by its own edit, if it has one there."""
    parts = []
    for k, first, last in company.spans(states.shape[1]):
        mine = states[:, first:last]
        parts.append(own[k][layer](mine) if layer in own[k] else mine)
    return torch.cat(parts, 1)
