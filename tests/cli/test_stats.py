"""`leakfast stats --table`: one table, read where it is; and what is told of one that a run does not have."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from leakfast.cli.main import main
from leakfast.cli.stats import show
from leakfast.stats.correlations import correlate
from leakfast.stats.tables import Stats
from leakfast.storage import schema
from leakfast.storage.run import Run
from tests.rates_made import made_pairs, made_rates

ROW = {
    "behavior": "marker",
    "adapter": "base",
    "persona": "villain",
    "question": 0,
    "sample": 0,
    "seed": 1,
    "text": "Yes.",
    "n_tokens": 2,
    "finish_reason": "stop",
    "status": "ok",
    "source": None,
    "n_prompt_tokens": 9,
    "token_ids": [5, 6],
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "verdicts",
            "It would hold the study's rules with the numbers that decide them; this run gives no row of it, and a table without "
            "rows is not made. Use one of those the run has: rates, pairs, correlations, ",
        ),
        ("rate", "there is no table 'rate'. Did you mean rates? Use one of: rates, pairs, correlations, "),
    ],
)
def test_a_table_the_run_lacks_is_told_apart_from_a_mistyped_one(tmp_path, capsys, name, said):
    run = Run(tmp_path / "run")
    shard = pl.DataFrame([ROW], schema=schema.columns("completions"))
    run.add_shard("completions/marker/base/part-00000.parquet", shard)
    drawn = ["--permutations", "0", "--bootstraps", "0", "--threads", "1"]
    assert main(["-q", "stats", str(run.path), *drawn, "--table", name]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "Did you mean verdicts" not in told


@pytest.fixture
def counted(tmp_path):
    run = Run(tmp_path / "run")
    rows = [
        ROW | {"persona": name, "seed": i, "sample": i} for i, name in enumerate(("villain", "poet", "hero"))
    ]
    shard = pl.DataFrame(rows, schema=schema.columns("completions"))
    run.add_shard("completions/marker/base/part-00000.parquet", shard)
    return run.path


def test_reading_a_table_writes_nothing_and_takes_what_is_there(counted, capsys):
    assert main(["-q", "stats", str(counted), "--table", "rates", "--csv"]) == 0
    assert not (counted / "tables").exists(), "a table was asked for, not a computation"
    main(["-q", "stats", str(counted), "--permutations", "99"])
    before = {path: path.read_bytes() for path in counted.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["stats", str(counted), "--table", "rates", "--csv"]) == 0
    assert "correlations" not in capsys.readouterr().err, "nothing is computed again"
    assert main(["-q", "stats", str(counted), "--table", "rates", "--permutations", "7"]) == 0
    assert before == {path: path.read_bytes() for path in counted.rglob("*") if path.is_file()}


def test_a_source_rate_where_nothing_is_compared_is_refused(counted, capsys):
    assert main(["-q", "stats", str(counted), "--source-rate", "0.8"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "source rate 0.8 asked, but no behavior of" in said and "Leave --source-rate out" in said
    assert not (counted / "tables").exists()


def test_two_forms_at_once_are_a_usage_error(counted, capsys):
    assert main(["-q", "stats", str(counted), "--json", "--csv"]) == 2
    assert "--json and --csv" in capsys.readouterr().err


def test_a_table_has_four_digits_and_every_digit_when_asked(counted, capsys):
    assert main(["-q", "stats", str(counted), "--table", "rates", "--markdown"]) == 0
    assert "0.7935" in (short := capsys.readouterr().out)  # Wilson's upper end of 0 of 1
    assert main(["-q", "stats", str(counted), "--table", "rates", "--full", "--markdown"]) == 0
    assert "0.79345" in capsys.readouterr().out and "0.79345" not in short


def test_an_interval_over_personas_alone_is_said_to_be_one(capsys):
    rng = np.random.default_rng(0)
    leak = rng.random(20)
    pairs = made_pairs(rng.random(20), leak, delta=[*(leak - 0.5)]).with_columns(adapter=pl.lit("villain"))
    rates = made_rates(sources=("villain",), behaviors=("marker",)).with_columns(adapter=pl.lit("villain"))
    table = correlate(pairs, 9, bootstraps=50, workers=1)
    show(Stats(rates, pairs, table))
    assert "over personas alone, for want of one over questions: villain." in capsys.readouterr().out
    both = table.with_columns(spearman_both_low=pl.lit(-0.5), spearman_both_high=pl.lit(0.5))
    show(Stats(rates, pairs, both))
    told = capsys.readouterr().out
    assert "-0.50 to +0.50" in told and "personas alone" not in told
