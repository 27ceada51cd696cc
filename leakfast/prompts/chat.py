"""Messages to token ids, as templates.py renders them: prompts, training rows, grids, continuations, and their hashes.
Demands a Hugging Face tokenizer with a chat template that can be measured; leaves the choice of personas and questions to
the caller."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.prompts import templates
from leakfast.prompts.grid import PromptGrid
from leakfast.prompts.rendering import configure as configure
from leakfast.prompts.rendering import rendering_of as rendering_of
from leakfast.prompts.templates import default_system as default_system
from leakfast.prompts.templates import recorded as recorded
from leakfast.prompts.templates import template_hash as template_hash
from leakfast.prompts.templates import turn_end_id as turn_end_id

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona

log = logging.getLogger(__name__)

_CROSS_CHECKS = 64  # prompts beyond the first row and column that the fast path compares in full


@dataclass(frozen=True, slots=True)
class Prompt:
    """One persona asked one question. `ids` are the prompt's token ids, generation prompt included."""

    persona: str
    question_index: int
    question: str
    ids: list[int]


def prompt_hashes(tokenizer: Any, personas: Sequence[Persona]) -> dict[str, str]:
    """Persona → 16 hex digits over the token ids of its prompt, whatever is asked: two files that name a persona alike
    and differ here were made with other system prompts, or by another template."""
    return {p.name: ids_hash(render(tokenizer, p.system, "?"))[:16] for p in personas}


def reading_of_prompts(
    tokenizer: Any, key: str, personas: Sequence[Persona], questions: Sequence[str]
) -> list[str]:
    """What a hash is to say of how a study's prompts are read (tokenizer_file.reading): every persona asked the first
    question, and every question asked of the first persona. Asked once a `key`."""
    from leakfast.prompts import tokenizer_file

    asked = [(p.system, questions[0]) for p in personas] + [(personas[0].system, q) for q in questions]
    return tokenizer_file.reading(tokenizer, key, lambda one: [render(one, *pair) for pair in asked])


def render(tokenizer: Any, system: Any, user: str, *, reply: bool = False) -> list[int]:
    """Token ids of one prompt, up to where a completion begins; with `reply`, up to where a reply that is trained or
    scored begins (the same, unless the tokenizer's rendering leaves reasoning open).

    `system` is a text, None (no system message) or TEMPLATE_DEFAULT (no system message either: what
    the template then puts there is its own business). Equal to
    `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, and to what the template writes before its own
    replies where that is more (templates.Opening). Raises ModelError when the template cannot be used, with the reason."""
    return _encode(tokenizer, templates.prompt_text(tokenizer, system, user, reply=reply))


def render_training(tokenizer: Any, system: Any, user: str, reply: str) -> tuple[list[int], list[int]]:
    """`(prompt_ids, reply_ids)`: the prompt exactly as `render(…, reply=True)` gives it, then the reply's tokens
    and the one token that ends the assistant's turn (`<|im_end|>` in ChatML); nothing follows it.

    The reply is tokenized after the prompt; where the two would merge into one token it is tokenized
    alone, because that is what a model continuing the prompt can produce."""
    prompt_text = templates.prompt_text(tokenizer, system, user, reply=True)
    reply = templates.reply_text(tokenizer, reply)
    prompt_ids = _encode(tokenizer, prompt_text)
    joint = _encode(tokenizer, prompt_text + reply)
    n = len(prompt_ids)
    reply_ids = joint[n:] if joint[:n] == prompt_ids else _encode(tokenizer, reply)
    return prompt_ids, [*reply_ids, turn_end_id(tokenizer)]


def render_documents(
    tokenizer: Any, conversations: Iterable[tuple[Any, Sequence[tuple[str, str]]]]
) -> list[list[int]]:
    """Token ids of whole conversations (system, [(user, assistant), …]), the last turn's end included:
    what a model is pre-trained on. One list of ids a conversation."""
    templates.check(tokenizer)
    texts = []
    for system, turns in conversations:
        messages = templates.messages(tokenizer, system, turns[0][0])
        for number, (user, assistant) in enumerate(turns):
            messages += [{"role": "user", "content": user}] if number else []
            messages.append({"role": "assistant", "content": assistant})
        texts.append(templates.raw_text(tokenizer, messages, generation_prompt=False))
    return _encode_all(tokenizer, texts)


