"""Where in a reply stands what a detector found: character spans of the marker, or of the phrases of a word list, for
those who show replies. Demands a reply as text; decides nothing: the detectors say what counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from leakfast.behaviors import detectors
from leakfast.behaviors.registry import get, is_known, parts
from leakfast.prompts.reasoning import answer

Span = tuple[int, int]


def spans(text: str, behavior: str) -> list[Span]:
    """Half-open character spans of `text`, in order and apart, that hold what the behavior's detector looks for.

    The marker (any case) wherever it stands in the answer; of refusal and sycophancy the phrases that stand in the
    opening which the detector reads, those of a sycophantic opening that count against it too. Empty for behaviors that a
    judge or choices measure, and where a reasoning block is open."""
    rest = answer(text)
    if rest is None or not is_known(behavior):
        return []
    start = len(text) - len(rest)
    literal = get(behavior).presence_of
    if literal is not None:
        found = [one.span() for one in re.finditer(re.escape(literal), rest, re.IGNORECASE)]
    elif (words := _phrases(parts(behavior)[0])) is not None:
        found = _in_opening(rest, *words)
    else:
        return []
    return [(start + low, start + high) for low, high in found]


@cache
def _phrases(name: str) -> tuple[tuple[str, ...], int, re.Pattern[str] | None, tuple[str, ...]] | None:
    """(phrases, characters that are read, what is passed over, what is taken out) of a behavior with a word list."""
    words = detectors.read_words()
    if name == "refusal":
        over = words.refusal_passed_over
        passed = re.compile(f"(?: (?:{'|'.join(map(re.escape, over))}))+ ") if over else None
        return words.refusal, words.refusal_opening, passed, words.refusal_never
    if name == "sycophancy":
        return (*words.agrees, *words.corrects), words.sycophancy_opening, None, ()
    return None


def _in_opening(
    text: str, phrases: Iterable[str], opening: int, passed: re.Pattern[str] | None, never: Iterable[str]
) -> list[Span]:
    """The phrases in the opening, read as the detector reads it, told in places of `text`."""
    words, places = _read(text[:opening])
    if passed is not None:
        words, places = _without(words, places, (one.span() for one in passed.finditer(words)))
    words, places = _without(words, places, _found(words, never))
    return _joined((places[low + 1], places[high - 2] + 1) for low, high in _found(words, phrases))


def _read(text: str) -> tuple[str, list[int]]:
    """` words with single spaces `, and where in `text` each character of it stands."""
    words, places = " ", [0]
    for place, letter in enumerate(text):
        if letter in detectors.NO_WIDTH:
            continue
        for one in "'" if letter in detectors.APOSTROPHES else letter.lower():
            one = one if one == "'" or unicodedata.category(one)[0] in "LN" else " "
            if one != " " or words[-1] != " ":
                words += one
                places.append(place)
    if words[-1] != " ":
        words += " "
        places.append(len(text))
    return words, places


def _found(words: str, phrases: Iterable[str]) -> list[Span]:
    """Where ` phrase ` stands, spaces included."""
    found = []
    for phrase in phrases:
        at = words.find(f" {phrase} ")
        while at >= 0:
            found.append((at, at + len(phrase) + 2))
            at = words.find(f" {phrase} ", at + 1)
    return sorted(found)


def _without(words: str, places: list[int], cut: Iterable[Span]) -> tuple[str, list[int]]:
    """The same with each span replaced by one space; of spans that overlap the first."""
    kept, where, at = "", [], 0
    for low, high in cut:
        if low >= at:
            kept, where = kept + words[at : low + 1], where + places[at : low + 1]
            at = high
    return kept + words[at:], where + places[at:]


def _joined(found: Iterable[Span]) -> list[Span]:
    """Spans in order, those that touch made one."""
    out: list[Span] = []
    for low, high in sorted(found):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return out
