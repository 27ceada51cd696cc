"""Shards measured again: those of a run are the same text for text, and one that was changed afterwards is told, though its hash
holds."""

from __future__ import annotations

import shutil

import polars as pl
import pytest

import leakfast
from leakfast.pipeline.checks import verify
from leakfast.storage.run import Run
from tests.cluster.studies import written

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return written(tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="module")
def pristine(study):
    return leakfast.run(study, out=study.parent / "run").run


def again_of(run, study):
    return next(c for c in verify(run, study=study, sample=99).checks if c.name == "measured again")


def changed(run: Run, relpath: str, frame: pl.DataFrame) -> None:
    entry = run.manifest["shards"][relpath]
    about = {key: value for key, value in entry.items() if key not in ("sha256", "bytes", "rows")}
    run.add_shard(relpath, frame, **about)


def test_every_shard_is_the_same_when_it_is_measured_again(pristine, study):
    check = again_of(pristine, study)
    shards = [p for root in ("completions", "choices") for p in Run(pristine).shards(root)]
    assert check.wrong == [] and check.checked == len(shards) > 3


def test_shards_that_were_changed_are_told(pristine, study, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    run = Run(tmp_path / "run")
    drawn = next(p for p in run.shards("completions") if "villain" in p)
    frame = run.read(drawn)
    first = pl.int_range(pl.len()) == 0
    changed(
        run, drawn, frame.with_columns(text=pl.when(first).then(pl.lit("other")).otherwise(pl.col("text")))
    )
    scored = run.shards("choices")[0]
    scores = run.read(scored)
    changed(run, scored, scores.with_columns(logprob_nats=pl.col("logprob_nats") + 0.01))
    assert sorted(again_of(run.path, study).wrong) == sorted(
        [
            f"{drawn}: 1 of {frame.height} rows are others when measured again",
            f"{scored}: {scores.height} of {scores.height} rows are others when measured again",
        ]
    )
