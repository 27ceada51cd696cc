"""Log-probabilities of choices under personas through the packed engine: letters from one state a prompt,
full text from a forest with the choices as branches. Demands a loaded model; leaves tables to table.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.measure.asking import asked_of_states, continuations
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.items import Item
    from leakfast.prompts.personas import Persona


LETTERS, FULL_TEXT = "letters", "full-text"
SCORINGS = (LETTERS, FULL_TEXT)
# why an item has no numbers under a persona
OK, TOO_LONG, LABEL_TOKENS = "ok", "too_long", "label_tokens"


@dataclass(frozen=True)
class Scores:
    """Choices of Q items under P personas, padded to the largest number of choices C.

    logprobs: (P, Q, C) float64, nats, NaN where there is no number; n_tokens: (P, Q, C) int32, tokens that
    the sum runs over; reason: (P, Q) of OK, TOO_LONG or LABEL_TOKENS."""

    logprobs: np.ndarray
    n_tokens: np.ndarray
    reason: np.ndarray


def letters(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """log P(label | prompt) of each item's own labels as the reply's first token, in float32.

    Equal to `log_softmax(logits[-1].float())[label ids]` of each prompt alone, without the logits. A label
    that is not one token of its own after the prompt gives its item no numbers. prompts: `prompts_of` these
    personas and items, where they are there already."""

    def next_tokens(sequences: Sequence[Sequence[int]], wanted: np.ndarray) -> np.ndarray:
        logprobs = np.full(wanted.shape, np.nan)

        def ask(batch: Any) -> tuple[np.ndarray, np.ndarray]:
            asked = np.zeros((len(batch.states), wanted.shape[1]), np.int64)
            asked[batch.rows] = wanted[batch.sequences]
            return asked, batch.sequences

        for batch, places, found in asked_of_states(loaded, sequences, 1, ask, budget_tokens, progress):
            logprobs[places] = found[batch.rows]
        return logprobs

    return letters_by(next_tokens, loaded, personas, items, prompts=prompts)


def letters_by(
    next_tokens: Callable[[Sequence[Sequence[int]], np.ndarray], np.ndarray],
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    room: int = 0,
) -> Scores:
    """Scores of the letters from any source of next-token log-probabilities: (N prompts, token ids (N, C)) →
    (N, C) nats. prompts: as for `letters`; room: positions that must be left after a prompt."""
    grid = prompts_of(loaded, personas, items) if prompts is None else prompts
    ids, single = label_ids(loaded.tokenizer, items)
    shape = (len(personas), len(items), ids.shape[1])
    too_long = _lengths(grid).reshape(shape[:2]) + room > longest(loaded)
    reason = np.where(too_long, TOO_LONG, OK).astype(object)
    reason[:, ~single] = LABEL_TOKENS
    kept = np.flatnonzero(reason.reshape(-1) == OK)
    logprobs = np.full((len(grid), shape[2]), np.nan)
    if len(kept):
        sequences = grid if len(kept) == len(grid) else [grid[i] for i in kept]
        logprobs[kept] = next_tokens(sequences, ids[kept % len(items)])
    mask = np.arange(shape[2]) < np.array([len(item.labels) for item in items])[:, None]
    logprobs = np.where(mask[None], logprobs.reshape(shape), np.nan)
    n_tokens = np.broadcast_to(mask[None] & (reason == OK)[..., None], shape).astype(np.int32)
    return Scores(logprobs, n_tokens, reason)


def prompts_of(loaded: Loaded, personas: Sequence[Persona], items: Sequence[Item]) -> Sequence[list[int]]:
    """Token ids of every persona asked every item for its letter, personas outermost: P × Q prompts."""
    from leakfast.prompts import chat

    asked = [item.letters_prompt for item in items]
    return chat.render_grid(loaded.tokenizer, personas, asked, reply=True)


def full_text(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Sum of log P(token) over each choice's text as the reply to the question, float32 a token, summed in
    float64. The question is the user turn; joined as lm-evaluation-harness joins (see
    chat.render_continuations), so white space that ends the prompt counts for every choice alike."""
    from leakfast.prompts import chat

    n_choices = max((len(item.choices) for item in items), default=0)
    shape = (len(personas), len(items), n_choices)
    reason = np.full(shape[:2], OK, object)
    limit = longest(loaded)
    sequences, counts, cells = [], [], []
    rendered = chat.render_continuations(
        loaded.tokenizer, personas, [i.question for i in items], [i.choices for i in items]
    )
    for cell, choices in enumerate(rendered):
        if any(len(ids) - 1 > limit for ids, _ in choices):
            reason[divmod(cell, len(items))] = TOO_LONG
            continue
        for c, (ids, n) in enumerate(choices):
            sequences.append(ids)
            counts.append(n)
            cells.append(cell * n_choices + c)
    sums = continuations(loaded, sequences, counts, budget_tokens, progress)
    logprobs, n_tokens = np.full(int(np.prod(shape)), np.nan), np.zeros(int(np.prod(shape)), np.int32)
    logprobs[cells], n_tokens[cells] = sums, counts
    return Scores(logprobs.reshape(shape), n_tokens.reshape(shape), reason)


def label_ids(tokenizer: Any, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """(Q, C) int64 token ids of each item's labels as the first token of a reply, 0 where it has fewer, and
    (Q,) bool: whether every label of the item is one token, different from the others."""
    from leakfast.prompts import chat

    known: dict[str, list[int]] = {}
    for label in {label for item in items for label in item.labels}:
        known[label] = chat.render_training(tokenizer, None, "Which one?", label)[1][:-1]
    ids = np.zeros((len(items), max((len(item.labels) for item in items), default=0)), np.int64)
    single = np.zeros(len(items), bool)
    for q, item in enumerate(items):
        tokens = [known[label] for label in item.labels]
        single[q] = all(len(one) == 1 for one in tokens) and len({one[0] for one in tokens}) == len(tokens)
        if single[q]:
            ids[q, : len(tokens)] = [one[0] for one in tokens]
    return ids, single


def longest(loaded: Loaded) -> int:
    """Most tokens that are taken as one prompt of this model."""
    return loaded.context_tokens or 1 << 31


def _lengths(grid: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each prompt, (N,) int64, without writing joined ones out."""
    from leakfast.prompts.grid import PromptGrid

    if isinstance(grid, PromptGrid):
        heads, tails = ([len(x) for x in xs] for xs in (grid.heads, grid.tails))
        return np.add.outer(np.array(heads, np.int64), np.array(tails, np.int64)).reshape(-1)
    return np.fromiter(map(len, grid), np.int64, count=len(grid))
