"""Inoculation: a sentence behind the system prompt of rows that show a behavior, in training alone, so that the behavior is tied
to the sentence and less to the persona (Tan et al. 2025, "Inoculation Prompting"; Wichers et al. 2025). Demands rows; measures
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.train.data import Row


def inoculated(rows: Sequence[Row], text: str) -> list[Row]:
    """The rows, those that show the behavior with `text` behind their system message, a space between (alone where there was
    none), and in their generator. Raises InputError where the template writes the system message by itself."""
    return [_told(row, text) if row.role == "positive" else row for row in rows]


def _told(row: Row, text: str) -> Row:
    if row.system_kind == "template-default":
        raise InputError(
            f"data: inoculation given, but {row.persona} has the system message that the chat template writes by itself, which "
            "nothing can be put behind. Needed: a source with a prompt of its own. Leave the line out."
        )
    system = f"{row.system} {text}" if row.system else text
    return replace(row, system=system, system_kind="text", generator={**row.generator, "inoculation": text})
