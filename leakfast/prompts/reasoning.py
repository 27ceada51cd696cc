"""Reasoning blocks: where one ends and the answer begins, in token ids, in texts, and in columns of texts. Demands the
known pairs of marks below (the templates that write them are named); leaves statuses to those who store completions."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

# what opens a block, and what closes it: the answer follows the last closer
PAIRS = (
    # DeepSeek R1 and V3, Qwen3 and later, GLM 4.5, Nemotron 3, LFM 2.5, Hunyuan, SmolLM3
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    (" to=self<|message|>", " to=user<|message|>"),  # Muse Glimmer
)
UNCLOSED = "unclosed-reasoning"  # status of a completion that ended inside a block
_ANYWHERE = [opener for opener, _ in PAIRS if "|" in opener]  # of special tokens, which no answer talks about
_CLOSERS = re.compile("|".join(re.escape(closer) for _, closer in PAIRS))
_OPENERS = re.compile(
    r"(?m)^\s*(?:"
    + "|".join(re.escape(opener) for opener, _ in PAIRS if opener not in _ANYWHERE)
    + ")|"
    + "|".join(map(re.escape, _ANYWHERE))
)


@dataclass(frozen=True)
class Read:
    """A completion as detectors and judges are to read it. text: the answer, what follows the last closed block; of an
    open one the whole, beginning with an opener so that it says so itself. reasoning: what stood before the answer, None
    where nothing did. n_tokens: tokens of that; is_open: it ended inside a block."""

    text: str
    reasoning: str | None = None
    n_tokens: int = 0
    is_open: bool = False


def answer(text: str) -> str | None:
    """What follows the last closed block of a text, the whole where there is none; None where a block is open at the end
    (an opener that begins a line, or is made of special tokens, and no closer after it)."""
    closed = _last_closed(text)
    rest = text[closed:].lstrip() if closed else text
    return None if _OPENERS.search(rest) else rest


def answers(text: pl.Expr) -> pl.Expr:
    """`answer` of a column: null for null, and where a block is open at the end."""
    import polars as pl

    closed = text.str.contains_any([closer for _, closer in PAIRS])
    rest = pl.when(closed).then(text.str.replace(rf"(?s)^.*(?:{_CLOSERS.pattern})\s*", "")).otherwise(text)
    return pl.when(~rest.str.contains(_OPENERS.pattern)).then(rest)


def read(
    tokenizer: Any, token_ids: Sequence[Sequence[int]], texts: Sequence[str], *, opened: bool = False
) -> list[Read]:
    """Completions as they are to be read. texts: decoded without special tokens, which is where most marks would be lost:
    where the tokenizer has marks of special tokens, blocks are found in what the ids decode to with them. opened: the
    prompt left a block open."""
    marked = _has_special_marks(tokenizer)
    return [
        _read(tokenizer, list(ids), text, marked, opened)
        if opened or marked or _CLOSERS.search(text) or _OPENERS.search(text)
        else Read(text)
        for ids, text in zip(token_ids, texts, strict=True)
    ]


def _read(tokenizer: Any, ids: list[int], text: str, marked: bool, opened: bool) -> Read:
    raw = _text(tokenizer, ids, marked) if marked else text
    closed = _last_closed(raw)
    rest = raw[closed:]
    if (opened and not closed) or _OPENERS.search(rest):
        shown = text if _OPENERS.match(text) else f"{PAIRS[0][0]}\n{text}"
        return Read(shown, text, len(ids), True)
    if not closed:
        return Read(text)
    cut = _tokens_up_to_closer(tokenizer, ids, marked)
    mine = _text(tokenizer, ids[cut:], False) if marked else rest
    return Read(mine.lstrip(), _text(tokenizer, ids[:cut], False), cut)


def _last_closed(text: str) -> int:
    """Where the last closer ends, 0 where there is none."""
    return max((found.end() for found in _CLOSERS.finditer(text)), default=0)


_marks: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _has_special_marks(tokenizer: Any) -> bool:
    """Whether a mark holds a token that decoding leaves out as special."""
    if tokenizer not in _marks:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        _marks[tokenizer] = any(token in mark for token in special for pair in PAIRS for mark in pair)
    return _marks[tokenizer]


def _text(tokenizer: Any, ids: Sequence[int], with_special: bool) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=not with_special, clean_up_tokenization_spaces=False
    )


def _tokens_up_to_closer(tokenizer: Any, ids: Sequence[int], with_special: bool) -> int:
    """The fewest tokens whose text holds the last closer."""
    closers = len(_CLOSERS.findall(_text(tokenizer, ids, with_special)))
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(_CLOSERS.findall(_text(tokenizer, ids[:middle], with_special))) >= closers:
            high = middle
        else:
            low = middle + 1
    return low
