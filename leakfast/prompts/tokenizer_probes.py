"""What tells two readings of a text apart: probing texts, and components as plain data. Demands the tokenizers library's
objects; leaves it to tokenizer_file.py what to do about a difference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROBES = (  # short ones first: the first that differs is shown
    "Hello, world!",
    "\n   x",
    "it's 12 a.m.",
    "def f(a, b):\n    if a:\n        return b\n\n    return [a for a in b]\n",
    "\n   x\n      y\n\tz\n\t\tw",
    "class A:\r\n\tdef g(self):\r\n\t\tpass\r\n",
    "  two before",
    "one  two   three    four     five",
    "after two  ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\r\n\r\n",
    "\t",
    " \n \n",
    "a\n\nb\n \nc",
    "a\u00a0b\u2003c\u200bd\u3000e",
    "\ufefffirst",
    "x\u0085y\u2028z",
    "1 12 123 1234 12345 1234567.89",
    "3.14e-10 0x1F 2nd 4x4 10,000",
    "it's we're I'll they'd can't you've I'm IT'S WE'RE",
    "isn\u2019t \u201cquoted\u201d \u2026 \u2014 \u2013",
    "Grüße aus Köln, Ærøskøbing, naïve café",
    "cafe\u0301 e\u0300 \ufb01 \u212b Å",
    "Привет, как дела?",
    "你好,世界。今天天气很好。",
    "こんにちは 世界",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "한국어 문장",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 ok",
    "∑∫√ ≤ ≥ → ½ ²",
    "snake_case camelCase PascalCase kebab-case CONSTANT",
    '{"key": [1, 2, {"a": null}], "b": "c\\n"}',
    "<div class='x'>&nbsp;</div> <s>gone</s> <unk> <pad> </s>",
    "https://example.org/a?b=c&d=e#f me@example.org",
    "`code` ```python\nx = 1\n``` **bold** # title\n- item\n  - sub",
    "A. one\nB. two\nC. three\nD. four\nAnswer:",
    "wait...what?!?! (yes) [no] {maybe} <x>",
    "[ZLT] ※ §§ ¤",
)
_WORDS = 384  # entries of the vocabulary that are read as texts, and decoded among others
_IMMATERIAL = {"trim_offsets"}  # moves the offsets of tokens, not the tokens


@dataclass(frozen=True)
class Difference:
    """Where two readings part. part: the components ("pre-tokenizer", …); text: a probe that they read differently,
    with the class's ids and the file's; equal ids were decoded otherwise."""

    part: str
    text: str = ""
    by_class: Sequence[int] = ()
    by_file: Sequence[int] = ()

    def __str__(self) -> str:
        if not self.text:
            return self.part
        if self.by_class == self.by_file:
            return f"{self.part}: ids {_few(self.by_file)} are not {self.text[:24]!r}"
        return f"{self.part}: {self.text[:24]!r} is {_few(self.by_class)} by the class, {_few(self.by_file)} by the file"


def _few(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")


def canonical(component: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as plain steps, without what moves no token."""
    if component is None:
        return []
    plain = _plain(json.loads(component.__getstate__()))
    steps = plain if isinstance(plain, list) else [plain]
    if type(component).__module__.endswith(".decoders"):
        # a byte-level one knows bytes alone, whatever else it says
        steps = [{"type": "ByteLevel"} if step["type"] == "ByteLevel" else step for step in steps]
    return steps


def _plain(part: Any) -> Any:
    if not isinstance(part, dict):
        return [_plain(one) for one in part] if isinstance(part, list) else part
    inside = next((part[k] for k in ("normalizers", "pretokenizers", "decoders") if k in part), None)
    if part.get("type") == "Sequence" and inside is not None:  # one inside another is the same as its steps
        steps = [_plain(one) for one in inside]
        return [s for step in steps for s in (step if isinstance(step, list) else [step])]
    return {k: _plain(v) for k, v in part.items() if k not in _IMMATERIAL}


def prefixes(steps: list[dict[str, Any]]) -> bool:
    """Whether one of a component's steps puts a space before a text."""
    return any(
        step["type"] == "Prepend"
        or step.get("prepend_scheme", "never") != "never"
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space") is True)
        for step in steps
    )


def first_difference(tokenizer: Any, own: Any) -> tuple[str, list[int], list[int]] | None:
    """(text, ids, the file's ids) of the first probe that `tokenizer` reads or writes otherwise than `own`: the probes,
    the file's special tokens in text, entries of its vocabulary."""
    vocabulary = own.get_vocab_size(with_added_tokens=False)
    some = range(0, vocabulary, max(1, vocabulary // _WORDS))
    special = [t.content for _, t in sorted(own.get_added_tokens_decoder().items())][:16]
    texts = [*PROBES, *(f"a {token} b\n{token}\n  c{token}d" for token in special)]
    texts += [word for word in own.decode_batch([[i] for i in some], skip_special_tokens=False) if word]
    mine = tokenizer(texts, add_special_tokens=False)["input_ids"]
    its = [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=False)]
    for text, ids, wanted in zip(texts, mine, its, strict=True):
        if ids != wanted:
            return text, ids, wanted
    told = [*its, *(ids[1:] for ids in its[: len(PROBES)] if len(ids) > 1), list(some)]
    for skip in (False, True):
        spelled = tokenizer.batch_decode(told, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        its = own.decode_batch(told, skip_special_tokens=skip)
        for ids, text, wanted in zip(told, spelled, its, strict=True):
            if text != wanted:
                return text, ids, ids
    return None