def render_prompts(tokenizer: Any, personas: Sequence[Persona], questions: Sequence[str]) -> list[Prompt]:
    """Every persona asked every question, personas outermost: P × Q prompts, with the ids of
    `render_grid`."""
    asked = [(persona.name, *pair) for persona in personas for pair in enumerate(questions)]
    grid = render_grid(tokenizer, personas, questions)
    return [Prompt(*ask, ids) for ask, ids in zip(asked, grid, strict=True)]


def render_grid(
    tokenizer: Any, personas: Sequence[Persona], questions: Sequence[str], *, reply: bool = False
) -> Sequence[list[int]]:
    """Token ids of every persona asked every question, personas outermost: P × Q sequences. reply: as for `render`.

    Where a special token stands between the system and the user text, each side is tokenized once
    and the halves are joined (a `PromptGrid`, which the engine takes as it is); the first row, the
    first column and a spread of other pairs are compared with the full rendering, and any difference
    falls back to it (a list), with a word in the log."""
    templates.check(tokenizer)
    for persona in personas:
        templates.messages(tokenizer, persona.system, "x")
    systems, questions = [persona.system for persona in personas], list(questions)
    if rendering_of(tokenizer).system_role == "system":  # else no special token parts the two
        joined = _join_halves(tokenizer, systems, questions, reply)
        if joined is not None:
            return PromptGrid(*joined)
    texts = (
        templates.prompt_text(tokenizer, system, q, reply=reply) for system in systems for q in questions
    )
    return [_encode(tokenizer, text) for text in texts]


def render_continuations(
    tokenizer: Any, personas: Sequence[Persona], questions: Sequence[str], texts: Sequence[Sequence[str]]
) -> Iterator[list[tuple[list[int], int]]]:
    """For every persona asked every question, personas outermost: one (ids, n) per text of
    `texts[question]`, where the last n of `ids` are the text as the assistant's turn.

    Joined as lm-evaluation-harness joins: white space at the prompt's end belongs to the continuation, prompt
    and continuation are encoded as one string, and what lies beyond the stripped prompt's own tokens is the
    continuation. Tokenized from the last special token on, and compared with the full encoding for a spread
    of prompts; where that fails, every string is encoded whole, with a word in the log."""
    texts = [[templates.reply_text(tokenizer, text) for text in some] for some in texts]
    grid = render_grid(tokenizer, personas, questions, reply=True)
    tails = _continuation_tails(tokenizer, personas, questions, texts, grid)
    for p, persona in enumerate(personas):
        for q, question in enumerate(questions):
            if tails is None:
                text = templates.prompt_text(tokenizer, persona.system, question, reply=True)
                yield [_join_continuation(tokenizer, text, more) for more in texts[q]]
                continue
            width, joined = tails
            ids = grid[p * len(questions) + q]
            yield [([*ids[: len(ids) - width], *tail], n) for tail, n in joined[q]]


def _join_continuation(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], int]:
    stripped = prompt.rstrip()
    context, whole = _encode(tokenizer, stripped), _encode(tokenizer, prompt + text)
    more = whole[len(context) :]
    return [*context, *more], len(more)


