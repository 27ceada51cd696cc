"""Completions as a table: their texts, what of them is the answer, and their status. Demands the tokenizer that they were
drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leakfast.generation.contract import Completion, Request
from leakfast.prompts.reasoning import Read

if TYPE_CHECKING:
    import polars as pl


def to_frame(
    loaded: Any,
    prompts: Sequence[Any],
    requests: Sequence[Request],
    completions: Iterable[Completion],
    *,
    behavior: str,
    adapter: str,
    source: str | None,
    answer_tokens: int | None = None,
) -> pl.DataFrame:
    """Completions as a frame of schema `completions` (+ source, n_prompt_tokens, token_ids; + reasoning and
    n_reasoning_tokens where a model reasoned), by request and sample.

    text: the answer, which follows the last closed reasoning block. status: "unclosed-reasoning" when a block was open
    at the end (text is then the whole, an opener before it), else "empty" when only whitespace came back, else
    "truncated" when max_new_tokens ended it, else "ok". answer_tokens: longest answer, where more may be drawn for
    reasoning; a longer one is cut there, as if max_new_tokens had ended it.
    """
    import polars as pl

    from leakfast.storage import schema

    done = sorted(completions, key=lambda c: (c.request, c.sample))
    done, reads = _read(loaded.tokenizer, done, answer_tokens)
    status = [_status(one, c) for one, c in zip(reads, done, strict=True)]
    chosen = [prompts[c.request] for c in done]
    frame = pl.DataFrame(
        {
            "behavior": [behavior] * len(done),
            "adapter": [adapter] * len(done),
            "persona": [p.persona for p in chosen],
            "question": [p.question_index for p in chosen],
            "sample": [c.sample for c in done],
            "seed": [requests[c.request].seeds[c.sample] for c in done],
            "text": [one.text for one in reads],
            "n_tokens": [len(c.token_ids) for c in done],
            "finish_reason": [c.finish_reason for c in done],
            "status": status,
            "source": [source] * len(done),
            "n_prompt_tokens": [len(requests[c.request].ids) for c in done],
            "token_ids": [c.token_ids for c in done],
        },
        schema={
            **schema.columns("completions"),
            "source": pl.String(),
            "n_prompt_tokens": pl.Int32(),
            "token_ids": pl.List(pl.Int32()),
        },
    )
    if any(one.reasoning is not None for one in reads):
        frame = frame.with_columns(
            pl.Series("reasoning", [one.reasoning for one in reads], pl.String()),
            pl.Series("n_reasoning_tokens", [one.n_tokens for one in reads], pl.Int32()),
        )
    return schema.check(frame, "completions")


def _read(
    tokenizer: Any, done: list[Completion], answer_tokens: int | None
) -> tuple[list[Completion], list[Read]]:
    """Completions and what they are read as, answers that are too long cut."""
    from leakfast.prompts import reasoning, templates

    opened = bool(getattr(tokenizer, "chat_template", None)) and templates.opens_reasoning(tokenizer)

    def read(some: list[Completion]) -> list[Read]:
        ids = [c.token_ids for c in some]
        return reasoning.read(tokenizer, ids, decode(tokenizer, ids), opened=opened)

    reads = read(done)
    if answer_tokens is None:
        return done, reads
    long = [
        i
        for i, (c, one) in enumerate(zip(done, reads, strict=True))
        if not one.is_open and len(c.token_ids) - one.n_tokens > answer_tokens
    ]
    for i in long:
        ids = done[i].token_ids[: reads[i].n_tokens + answer_tokens]
        done[i] = replace(done[i], token_ids=ids, finish_reason="length")
    for i, one in zip(long, read([done[i] for i in long]), strict=True):
        reads[i] = one
    return done, reads


def _status(one: Read, completion: Completion) -> str:
    from leakfast.prompts.reasoning import UNCLOSED

    if one.is_open:
        return UNCLOSED
    if not one.text.strip():
        return "empty"
    return "truncated" if completion.finish_reason == "length" else "ok"


def decode(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of generated ids, special tokens (turn ends among them) left out, spacing untouched."""
    if not len(token_ids):
        return []
    return tokenizer.batch_decode(
        [list(ids) for ids in token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
