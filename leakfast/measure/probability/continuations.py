"""How a text is spelled, token for token, as the next words of a reply. Demands a tokenizer; scores nothing.

A model continues the tokens it has written. So a spelling is what the tokenizer, given the reply and the text together, puts
after the reply's own tokens. Where it would cut the reply's end otherwise (a full stop and line breaks in one token), those
tokens cannot follow the reply as it was written: the text is then spelled as it is after a letter, and the spelling counts
as recut. What a tokenizer never writes (`[Z` and `LT]` where it has `[`, `Z`, …) is left out, as are texts that go on in
the token that ends them; the probability is of the spellings alone, and so no more than that of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leakfast.behaviors.detectors import BEFORE

_LETTER = "a"  # which no tokenizer joins with white space or a bracket behind it

Spelling = tuple[int, ...]


@dataclass(frozen=True)
class Spellings:
    """Distinct spellings of a text, white space before it (detectors.BEFORE) included; no one is the beginning of another.

    start: as the first words of a reply; inside: after a letter, one for each white space, equal ones too."""

    text: str
    start: tuple[Spelling, ...]
    inside: tuple[Spelling, ...]

    @property
    def distinct(self) -> tuple[Spelling, ...]:
        """Those inside a reply, each once."""
        return tuple(dict.fromkeys(self.inside))

    @property
    def longest(self) -> int:
        """Tokens of the longest of them."""
        return max(map(len, (*self.start, *self.inside)))


def spellings(tokenizer: Any, text: str) -> Spellings:
    """The spellings of `text`. Raises ValueError for an empty one."""
    if not text:
        raise ValueError("a text of at least one character is needed")
    alone = _encoded(tokenizer, [before + text for before in BEFORE])
    letter = _encoded(tokenizer, [_LETTER])[0]
    after = _encoded(tokenizer, [_LETTER + before + text for before in BEFORE])
    inside = [
        ids[len(letter) :] if ids[: len(letter)] == letter else one
        for ids, one in zip(after, alone, strict=True)
    ]
    return Spellings(text, tuple(dict.fromkeys(alone)), tuple(inside))


def at_ends(
    tokenizer: Any, spelled: Spellings, replies: Sequence[Sequence[int]]
) -> list[tuple[tuple[Spelling, ...], int]]:
    """For each reply (its tokens, without the one that ends it) the distinct spellings after it, and how many of them are
    recut. An empty reply has those of a reply's first words."""
    known: dict[Spelling, tuple[tuple[Spelling, ...], int]] = {(): (spelled.start, 0)}
    given = [tuple(reply) for reply in replies]
    new = [reply for reply in dict.fromkeys(given) if reply]
    if new:
        said = tokenizer.batch_decode(
            [list(reply) for reply in new], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        joined = iter(_encoded(tokenizer, [one + before + spelled.text for one in said for before in BEFORE]))
        for reply in new:
            ends, recut = [], 0
            for otherwise in spelled.inside:
                ids = next(joined)
                stays = ids[: len(reply)] == reply
                recut += not stays
                ends.append(ids[len(reply) :] if stays else otherwise)
            known[reply] = tuple(dict.fromkeys(ends)), recut
    return [known[reply] for reply in given]


def _encoded(tokenizer: Any, texts: list[str]) -> list[Spelling]:
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
