"""The study's tables about steering: directions, and what is done along them once everything is trained and measured, or while
an adapter is trained. Demands pydantic; leaves the work to pipeline.steering and pipeline.steered_training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class SteeringConfig(BaseModel):
    """One direction, and what is done along it while adapters are measured again, an arm a strength. A list: [[steering]].

    name: what the arms are called by.
    kind: source-mean (the source's centroid less the mean of all), contrast (less the mean of those it is set against; none
    named: of all others), difference (less that of one persona), random (as long as the direction `like`), or file.
    source: the persona that it points to (None: each adapter's own). against: the personas it points away from.
    like: for random, the name of an earlier table. file: for file, what `leakfast directions` wrote. seed: of a random one.
    layers: decoder blocks, counted from 0, whose outputs are steered, each by its own vector, all at once.
    mode: add, project (the component is taken out) or cap (it is at most so long), at every token of prompt and reply.
    strengths: an arm each; in multiples of the unit; of project the share that is taken out. 0 of add and project is the
    model as it is, to the bit.
    unit: direction (its length) or residual (the mean length of the personas' centroids at the layer).
    of: the behaviors whose adapters are steered (none: all that are trained). base: whether the unadapted model is too.
    personas: who is asked beside each adapter's source.
    samples: fewer completions a prompt than the behaviors' own (None: as they say). n_items: items of multiple choice, drawn.
    measure: completions, probability or both (None: as the behaviors say)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    kind: Literal["source-mean", "contrast", "difference", "random", "file"] = "source-mean"
    source: str | None = None
    against: list[str] = []
    like: str | None = None
    file: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    mode: Literal["add", "project", "cap"] = "add"
    strengths: Annotated[list[float], Field(min_length=1)] = [0.0, 0.5, 1.0, 2.0]
    unit: Literal["direction", "residual"] = "direction"
    of: list[str] = []
    base: bool = False
    personas: str | list[str] = "originals"
    samples: Annotated[int, Field(ge=1)] | None = None
    n_items: Annotated[int, Field(ge=1)] | None = None
    measure: Literal["completions", "probability", "both"] | None = None

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> SteeringConfig:
        if (self.kind == "random") != (self.like is not None):
            raise ValueError(
                'kind = "random" needs like = "NAME", the name of an earlier table, and no other kind has it'
            )
        _check_kind(self.kind, self.against, self.file)
        if self.mode == "project" and not all(0 <= one <= 1 for one in self.strengths):
            raise ValueError("strengths of project are shares, from 0 to 1")
        return self


class TrainSteeringConfig(BaseModel):
    """What is done along a direction while the adapter is trained, and not when it is measured. The direction comes from the
    run's centroids of the unadapted model. Without this table nothing is done.

    kind: source-mean (the source's centroid less the mean of all), contrast (less the mean of those it is set against; none
    named: of all others), difference (less that of one persona), random (as long as that of the kind `like`), or file.
    source: the persona that it points to (None: the adapter's own). against: the personas it points away from.
    like: for random, the kind that it is as long as. file: for file, what `leakfast directions` wrote. seed: of a random one.
    layers: decoder blocks, counted from 0, whose outputs are steered, each by its own vector, all at once.
    mode: add, project (the component is taken out) or cap (it is at most so long), at every token of every row.
    strength: in multiples of the unit; of project the share that is taken out. At 0 add and project train the same adapter, to
    the byte, as no steering.
    unit: direction (its length) or residual (the mean length of the personas' centroids at the layer)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["source-mean", "contrast", "difference", "random", "file"] = "source-mean"
    source: str | None = None
    against: list[str] = []
    like: Literal["source-mean", "contrast", "difference"] | None = None
    file: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    mode: Literal["add", "project", "cap"] = "add"
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    unit: Literal["direction", "residual"] = "direction"

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> TrainSteeringConfig:
        if (self.kind == "random") != (self.like is not None):
            raise ValueError(
                'kind = "random" needs like = "source-mean" (or another), and no other kind has it'
            )
        _check_kind(self.like or self.kind, self.against, self.file)
        if self.mode == "project" and not 0 <= self.strength <= 1:
            raise ValueError("strength of project is a share, from 0 to 1")
        return self


def _check_kind(kind: str, against: Sequence[str], file: str | None) -> None:
    """Raises ValueError for a kind that lacks what it is made of, or has what it is not."""
    if (kind == "file") != (file is not None):
        raise ValueError('kind = "file" needs file = "PATH", and no other kind has it')
    if kind == "difference" and len(against) != 1:
        raise ValueError('kind = "difference" needs one persona, such as against = ["assistant"]')
    if against and kind not in ("contrast", "difference"):
        raise ValueError(f'kind = "{kind}" has no against')


def in_order(tables: Sequence[SteeringConfig]) -> Sequence[SteeringConfig]:
    """The tables as they are. Raises ValueError for a name given twice with one mode, and for a `like` that names no earlier
    table of a kind but random."""
    seen: dict[str, Any] = {}
    for one in tables:
        if one.name in seen:
            raise ValueError(f"two tables of steering are called {one.name}; arms are kept by name")
        if one.like is not None and seen.get(one.like) in (None, "random"):
            raise ValueError(f'like = "{one.like}" names no earlier direction to be as long as')
        seen[one.name] = one.kind
    return tables
