"""What breaks a run, kind by kind: writes that are refused, two commands on one folder, a writer that is killed, damaged files,
a worker that hangs. None of it counts a row that is not whole. Disks, folders and clocks are in test_writers.py, whole commands
in test_studies.py."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from leakfast.cluster import messages as m
from leakfast.cluster.driver import _Driver
from leakfast.cluster.tasks import Task
from leakfast.errors import LeakfastError, StoreError
from leakfast.pipeline.checks import verify
from leakfast.storage import disk, layout
from leakfast.storage.run import Run

FRAME = pl.DataFrame({"n": list(range(50))})


def name(number: int) -> str:
    return layout.shard("completions/marker/base", number)


def filled(folder: Path, shards: int = 4) -> Run:
    run = Run(folder).create("name = 'x'\n")
    for number in range(shards):
        run.add_shard(name(number), FRAME, request=str(number))
    return run


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("tries", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_write_that_is_refused_leaves_whole_shards_and_the_same_call_goes_on(
    tmp_path, monkeypatch, tries, code
):
    """At a drawn moment of the writes (bytes, sync, rename) the system refuses; what was counted before is there, no half file
    is, and the next call makes what is missing."""
    draw, plain = random.Random(code), os.fsync
    for number in range(tries):
        folder = tmp_path / str(number)
        left = draw.randrange(1, 14)

        def refuse(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(code, os.strerror(code))
            plain(descriptor)

        monkeypatch.setattr(disk.os, "fsync", refuse)
        with pytest.raises(StoreError, match="cannot be written"):
            filled(folder)
        monkeypatch.setattr(disk.os, "fsync", plain)
        run = Run(folder)
        before = run.shards() if (folder / "manifest.json").exists() else []
        assert all(run.read(one).equals(FRAME) for one in before)
        assert not list(folder.rglob("*.tmp*"))
        again = filled(folder)
        assert again.shards() == [name(k) for k in range(4)]
        assert again.read().height == 4 * FRAME.height, "none lost, none twice"
        shutil.rmtree(folder)


def test_a_run_on_a_folder_that_may_not_be_written_can_still_be_verified(tmp_path, monkeypatch):
    """Every way to write is refused, as a file system that is mounted to be read does."""
    run = filled(tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, what in (
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "touch"),
    ):
        monkeypatch.setattr(owner, what, refuse)
    assert verify(run.path).checks[0].wrong == []
    with pytest.raises(StoreError, match="file system that can be written"):
        Run(run.path).add_shard(name(9), FRAME)


# ── the clock ────────────────────────────────────────────────────────────────────────────────────────
def test_no_duration_is_taken_from_the_clock():
    root = Path(disk.__file__).resolve().parents[1]
    wall = re.compile(r"time\.time\(\)\s*[-+<>]|[-+<>]=?\s*time\.time\(\)|utcnow|datetime\.now\([^)]*\)\s*-")
    users = [path.name for path in root.rglob("*.py") if wall.search(path.read_text(encoding="utf-8"))]
    assert users == [], "durations are time.monotonic's"


# ── two commands, and one that dies ──────────────────────────────────────────────────────────────────
WRITER = """
import sys
from leakfast.storage.run import Run
import polars as pl
run = Run(sys.argv[1])
with run.lock():
    run.create()
    number = len(run.shards())
    while number < int(sys.argv[2]):
        run.add_shard(f"completions/marker/base/part-{number:05d}.parquet", pl.DataFrame({"n": list(range(50))}))
        number += 1
        print(number, flush=True)
"""


def writer(folder: Path, shards: int) -> subprocess.Popen:
    words = [sys.executable, "-c", WRITER, str(folder), str(shards)]
    root = str(Path(disk.__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_commands_on_one_folder(tmp_path):
    one = writer(tmp_path / "run", 100_000)
    try:
        one.stdout.readline()
        with pytest.raises(StoreError, match=f"pid {one.pid}"):
            filled(tmp_path / "run")
    finally:
        one.kill()
        one.communicate()
    run = filled(tmp_path / "run", 1)
    assert run.read(name(0)).equals(FRAME), "the lock went with the process that held it"


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_at_drawn_moments(tmp_path, kills):
    """SIGKILL while shards are written: what the writer said it had stored is there, whole and once."""
    draw, folder = random.Random(kills), tmp_path / "run"
    for _ in range(kills):
        child = writer(folder, 100_000)
        said = [child.stdout.readline()]
        until = time.monotonic() + draw.uniform(0, 0.4)
        while time.monotonic() < until:
            said.append(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        told = int((b"".join(said) + rest).split()[-1])
        run = Run(folder)
        names = run.shards()
        assert told <= len(names) <= told + 1, "nothing that was stored is lost"
        assert names == [name(k) for k in range(len(names))]
        assert run.read().height == len(names) * FRAME.height
        found = verify(folder)
        assert [check.wrong for check in found.checks[:2]] == [[], []]


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("tries", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_any_flipped_bit_of_any_file_is_told_by_verify(tmp_path, tries):
    """Of files that have a hash or a check: whichever byte of them is another, verify names the file, and changes nothing."""
    run, draw = filled(tmp_path / "run"), random.Random(tries)
    files = [*run.shards(), layout.MANIFEST, layout.JOURNAL, layout.STUDY]
    for _ in range(tries):
        relpath = draw.choice(files)
        path = run.path / relpath
        content = path.read_bytes()
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
        damaged = path.read_bytes()
        found = verify(run.path)
        told = [*found.wrong, *(note for check in found.checks for note in check.notes if "mid-word" in note)]
        blank = (
            json.loads(content) == _read(damaged)
            if relpath == layout.MANIFEST
            else content.split() == damaged.split()
        )
        assert blank or any(relpath in sentence or "mid-word" in sentence for sentence in told), (relpath, at)
        assert path.read_bytes() == damaged and not (run.path / "quarantine").exists()
        path.write_bytes(content)
    assert verify(run.path).checks[0].wrong == []


def _read(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────
class Silent:
    """Workers of which the first `hangs` say nothing of their task."""

    size = 1

    def __init__(self, hangs: int) -> None:
        self.hangs, self.said, self.killed = hangs, [], 0

    def start(self, worker):
        self.said.append((worker, m.Ready("here")))

    def give(self, worker, task, files, stages):
        if self.killed >= self.hangs:
            self.said.append((worker, m.Done({task.name: 1.0})))

    def next(self, timeout_s):
        return self.said.pop(0) if self.said else time.sleep(0.01)

    def kill(self, worker):
        self.killed += 1


@pytest.mark.parametrize("hangs", [1, 2])
def test_a_worker_that_hangs_is_ended_and_its_task_given_to_another(tmp_path, hangs):
    run, pool = Run(tmp_path / "run").create(), Silent(hangs)
    _Driver(run, pool, [Task("train", "marker", ("a",))], 0.05).all(lambda *_: None)
    assert pool.killed == hangs
    events = [json.loads(line)["event"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert events.count("worker_died") == hangs and events[-1] == "cluster"


def test_a_task_of_which_every_worker_hangs_ends_the_command(tmp_path):
    run, pool = Run(tmp_path / "run").create(), Silent(99)
    with pytest.raises(LeakfastError, match="3 workers died of it"):
        _Driver(run, pool, [Task("train", "marker", ("a",))], 0.05).all(lambda *_: None)
