"""Prompts to a prefix forest to packed batches, so that every distinct token is computed once.
Demands token ids; plans with leakfast._native, or says once that the Python twin stands in.
Leaves the forward pass to passes.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

import numpy as np

from leakfast.prompts.grid import PromptGrid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spans:
    """S spans of query rows. Span s asks with rows [q_offsets[s], q_offsets[s+1]) and attends to the
    rows k_rows[k_offsets[s]:k_offsets[s+1]], the whole path from the root to its last query: with
    bottom-right causal masking, its queries are its last keys. All indices count within the batch."""

    q_offsets: np.ndarray  # (S+1,) int64
    k_offsets: np.ndarray  # (S+1,) int64
    k_rows: np.ndarray  # (K,) int32


def end_to_end(spans: Sequence[Spans], rows: Sequence[int]) -> Spans:
    """The spans of several batches whose rows lie one batch after the other; rows: how many key rows each has."""
    firsts = np.cumsum([0, *rows])
    q_ends = np.concatenate([np.zeros(1, np.int64), *(np.diff(s.q_offsets) for s in spans)])
    k_ends = np.concatenate([np.zeros(1, np.int64), *(np.diff(s.k_offsets) for s in spans)])
    shifted = [s.k_rows + np.int32(first) for s, first in zip(spans, firsts, strict=False)]
    return Spans(np.cumsum(q_ends), np.cumsum(k_ends), np.concatenate(shifted))


@dataclass(frozen=True)
class Batch(Spans):
    """T packed tokens; each span is a segment, and its queries are rows that it computes."""

    tokens: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, counted from the root
    first_segment: int  # index of this batch's first segment in the plan

    @property
    def leaf_rows(self) -> np.ndarray:
        """(S,) int64: the row of each segment's last token."""
        return self.q_offsets[1:] - 1

    def last_rows(self, segments: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, Spans]:
        """The rows of the last counts[i] tokens of the sequence that ends in segments[i], both (M,)
        int64: (rows (R,) int64, each once and rising; places (sum(counts),) int64 of every asked token
        among them, in the order of the arguments and of position; spans of one query a row).
        Raises ValueError where a count is below 1 or beyond the sequence."""
        ends = self.k_offsets[1:][segments]
        if len(counts) and not (counts.min() >= 1 and (counts <= ends - self.k_offsets[segments]).all()):
            raise ValueError("counts must lie between 1 and the sequence's length")
        keys = _ranges(ends - counts, counts)  # places of the asked tokens in k_rows
        first = np.repeat(self.k_offsets[segments], counts)
        rows, chosen, places = np.unique(
            self.k_rows[keys].astype(np.int64), return_index=True, return_inverse=True
        )
        lengths = (keys - first)[chosen] + 1
        k_rows = self.k_rows[_ranges(first[chosen], lengths)]
        return rows, places.reshape(-1), Spans(np.arange(len(rows) + 1), _offsets(lengths), k_rows)


@dataclass(frozen=True)
class Plan:
    """The packed batches of N sequences; sequence i ends where segment `segment_of[i]` ends. Equal
    sequences share a segment. Arrays as leakfast.forward.forest_py.plan_forest describes them."""

    segment_of: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    batch_tokens: np.ndarray
    batch_segments: np.ndarray
    q_offsets: np.ndarray
    k_offsets: np.ndarray
    k_rows: np.ndarray
    n_input_tokens: int
    lengths: np.ndarray = field(repr=False)  # (N,) int64: tokens of each sequence as given

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
                self.q_offsets[s : t + 1] - first,
                self.k_offsets[s : t + 1] - k_first,
                self.k_rows[k_first : self.k_offsets[t]],
                self.tokens[first:last],
                self.positions[first:last],
                s,
            )


def plan(sequences: Sequence[Sequence[int]], budget_tokens: int) -> Plan:
    """The prefix forest of N token sequences (a list of them, or a `PromptGrid`) in batches of at most
    `budget_tokens` packed tokens.

    A longer sequence gets a batch of its own. A prefix whose branches fall into two batches is
    computed in both; so a batch ends, within its last eighth, where the least is shared with what
    follows. The batches depend on the set of sequences, not on their order.
    Raises ValueError on an empty sequence or a budget below 1."""
    tokens, lengths = _flat(sequences)
    made = planner()(tokens, _offsets(lengths), int(budget_tokens))
    return Plan(*made, n_input_tokens=len(tokens), lengths=lengths)


def lengths_of(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each of N sequences: (N,) int64."""
    if isinstance(sequences, PromptGrid):
        h, t = (
            np.fromiter(map(len, xs), np.int64, count=len(xs)) for xs in (sequences.heads, sequences.tails)
        )
        return np.add.outer(h, t).reshape(-1)
    return np.fromiter(map(len, sequences), np.int64, count=len(sequences))


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All sequences end to end (int32), and their lengths (N,) int64."""
    lengths = lengths_of(sequences)
    if isinstance(sequences, PromptGrid):
        heads, tails = ([np.array(x, np.int32) for x in xs] for xs in (sequences.heads, sequences.tails))
        pieces = [piece for head in heads for tail in tails for piece in (head, tail)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return tokens, lengths
    return np.fromiter(chain.from_iterable(sequences), np.int32, count=int(lengths.sum())), lengths


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0]+1, … (lengths[0] of them), then the next: (sum(lengths),) int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


@cache
def planner() -> Callable[..., tuple[np.ndarray, ...]]:
    """The C++ planner, or its Python twin with one warning when the extension is not there."""
    try:
        from leakfast._native import plan_forest
    except ImportError as error:
        from leakfast.forward.forest_py import plan_forest

        log.warning("forest: planning in Python, slower, same plans (no C++ extension: %s)", error)
    return plan_forest
