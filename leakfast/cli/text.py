"""Text on its way to a terminal: completions made harmless, tables, JSON. Demands rich only for
tables; leaves meaning and rounding of values to the commands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

# C0 and C1 controls except tab and newline, marks that turn or hide text, fillers that draw nothing, lone surrogates
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def inert(text: str) -> str:
    """`text` with every control character replaced by its visible escape, so that printing a
    completion cannot move the cursor, colour the screen, set the title or reverse the line."""
    return _HARMFUL.sub(_escape, text)


def one_line(text: str) -> str:
    """The same for what is to stay on its line, such as a name: tabs and line breaks are escaped too."""
    return inert(text).replace("\t", "\\t").replace("\n", "\\n")


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """`value` as JSON on stdout; NaN and infinities, which JSON lacks, become null. Characters that steer a terminal are
    written as \\u escapes, which a reader of JSON turns back."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, default=str)
    click.echo(_HARMFUL.sub(lambda match: json.dumps(match.group())[1:-1], text))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Rows under headings on stdout: numbers to the right, None as a dash, text made inert."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    shown = None if title is None else Text(one_line(title), style="italic")
    table = Table(title=shown, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(Text(one_line(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("–" if cell is None else one_line(str(cell))) for cell in row))
    console.print(table)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
