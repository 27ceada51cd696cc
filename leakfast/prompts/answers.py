"""Which choice is right, as lists of items write it: a label, a place from 0 or from 1, the choice's text, or a one
among zeros. One reading a list, decided over all its lines. Demands questions and choices that items.py has taken out
of the lines; an answer that two readings take for different choices is refused, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

READINGS = ("label", "text", "index0", "index1", "onehot")
TOLD = {
    "label": "labels",
    "text": "texts of choices",
    "index0": "places counted from 0",
    "index1": "places counted from 1",
    "onehot": "a 1 among 0s",
}
_NUMBER = re.compile(r"[+-]?\d+(?:\.0+)?")
_BARE = re.compile(r"[(\[]?\s*([^\s()\[\].:]+)\s*[)\].:]*")  # (C)  C.  [C]  C)
_LED = re.compile(r"[(\[]?\s*([^\s()\[\].:]+)\s*[)\].:]+\s*(\S.*)", re.DOTALL)  # (C) grapes
FORCED = "answer_as"  # a line's key that names the reading of the whole list


@dataclass
class Line:
    """One line of a list. labels: one a choice; own: what the line itself gave as labels, None for A, B, C, …;
    given: key → what stands there; shape: the reading that the line's shape tells (HellaSwag's: index0)."""

    where: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    own: Sequence[Any] | None
    given: dict[str, Any] = field(default_factory=dict)
    forced: Any = None
    shape: str | None = None


@dataclass(frozen=True)
class Decided:
    """answers: a line's right label, None where it gives none; reading: in words, what was read how; faults: a
    sentence for each reason why the list cannot be read (answers are then empty)."""

    answers: tuple[str | None, ...]
    reading: str
    faults: tuple[str, ...] = ()


def decide(lines: Sequence[Line]) -> Decided:
    """The right label of every line, under one reading for each key that holds answers.

    A reading counts where it takes every answer of the key. A label in the labels' own way of writing comes before
    the others; where several are left and name different choices, the list is refused. Keys that both can be read
    must agree on every line that has both."""
    telling = [line for line in lines if line.forced is not None]
    bad = [line for line in telling if line.forced not in READINGS or line.forced != telling[0].forced]
    if bad:
        told = f"{FORCED} is {bad[0].forced!r}. One of {', '.join(READINGS)} is needed, the same for the whole list."
        return Decided((), "", (f"{bad[0].where}: {told}",))
    keys = dict.fromkeys(key for line in lines for key, value in line.given.items() if not _empty(value))
    found, faults, told, ignored = {}, [], [], []
    for key in keys:
        read = _of_key(lines, key, telling[0].forced if telling else None)
        if isinstance(read, _Why):
            ignored.append((key, read))
        else:
            reading, found[key] = read
            told.append(f"{key} read as {TOLD[reading]}")
    if ignored and (not found or any(why.ambiguous for _, why in ignored)):
        faults += [why.sentence for _, why in ignored if why.ambiguous or not found]
        return Decided((), "", tuple(faults))
    told += [f"{key} left aside, as it names no choices" for key, _ in ignored]
    answers = []
    for i, line in enumerate(lines):
        mine = {key: given[i] for key, given in found.items() if given[i] is not None}
        if len(set(mine.values())) > 1:
            said = " and ".join(f"{key} says {label}" for key, label in mine.items())
            faults.append(f"{line.where}: {said}. Correct one of them, or take it out of the list.")
        answers.append(next(iter(mine.values()), None))
    return Decided(() if faults else tuple(answers), "; ".join(told), tuple(faults))


@dataclass(frozen=True)
class _Why:
    sentence: str
    ambiguous: bool = False


def _of_key(lines: Sequence[Line], key: str, forced: str | None) -> tuple[str, list[str | None]] | _Why:
    """(reading, answers), or why the key's values cannot be read."""
    asked = [(i, line, line.given[key]) for i, line in enumerate(lines) if not _empty(line.given.get(key))]
    shapes = {line.shape for _, line, _ in asked}
    (only,) = shapes if len(shapes) == 1 else (None,)
    wanted = (forced,) if forced else (only,) if only else READINGS
    read = {r: [_READ[r](line, value) for _, line, value in asked] for r in wanted}
    whole = [r for r, labels in read.items() if None not in labels]
    if not whole:
        most = max(read, key=lambda r: sum(label is not None for label in read[r]))
        _, line, value = asked[read[most].index(None)]
        how = f" as {TOLD[most]}" if len(wanted) == 1 or any(read[most]) else ""
        return _Why(
            f"{line.where}: {key} is {_short(value)}, which cannot be read{how} (labels {', '.join(line.labels)}). "
            "All lines need one way of writing: a label, a place of a choice, or its text. Correct it, or write null "
            "where none is right."
        )
    if "label" in whole and all(_as_written(line, value) for _, line, value in asked):
        whole = ["label"]
    if {"label", "index0"} <= set(whole) and read["label"] == read["index0"]:
        whole = ["label"]  # labels that are the places from 0: nobody counts these from 1
    first = whole[0]
    for other in whole[1:]:
        apart = next((k for k in range(len(asked)) if read[first][k] != read[other][k]), None)
        if apart is not None:
            _, line, value = asked[apart]
            return _Why(
                f"{line.where}: {key} is {_short(value)}: choice {read[first][apart]} if these are {TOLD[first]}, "
                f"{read[other][apart]} if they are {TOLD[other]}, and no line of the list decides. Say which: add "
                f'"{FORCED}": "{first}" or "{FORCED}": "{other}" to the first line.',
                ambiguous=True,
            )
    answers: list[str | None] = [None] * len(lines)
    for (i, _, _), label in zip(asked, read[first], strict=True):
        answers[i] = label
    return first, answers


