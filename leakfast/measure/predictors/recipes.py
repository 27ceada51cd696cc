"""Other ways to take a persona's state than at the prompt's last token: at chosen positions of the prompt, and as the
difference between "I am X" and "I am not X". Demands a loaded model; leaves cosines to `geometry`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.progress import Progress
from leakfast.prompts import chat, positions

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona

ASKED = "Who are you?"  # what a statement answers
NO_STATEMENT = "a system prompt that does not begin with 'You are …'"
_SAID = ("I am X", "I am not X")  # of no position's name
_FIRST = re.compile(
    r"\s*You(?: are|['’]re) (?!not\b)(.+?)(?:(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bSt)[.!?]+(?=\s|$)|\n|$)"
)
_MINE = {"your": "my", "yours": "mine", "yourself": "myself"}


@dataclass(frozen=True)
class Recipes:
    """Of P personas at L layers, NaN where there is none. at: position → (P, L, D) float32, mean over questions of the states
    there; statements: (P, L, D) float32, the state at the end of "I am X." less that of "I am not X.", None where not asked.
    lacks: position or "statements" → persona → why it has none."""

    at: Mapping[str | int, np.ndarray]
    statements: np.ndarray | None
    lacks: Mapping[str | int, Mapping[str, str]]


def statement(prompt: str | None) -> tuple[str, str] | None:
    """("I am X.", "I am not X.") of a system prompt that begins "You are X", up to the end of that sentence and in the first
    person; None for any other."""
    found = _FIRST.match(prompt or "")
    if not found:
        return None
    said = re.sub(r"\b(your|yours|yourself)\b", lambda m: _MINE[m[1]], found[1].strip())
    said = re.sub(r"\byou are\b", "I am", said)
    said = re.sub(r"\byou(?= [a-z])", "I", said)
    said = re.sub(r"\byou\b", "me", said)
    return f"I am {said}.", f"I am not {said}."


def measured(
    loaded: Loaded,
    people: Sequence[Persona],
    questions: Sequence[str],
    layers: Sequence[int],
    at: Sequence[str | int],
    statements: bool,
    progress: Progress | None = None,
) -> Recipes:
    """States by all recipes in one pass; a persona one of whose prompts has no such position has none of it."""
    from leakfast.forward import passes

    sequences: list[Sequence[int]] = []
    segments: list[int] = []
    keys: dict[tuple[Any, str], int] = {}
    lacks: dict[str | int, dict[str, str]] = {}

    def add(recipe: Any, name: str, ids: Sequence[int]) -> None:
        sequences.append(ids)
        segments.append(keys.setdefault((recipe, name), len(keys)))

    grid = chat.render_grid(loaded.tokenizer, people, questions) if at else ()
    lacks |= {position: {} for position in at}
    for p, one in enumerate(people if at else ()):
        each = [positions.indices(loaded.tokenizer, one.system, text, at) for text in questions]
        for position, found in zip(at, zip(*each, strict=True), strict=True):
            if missing := [why for why in found if isinstance(why, str)]:
                lacks[position][one.name] = missing[0]
                continue
            for q, last in enumerate(found):
                add(position, one.name, grid[p * len(questions) + q][: int(last) + 1])
    if statements:
        lacks["statements"] = {}
        for one in people:
            both = statement(one.prompt)
            if both is None:
                lacks["statements"][one.name] = NO_STATEMENT
                continue
            for said, text in zip(_SAID, both, strict=True):
                prompt, reply = chat.render_training(loaded.tokenizer, None, ASKED, text)
                add(said, one.name, [*prompt, *reply[:-1]])

    shape = (len(people), len(layers), loaded.hidden_size)
    states: dict[Any, np.ndarray] = {recipe: np.full(shape, np.nan, np.float32) for recipe in (*at, *_SAID)}
    if sequences:
        sums, _ = passes.last_token_sums(loaded, sequences, list(layers), segments, progress=progress)
        means = sums / np.bincount(segments)[:, None].astype(np.float32)
        row = {one.name: p for p, one in enumerate(people)}
        for (recipe, name), segment in keys.items():
            states[recipe][row[name]] = means[:, segment]
    return Recipes(
        {position: states[position] for position in at},
        states[_SAID[0]] - states[_SAID[1]] if statements else None,
        lacks,
    )
