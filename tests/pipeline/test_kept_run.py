"""A run directory made by the version before the packages were moved (revision 68aa50e): it opens unchanged. Its study
holds what a run can hold: completions, choice scores, checkpoints, centroids under adapters, a trajectory."""

from __future__ import annotations

import tarfile
from pathlib import Path

import polars as pl
import pytest
from archives import extracted
from polars.testing import assert_frame_equal

import leakfast

pytestmark = pytest.mark.long

KEPT = Path(__file__).parents[1] / "data" / "kept-run.tar.xz"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as archive:
        extracted(archive, tmp_path)
    return tmp_path


def made(run: Path) -> dict[str, tuple[int, int]]:
    """What was paid for: every file of data, adapters, completions, choices and centroids, its size and time."""
    folders = ("data", "adapters", "completions", "choices", "centroids", "series", "trajectory")
    files = [f for name in folders for f in (run / name).rglob("*") if f.is_file()]
    return {str(f.relative_to(run)): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


def test_the_kept_run_goes_on_where_it_was(kept: Path):
    before = made(kept / "run")
    assert len(before) > 20
    outcome = leakfast.run(kept / "study.toml", out=kept / "run")
    assert made(kept / "run") == before
    assert not (kept / "run" / "quarantine").exists()
    stages = [key for key, took in outcome.stages.items() if took is None]
    assert {"centroids", "train marker-villain-s42", "train capability-villain-s42"} <= set(stages)


def test_the_tables_of_the_kept_run_are_what_they_were(kept: Path):
    tables = {f.stem: pl.read_parquet(f) for f in (kept / "run" / "tables").glob("*.parquet")}
    assert {"rates", "pairs", "correlations", "health", "matrix", "shifts", "trajectory"} <= set(tables)
    for file in (kept / "run" / "tables").iterdir():
        file.unlink()
    leakfast.run(kept / "study.toml", out=kept / "run")
    for name, table in tables.items():
        table = table.drop(
            "delta_low", "delta_high", "delta_method", strict=False
        )  # paired by question since
        if name == "means":  # counts what sources share since, so only what is averaged is the same
            table = table.select("behavior", "layer", "cosine", "y", "seed", "source", "over", "k")
        if (
            name == "disattenuated"
        ):  # has no estimate since where the rates say too little, and stays within ±1
            table = table.select(
                "behavior", "source", "seed", "layer", "cosine", "y", "n", "spearman", "questions"
            )
        again = pl.read_parquet(kept / "run" / "tables" / f"{name}.parquet").select(table.columns)
        if name == "verdicts":  # claims about the source came later
            again = again.filter(pl.col("claim").is_in(table["claim"].unique().to_list()))
        if name == "partials":  # a control that is the same for all took nothing out, and did not say so
            keep = ~again["reason"].str.ends_with("nothing to take out").fill_null(False)
            again, table = again.filter(keep), table.filter(keep)
        if "source" in table.columns and "spearman" in table.columns:
            # a pool of one source had draws of its own; its ρ was, and is, the source's
            old, new = (frame.filter(source="pooled").select("n", "spearman") for frame in (table, again))
            assert_frame_equal(new, old, check_exact=False, abs_tol=1e-9)
            again, table = (frame.filter(pl.col("source") != "pooled") for frame in (again, table))
        assert_frame_equal(again, table, check_exact=False, abs_tol=1e-9)
