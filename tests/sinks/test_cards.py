"""What a card calls the numbers of a behavior: completions are counted where completions were drawn, and nowhere else."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast.sinks.cards import _counted, _measure

ROW = {"hits": 3, "total": 12, "rate": 0.25, "chance": None, "estimator": None, "n_judged": None}


@pytest.mark.parametrize(
    ("behavior", "unit", "row", "what", "counted"),
    [
        ("marker", "share", {}, "rate", "3 of 12 completions"),
        ("capability", "share", {}, "accuracy", "3 of 12 items answered rightly"),
        ("capability-own.eval", "share", {"chance": 0.25}, "accuracy", "3 of 12 items answered rightly"),
        (
            "marker",
            "share",
            {"hits": None, "total": None, "estimator": "reply-end"},
            "probability",
            "no replies: the model's own probability (reply-end)",
        ),
        ("misalignment-advice", "points", {"hits": None, "total": None}, "score", None),
        (
            "misalignment-advice",
            "points",
            {"hits": None, "total": None, "n_judged": 1200},
            "score",
            "1,200 scored completions",
        ),
        ("marker", "share", {"hits": None, "total": None}, "rate", None),
    ],
)
def test_a_card_says_what_was_counted(behavior, unit, row, what, counted):
    """Items of multiple choice were called completions, and a probability a rate of them."""
    whole = {**ROW, **row}
    types = {"chance": pl.Float64, "estimator": pl.String, "n_judged": pl.Int64, "hits": pl.Int64}
    rates = pl.DataFrame([whole], schema_overrides=types)
    assert _measure(rates, behavior, unit) == what
    assert _counted(whole, what) == counted
    less = rates.drop("chance", "estimator", "n_judged")  # tables of which none was measured so
    if not row:
        assert _measure(less, behavior, unit) == what
