"""The table that `leakfast eval` prints: whose interval stands under which name."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.cli import rates as shown
from leakfast.stats import rates as rate_tables
from leakfast.stats import summaries
from leakfast.storage import schema

PEOPLE = ["villain", "clown", "reader"]


def counted(drawn):
    """Rates and counts of 8 questions that are answered all one way or the other."""
    rng = np.random.default_rng(0)
    hits = drawn * rng.binomial(1, 0.5, size=(3, 8))
    frame = {"behavior": "marker", "adapter": "a", "persona": np.repeat(PEOPLE, 8)}
    frame |= {"question": np.tile(np.arange(8), 3), "hits": hits.ravel(), "total": drawn}
    counts = pl.DataFrame(frame).with_columns(
        pl.lit(0, pl.Int64).alias(name) for name in ("n_empty", "n_truncated", "n_error")
    )
    counts = counts.with_columns(pl.col("question").cast(pl.Int32), pl.col("total").cast(pl.Int64))
    assert not set(schema.columns("question_counts")) - set(counts.columns)
    rates = rate_tables.table(rate_tables.totals(counts), {"a": ("villain", 1)}, {})
    return summaries.with_intervals(rates, counts)


def span(row, kind):
    return f"{100 * row[f'{kind}_low']:.1f} – {100 * row[f'{kind}_high']:.1f}"


def test_the_interval_is_over_questions_and_wilsons_stands_under_its_name(capsys):
    table = counted(50)
    shown.show(table, "marker", 5)
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if "persona" in line and "Wilson" in line)
    assert head.index("95 % interval") < head.index("Wilson 95 %") and "over questions" in text
    for row in table.rows(named=True):
        line = next(line for line in text.splitlines() if row["persona"] in line)
        assert line.index(span(row, "bb")) < line.index(span(row, "ci"))
        assert row["bb_high"] - row["bb_low"] > 2 * (row["ci_high"] - row["ci_low"]), (
            "400 samples of 8 answers"
        )


def test_one_sample_a_question_has_wilsons_alone(capsys):
    table = counted(1)
    shown.show(table, "marker", 5)
    text = capsys.readouterr().out
    assert "Wilson 95 %" in text and "95 % interval" not in text and "over questions" not in text
    assert span(table.row(0, named=True), "ci") in text
