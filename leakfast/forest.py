"""Prompts to a prefix forest to packed batches, so that every distinct token is computed once.
Demands token ids; plans with leakfast._native, or says once that the Python twin stands in.
Leaves the forward pass to engine.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """T packed tokens of S segments. Segment s computes rows [q_offsets[s], q_offsets[s+1]) and
    attends to the rows k_rows[k_offsets[s]:k_offsets[s+1]], its whole path from the root: with
    bottom-right causal masking, its queries are its last keys. All indices count within the batch."""

    tokens: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, counted from the root
    q_offsets: np.ndarray  # (S+1,) int64
    k_offsets: np.ndarray  # (S+1,) int64
    k_rows: np.ndarray  # (K,) int32
    first_segment: int  # index of this batch's first segment in the plan

    @property
    def leaf_rows(self) -> np.ndarray:
        """(S,) int64: the row of each segment's last token."""
        return self.q_offsets[1:] - 1


@dataclass(frozen=True)
class Plan:
    """The packed batches of N sequences; sequence i ends where segment `segment_of[i]` ends. Equal
    sequences share a segment. Arrays as leakfast._forest_py.plan_forest describes them."""

    segment_of: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    batch_tokens: np.ndarray
    batch_segments: np.ndarray
    q_offsets: np.ndarray
    k_offsets: np.ndarray
    k_rows: np.ndarray
    n_input_tokens: int

    @property
    def n_segments(self) -> int:
        return len(self.q_offsets) - 1

    def __len__(self) -> int:
        return len(self.batch_tokens) - 1

    def __iter__(self) -> Iterator[Batch]:
        for b in range(len(self)):
            first, last = self.batch_tokens[b], self.batch_tokens[b + 1]
            s, t = int(self.batch_segments[b]), int(self.batch_segments[b + 1])
            k_first = self.k_offsets[s]
            yield Batch(
                self.tokens[first:last],
                self.positions[first:last],
                self.q_offsets[s : t + 1] - first,
                self.k_offsets[s : t + 1] - k_first,
                self.k_rows[k_first : self.k_offsets[t]],
                s,
            )


def plan(sequences: Sequence[Sequence[int]], budget_tokens: int) -> Plan:
    """The prefix forest of N token sequences in batches of at most `budget_tokens` packed tokens.

    A longer sequence gets a batch of its own; a prefix whose branches fall into two batches is
    computed in both. The batches depend on the set of sequences, not on their order.
    Raises ValueError on an empty sequence or a budget below 1."""
    lengths = np.fromiter(map(len, sequences), np.int64, count=len(sequences))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = np.fromiter(chain.from_iterable(sequences), np.int32, count=int(offsets[-1]))
    return Plan(*planner()(tokens, offsets, int(budget_tokens)), n_input_tokens=len(tokens))


@cache
def planner() -> Callable[..., tuple[np.ndarray, ...]]:
    """The C++ planner, or its Python twin with one warning when the extension is not there."""
    try:
        from leakfast._native import plan_forest
    except ImportError as error:
        from leakfast._forest_py import plan_forest

        log.warning("forest: planning in Python, slower, same plans (no C++ extension: %s)", error)
    return plan_forest