def _as_written(line: Line, value: Any) -> bool:
    """Whether the value is written as labels are: as a text, or as a number where the line's own labels are numbers."""
    return isinstance(value, str) or all(isinstance(label, int | float) for label in line.own or [""])


def _label(line: Line, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    number = _number(value)
    text = str(number) if number is not None and not isinstance(value, str) else str(value).strip()
    if text in line.labels:
        return text
    folded = {label.casefold(): label for label in line.labels}
    if len(folded) < len(line.labels):
        return None
    if bare := _BARE.fullmatch(text):
        return folded.get(bare[1].casefold())
    if led := _LED.fullmatch(text):
        label = folded.get(led[1].casefold())
        return label if label is not None and _text(line, led[2]) == label else None
    return None


def _text(line: Line, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    for plain in (lambda t: " ".join(t.split()), lambda t: " ".join(t.casefold().split())):
        places = [i for i, choice in enumerate(line.choices) if plain(choice) == plain(value)]
        if len(places) == 1:
            return line.labels[places[0]]
    return None


def _index(start: int) -> Callable[[Line, Any], str | None]:
    def read(line: Line, value: Any) -> str | None:
        number = _number(value)
        place = None if number is None else number - start
        return line.labels[place] if place is not None and 0 <= place < len(line.labels) else None

    return read


def _onehot(line: Line, value: Any) -> str | None:
    if not is_onehot(value) or len(value) != len(line.labels):
        return None
    return line.labels[[bool(v) for v in value].index(True)]


def is_onehot(values: Any) -> bool:
    """Whether these are a 1 among 0s, as numbers."""
    if not isinstance(values, list | tuple) or not all(isinstance(v, bool | int | float) for v in values):
        return False
    return all(v in (0, 1) for v in values) and sum(map(bool, values)) == 1


_READ: dict[str, Callable[[Line, Any], str | None]] = {
    "label": _label,
    "text": _text,
    "index0": _index(0),
    "index1": _index(1),
    "onehot": _onehot,
}


def _number(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return int(float(value))
    return None


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}…"
