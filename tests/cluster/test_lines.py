"""The line between a driver and its workers: whole messages in order, and a worker that hangs in the middle of one, or reads
none, is ended like any that is silent, while the driver goes on."""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import warm

from leakfast.cluster import lines, local
from leakfast.cluster.driver import _Driver
from leakfast.cluster.lines import Line
from leakfast.cluster.local import LocalPool
from leakfast.cluster.tasks import Task
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

STUDY = 'name = "x"\nmodel = "organism"\npersonas = ["villain", "monk"]\nsources = ["villain"]\n[behaviors.refusal]\n'
LARGE = b"x" * (8 << 20)  # more than a socket holds
LIMIT_S = 300.0  # for a driver that would wait for ever
SILENCE_S = 4.0  # a worker is a fork that has everything imported, and is ready within half a second

# first: what a worker does in its first life instead of what it was asked; afterwards its task takes no time
WORKER = """
import os, signal, sys
from pathlib import Path
from leakfast.cluster import lines, local, worker

def first() -> None:
    {first}

class Worker(worker.Worker):
    def __init__(self, study, only, folder, send):
        super().__init__(study, only, folder, send)
        lives = folder.parent.parent / "lives"
        lives.mkdir(exist_ok=True)
        if len(list(lives.iterdir())) == 0:
            (lives / str(os.getpid())).touch()
            first()

worker.Worker = Worker
worker.carry_out = lambda stages, task: None
local.serve(int(sys.argv[1]), Path(sys.argv[2]))
"""
STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
HALF = "os.write(int(sys.argv[1]), lines._LENGTH.pack(100) + b'half a message'); " + STOPS


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield Line(ours), theirs
    ours.close()
    theirs.close()


def test_messages_of_any_size_come_whole_and_in_order(ends):
    line, theirs = ends
    sent, heard = [1, "two", LARGE, {"four": 4.0}], []
    worker = threading.Thread(target=lambda: heard.extend(lines.receive(theirs) for _ in sent), daemon=True)
    for one in sent:
        line.send(one)
    assert line.awaits & selectors.EVENT_WRITE, "more than the socket holds: nothing waits for its reader"
    worker.start()
    while line.awaits & selectors.EVENT_WRITE:
        line.flush()
    worker.join(LIMIT_S)
    assert heard == sent
    back = threading.Thread(target=lambda: [lines.send(theirs, one) for one in sent], daemon=True)
    back.start()
    got: list = []
    while len(got) < len(sent):
        if (one := line.receive()) is not None:
            got.append(one)
    assert got == sent


def test_a_message_is_heard_when_its_last_byte_is_there(ends):
    line, theirs = ends
    assert line.receive() is None
    whole = lines._LENGTH.pack(6) + b"\x80\x04K\x07.."[:6]
    for at in range(len(whole) - 1):
        theirs.send(whole[at : at + 1])
        assert line.receive() is None
    theirs.send(whole[-1:])
    assert line.receive() == 7
    theirs.close()
    with pytest.raises(EOFError):
        line.receive()


@pytest.mark.skipif(sys.platform == "win32", reason="a process is stopped by a signal")
@pytest.mark.parametrize("first", [STOPS, HALF], ids=["reads nothing", "half a message"])
def test_a_worker_that_hangs_in_the_midst_of_a_message_is_ended(tmp_path, monkeypatch, first):
    monkeypatch.setattr(LocalPool, "command", (sys.executable, "-c", WORKER.format(first=first)))
    names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=warm.Popen, **names))
    run = Run(tmp_path / "run").create()
    run.add_file("data/large", LARGE)  # lent to it, and more than it takes
    pool = LocalPool(parse_study(STUDY, "x.toml"), (), [None], 1, 30)
    driver = _Driver(run, pool, [Task("train", "refusal", ("a",), needs=("data/large",))], SILENCE_S)
    work = threading.Thread(target=driver.all, args=(lambda *_: None,), daemon=True)
    work.start()
    work.join(LIMIT_S)
    try:
        assert not work.is_alive(), "the driver waits for a worker that hangs"
        events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
        assert [e["why"] for e in events if e["event"] == "worker_died"] == [
            f"said nothing for {SILENCE_S:.0f} s and was ended"
        ]
    finally:
        pool.close()


def test_a_process_that_the_system_holds_is_left_behind(tmp_path, monkeypatch, caplog):
    """One that waits for a device cannot be ended, not even by SIGKILL."""

    class Held:
        pid, stdin = 7, None

        def kill(self):
            pass

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("worker", timeout)

    pool = LocalPool(parse_study(STUDY, "x.toml"), (), [None], 1, 30)
    pool._process[0] = Held()
    monkeypatch.setattr(local, "_END_S", 0.0)
    pool.kill(0)
    assert "process 7 does not end; it is left behind" in caplog.text
    pool.close()
