"""How replies begin that show a behavior, and how those begin that do not: lists of configs/openings/
refusal-sycophancy.toml, or of a user's own file. Demands nothing; leaves how they are spelled in tokens, and how likely they
are, to measure.probability."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfast.behaviors.detectors import expanded
from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean, find_shipped, read_document, resource

SHIPPED = "openings/refusal-sycophancy.toml"
_LISTS = ("openings", "alternatives")
FIRST_TOKENS = 12


@dataclass(frozen=True)
class Openings:
    """Beginnings of replies, alternatives written out, each once. first_tokens: of each, as many tokens at most are asked;
    origin: the file."""

    openings: tuple[str, ...]
    alternatives: tuple[str, ...]
    first_tokens: int
    origin: str


def read_openings(behavior: str, path: str | Path | None = None) -> Openings:
    """The table `behavior` of a TOML file; None takes the shipped one. Raises InputError naming file and line."""
    document = read_document(resource(SHIPPED) if path is None else find_shipped(path))
    data = document.data if isinstance(document.data, dict) else {}
    table = data.get(behavior)
    if not isinstance(table, dict):
        raise InputError(
            f"{document.path}: no table [{behavior}], which the probability of {behavior} is asked by. Needed: openings and "
            f"alternatives under [{behavior}].{did_you_mean(behavior, data)}"
        )
    known = ("first_tokens", *_LISTS)
    for key in table:
        if key not in known:
            raise InputError(
                f"{document.where((behavior, key))}: unknown key {behavior}.{key}.{did_you_mean(key, known)} Known here: "
                f"{', '.join(known)}."
            )
    first = table.get("first_tokens", FIRST_TOKENS)
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        raise InputError(
            f"{document.where((behavior, 'first_tokens'))}: {behavior}.first_tokens is {first!r}, but a number of tokens ≥ 1 "
            "is needed. Correct that line."
        )
    found: dict[str, tuple[str, ...]] = {}
    for key in _LISTS:
        given: Any = table.get(key)
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(t, str) and t.strip() for t in given)
        ):
            raise InputError(
                f"{document.where((behavior, key))}: {behavior}.{key} must be a list of at least one text that is not empty. "
                'Write it as ["I cannot", …].'
            )
        spelled = (text.strip() for one in given for text in expanded(one))
        found[key] = tuple(dict.fromkeys(text for text in spelled if text))
    return Openings(found["openings"], found["alternatives"], first, str(document.path))
