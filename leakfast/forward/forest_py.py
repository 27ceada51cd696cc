"""The forest planner in plain Python: what csrc/forest.cpp computes, array for array, slower.
Used where the extension could not be built, and by tests as its twin. Needs numpy only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def plan_forest(tokens: np.ndarray, offsets: np.ndarray, budget: int) -> tuple[np.ndarray, ...]:
    """Packed batches of the prefix forest of N sequences.

    tokens (int32, all sequences end to end), offsets (N+1, int64), budget (tokens per batch; a
    sequence longer than that stands alone). Distinct sequences, in lexicographic order, are one
    segment each: the tokens that the sequence before it in the batch did not already bring. A full
    batch ends, within the last eighth of the budget, where the next sequence shares least with it.
    Returns, with T packed tokens, S segments, B batches:
    segment_of (N, int64), tokens (T, int32), positions (T, int32), batch_tokens (B+1, int64),
    batch_segments (B+1, int64), q_offsets (S+1, int64), k_offsets (S+1, int64) and
    k_rows (int32: each segment's path from the root, as rows within its batch).
    Raises ValueError on an empty sequence, offsets that do not fit, or budget < 1."""
    if tokens.ndim != 1 or offsets.ndim != 1 or not len(offsets):
        raise ValueError("tokens and offsets must have one dimension, offsets at least one entry")
    if budget < 1:
        raise ValueError("budget must be at least 1 token")
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError("offsets must start at 0 and end at the number of tokens")
    empty = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(empty):
        raise ValueError(f"sequence {empty[0]} is empty")

    distinct, shared, segment_of = _distinct(tokens.tolist(), offsets.tolist())
    packed: list[int] = []
    positions: list[int] = []
    batch_tokens, batch_segments, q_offsets, k_offsets = [0], [0], [0], [0]
    k_rows: list[int] = []
    first = 0
    while first < len(distinct):
        end = _batch_end(distinct, shared, first, budget)
        start = len(packed)
        path: list[int] = []
        for s in range(first, end):
            keep = shared[s] if s > first else 0
            at = len(packed) - start
            path = path[:keep] + list(range(at, at + len(distinct[s]) - keep))
            packed += distinct[s][keep:]
            positions += range(keep, len(distinct[s]))
            k_rows += path
            k_offsets.append(len(k_rows))
            q_offsets.append(len(packed))
        batch_tokens.append(len(packed))
        batch_segments.append(end)
        first = end
    offsets_of = (batch_tokens, batch_segments, q_offsets, k_offsets)
    return (
        np.array(segment_of, np.int64),
        *(np.array(found, np.int32) for found in (packed, positions)),
        *(np.array(found, np.int64) for found in offsets_of),
        np.array(k_rows, np.int32),
    )


def _distinct(flat: list[int], ends: list[int]) -> tuple[list[list[int]], list[int], list[int]]:
    """The distinct sequences in order, how many leading tokens each shares with the one before it, and which of them
    each sequence is."""
    sequences = [flat[a:b] for a, b in pairwise(ends)]
    distinct: list[list[int]] = []
    shared: list[int] = []
    which = [0] * len(sequences)
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[index]
        if not distinct or distinct[-1] != sequence:
            before = distinct[-1] if distinct else []
            pairs = enumerate(zip(before, sequence, strict=False))
            shared.append(next((i for i, (a, b) in pairs if a != b), len(before)))
            distinct.append(sequence)
        which[index] = len(distinct) - 1
    return distinct, shared, which


def _batch_end(distinct: list[list[int]], shared: list[int], first: int, budget: int) -> int:
    """One past the last of the distinct sequences in the batch that begins at `first`."""
    cost, end = len(distinct[first]), first + 1
    costs = [cost]  # tokens of the batch if it ended before first + 1, first + 2, …
    while end < len(distinct) and cost + len(distinct[end]) - shared[end] <= budget:
        cost += len(distinct[end]) - shared[end]
        costs.append(cost)
        end += 1
    if end == len(distinct):
        return end
    near = [c for c in range(first + 1, end) if costs[c - first - 1] >= budget - budget // 8]
    return min([*near, end], key=lambda c: (shared[c], -c))
