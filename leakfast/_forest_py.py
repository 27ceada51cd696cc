"""The forest planner in plain Python: what csrc/forest.cpp computes, array for array, slower.
Used where the extension could not be built, and by tests as its twin. Needs numpy only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def plan_forest(tokens: np.ndarray, offsets: np.ndarray, budget: int) -> tuple[np.ndarray, ...]:
    """Packed batches of the prefix forest of N sequences.

    tokens (int32, all sequences end to end), offsets (N+1, int64), budget (tokens per batch; a
    sequence longer than that stands alone). Distinct sequences, in lexicographic order, are one
    segment each: the tokens that the sequence before it in the batch did not already bring.
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

    flat = tokens.tolist()
    ends = offsets.tolist()
    sequences = [flat[a:b] for a, b in pairwise(ends)]
    segment_of = [0] * len(sequences)
    packed: list[int] = []
    positions: list[int] = []
    batch_tokens, batch_segments, q_offsets, k_offsets = [0], [0], [0], [0]
    k_rows: list[int] = []
    path: list[int] = []
    before: list[int] = []
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[index]
        if before == sequence:
            segment_of[index] = len(q_offsets) - 2
            continue
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b), len(before)
        )
        before = sequence
        in_batch = len(packed) - batch_tokens[-1]
        if in_batch > 0 and in_batch + len(sequence) - shared > budget:
            batch_tokens.append(len(packed))
            batch_segments.append(len(q_offsets) - 1)
        start = batch_tokens[-1]
        if len(packed) == start:
            shared = 0
        path = path[:shared] + list(range(len(packed) - start, len(packed) - start + len(sequence) - shared))
        packed += sequence[shared:]
        positions += range(shared, len(sequence))
        k_rows += path
        k_offsets.append(len(k_rows))
        q_offsets.append(len(packed))
        segment_of[index] = len(q_offsets) - 2
    if sequences:
        batch_tokens.append(len(packed))
        batch_segments.append(len(q_offsets) - 1)
    return (
        np.array(segment_of, np.int64),
        np.array(packed, np.int32),
        np.array(positions, np.int32),
        np.array(batch_tokens, np.int64),
        np.array(batch_segments, np.int64),
        np.array(q_offsets, np.int64),
        np.array(k_offsets, np.int64),
        np.array(k_rows, np.int32),
    )
