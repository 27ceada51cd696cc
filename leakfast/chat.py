"""Messages to token ids: the only place that renders a chat template.
Demands a Hugging Face tokenizer whose template takes a system message and renders the same text
every time; leaves the choice of personas and questions to the caller."""

from __future__ import annotations

import hashlib
import logging
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import ModelError
from leakfast.forest import Joined
from leakfast.personas import TEMPLATE_DEFAULT

if TYPE_CHECKING:
    from datetime import date

    from leakfast.personas import Persona

log = logging.getLogger(__name__)

PINNED_DATE = (2024, 7, 26)  # templates that print today's date are given this one instead
_PROBE = "Zq7 what is asked here?"
_ANSWER = "Zq7 what is answered here."
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
    from leakfast import tokenizer_file

    asked = [(p.system, questions[0]) for p in personas] + [(personas[0].system, q) for q in questions]
    return tokenizer_file.reading(tokenizer, key, lambda one: [render(one, *pair) for pair in asked])


def render(tokenizer: Any, system: Any, user: str) -> list[int]:
    """Token ids of one prompt, up to and including the generation prompt.

    `system` is a text, None (no system message) or TEMPLATE_DEFAULT (no system message either: what
    the template then puts there is its own business). Equal to
    `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
    Raises ModelError when the template cannot be used, with the reason."""
    _check_template(tokenizer)
    return _encode(tokenizer, _render_text(tokenizer, _messages(system, user)))


def render_training(tokenizer: Any, system: Any, user: str, reply: str) -> tuple[list[int], list[int]]:
    """`(prompt_ids, reply_ids)`: the prompt exactly as `render` gives it, then the reply's tokens
    and the one token that ends the assistant's turn (`<|im_end|>` in ChatML); nothing follows it.

    The reply is tokenized after the prompt; where the two would merge into one token it is tokenized
    alone, because that is what a model continuing the prompt can produce."""
    _check_template(tokenizer)
    prompt_text = _render_text(tokenizer, _messages(system, user))
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
    _check_template(tokenizer)
    texts = []
    for system, turns in conversations:
        messages = _messages(system, turns[0][0])[:-1]
        for user, assistant in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        texts.append(_render_text(tokenizer, messages, generation_prompt=False))
    return _encode_all(tokenizer, texts)


def turn_end_id(tokenizer: Any) -> int:
    """Id of the special token with which the template ends an assistant's turn."""
    _check_template(tokenizer)
    messages = [*_messages(None, _PROBE), {"role": "assistant", "content": _ANSWER}]
    text = _render_text(tokenizer, messages, generation_prompt=False)
    rest = text[text.rfind(_ANSWER) + len(_ANSWER) :] if _ANSWER in text else ""
    ids = _encode(tokenizer, rest.lstrip())
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise _refused(
            tokenizer,
            f"after an assistant's reply it writes {rest[:20]!r}, which does not begin with a special token",
            "a template that ends a reply with an end-of-turn token",
        )
    return ids[0]


def render_prompts(tokenizer: Any, personas: Sequence[Persona], questions: Sequence[str]) -> list[Prompt]:
    """Every persona asked every question, personas outermost: P × Q prompts, with the ids of
    `render_grid`."""
    asked = [(persona.name, *pair) for persona in personas for pair in enumerate(questions)]
    grid = render_grid(tokenizer, personas, questions)
    return [Prompt(*ask, ids) for ask, ids in zip(asked, grid, strict=True)]


def render_grid(tokenizer: Any, personas: Sequence[Persona], questions: Sequence[str]) -> Sequence[list[int]]:
    """Token ids of every persona asked every question, personas outermost: P × Q sequences.

    Where a special token stands between the system and the user text, each side is tokenized once
    and the halves are joined (a `forest.Joined`, which the engine takes as it is); the first row, the
    first column and a spread of other pairs are compared with the full rendering, and any difference
    falls back to it (a list), with a word in the log."""
    _check_template(tokenizer)
    for persona in personas:
        _messages(persona.system, "x")
    systems, questions = [persona.system for persona in personas], list(questions)
    joined = _join_halves(tokenizer, systems, questions)
    if joined is not None:
        return Joined(*joined)
    texts = (_render_text(tokenizer, _messages(system, q)) for system in systems for q in questions)
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
    grid = render_grid(tokenizer, personas, questions)
    tails = _continuation_tails(tokenizer, personas, questions, texts, grid)
    for p, persona in enumerate(personas):
        for q, question in enumerate(questions):
            if tails is None:
                text = _render_text(tokenizer, _messages(persona.system, question))
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
    first = _render_text(tokenizer, _messages(personas[0].system, questions[0]))
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
        text = _render_text(tokenizer, _messages(personas[p].system, questions[q]))
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
        groups.setdefault(tuple(render(tokenizer, persona.system, _PROBE)), []).append(persona.name)
    return [names for names in groups.values() if len(names) > 1]


