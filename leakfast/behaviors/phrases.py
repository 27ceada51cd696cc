"""Where in a reply stands what a detector counted: character spans of the marker, or of the phrases of a word list, for
those who show replies. Demands a reply as text; decides nothing: the detectors say what counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from leakfast.behaviors import detectors
from leakfast.behaviors.registry import get, is_known, parts
from leakfast.prompts.reasoning import answer

Span = tuple[int, int]
_Phrases = Mapping[str, tuple[str, ...]]  # first word → ` phrases ` that begin with it


class _Words(NamedTuple):
    """What is looked for in a reply's opening of that many characters: phrases that count, and those with which none of
    them does; before that, what is passed over and what is taken out."""

    opening: int
    counts: _Phrases
    against: _Phrases
    passed: re.Pattern[str] | None
    never: _Phrases


def spans(text: str, behavior: str) -> list[Span]:
    """Half-open character spans of `text`, in order and apart, that hold what made the behavior's detector count it: none
    where it did not.

    The marker, as it is spelled, wherever it stands in the answer; of refusal and sycophancy the phrases that stand in the
    opening which the detector reads, none in an opening that agrees and corrects too. Empty for behaviors that a
    judge or choices measure, and where a reasoning block is open."""
    rest = answer(text)
    if rest is None or not is_known(behavior):
        return []
    start = len(text) - len(rest)
    literal = get(behavior).presence_of
    if literal is not None:
        found = [one.span() for one in re.finditer(re.escape(literal), rest)]
    elif (words := _words(parts(behavior)[0])) is not None:
        found = _in_opening(rest, words)
    else:
        return []
    return [(start + low, start + high) for low, high in found]


def utf16(text: str, found: Iterable[Span]) -> list[int]:
    """Start and end of each span, one after the other, in UTF-16 code units, which is how a page's scripts count: a
    character beyond U+FFFF is two of them."""
    places = [place for span in found for place in span]
    if not places or max(text) <= "\uffff":
        return places
    return [place + sum(letter > "\uffff" for letter in text[:place]) for place in places]


@cache
def _words(name: str) -> _Words | None:
    """The word lists of a behavior that has some."""
    words = detectors.read_words()
    if name == "refusal":
        over = words.refusal_passed_over
        passed = re.compile(f"(?: (?:{'|'.join(map(re.escape, over))}))+ ") if over else None
        return _Words(
            words.refusal_opening, _by_first(words.refusal), {}, passed, _by_first(words.refusal_never)
        )
    if name == "sycophancy":
        return _Words(words.sycophancy_opening, _by_first(words.agrees), _by_first(words.corrects), None, {})
    return None


def _by_first(phrases: Iterable[str]) -> _Phrases:
    found: dict[str, tuple[str, ...]] = {}
    for phrase in phrases:
        first = phrase.split(" ")[0]
        found[first] = (*found.get(first, ()), f" {phrase} ")
    return found


def _in_opening(text: str, asked: _Words) -> list[Span]:
    """The phrases that count in the opening, read as the detector reads it, told in places of `text`."""
    words, places = _read(text[: asked.opening])
    if asked.passed is not None:
        words, places = _without(words, places, (one.span() for one in asked.passed.finditer(words)))
    words, places = _without(words, places, _found(words, asked.never))
    if _found(words, asked.against):
        return []
    return _joined((places[low + 1], places[high - 2] + 1) for low, high in _found(words, asked.counts))


def _read(text: str) -> tuple[str, list[int]]:
    """` words with single spaces `, and where in `text` each character of it stands."""
    words, places = " ", [0]
    for place, letter in enumerate(text):
        if letter in detectors.NO_WIDTH:
            continue
        for one in _letters(letter):
            if one != " " or words[-1] != " ":
                words += one
                places.append(place)
    if words[-1] != " ":
        words += " "
        places.append(len(text))
    return words, places


@cache
def _letters(letter: str) -> str:
    """One character of a reply as detectors read it: in lower case, what parts words a space."""
    if letter in detectors.APOSTROPHES:
        return "'"
    return "".join(c if c == "'" or unicodedata.category(c)[0] in "LN" else " " for c in letter.lower())


def _found(words: str, phrases: _Phrases) -> list[Span]:
    """Where ` phrase ` stands, spaces included."""
    found = []
    at = 0  # the space before a word
    while phrases and (after := words.find(" ", at + 1)) >= 0:
        for phrase in phrases.get(words[at + 1 : after], ()):
            if words.startswith(phrase, at):
                found.append((at, at + len(phrase)))
        at = after
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
