"""The store's writer by itself under what a machine does to it: disks of drawn sizes that are full, folders that may not be
written, commands that begin at once, clocks that jump. What takes whole commands is in test_studies.py; here are many tries of
what lies in the writer alone. Each is drawn by its number, and printed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from leakfast.errors import StoreError
from leakfast.pipeline.checks import verify
from leakfast.storage import disk, layout
from leakfast.storage.run import Run
from tests.faults.clock import library
from tests.faults.limited import as_any_user, grow, small_disk

KB, SHARDS = 1024, 12


def name(number: int) -> str:
    return layout.shard("completions/marker/base", number)


def frame(number: int) -> pl.DataFrame:
    """Texts that cannot be pressed together, of a shard's own length."""
    draw = random.Random(number)
    return pl.DataFrame({"text": [draw.randbytes(60).hex() for _ in range(draw.randrange(20, 400))]})


FRAMES = [frame(number) for number in range(SHARDS)]


def fill(folder: Path) -> Run:
    """What a command does that goes on where it was."""
    run = Run(folder).create("name = 'x'\n")
    with run.lock():
        for number in range(SHARDS):
            if not run.has(name(number)):
                run.add_shard(name(number), FRAMES[number], request=str(number))
        run.mark_done("all of it", "inputs", files=[name(number) for number in range(SHARDS)])
    return run