def default_system(tokenizer: Any) -> str | None:
    """What the template says as the system message when a conversation has none; None if it says nothing."""
    _check_template(tokenizer)
    mark = "Zq7 who speaks here."
    before, _, after = _render_text(tokenizer, _messages(mark, _PROBE)).partition(mark)
    text = _render_text(tokenizer, _messages(None, _PROBE))
    if not (text.startswith(before) and text.endswith(after)) or len(text) < len(before) + len(after):
        return None
    return text[len(before) : len(text) - len(after)]


def ids_hash(ids: Iterable[int]) -> str:
    """SHA-256 (hex) of token ids as little-endian int32."""
    ids = list(ids)
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of the chat template's text."""
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()


def _messages(system: Any, user: str) -> list[dict[str, str]]:
    if not user.strip():
        raise ValueError("a prompt needs a user text that is not empty")
    if system is None or system is TEMPLATE_DEFAULT:
        return [{"role": "user", "content": user}]
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"system must be a text, None or TEMPLATE_DEFAULT, not {system!r}")
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _template(tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"chat: the tokenizer of {_name(tokenizer)} has no chat template, but leakfast talks to chat "
            "models. Use its instruction-tuned version, or save a chat_template.jinja beside the tokenizer."
        )
    return tokenizer.get_chat_template()


def _render_text(tokenizer: Any, messages: list[dict[str, str]], generation_prompt: bool = True) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, strftime_now=_pinned_date
        )
    except TemplateError as error:
        roles = " → ".join(message["role"] for message in messages)
        raise _refused(
            tokenizer, f"it refuses the roles {roles}: {error}", "a template that takes a system message"
        ) from error


def _pinned_date(pattern: str) -> str:
    return _date().strftime(pattern)


def _date() -> date:
    from datetime import date

    return date(*PINNED_DATE)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


_checked: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _check_template(tokenizer: Any) -> None:
    """Once per tokenizer and template: a system text and a user text must both reach the model,
    and two renderings must be equal."""
    template = _template(tokenizer)
    if _checked.get(tokenizer) == template:
        return
    system = "Zq7 who speaks here."
    text = _render_text(tokenizer, _messages(system, _PROBE))
    if system not in text:
        raise _refused(tokenizer, "it drops the system message", "a template that has a system role")
    if _PROBE not in text:
        raise _refused(tokenizer, "it drops the user's message", "a template that prints it as it is")
    if text != _render_text(tokenizer, _messages(system, _PROBE)):
        raise _refused(
            tokenizer, "it renders one conversation in two ways", "a template without chance in it"
        )
    if "strftime_now" in template:
        log.warning(
            "chat: the template of %s prints today's date; it is given %s always", _name(tokenizer), _date()
        )
    _checked[tokenizer] = template


def _refused(tokenizer: Any, given: str, needed: str) -> ModelError:
    return ModelError(
        f"chat: the chat template of {_name(tokenizer)} cannot be used: {given}. Needed: {needed}. "
        "Use another model, or put a chat_template.jinja of your own into a local copy of it."
    )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "this model"


def _join_halves(
    tokenizer: Any, systems: list[Any], questions: list[str]
) -> tuple[list[list[int]], list[list[int]]] | None:
    """Ids of each persona's prefix and each question's tail, or None when the halves cannot be
    shown to join into the full rendering."""
    if not systems or not questions:
        return [[] for _ in systems], [[] for _ in questions]
    specials = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len)

    def full(row: int, column: int) -> str:
        return _render_text(tokenizer, _messages(systems[row], questions[column]))

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
