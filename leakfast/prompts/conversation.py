"""What stands around a question: turns before it, and the beginning of the reply. Demands nothing heavy; leaves rendering to
templates.py, and files of questions to questions.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from leakfast.errors import InputError

Turns = tuple[tuple[str, str], ...]  # (user, assistant), in order


class Question(str):
    """The text of a question, with what stands around it wherever a prompt is rendered; without either it is a plain text.

    turns: (user, assistant) turns before it, after the system message. prefill: how the reply begins; its tokens end the
    prompt, and a completion is what follows them, so that detectors and judges read what the model wrote itself."""

    turns: Turns
    prefill: str

    def __new__(cls, text: str, turns: Turns = (), prefill: str = "") -> Question:
        made = super().__new__(cls, text)
        made.turns, made.prefill = turns, prefill
        return made


def turns_of(user: str) -> Turns:
    return user.turns if isinstance(user, Question) else ()


def prefill_of(user: str) -> str:
    return user.prefill if isinstance(user, Question) else ""


def messages(system: str | None, user: str, system_role: str = "system") -> list[dict[str, str]]:
    """System message, the turns before the question, and the question; system_role user: the first stands in the first user
    turn. What the reply begins with is not among them (`prefill_of`)."""
    asked = [{"role": "user", "content": str(user)}]
    for said, answered in reversed(turns_of(user)):
        asked = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}, *asked]
    if system is None:
        return asked
    if system_role == "user":
        return [{"role": "user", "content": f"{system}\n\n{asked[0]['content']}"}, *asked[1:]]
    return [{"role": "system", "content": system}, *asked]


def described(texts: Iterable[str]) -> list[Any]:
    """Questions as hashes see them: a text as it is, one with something around it with that."""
    return [[str(t), turns_of(t), prefill_of(t)] if turns_of(t) or prefill_of(t) else t for t in texts]


def told(texts: Sequence[str]) -> dict[str, Any]:
    """What is kept beside completions of what stands around the questions of a set, the same for all; empty without."""
    found = {"turns": [list(t) for t in turns_of(texts[0])], "prefill": prefill_of(texts[0])} if texts else {}
    return {key: value for key, value in found.items() if value}


def around(where: str, name: str, turns: Any, prefill: Any) -> tuple[Turns, str]:
    """The `turns` and the `prefill` of a question set of that name as its file gives them (None: not). where: for messages.

    turns: a list of tables of a user's and an assistant's text; prefill: a text, or a list of its UTF-8 bytes (0–255).
    Raises InputError for anything else, and for bytes that end inside a character."""
    found: list[tuple[str, str]] = []
    for number, turn in enumerate(turns if isinstance(turns, list) else [] if turns is None else [None]):
        texts = [turn.get(role) for role in ("user", "assistant")] if isinstance(turn, dict) else []
        if len(texts) != 2 or len(turn) != 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(
                f"{where}: turn {number} of set {name!r} is no pair of a user's and an assistant's text. Write "
                'turns = [{ user = "…", assistant = "…" }], or leave the line out.'
            )
        found.append((texts[0], texts[1]))
    if prefill is None:
        return tuple(found), ""
    if isinstance(prefill, list) and all(isinstance(b, int) and 0 <= b < 256 for b in prefill):
        try:
            prefill = bytes(prefill).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: the prefill of set {name!r} is {len(prefill)} bytes, of which those from byte {error.start} on are no "
                "whole character of UTF-8. A reply begins with whole characters: complete it, or write it as a text."
            ) from None
    if not isinstance(prefill, str) or not prefill.strip():
        raise InputError(
            f"{where}: the prefill of set {name!r} is no text. Write how the reply begins, or leave the line out."
        )
    return tuple(found), prefill
