"""Edit distance between texts: how many characters must be put in, taken out or exchanged. Demands strings; knows
nothing of words or meaning, and folds neither case nor accents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def levenshtein(one: str, others: Sequence[str]) -> np.ndarray:
    """Edits from `one` to each of `others`: (n,) int64 (Levenshtein 1966; Wagner and Fischer 1974).

    Characters are code points; insertion, deletion and substitution cost 1 each. All others go through the table at
    once. Row i of it is

        D[i, j] = min(D[i−1, j] + 1, D[i−1, j−1] + [one_i ≠ other_j], D[i, j−1] + 1)

    and its last term, which runs along the row, is j + the running minimum of (the first two) − j."""
    lengths = np.array([len(text) for text in others], dtype=np.int64)
    width = int(lengths.max(initial=0))
    letters = np.full((len(others), width), -1, dtype=np.int64)
    for row, text in zip(letters, others, strict=True):
        row[: len(text)] = [ord(letter) for letter in text]
    place = np.arange(width + 1, dtype=np.int64)
    above = np.tile(place, (len(others), 1))
    for number, letter in enumerate(one, start=1):
        here = np.empty_like(above)
        here[:, 0] = number
        here[:, 1:] = np.minimum(above[:, 1:] + 1, above[:, :-1] + (letters != ord(letter)))
        above = np.minimum.accumulate(here - place, axis=1) + place
    return above[np.arange(len(others)), lengths]


def normalized(one: str, others: Sequence[str]) -> np.ndarray:
    """Edits over the length of the longer text: (n,) float64 from 0 (the same text) to 1; 0 for two empty texts."""
    longer = np.maximum(np.array([len(text) for text in others], dtype=np.int64), len(one))
    return levenshtein(one, others) / np.maximum(longer, 1)
