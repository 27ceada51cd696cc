"""The states that geometry's predictors rest on: last prompt tokens with their Gram matrices, and replies' means with and
without the persona. Demands a loaded model and replies that are there; leaves cosines to `geometry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.geometry import Centroids
from leakfast.measure import centroids
from leakfast.measure.predictors import geometry, recipes
from leakfast.measure.predictors.geometry import Measured
from leakfast.progress import Progress
from leakfast.prompts import chat

if TYPE_CHECKING:
    from leakfast.measure.predictors.request import Request
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona

HELD_BYTES = 1 << 28  # states held at once
SILENT = "no reply of at least one token"


def measured(
    loaded: Loaded,
    request: Request,
    layers: Sequence[int],
    said: Mapping[tuple[str, int], Sequence[Sequence[int]]],
    lacks: Mapping[str, str],
    known: Centroids | None = None,
    *,
    progress: Progress | None = None,
) -> Measured:
    """States of all the request's personas but those that `lacks` gives a reason for. said: (persona, question) → its
    replies' token ids without the one that ends them. known: centroids of the very same prompts, taken instead of the means
    made here (None: there are none)."""
    personas, questions = request.personas, request.questions
    people = [one for one in personas if one.name not in lacks]
    asked = request.texts
    means, grams = _prompts(loaded, people, questions, layers, progress)
    own, without, silent = _replies(loaded, people, asked, layers, said, progress)
    if known is not None:
        rows = [known.personas.index(one.name) for one in people]
        means = np.stack([known.layer(layer)[rows] for layer in layers], 1)
    there = [place for place, one in enumerate(personas) if one.name not in lacks]

    def whole(values: np.ndarray) -> np.ndarray:
        out = np.full((len(personas), *values.shape[1:]), np.nan, values.dtype)
        out[there] = values
        return out

    names = [one.name for one in personas]

    def made(values: np.ndarray) -> Centroids:
        filled = whole(values)
        at = {layer: filled[:, k] for k, layer in enumerate(layers)}
        return Centroids(names, list(layers), {"centered_on": request.centered_on()}, at)

    contrasts = whole(own - without)
    kernels = None if grams is None else whole(grams)
    found = recipes.measured(loaded, people, asked, layers, request.positions, request.statements, progress)
    at = {position: made(states) for position, states in found.at.items()}
    said = None if found.statements is None else made(found.statements)
    return Measured(
        made(means), made(own), contrasts, kernels, len(asked), lacks, silent, at, said, found.lacks
    )


def _prompts(
    loaded: Loaded,
    people: Sequence[Persona],
    questions: Any,
    layers: Sequence[int],
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(P, L, D) means of last-prompt states and (P, L, Q, Q) Grams, as many layers at a time as may be held."""
    q = len(getattr(questions, "questions", questions))
    step = max(1, HELD_BYTES // (len(people) * q * loaded.hidden_size * 4))
    means = np.empty((len(people), len(layers), loaded.hidden_size), np.float32)
    enough = q >= geometry.FEWEST_QUESTIONS
    grams = np.empty((len(people), len(layers), q, q)) if enough else None
    for first in range(0, len(layers), step):
        some = list(layers[first : first + step])
        made = centroids.compute(loaded, people, questions, some, keep_questions=True, progress=progress)
        for place, layer in enumerate(some, first):
            means[:, place] = made.layer(layer)
            if grams is not None:
                grams[:, place] = geometry.gram(made.questions[layer])
    return means, grams


def _replies(
    loaded: Loaded,
    people: Sequence[Persona],
    asked: Sequence[str],
    layers: Sequence[int],
    said: Mapping[tuple[str, int], Sequence[Sequence[int]]],
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """(P, L, D) float32 twice: mean over a persona's replies of the mean over the reply's tokens, under its own prompt and
    without a system message; each question counts alike, each of its replies alike; and who said nothing."""
    said_of = [
        [(q, list(ids)) for q in range(len(asked)) for ids in said.get((one.name, q), ()) if len(ids)]
        for one in people
    ]
    silent = {one.name: SILENT for one, mine in zip(people, said_of, strict=True) if not mine}
    bare = [chat.render(loaded.tokenizer, None, question) for question in asked]
    grid = chat.render_grid(loaded.tokenizer, people, asked)
    own = np.full((len(people), len(layers), loaded.hidden_size), np.nan, np.float32)
    without = own.copy()
    most = max(map(len, said_of), default=0)
    step = max(1, HELD_BYTES // max(1, most * len(layers) * loaded.hidden_size * 4))
    for first in range(0, len(people), step):
        span = slice(first, first + step)
        prompts = [[grid[place * len(asked) + q] for q in range(len(asked))] for place in range(len(people))]
        own[span] = _means(loaded, prompts[span], said_of[span], layers)
        without[span] = _means(loaded, [bare] * len(prompts[span]), said_of[span], layers)
        for place, mine in enumerate(prompts[span], first):
            if mine == bare:  # the same states but for rounding, of which no contrast is to be made
                without[place] = own[place]
        if progress:
            progress(min(first + step, len(people)), len(people), "replies' states")
    return own, without, silent


def _means(
    loaded: Loaded,
    prompts: Sequence[Sequence[Sequence[int]]],
    said: Sequence[Sequence[tuple[int, list[int]]]],
    layers: Sequence[int],
) -> np.ndarray:
    """(personas, L, D) float32 means of replies' states; prompts: of each persona, by question; said: (question, tokens).
    NaN for a persona without replies."""
    from leakfast.forward import passes

    sequences = [[*mine[q], *ids] for mine, some in zip(prompts, said, strict=True) for q, ids in some]
    counts = [len(ids) for some in said for _, ids in some]
    out = np.full((len(said), len(layers), loaded.hidden_size), np.nan, np.float32)
    if not sequences:
        return out
    states = passes.span_means(loaded, sequences, counts, list(layers))
    start = 0
    for place, some in enumerate(said):
        if some:
            number = np.array([q for q, _ in some])
            weight = 1 / np.bincount(number)[number]
            mine = states[start : start + len(some)].astype(np.float64)
            out[place] = np.tensordot(weight / weight.sum(), mine, 1)
        start += len(some)
    return out
