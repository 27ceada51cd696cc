"""The page of tables, made from leakfast/storage/columns.py: `python -m leakfast.cli.table_reference` prints it, `--check
docs/tables.md` compares, `--write docs/tables.md` makes the file. Leaves the words to leakfast/storage/meanings.py."""

from __future__ import annotations

import sys

from leakfast.cli import pages
from leakfast.storage import columns
from leakfast.storage.meanings import MEANINGS

HEAD = """\
# Tables

Every table of a run and its columns. Made from `leakfast/storage/columns.py` by `python -m leakfast.cli.table_reference
--write docs/tables.md`. Tables are Parquet files and hold full precision; the report rounds. A value that is not known is
null, never NaN, and a `reason` says why. Units stand in the names: `_nats`, `_tokens`, `_share` (0-1). Intervals are 95 %.

```python
import leakfast, polars as pl

pl.read_parquet("runs/demo/completions/**/*.parquet")  # what was measured
t = leakfast.stats("runs/demo")  # computes and writes the tables
t.rates, t.pairs, t.correlations, t.more["partials"]
```

`leakfast stats RUN --table NAME --csv` (or `--json`, `--markdown`, `--latex`) prints one of them.
"""
MEASURED = """\
## Measurements

Parquet shards in the run directory, one folder for each behavior and adapter.
"""
RESULTS = """\
## Results

`tables/NAME.parquet`, written by `leakfast stats` and `leakfast run`. The first three are always there, though they may be
empty; a further table is written where it has rows.
"""
SOMETIMES = """\
## Columns that are there where they are known

`rates`, `set_rates`, `question_counts` and `trajectory` have these besides where they apply: counts of what was not a plain
reply, what guessing gives on multiple choice, and what a judge left out.
"""


def reference() -> str:
    """The whole page, Markdown."""
    from leakfast.stats.analysis import TABLES

    parts = [HEAD, MEASURED, *map(_section, columns.MEASUREMENTS), RESULTS]
    for name in [*columns.RESULTS, *columns.FURTHER]:
        parts.append(_section(name, TABLES.get(name)))
    rows = [columns.described("rates", name) for name in columns.SOMETIMES]
    return "\n".join([*parts, SOMETIMES, _rows(rows)])


def _section(name: str, holds: str | None = None) -> str:
    row, _ = columns.tables()[name]
    told = f"{holds[0].upper()}{holds[1:]}.\n" if holds else ""
    return f"### `{name}`\n\n{told}A row is {row}.\n\n{_rows(columns.columns(name))}"


def _rows(found: list[columns.Column]) -> str:
    return pages.table(["column", "type", "meaning"], [(f"`{c.name}`", c.dtype, c.meaning) for c in found])


def unused() -> list[str]:
    """Words that no table has a column for."""
    used = {
        key
        for name in columns.tables()
        for column in [*columns.columns(name), *(columns.described("rates", n) for n in columns.SOMETIMES)]
        for key in (f"{name}.{column.name}", column.name)
    }
    return sorted(set(MEANINGS) - used)


def main(argv: list[str]) -> int:
    """Print, check or write the page; 1 when the check fails."""
    return pages.main(argv, reference, "leakfast.cli.table_reference")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
