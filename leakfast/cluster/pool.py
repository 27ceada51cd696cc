"""What the driver asks of a set of workers, wherever they live. Demands nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from leakfast.cluster.messages import Lent, Message
from leakfast.cluster.tasks import Task


class Pool(Protocol):
    """size: how many workers there are to be, numbered from 0."""

    size: int

    def start(self, worker: int) -> None:
        """A new process or actor, which will say Ready; what was there under that number is gone."""

    def give(self, worker: int, task: Task, files: Mapping[str, Lent], stages: Mapping[str, Any]) -> None:
        """One task, to a worker that has none."""

    def next(self, timeout_s: float) -> tuple[int, Message] | None:
        """The next that a worker says, Died where one is gone; None where all were silent so long."""

    def kill(self, worker: int) -> None:
        """End it at once."""

    def close(self) -> None:
        """End all."""
