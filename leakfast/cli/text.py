"""Text on its way to a terminal: tables, JSON. Demands rich only for tables; leaves meaning and rounding of values to the
commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

from leakfast.inert import STEERING, one_line


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """`value` as JSON on stdout; NaN and infinities, which JSON lacks, become null. Characters that steer a terminal are
    written as \\u escapes, which a reader of JSON turns back."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, default=str)
    click.echo(STEERING.sub(lambda match: json.dumps(match.group())[1:-1], text))


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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
