"""What a worker says to the driver, and the files that the driver lends it. Plain data: it crosses processes and machines.
Demands nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ready:
    """A worker waits for its first task. where: machine and process."""

    where: str


@dataclass(frozen=True)
class Made:
    """A file of the run is whole: its path in the run, its bytes, what the manifest says of it beside hash and size."""

    relpath: str
    content: bytes = field(repr=False)
    sha256: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Struck:
    """A file that was lent follows from another request now: of these bytes it does not count any more."""

    relpath: str
    sha256: str
    reason: str


@dataclass(frozen=True)
class StageDone:
    key: str
    inputs: str
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Logged:
    """A line for the run's journal."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    """A line of the worker's log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Shown:
    """Progress of the task in hand."""

    title: str
    done: int
    total: int
    what: str


@dataclass(frozen=True)
class Done:
    """The task is over. took: steps and their seconds, None where one was done before."""

    took: Mapping[str, float | None]


@dataclass(frozen=True)
class Failed:
    """The task cannot be done by anybody. kind: the error's class in leakfast.errors."""

    kind: str
    text: str


@dataclass(frozen=True)
class Died:
    """The worker is gone, and what it had in hand may be done by another."""

    why: str


Message = Ready | Made | Struck | StageDone | Logged | Said | Shown | Done | Failed | Died


@dataclass(frozen=True)
class Lent:
    """A file of the run for a worker: its manifest entry and its bytes (None: the worker has it already)."""

    entry: Mapping[str, Any]
    content: bytes | None = field(repr=False)
