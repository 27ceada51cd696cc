"""The driver, with workers that do as the test says: who gets what again, and when it gives up."""

from __future__ import annotations

import json
import logging

import pytest

from leakfast.cluster import messages as m
from leakfast.cluster.driver import _Driver, _Seat
from leakfast.cluster.tasks import Task
from leakfast.errors import InputError, LeakfastError
from leakfast.storage.run import Run

TASKS = [
    Task("train", "marker", ("a",), weight=3),
    Task("measure", "marker", ("a",), after=("train a",), weight=5),
]


class Scripted:
    """answers: for every task given, the messages that its worker says; Died ends it, silence says nothing."""

    def __init__(self, answers, size=1):
        self.size, self.answers, self.said, self.given = size, list(answers), [], []
        self.started = self.killed = 0

    def start(self, worker):
        self.started += 1
        self.said.append((worker, m.Ready("here")))

    def give(self, worker, task, files, stages):
        self.given.append((task.name, files, stages))
        self.said += [(worker, said) for said in self.answers.pop(0)]

    def next(self, timeout_s):
        return self.said.pop(0) if self.said else None

    def kill(self, worker):
        self.killed += 1

    def close(self):
        pass


def drive(tmp_path, answers, tasks=TASKS, silence_s=60.0):
    run, pool, shown = Run(tmp_path / "run").create(), Scripted(answers), []
    driver = _Driver(run, pool, tasks, silence_s)
    driver.all(lambda done, total, what="": shown.append((done, total, what)))
    return run, pool, shown


FILE = m.Made(
    "adapters/a/x", b"x", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", {"rows": 1}
)


def test_what_is_made_is_in_the_run_and_what_is_read_is_lent_once(tmp_path):
    tasks = [
        TASKS[0],
        *(Task("measure", f"b{k}", ("a",), after=("train a",), needs=("adapters/a",)) for k in range(2)),
    ]
    done = [
        FILE,
        m.StageDone("train a", "hash", {"files": ["adapters/a/x"]}),
        m.Logged("noted", {"n": 1}),
        m.Done({"train a": 2.0}),
    ]
    run, pool, shown = drive(tmp_path, [done, [m.Done({"e": 1.0})], [m.Done({"e": 3.0})]], tasks)
    assert run.stage_done("train a", "hash") and run.manifest["shards"]["adapters/a/x"]["rows"] == 1
    assert "noted" in (run.path / "log.jsonl").read_text()
    (_, files, stages) = pool.given[1]
    assert files["adapters/a/x"].content is None, "it has made that itself"
    assert stages["train a"]["inputs"] == "hash"
    assert shown[-1][:2] == (5, 5)


def test_another_worker_is_sent_the_bytes(tmp_path):
    task = Task("measure", "b", ("a",), after=("train a",), needs=("adapters/a",))
    answers = [[FILE, m.Done({})], [m.Died("signal 9")], [m.Done({})]]
    _, pool, _ = drive(tmp_path, answers, [TASKS[0], task])
    assert [files["adapters/a/x"].content for _, files, _ in pool.given[1:]] == [None, b"x"]


def test_bytes_that_are_not_those_of_their_hash_are_not_taken(tmp_path):
    from leakfast.errors import StoreError

    with pytest.raises(StoreError, match="do not match"):
        drive(tmp_path, [[m.Made("a", b"y", FILE.sha256, {})]], TASKS[:1])


def test_a_task_whose_worker_died_is_handed_out_again(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "leakfast")
    run, pool, _ = drive(tmp_path, [[m.Died("signal 9")], [m.Done({})], [m.Done({})]])
    assert [name for name, *_ in pool.given] == ["train a", "train a", "measure marker a"]
    assert pool.started == 2 and "worker 0 died (signal 9); train a is handed out again" in caplog.text
    last = json.loads((run.path / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["tried_again"]) == ("cluster", 1)


def test_a_task_that_kills_three_workers_is_the_end(tmp_path):
    with pytest.raises(LeakfastError, match="train a: 3 workers died of it, the last one so: signal 9"):
        drive(tmp_path, [[m.Died("signal 9")]] * 3)


def test_workers_that_never_come_up(tmp_path):
    class Stillborn(Scripted):
        def start(self, worker):
            self.started += 1
            self.said.append((worker, m.Died("exit 1\nno such module")))

    pool = Stillborn([])
    with pytest.raises(
        LeakfastError, match="no worker comes up; the last one ended so: exit 1\nno such module"
    ):
        _Driver(Run(tmp_path / "run").create(), pool, TASKS, 60.0).all(lambda *_: None)
    assert pool.started == 3


def test_a_worker_that_says_nothing_is_ended(tmp_path, caplog):
    _, pool, _ = drive(tmp_path, [[], [m.Done({})], [m.Done({})]], silence_s=0.05)
    assert pool.killed == 1 and "said nothing for" in caplog.text


def test_an_error_ends_all(tmp_path):
    with pytest.raises(InputError, match="no such items"):
        drive(tmp_path, [[m.Failed("InputError", "no such items")]])


def test_a_file_that_follows_from_another_request_now_is_struck_once(tmp_path):
    """Two pieces of a measurement both find a third's file stale; one of them has made it anew."""
    run = Run(tmp_path / "run").create()
    run.add_file("completions/b/part", b"old")
    old = run.manifest["shards"]["completions/b/part"]["sha256"]
    new = m.Made("completions/b/part", FILE.content, FILE.sha256, {})
    struck = m.Struck("completions/b/part", old, "drawn by another request")
    pool = Scripted([[struck, new, m.Done({})], [struck, m.Done({})]])
    tasks = [Task("measure", "b", portion=(k, 2)) for k in range(2)]
    _Driver(run, pool, tasks, 60.0).all(lambda *_: None)
    assert (run.path / "completions/b/part").read_bytes() == b"x"
    assert run.has("completions/b/part")


def test_a_task_that_shows_one_thing_after_another_never_goes_back():
    seat = _Seat()
    shares = []
    for title, total in (("rows", 10), ("learning rate", 4), ("learning rate", 4), ("train", 46)):
        for done in range(total + 1):
            seat.hears(title, done, total)
            shares.append(seat.share)
    assert shares == sorted(shares) and 0.8 < shares[-1] < 1 and seat.what == "train 46/46"