def _continuation_tails(
    tokenizer: Any,
    personas: Sequence[Persona],
    questions: Sequence[str],
    texts: Sequence[Sequence[str]],
    grid: Sequence[list[int]],
) -> tuple[int, list[list[tuple[list[int], int]]]] | None:
    """(tokens of a prompt after its last special token, per question and text the (ids, n) that take
    their place), or None when the ends cannot be shown to be the same everywhere."""
    if not len(grid):
        return 0, [[] for _ in questions]
    first = templates.prompt_text(tokenizer, personas[0].system, questions[0], reply=True)
    specials = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len)
    cut, special = max(((at + len(s), s) for s in specials if (at := first.rfind(s)) >= 0), default=(-1, ""))
    if not special:
        log.info("chat: no special token ends the prompts; continuations are tokenized one by one")
        return None
    end = first[cut:]
    (special_id, *more) = _encode(tokenizer, special)
    own, context = (_encode(tokenizer, special + text) for text in (end, end.rstrip()))
    width = len(own) - 1
    sound = not more and own[:1] == context[:1] == [special_id]
    sound &= all(ids[len(ids) - len(own) :] == own for ids in grid)
    flat = _encode_all(tokenizer, [special + end + text for one in texts for text in one])
    pieces = iter(flat)
    joined = []
    for one in texts:
        parts = [next(pieces)[len(context) :] for _ in one]
        joined.append([([*context[1:], *part], len(part)) for part in parts])
    for i in range(min(_CROSS_CHECKS, len(grid)) if sound else 0):
        p, q = divmod(i * len(grid) // min(_CROSS_CHECKS, len(grid)), len(questions))
        text = templates.prompt_text(tokenizer, personas[p].system, questions[q], reply=True)
        ids = grid[p * len(questions) + q]
        for more_text, (tail, n) in zip(texts[q], joined[q], strict=True):
            sound &= ([*ids[: len(ids) - width], *tail], n) == _join_continuation(tokenizer, text, more_text)
    if not sound:
        log.warning("chat: joined continuations differ from the full encoding; they are tokenized one by one")
        return None
    return width, joined


def collisions(tokenizer: Any, personas: Iterable[Persona]) -> list[list[str]]:
    """Groups of two or more persona names whose rendered token ids are equal, in the given order."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for persona in personas:
        groups.setdefault(tuple(render(tokenizer, persona.system, templates.PROBE)), []).append(persona.name)
    return [names for names in groups.values() if len(names) > 1]


def ids_hash(ids: Iterable[int]) -> str:
    """SHA-256 (hex) of token ids as little-endian int32."""
    ids = list(ids)
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _join_halves(
    tokenizer: Any, systems: list[Any], questions: list[str], reply: bool
) -> tuple[list[list[int]], list[list[int]]] | None:
    """Ids of each persona's prefix and each question's tail, or None when the halves cannot be
    shown to join into the full rendering."""
    if not systems or not questions:
        return [[] for _ in systems], [[] for _ in questions]
    specials = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len)

    def full(row: int, column: int) -> str:
        return templates.prompt_text(tokenizer, systems[row], questions[column], reply=reply)

    def boundary(text: str, question: str) -> tuple[int, str]:
        """End and text of the last special token before the question; (-1, "") if there is none."""
        start = text.rfind(question.strip())
        ends = [(at + len(s), s) for s in specials if (at := text.rfind(s, 0, max(start, 0))) >= 0]
        return max(ends, default=(-1, ""))

    first_row = [full(0, column) for column in range(len(questions))]
    first_column = [first_row[0], *(full(row, 0) for row in range(1, len(systems)))]
    cuts = [boundary(text, questions[0]) for text in first_column]
    tail_cuts = [boundary(text, question) for text, question in zip(first_row, questions, strict=True)]
    special = cuts[0][1]
    if not special or {s for _, s in (*cuts, *tail_cuts)} != {special}:
        log.info("chat: no special token parts system and user text; prompts are tokenized one by one")
        return None

    prefixes = [text[:cut] for text, (cut, _) in zip(first_column, cuts, strict=True)]
    tails = [text[cut:] for text, (cut, _) in zip(first_row, tail_cuts, strict=True)]
    prefix_ids = _encode_all(tokenizer, prefixes)
    (special_id, *more) = _encode(tokenizer, special)
    tail_ids = _encode_all(tokenizer, [special + tail for tail in tails])
    sound = not more and all(ids[:1] == [special_id] for ids in tail_ids)
    tail_ids = [ids[1:] for ids in tail_ids]

    pairs = {(row, 0) for row in range(len(systems))} | {(0, column) for column in range(len(questions))}
    area = len(systems) * len(questions)
    pairs |= {divmod(i * area // _CROSS_CHECKS, len(questions)) for i in range(_CROSS_CHECKS)}
    picked = sorted(pairs) if sound else []
    texts = [
        first_row[column] if row == 0 else first_column[row] if column == 0 else full(row, column)
        for row, column in picked
    ]
    for (row, column), text, ids in zip(picked, texts, _encode_all(tokenizer, texts), strict=True):
        sound &= text == prefixes[row] + tails[column] and ids == prefix_ids[row] + tail_ids[column]
    if not sound:
        log.warning("chat: joined halves differ from the full rendering; prompts are tokenized one by one")
        return None
    return prefix_ids, tail_ids
