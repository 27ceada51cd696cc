"""The tables of a run that is not finished are those that `stats` makes, without what is drawn; nothing is written."""

from __future__ import annotations

import polars as pl
import pytest
import served_runs as runs
from polars.testing import assert_frame_equal

from leakfast import stats
from leakfast.errors import InputError
from leakfast.stats.preliminary import preliminary
from leakfast.storage.reading import Reading

pytestmark = pytest.mark.long


def test_rates_and_rho_are_those_of_stats_and_what_is_drawn_is_null(tmp_path):
    run = runs.whole(tmp_path / "run")
    made = preliminary(Reading(run.path))
    assert not (run.path / "tables").exists()
    whole = stats.stats(run, permutations=9, bootstraps=9, write=False)
    assert_frame_equal(made.rates, whole.rates)
    assert_frame_equal(made.pairs, whole.pairs)
    assert_frame_equal(made.more["health"], whole.more["health"])
    assert_frame_equal(made.more["exposure"], whole.more["exposure"])
    key = ["behavior", "adapter", "source", "layer", "cosine", "y", "category", "n", "spearman", "pearson"]
    assert_frame_equal(made.correlations.select(key), whole.correlations.select(key))
    drawn = made.correlations.select(pl.col("^spearman_p_(perm|max)$|^spearman_ci_.*$"))
    assert drawn.width >= 3 and all(column.null_count() == drawn.height for column in drawn)


def test_nothing_measured_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nothing to count"):
        preliminary(Reading(runs.begin(tmp_path / "run").path))
