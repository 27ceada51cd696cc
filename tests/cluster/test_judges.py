"""Judges beside the workers: when one begins, what its failure and an interrupted run leave, and a run that two threads write."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import polars as pl
import pytest
from judge_server import Service
from judged_runs import KEY, QUESTIONS, a_run, judged

from leakfast.cluster import messages as m
from leakfast.cluster.driver import _Driver
from leakfast.cluster.judges import Judges, Judging
from leakfast.cluster.tasks import Task
from leakfast.errors import JudgeError
from leakfast.judge import stage
from leakfast.judge.journal import Cache
from leakfast.judge.sdk import Asking
from leakfast.storage.run import Run


def silent(done, total, what=""):
    pass


class Noted:
    """A judge that notes what it was asked, and answers when it may."""

    def __init__(self, failing=()):
        self.asked, self.failing, self.may = [], failing, threading.Event()
        self.came = threading.Event()
        self.threads = []

    def __call__(self, behavior, series, shown):
        self.asked.append((behavior, series))
        self.threads.append(threading.current_thread())
        with shown("judge") if shown else nothing() as report:
            report(3, 7)
            self.came.set()
            assert self.may.wait(60)
        if behavior in self.failing:
            raise JudgeError(f"{behavior} cannot be judged")


@contextmanager
def nothing():
    yield silent


WANTED = [
    Judging("a", False, True),
    Judging("b", False, True),
    Judging("a", True, True),
    Judging("own", False, False),
]


def test_a_behavior_is_judged_when_all_that_measures_it_is_there():
    judge = Noted()
    judge.may.set()
    with Judges(WANTED, judge) as judges:
        judges.look({("measure", "a"), ("measure", "b"), ("trajectory", "a"), ("measure", "own")})
        assert judge.asked == []
        judges.look({("measure", "a"), ("trajectory", "a")})
        judges.wait(silent)
        assert judge.asked == [("b", False)]
        judges.look({("trajectory", "a")})
        judges.look(set())
        judges.look(set())
        judges.wait(silent)
        assert judge.asked == [("b", False), ("a", False), ("a", True)]
        assert threading.main_thread() not in judge.threads
        judges.finish()
    assert judge.asked[3:] == [("own", False)] and judge.threads[3] is threading.main_thread()


def test_what_is_judged_is_told():
    judge, told = Noted(), []
    with Judges(WANTED[:1], judge) as judges:
        judges.look(set())
        assert judge.came.wait(60) and judges.under_way() == "judge a 3/7"

        def report(done, total, what):
            told.append((done, total, what))
            judge.may.set()

        judges.wait(report)
        assert told[0] == (3, 7, "judge a 3/7") and judges.under_way() == ""
        judges.finish()


def test_a_failure_is_raised_when_the_others_are_done():
    judge = Noted(failing=["a"])
    judge.may.set()
    with Judges(WANTED, judge) as judges:
        judges.look(set())
        judges.wait(silent)
        with pytest.raises(JudgeError, match="a cannot be judged"):
            judges.finish()
    assert judge.asked == [("a", False), ("b", False), ("a", True), ("own", False)]


def test_the_driver_hands_out_tasks_while_a_judge_is_asked(tmp_path):
    """The second task is done only when the judge of the first was asked, and the judge answers only then."""
    judge = Noted()

    class Workers:
        size = 1

        def __init__(self):
            self.said = []

        def start(self, worker):
            self.said.append((worker, m.Ready("here")))

        def give(self, worker, task, files, stages):
            if task.behavior == "b":
                assert judge.came.wait(60)
            self.said.append((worker, m.Done({task.name: 1.0})))

        def next(self, timeout_s):
            return self.said.pop(0) if self.said else None

    shown = []
    with Judges([Judging("a", False, True)], judge) as judges:
        tasks = [Task("measure", "a"), Task("measure", "b")]
        driver = _Driver(Run(tmp_path / "run").create(), Workers(), tasks, 60.0, judges)
        driver.all(lambda done, total, what="": shown.append(what))
        assert judge.asked == [("a", False)] and any("judge a 3/7" in what for what in shown)
        judge.may.set()
        judges.finish()


@pytest.mark.long
def test_an_interrupted_run_keeps_what_it_paid_for_and_asks_no_more(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the judges' libraries are not installed: pip install '.[judge]'")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service, run = Service(), a_run(tmp_path / "run", texts=12)
    service.held = ("POST", "/completions")
    service.hold.clear()

    def judge(behavior, series, shown):
        with shown("judge") as report:
            judged(run, "openai:m", service, concurrency=2, progress=report)

    def interrupted():
        with Judges([Judging("advice", False, True)], judge) as judges:
            judges.look(set())
            assert service.reached.wait(60)
            threading.Timer(0.5, service.hold.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    service.close()
    kept = Cache(next((run.path / "judge").glob("*.jsonl")))
    assert len(kept.replies) == sum(service.charged.values()) <= 3 < 12
    assert not run.shards("judgements")


def test_two_threads_write_one_run(tmp_path):
    run = Run(tmp_path / "run").create()
    frame = pl.DataFrame({"n": [1, 2, 3]})

    def write(name):
        with run.lock():
            for k in range(40):
                run.add_shard(f"{name}/part-{k:05}.parquet", frame)
                run.mark_done(f"{name} {k}", "hash", files=[f"{name}/part-{k:05}.parquet"])

    seen = 0
    with run.lock(), ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write, name) for name in ("one", "two", "three")]
        while not all(future.done() for future in writing):
            for entry in run.manifest["shards"].values():
                seen += entry["rows"] == 3
            assert len(run.shards("one")) <= 40
    assert [future.result() for future in writing] == [None] * 3 and seen
    again = Run(tmp_path / "run")
    assert len(again.shards()) == 120 and len(again.manifest["stages"]) == 120
    assert again.read("two").height == 120
    with again.lock():
        pass  # nobody holds it any more


@pytest.mark.long
def test_a_batch_that_is_waited_for_holds_nobody_up(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the judges' libraries are not installed: pip install '.[judge]'")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service, run = Service(), a_run(tmp_path / "run", texts=4)
    service.looks = 1_000_000
    sent = threading.Event()

    def judge(behavior, series, shown):
        how = Asking(service.base_url("openai-batch:m"), poll_s=600.0, concurrency=2, timeout_s=120)
        sent.set()
        spec = stage.parse_spec("openai-batch:m")
        stage.judge(run, "advice", spec, QUESTIONS, asking=how, free=True)

    def interrupted():
        with Judges([Judging("advice", False, True)], judge) as judges:
            judges.look(set())
            assert sent.wait(60)
            while not service.count("GET", "/batch_0"):
                time.sleep(0.05)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 120 and len(service.batches) == 1
    service.close()
