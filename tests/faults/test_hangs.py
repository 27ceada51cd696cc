"""Workers that hang, as a process does that is stopped: driver, pool, processes and the lines between them are the real ones;
what a task makes is bytes, since a driver sees no more of a measurement, and a worker without a model comes up in a second."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from leakfast.cluster import messages as m
from leakfast.cluster.driver import _Driver
from leakfast.cluster.local import LocalPool
from leakfast.cluster.tasks import Task
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a process is stopped by a signal"),
]
STUDY = 'name = "x"\nmodel = "organism"\npersonas = ["villain", "monk"]\nsources = ["villain"]\n[behaviors.refusal]\n'
WORKERS, HANGS, TASKS, FILES = 3, 3, 6, 5  # in a round
SILENCE_S = 40.0  # more than a worker takes to come up on a machine that has much else to do
WORKER = f"""
import random, sys, time
from pathlib import Path
from leakfast.cluster import local, worker

def carry_out(stages, task):
    for number in range({FILES}):
        path = f"{{task.needs[0]}}/{{number}}"
        if not stages.store.has(path):
            time.sleep(0.05)
            stages.store.add_file(path, random.Random(path).randbytes(500_000))  # more than a socket holds

worker.carry_out = carry_out
local.serve(int(sys.argv[1]), Path(sys.argv[2]))
"""


def wanted() -> dict[str, str]:
    paths = [f"completions/refusal/a{task}/{number}" for task in range(TASKS) for number in range(FILES)]
    return {path: hashlib.sha256(random.Random(path).randbytes(500_000)).hexdigest() for path in paths}


@pytest.mark.parametrize("rounds", [8])
def test_workers_that_hang_at_drawn_moments(tmp_path, monkeypatch, rounds):
    """Stopped when a drawn number of files is there: in the midst of a message, between two, or idle. Each is
    ended when it was silent for so long, and another goes on with its task, from what it had stored."""
    monkeypatch.setattr(LocalPool, "command", (sys.executable, "-c", WORKER))
    ended = 0
    for number in range(rounds):
        ended += _round(tmp_path / str(number), random.Random(5000 + number), number)
    assert ended >= 20


def _round(folder: Path, draw: random.Random, number: int) -> int:
    run = Run(folder).create()
    tasks = [
        Task("measure", "refusal", (f"a{k}",), needs=(f"completions/refusal/a{k}",)) for k in range(TASKS)
    ]
    pool = LocalPool(parse_study(STUDY, "x.toml"), (), [None] * WORKERS, 1, 30)
    driver = _Driver(run, pool, tasks, SILENCE_S)
    moments = sorted(draw.randrange(TASKS * FILES - FILES) for _ in range(HANGS))
    stopped: dict[int, float] = {}
    back: list[float] = []
    plain = pool.next

    def next_(timeout_s: float):
        if moments and len(run.manifest["shards"]) >= moments[0]:
            free = [w for w in pool._process if w not in stopped and _may_die(driver, w)]
            if free:
                worker = draw.choice(free)
                moments.pop(0)
                time.sleep(draw.uniform(0, 0.1))
                os.kill(pool._process[worker].pid, signal.SIGSTOP)
                stopped[worker] = time.monotonic()
        said = plain(timeout_s)
        if said is not None and isinstance(said[1], m.Ready) and said[0] in stopped:
            back.append(time.monotonic() - stopped.pop(said[0]))
        return said

    pool.next = next_
    try:
        driver.all(lambda *_: None)
    finally:
        pool.close()
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    died = [event["why"] for event in events if event["event"] == "worker_died"]
    assert set(died) <= {f"said nothing for {SILENCE_S:.0f} s and was ended"}
    made = {path: entry["sha256"] for path, entry in run.manifest["shards"].items()}
    assert made == wanted() and run.shards() == sorted(made), "every file, with its bytes"
    assert sorted(e["path"] for e in events if e["event"] == "shard") == sorted(made), "none was made twice"
    print(
        f"round {number}: {len(died)} ended with a task, another ready after {[round(s) for s in back]} s",
        flush=True,
    )
    return len(died)


def _may_die(driver: _Driver, worker: int) -> bool:
    """It is up; its task has not cost two workers already, which would end the command; nor has it none while tasks run out."""
    seat = driver.seats[worker]
    if not seat.ready:
        return False
    return bool(driver.waiting) if seat.task is None else driver.tries.get(seat.task.name, 0) < 2
