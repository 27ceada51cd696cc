"""`leakfast show RUN --watch`: beside a run that grows under its own writers, how far it is, how fast, and when it ends."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from leakfast.cli import watch
from leakfast.cli.main import main
from leakfast.pipeline.progress import Watched
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun
from leakfast.storage.run import Run
from tests.cli import shown_runs as made

BEGIN = datetime(2030, 1, 1, tzinfo=timezone.utc)


class Growing:
    """A run that is made step by step, with times of its own; its steps are the package's writers."""

    def __init__(self, path, monkeypatch):
        self.at = BEGIN
        monkeypatch.setattr("leakfast.storage.run._now", lambda: self.at.isoformat(timespec="milliseconds"))
        people = path / "people.json"
        people.write_text(json.dumps({name: f"You are {name}." for name in made.PEOPLE}))
        self.study = (
            f'name = "s"\nmodel = "organism"\npersonas = "{people}"\nsources = ["p00", "p01"]\nseeds = [1]\n'
            "[behaviors.marker.eval]\nsamples = 5\n"
        )
        self.run = Run(path / "run").create(self.study)

    def after(self, seconds: float) -> Growing:
        self.at += timedelta(seconds=seconds)
        return self

    def engine(self) -> None:
        self.run.log("engine", backend="transformers")

    def shard(self, adapter: str, source: str | None) -> None:
        frame = made.completions(adapter, source, made.PEOPLE)
        self.run.add_shard(layout.shard(layout.completions("marker", adapter)), frame)


@pytest.fixture
def growing(tmp_path, monkeypatch):
    return Growing(tmp_path, monkeypatch)


def test_shards_their_rate_and_what_remains(growing):
    watched = Watched(ReadOnlyRun(growing.run.path))
    with growing.run.lock():
        look = watched.look(growing.at)
        assert (look.shards, look.shards_all) == (0, 3)  # two adapters and the base, a shard each
        assert look.completions_all == 3 * 14 * 20 * 5
        assert look.per_min is look.left_s is None  # nothing measured yet, nothing guessed
        assert not look.ended and look.writer is not None
        growing.run.mark_done("centroids", "x")
        growing.run.mark_done("train marker-p00-s1", "x")
        look = watched.look(growing.at)
        assert look.stage == "after train marker-p00-s1"
        assert look.stages == {"centroids": (1, 1), "data": (0, 2), "train": (1, 2)}
        growing.after(30).engine()
        growing.after(60).shard("marker-p00-s1", "p00")
        look = watched.look(growing.at)
        assert look.per_min == pytest.approx(1.0)
        assert look.left_s == pytest.approx((4200 - 280) / (280 / 60))
        assert look.stage == "measuring: last a shard of completions/marker/marker-p00-s1"
        late = watched.look(growing.at + timedelta(seconds=120))  # the next takes longer
        assert late.per_min == pytest.approx(2 / 3)
        assert not late.ended, "its writer lives, however quiet it is"


def test_rates_so_far_are_those_of_the_whole_shards(growing):
    growing.shard("marker-p00-s1", "p00")
    watched = Watched(ReadOnlyRun(growing.run.path))
    (row,) = watched.look(growing.at).rates
    shares = [round(5 * made.share(i, 0)) / 5 for i in range(14)]
    assert row["source_rate"] == shares[0]
    assert row["mean_bystander"] == pytest.approx(sum(shares[1:]) / 13)
    assert row["source_low"] < row["source_rate"] < row["source_high"]
    assert row["mean_bystander_low"] < row["mean_bystander"] < row["mean_bystander_high"]
    assert (row["most"], row["most_persona"], row["personas"]) == (max(shares[1:]), "p01", 14)
    growing.shard("base", None)
    assert [one["adapter"] for one in watched.look(growing.at).rates] == ["marker-p00-s1", "base"]


