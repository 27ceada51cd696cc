"""`leakfast stats --table`: what is told about a table that a run does not have."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast.cli.main import main
from leakfast.storage import schema
from leakfast.storage.run import Run

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
            "It would hold the study's rules with the numbers that decide them; this run gives no row",
        ),
        ("rate", "Did you mean rates?"),
    ],
)
def test_a_table_the_run_lacks_is_told_apart_from_a_mistyped_one(tmp_path, capsys, name, said):
    run = Run(tmp_path / "run")
    shard = pl.DataFrame([ROW], schema=schema.columns("completions"))
    run.add_shard("completions/marker/base/part-00000.parquet", shard)
    drawn = ["--permutations", "0", "--bootstraps", "0", "--threads", "1"]
    assert main(["-q", "stats", str(run.path), *drawn, "--table", name]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert (
        "Use one of those the run has: rates, pairs, correlations, " in told
        and "Did you mean verdicts" not in told
    )