def bytes_of(folder: Path) -> dict[str, str]:
    return {path: entry["sha256"] for path, entry in Run(folder).manifest["shards"].items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    return bytes_of(fill(tmp_path_factory.mktemp("undisturbed") / "run").path)


def goes_on(folder: Path, undisturbed: dict[str, str], what: str) -> None:
    """After a fault: whole shards from the first on, and no half file; the same call makes the run that nothing disturbed."""
    before = bytes_of(folder) if (folder / "manifest.json").exists() else {}
    assert before == {name(k): undisturbed[name(k)] for k in range(len(before))}
    assert Run(folder).shards() == sorted(before), "what was stored is whole"
    began = time.monotonic()
    run = fill(folder)
    took = time.monotonic() - began
    assert bytes_of(folder) == undisturbed and run.read().equals(pl.concat(FRAMES)), "none lost, none twice"
    assert run.stage_done("all of it", "inputs") and not (folder / layout.QUARANTINE).exists()
    assert not list(folder.rglob("*.tmp*"))
    found = verify(folder)
    assert [check.wrong for check in found.checks[:2]] == [[], []]
    print(f"{what}: {len(before)} of {SHARDS} shards were stored; the rest in {took:.2f} s")


@pytest.mark.parametrize("tries", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_disks_that_are_full(tmp_path, undisturbed, tries):
    for number in range(tries):
        draw = random.Random(1000 + number)
        size = draw.randrange(12, 116) * KB  # all of it takes more
        with small_disk(tmp_path / str(number), size) as small:
            with pytest.raises(StoreError, match="Free some space"):
                fill(small / "run")
            assert not list(small.rglob("*.tmp*"))
            grow(small, size + 600 * KB)
            goes_on(small / "run", undisturbed, f"try {number}, {size // KB} KB")


@pytest.mark.parametrize("tries", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_folders_that_may_not_be_written(tmp_path, monkeypatch, undisturbed, tries):
    """At a drawn write the right to write is taken from the run's folder, that of its shards, both, or the journal alone."""
    plain, taken, refusals = os.fsync, [], 0
    for number in range(tries):
        draw, folder = random.Random(2000 + number), tmp_path / str(number) / "run"
        left, leaf = draw.randrange(1, 4 * SHARDS), (folder / name(0)).parent
        wanted = draw.choice([[folder], [leaf], [folder, leaf], [folder / layout.JOURNAL]])

        def take(descriptor: int, wanted: list[Path] = wanted) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                taken.extend(path for path in wanted if path.exists())
                for path in taken:
                    path.chmod(0o500 if path.is_dir() else 0o400)
            plain(descriptor)

        monkeypatch.setattr(disk.os, "fsync", take)
        ended = "wrote there no more"
        with as_any_user():
            try:
                fill(folder)
            except StoreError as error:
                ended, refusals = error.message, refusals + 1
                assert "Permission denied" in ended and "writable for you" in ended
            what = f"try {number}, {[path.name for path in taken]} closed, {ended.partition(': ')[0].rpartition('/')[2]}"
            monkeypatch.setattr(disk.os, "fsync", plain)
            while taken:
                path = taken.pop()
                path.chmod(0o700 if path.is_dir() else 0o600)
            goes_on(folder, undisturbed, what)
    assert refusals > 0.8 * tries


# ── commands that begin at once ──────────────────────────────────────────────────────────────────────
def _writes(folder: Path, begin: int, pause_s: float) -> int:
    """A command: 0 where it did its work, 7 where another held the run. Of bytes alone, since polars outlives no fork."""
    os.read(begin, 1)
    try:
        with Run(folder).lock() as run:
            run.create("name = 'x'\n")
            for number in range(6):
                time.sleep(pause_s)
                if not run.has(f"data/{number}"):
                    run.add_file(f"data/{number}", bytes([number]) * 1000)
    except StoreError as error:
        return 7 if "another leakfast process (pid " in error.message else 8
    return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forks of this process")
@pytest.mark.parametrize("tries", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_commands_that_begin_at_once(tmp_path, tries):
    """Two or three on a folder that is not there yet: one has it, the others are told or come after, each row is there once."""
    for number in range(tries):
        draw, folder = random.Random(3000 + number), tmp_path / str(number)
        begin, go = os.pipe()
        children = []
        for _ in range(draw.randrange(2, 4)):
            pause_s = draw.choice([0.0, 0.001, 0.01])
            if not (child := os.fork()):
                os._exit(_writes(folder, begin, pause_s))
            children.append(child)
        os.write(go, b"." * len(children))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(begin)
        os.close(go)
        assert set(codes) <= {0, 7} and 0 in codes, codes
        run = Run(folder)
        assert run.shards() == [f"data/{k}" for k in range(6)]
        told = [json.loads(line) for line in (folder / layout.JOURNAL).read_text().splitlines()]
        assert sorted(e["path"] for e in told if e["event"] == "shard") == run.shards(), (
            "each was written once"
        )
        assert not list(folder.rglob("*.tmp*")) and not (folder / layout.QUARANTINE).exists()
        assert [check.wrong for check in verify(folder).checks[:2]] == [[], []]
        print(f"try {number}: {codes}")


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────
JUMPING = """
import ctypes, json, os, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.faults import test_writers as w
for number in range(int(sys.argv[2])):
    draw, folder = random.Random(4000 + number), Path(sys.argv[1]) / str(number)
    ctypes.CDLL(None).jumping_clock(ctypes.c_uint64(1 + draw.randrange(1 << 62)))
    for _ in range(draw.randrange(1, 4)):  # commands, each under the clock that the last one left
        run = w.fill(folder)
        for path in folder.rglob("*"):
            if draw.random() < 0.5:
                when = draw.randrange(-10**9, 5 * 10**9)
                os.utime(path, (when, when))
        if draw.random() < 0.3:
            (folder / "manifest.json").unlink()
    times = [json.loads(line)["time"] for line in (folder / "log.jsonl").read_text().splitlines()]
    back = sum(a > b for a, b in zip(times, times[1:]))
    print(json.dumps([w.bytes_of(folder), back, run.read().equals(w.pl.concat(w.FRAMES))]), flush=True)
"""


@pytest.mark.parametrize("tries", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_clocks_that_jump(tmp_path, undisturbed, tries):
    """The clock of a whole process, up to ten years to either side at every fourth look, with files from before 1970 and after
    2100: what is stored is counted by its bytes, and by no time."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "LD_PRELOAD": str(library(tmp_path)), "PYTHONPATH": paths}
    words = [sys.executable, "-c", JUMPING, str(tmp_path), str(tries), str(root)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == tries
    for number, (stored, back, same) in enumerate(found):
        assert stored == undisturbed and same, number
        assert not (tmp_path / str(number) / layout.QUARANTINE).exists()
        print(f"try {number}: {back} lines of the journal before the one above them")
    assert sum(back for _, back, _ in found) > tries, "they did jump"