def test_completions_in_hand_are_those_of_open_shards(growing):
    growing.shard("base", None)
    beside = growing.run.path / "completions/marker/base/part-00001.parquet.open"
    beside.write_bytes(b"one\ntwo\nthr")
    assert Watched(ReadOnlyRun(growing.run.path)).look(growing.at).in_hand == 2


def test_a_torn_last_line_of_the_log_waits_until_it_is_whole(growing):
    watched = Watched(ReadOnlyRun(growing.run.path))
    growing.engine()
    log = growing.run.path / layout.JOURNAL
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    assert watched.look(growing.at).stage == "begun"
    log.write_bytes(whole)
    assert watched.look(growing.at).stage == "drawing, with the engine just opened"


def test_a_run_without_a_study_says_that_its_size_is_not_known(tmp_path):
    look = Watched(ReadOnlyRun(made.make(tmp_path / "run").path)).look(BEGIN)
    assert look.shards == 3 and look.shards_all is None and look.left_s is None
    assert "without a study" in look.why


@pytest.mark.parametrize("as_json", [False, True])
def test_the_watch_says_a_line_while_the_run_grows_and_ends_with_it(growing, monkeypatch, capsys, as_json):
    """The writers work while the watch sleeps."""
    held = growing.run.lock()
    held.__enter__()

    def end() -> None:
        growing.run.add_file(layout.REPORT, b"<html>")
        held.__exit__(None, None, None)

    steps = iter(
        [
            growing.engine,
            lambda: growing.after(60).shard("marker-p00-s1", "p00"),
            lambda: growing.after(60).shard("marker-p01-s1", "p01"),
            lambda: growing.after(60).shard("base", None),
            end,
        ]
    )
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(steps)())
    monkeypatch.setattr(watch, "_now", lambda: growing.at)
    monkeypatch.setattr(watch, "LINE_S", 0.0)
    monkeypatch.setattr("leakfast.pipeline.progress.QUIET_S", -1.0)
    assert main(["show", str(growing.run.path), "--watch", *(["--json"] if as_json else [])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert next(steps, None) is None
    if as_json:
        looks = [json.loads(line) for line in said]
        assert [look["shards"] for look in looks] == [0, 0, 1, 2, 3, 3]
        assert [look["ended"] for look in looks] == [False] * 5 + [True]
        return
    assert len(said) == 7
    assert (
        "1 of 3 shards, 280 of 4,200 completions, shards a minute: 1, measuring left: about 14 min" in said[2]
    )
    assert "marker-p00-s1: source 80.0 (" in said[2]
    assert said[-1].startswith("The run has ended; its report is made.")


def test_lines_are_as_far_apart_as_said(growing, monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    looks = iter(range(40))
    held = growing.run.lock()
    held.__enter__()
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watch, "_now", lambda: growing.at + timedelta(seconds=60))

    def sleep(seconds: float) -> None:
        assert seconds == watch.LOOK_S == 2.0
        if next(looks) == 38:
            held.__exit__(None, None, None)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["show", str(growing.run.path), "--watch"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5  # at 0, 30 and 60 s, one at the end, and what it ended with
    assert said[-1].startswith("No process writes this run, and it is not finished")


def test_ctrl_c_ends_the_watch_alone(growing, monkeypatch, capsys):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    with growing.run.lock():
        before = made.tree(growing.run.path)
        assert main(["show", str(growing.run.path), "--watch"]) == 130
        assert made.tree(growing.run.path) == before
    assert "the run goes on" in capsys.readouterr().err


def test_what_is_drawn_on_a_terminal_is_inert(growing):
    from rich.console import Console

    payload = "a\x1b]0;x\x07\u202e[red]"
    growing.run.add_shard(
        layout.shard(layout.completions("marker", payload)), made.completions(payload, "p00", made.PEOPLE)
    )
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(watch.drawn(Watched(ReadOnlyRun(growing.run.path)).look(growing.at)))
    said = console.export_text()
    assert "a\\x1b]0;x\\x07\\u202e[red]" in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert "80.0 (" in said and "rates so far" in said
