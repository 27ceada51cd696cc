"""Log-probabilities of chosen tokens through the packed engine: at states of token sequences, and summed over continuations
that are branches of a prefix forest. Demands a loaded model; leaves what the tokens are to its callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded


def continuations(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int] | np.ndarray,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Sum of log P(token | all before it) over the last counts[i] tokens of sequence i: (N,) float64, nats.

    float32 a token, summed in float64. counts: from 1 to the sequence's length less 1. Equal to
    `log_softmax(logits.float(), -1)` of each sequence alone, gathered and added, without the logits; what sequences share
    at their beginnings is computed once a batch. Raises as passes.final_states."""
    counts = np.asarray(counts, np.int64)
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ends = [one[len(one) - n :] for one, n in zip(sequences, counts.tolist(), strict=True)]
    flat = np.fromiter((t for one in ends for t in one), np.int64, count=int(first[-1]))
    read = [one[:-1] for one in sequences]  # the last token is asked for, never read
    starts = np.fromiter(map(len, read), np.int64, count=len(read)) - counts

    def ask(batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens asked of each state (several where continuations part), and where each asked token's stands."""
        tokens = flat[first[batch.sequences] + batch.positions - starts[batch.sequences]]
        pairs, which = np.unique(np.stack([batch.rows, tokens], 1), axis=0, return_inverse=True)
        heads = np.searchsorted(pairs[:, 0], np.arange(len(batch.states) + 1))
        column = np.arange(len(pairs)) - heads[pairs[:, 0]]
        asked = np.zeros((len(batch.states), int(column.max(initial=0)) + 1), np.int64)
        asked[pairs[:, 0], column] = pairs[:, 1]
        return asked, column[which.reshape(-1)]

    sums = np.zeros(len(read))
    last = counts if len(counts) else 1
    for batch, column, found in asked_of_states(loaded, read, last, ask, budget_tokens, progress):
        sums += np.bincount(
            batch.sequences, weights=found[batch.rows, column].astype(np.float64), minlength=len(sums)
        )
    return sums


def asked_of_states(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    last: Any,
    ask: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    budget_tokens: int | None,
    progress: Progress | None,
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Batch by batch: (final states' batch, what `ask` returned beside the token ids, log-probabilities
    (R, C) float32 on the host). A batch is fetched once the next one is queued."""
    import torch

    from leakfast.forward import passes
    from leakfast.forward.attention import put
    from leakfast.forward.head import head_of

    if not len(sequences):
        return
    head = head_of(loaded)
    waiting = None
    for batch in passes.final_states(loaded, sequences, last, budget_tokens=budget_tokens, progress=progress):
        asked, more = ask(batch)
        with torch.inference_mode():
            found = head.logprobs(batch.states, put(asked, head.device))
        if waiting:
            yield waiting[0], waiting[1], waiting[2].cpu().numpy()
        waiting = batch, more, found
    yield waiting[0], waiting[1], waiting[2].cpu().numpy()
