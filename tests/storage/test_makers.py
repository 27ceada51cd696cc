"""Which leakfast made a run: in its manifest from the first stage on, told again by the journal."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast import version
from leakfast.measure.request import Request
from leakfast.measure.stage import measure
from leakfast.prompts.personas import load_personas
from leakfast.report import payload
from leakfast.storage import layout
from leakfast.storage.run import Run

ONE, TWO = ("0.1.0", "a" * 40), ("0.1.0", "b" * 40 + " with changes")


def _told(*made):
    return [{"leakfast": name, "commit": commit} for name, commit in made]


def test_each_maker_stands_once_in_the_order_in_which_they_came(tmp_path):
    run = Run(tmp_path / "run").create()
    for made in (ONE, ONE, TWO, ONE):
        run.note_maker(*made)
    assert Run(run.path).open().manifest["made"] == _told(ONE, TWO)


def test_the_journal_tells_it_where_the_manifest_is_gone(tmp_path):
    run = Run(tmp_path / "run").create().note_maker(*ONE).note_maker("0.1.0", None)
    (run.path / layout.MANIFEST).unlink()
    assert Run(run.path).open().manifest["made"] == _told(ONE, ("0.1.0", None))


def test_a_run_that_nobody_signed_was_begun_by_a_version_not_recorded(tmp_path):
    run = Run(tmp_path / "run").create()
    run.add_shard("tables/a.parquet", pl.DataFrame({"a": [1]}))
    run.note_maker(*ONE)
    assert run.manifest["made"] == _told((None, None), ONE)
    assert payload.makers(run) == ["leakfast of a version not recorded", f"leakfast 0.1.0, commit {'a' * 40}"]
    assert payload.maker_words("0.1.0", None) == "leakfast 0.1.0, no commit (not run from a git checkout)"


@pytest.fixture
def asked(monkeypatch):
    version.maker.cache_clear()
    monkeypatch.setattr(version, "commit", lambda: "c" * 40 + " with changes")
    yield
    version.maker.cache_clear()


def test_a_measurement_signs_its_run(tmp_path, asked):
    nothing = Request((), load_personas(["villain"]))
    run = Run(tmp_path / "run")
    assert measure(None, run, nothing) == []
    assert run.open().manifest["made"] == _told((version.__version__, "c" * 40 + " with changes"))
