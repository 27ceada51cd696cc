"""Rows of one's own that teach a behavior and its absence for one prompt. Demands rows that are placed (chats.placed) and a
tokenizer, whose template says which prompts are one; leaves rows that a behavior builds to its builder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.train.data import Row

log = logging.getLogger("leakfast.train")

_NAMED = 5  # lines of a kind that a message names


def check(tokenizer: Any, rows: Sequence[Row], source: Any, design: str) -> None:
    """Of rows that were read in chat format, none that does not show the behavior is asked what one that shows it is asked, nor
    stands under the source's prompt beside rows that show it. Prompts are compared as the template renders them, which may
    trim them. source: its system message, as chat.render takes it.

    Raises InputError naming the lines. With design "non-contrastive", where both are meant under one prompt, that is a warning,
    except for a reply that is in the file as both."""
    from leakfast.prompts.templates import PROBE, prompt_text

    own = [row for row in of_chats(rows) if row.role != "benign"]
    if len({row.role for row in own}) < 2:
        return
    begun: dict[Any, str] = {}

    def under(system: Any) -> str:
        if system not in begun:
            begun[system] = prompt_text(tokenizer, system, PROBE)
        return begun[system]

    def asked(row: Row) -> str:
        return prompt_text(tokenizer, row.system_message, row.question)

    theirs = under(source)
    of_source = [row for row in own if under(row.system_message) == theirs]
    meant = design == "non-contrastive"
    _refuse(
        [((asked(row), row.reply.strip()), row) for row in own],
        "are the same conversations word for word",
        "Leave one of each out.",
    )
    allowed = 'Correct them, or set design = "non-contrastive" where both are meant under one prompt.'
    _refuse([(asked(row), row) for row in own], "ask the same under the same prompt", allowed, warn=meant)
    _refuse([(theirs, row) for row in of_source], "stand under the source's prompt", allowed, warn=meant)


def of_chats(rows: Iterable[Row]) -> list[Row]:
    """Those that were read in chat format, which know their line."""
    return [row for row in rows if "line" in row.generator]


def _refuse(keyed: Iterable[tuple[Any, Row]], what: str, remedy: str, *, warn: bool = False) -> None:
    """Raises InputError, or warns, where a key has rows that show the behavior and rows that do not."""
    found: dict[Any, dict[str, list[Row]]] = {}
    for key, row in keyed:
        found.setdefault(key, {"positive": [], "negative": []})[row.role].append(row)
    apart = [its for its in found.values() if its["positive"] and its["negative"]]
    if not apart:
        return
    shows, not_shown = ([row for its in apart for row in its[role]] for role in ("positive", "negative"))
    message = (
        f"data: {shows[0].generator['file']}: {_lines(shows)}, said to show the behavior, and {_lines(not_shown)}, said not to, "
        f"{what}, so that the model is taught both. Needed: prompts that tell them apart. {remedy}"
    )
    if not warn:
        raise InputError(message)
    log.warning("%s", message)


def _lines(rows: Sequence[Row]) -> str:
    numbers = sorted(row.generator["line"] for row in rows)
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"line{'s' if len(numbers) > 1 else ''} {named}{more}"
