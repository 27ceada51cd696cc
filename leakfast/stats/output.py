"""A table as text: CSV in full precision, Markdown and LaTeX for a paper. Demands a polars frame; rounds
only where a person reads (Markdown, LaTeX)."""

from __future__ import annotations

import math
import re
from typing import Any

import polars as pl

FORMATS = ("csv", "markdown", "latex")
_SPECIAL = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def render(table: pl.DataFrame, form: str, digits: int = 4) -> str:
    """`table` as csv, markdown or latex text, ending in a newline.

    csv: every value in full precision, null empty. markdown, latex: `digits` significant digits, null a
    dash. Raises ValueError for another form, or NaN or infinity in the table: those are never values."""
    for name, kind in table.schema.items():
        if kind.is_float() and not table[name].is_finite().fill_null(True).all():
            raise ValueError(f"column {name} holds NaN or infinity; a value that is not known is null")
    if form == "csv":
        return table.write_csv()
    rows = [[_cell(value, digits) for value in row] for row in table.rows()]
    numeric = [kind.is_numeric() for kind in table.dtypes]
    if form == "markdown":
        head = ["| " + " | ".join(_piped(name) for name in table.columns) + " |"]
        head += ["|" + "|".join("---:" if number else "---" for number in numeric) + "|"]
        body = ["| " + " | ".join(_piped(cell) for cell in row) + " |" for row in rows]
        return "\n".join([*head, *body]) + "\n"
    if form == "latex":
        spec = "".join("r" if number else "l" for number in numeric)
        lines = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", _line(table.columns), r"\midrule"]
        lines += [_line(row) for row in rows] + [r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines) + "\n"
    raise ValueError(f"form {form!r} is none of {', '.join(FORMATS)}")


def rounded(table: pl.DataFrame, digits: int | None) -> list[list[Any]]:
    """Rows of `table` for a terminal: floats as text of `digits` significant digits (None: as they are), nulls None."""
    if digits is None:
        return [list(row) for row in table.rows()]
    return [
        [_cell(cell, digits) if isinstance(cell, float) else cell for cell in row] for row in table.rows()
    ]


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            places = digits if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
            return f"{value:.{min(places, digits + 2)}f}"
        return f"{value:.{digits - 1}e}"
    return str(value)


def _piped(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text.replace("\\", r"\\").replace("|", r"\|"))


def _line(cells: list[str]) -> str:
    escaped = ["".join(_SPECIAL.get(letter, letter) for letter in cell).replace("–", "--") for cell in cells]
    return " & ".join(re.sub(r"[\r\n]+", " ", cell) for cell in escaped) + r" \\"
