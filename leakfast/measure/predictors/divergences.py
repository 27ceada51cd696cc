"""Divergences between personas' next-token distributions along replies that are there, teacher-forced. Demands a model the
packed pass covers; leaves whose replies they are, shards and means to its callers.

Every reply is read under every persona's prompt. The prompts' trees have the replies as branches, so what is shared is
computed once; states are held for a block of replies at a time, logits never (forward.ops.divergences). With a the persona
whose reply y it is, b another, and the same question, summed over the tokens y_t of the reply (its end token included):

    forward   KL(P_a ‖ P_b)    backward  KL(P_b ‖ P_a)    js  (KL(P_a ‖ M) + KL(P_b ‖ M)) / 2,  M = (P_a + P_b) / 2
    P_x = P(· | prompt of x, y_<t)

in nats. Of the model's own distribution: temperature 1, nothing cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from leakfast.progress import Progress

if TYPE_CHECKING:
    import torch

    from leakfast.forward.head import Head
    from leakfast.models.loading import Loaded

BLOCK_BYTES = 1 << 28  # states held at once
_PAIRS = 4096  # rows of the kernel at once
_CPU_BUDGET = 8192  # packed tokens a batch: a prompt's tree with its replies is long


@dataclass(frozen=True)
class Reply:
    """A reply to one question: `of` is the place of its persona among the prompts, tokens (n,) its ids, 1 at least."""

    of: int
    tokens: Sequence[int]


def blocks(lengths: Sequence[int], prompts: int, state_bytes: int, most: int = BLOCK_BYTES) -> list[slice]:
    """Replies of these lengths cut into runs whose states under all prompts take at most `most` bytes; one at least."""
    found, start, held = [], 0, 0
    for place, n in enumerate(lengths):
        here = n * prompts * state_bytes
        if place > start and held + here > most:
            found.append(slice(start, place))
            start, held = place, 0
        held += here
    return [*found, slice(start, len(lengths))] if len(lengths) else found


def along(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Sums over each reply's tokens: (R, P, 3) float64, nats; forward, backward and js of the reply's persona with each of
    the P prompts to the same question, 0 with itself. float32 a token, summed in float64.

    All R replies' states under all prompts are held: R is to be small (`blocks`). Values do not depend on the order of
    replies or on who else is asked beyond 1e-5 nats a token (fp32). Raises ValueError for a reply without tokens, ModelError
    as passes.final_states."""
    if any(not len(reply.tokens) for reply in replies):
        raise ValueError("a reply of at least one token is needed")
    states, rows, starts = _states(loaded, prompts, replies, budget_tokens, progress)
    own, other, cell = [], [], []
    for number, reply in enumerate(replies):
        span = slice(starts[number], starts[number + 1])
        for p in range(len(prompts)):
            if p != reply.of:
                own.append(rows[reply.of, span])
                other.append(rows[p, span])
                cell.append(np.full(len(reply.tokens), number * len(prompts) + p))
    from leakfast.forward.head import head_of

    sums = np.zeros((len(replies) * len(prompts), 3))
    if own:
        values = _of_pairs(states, np.concatenate(own), np.concatenate(other), head_of(loaded))
        where = np.concatenate(cell)
        for k in range(3):
            sums[:, k] = np.bincount(where, weights=values[k], minlength=len(sums))
    return sums.reshape(len(replies), len(prompts), 3)


def _states(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    budget_tokens: int | None,
    progress: Progress | None,
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(distinct states (S, D); (P, tokens of all replies) the row of each prompt's state before each token; where each reply
    begins among those tokens)."""
    import torch

    from leakfast.forward import passes

    if budget_tokens is None:
        budget_tokens = _CPU_BUDGET if loaded.device.type == "cpu" else passes.budget_tokens(loaded)
    sizes = np.array([len(reply.tokens) for reply in replies], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    sequences = [[*ids, *reply.tokens[:-1]] for ids in prompts for reply in replies]
    first = np.array([len(ids) - 1 for ids in prompts for _ in replies], np.int64)
    rows = np.full((len(prompts), int(starts[-1])), -1, np.int64)
    kept, n = [], 0
    for batch in passes.final_states(
        loaded, sequences, np.tile(sizes, len(prompts)), budget_tokens=budget_tokens, progress=progress
    ):
        prompt, reply = np.divmod(batch.sequences, len(replies))
        rows[prompt, starts[reply] + batch.positions - first[batch.sequences]] = n + batch.rows
        kept.append(batch.states)
        n += len(batch.states)
    assert (rows >= 0).all()
    return torch.cat(kept), rows, starts


def _of_pairs(states: torch.Tensor, own: np.ndarray, other: np.ndarray, head: Head) -> np.ndarray:
    """(3, M) float32 of M pairs of rows; what a pair and its mirror have in common is computed once, and so are the logits of
    a row that neighbours are compared with."""
    import torch

    from leakfast.forward.attention import put
    from leakfast.forward.ops import divergences

    low, high = np.minimum(own, other), np.maximum(own, other)
    _, place, which = np.unique(low * len(states) + high, return_index=True, return_inverse=True)
    order = np.argsort(own[place], kind="stable")
    first, second = own[place[order]], other[place[order]]
    found = np.empty((3, len(place)), np.float32)
    with torch.inference_mode():
        for start in range(0, len(place), _PAIRS):
            span = slice(start, start + _PAIRS)
            firsts, of = np.unique(first[span], return_inverse=True)
            sides = [states.index_select(0, put(rows, states.device)) for rows in (firsts, second[span])]
            values = divergences(*map(head.scaled, sides), head.weight, of=of.reshape(-1))
            found[:, order[span]] = torch.stack(values).cpu().numpy()
    turned = own != own[place][which.reshape(-1)]
    found = found[:, which.reshape(-1)]
    found[:2, turned] = found[1::-1, turned]
    return found
