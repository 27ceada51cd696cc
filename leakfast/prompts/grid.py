"""Persona × question → token ids: a grid of prompts kept as the two halves each is joined from. Demands numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PromptGrid(Sequence[list[int]]):
    """P × Q sequences `heads[p] + tails[q]`, heads outermost, held as their P + Q pieces: what a
    planner needs of personas × questions without writing every prompt out."""

    def __init__(self, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> None:
        self.heads = [list(head) for head in heads]
        self.tails = [list(tail) for tail in tails]

    def __len__(self) -> int:
        return len(self.heads) * len(self.tails)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # negative indices and IndexError as a list has them
        return self.heads[at // len(self.tails)] + self.tails[at % len(self.tails)]
