"""Batches of like length through a decoder's own forward, for models and prompts that the packed pass does not cover: layers
that mix tokens otherwise than by attention, or rope that turns with a prompt's length. Demands a causal decoder with a list
of blocks; shares nothing between prompts, and leaves which way is taken to taken.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from leakfast.forward import packs, room
from leakfast.forward.attention import put

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Padded:
    """B distinct sequences, padded at their ends to L tokens, and whose states its R wanted rows of the B·L are. Its
    fields mean what a Pack's mean."""

    tokens: torch.Tensor  # (B, L) int64
    mask: torch.Tensor  # (B, L) int64: 1 where a token is
    rows: torch.Tensor  # (R,) int64 wanted rows of the B·L, each once
    members: np.ndarray  # (n,) int64
    counts: np.ndarray  # (n,) int64
    places: np.ndarray  # (sum(counts),) int64
    n_segments: int

    def through(self, model: Any, layers: Collection[int], take: packs.Take) -> torch.Tensor:
        """As Pack.through: (B·L, D) of the decoder's own end. Every block is run."""
        _, every = packs.stack(model)
        hooks = [every[n].register_forward_hook(partial(_taken, take, n, self.rows)) for n in layers]
        try:
            with packs.resting(model):
                ended = model(input_ids=self.tokens, attention_mask=self.mask, use_cache=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return ended.flatten(0, 1)


def _taken(take: packs.Take, layer: int, rows: torch.Tensor, module: Any, given: Any, out: Any) -> None:
    take(layer, packs.states_of(out).flatten(0, 1), rows)


def walk(
    model: Any,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    budget: int,
    run: Callable[[Padded], torch.Tensor],
    alone: bool = False,
) -> Iterator[tuple[Padded, torch.Tensor]]:
    """(batch, run(batch)) for every batch of N sequences, shorter ones first, each of at most `budget` tokens with its
    padding, or of one sequence. counts (N,) int64: last tokens of each that are wanted; alone: one length a batch.

    Out of device memory the budget is halved, with a warning; ModelError when one sequence does not fit."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(tuple(sequence), []).append(index)
    todo = sorted(groups, key=len)
    device = next(model.parameters()).device
    while todo:
        n = _fitting(todo, budget, alone)
        failed = None
        try:
            batch = _padded(todo[:n], [groups[one] for one in todo[:n]], counts, device)
            result = run(batch)
        except RuntimeError as error:
            failed = room.out_of_memory(error)
            if failed is None:
                raise
        if failed is None:
            yield batch, result
            todo = todo[n:]
            continue
        room.give_back(device)
        if n == 1:
            raise room.does_not_fit(len(todo[0]), device, failed)
        budget = max(1, n * len(todo[n - 1]) // 2)
        log.warning(
            "engine: out of memory at %d prompts; going on with at most %d tokens (%s)", n, budget, failed
        )


def _fitting(todo: list[tuple[int, ...]], budget: int, alone: bool) -> int:
    """How many of the first, shortest sequences go into one batch: at least one."""
    n = 1
    while n < len(todo) and (n + 1) * len(todo[n]) <= budget and (not alone or len(todo[n]) == len(todo[0])):
        n += 1
    return n


def _padded(
    some: list[tuple[int, ...]], members: list[list[int]], counts: np.ndarray, device: torch.device
) -> Padded:
    longest = max(map(len, some))
    tokens = np.zeros((len(some), longest), np.int64)
    mask = np.zeros((len(some), longest), np.int64)
    rows, places, every = [], [], []
    base = 0
    for row, (sequence, who) in enumerate(zip(some, members, strict=True)):
        n = len(sequence)
        tokens[row, :n], mask[row, :n] = sequence, 1
        most = int(counts[who].max())
        if not (counts[who].min() >= 1 and most <= n):
            raise ValueError("counts must lie between 1 and the sequence's length")
        rows.append(np.arange(row * longest + n - most, row * longest + n))
        for one in who:
            every.append(one)
            places.append(np.arange(base + most - counts[one], base + most))
        base += most
    return Padded(
        put(tokens, device),
        put(mask, device),
        put(np.concatenate(rows), device),
        np.array(every, np.int64),
        counts[every],
        np.concatenate(places),
        len(some),
    )
