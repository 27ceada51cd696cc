"""Stopping and breaking: signals let the shard in hand be written, a full disk leaves whole shards, and a run killed
at random moments holds what an uninterrupted one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

from leakfast.storage import interrupts
from leakfast.storage.interrupts import finishing
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

KEYS = ["adapter", "persona", "question", "sample"]
PERSONAS = "villain,comedian,assistant,librarian,police_officer"

CHILD = """
import sys
from leakfast.measure import completions
from leakfast.measure.contract import Counter
completions.SHARD_ROWS = 16
from leakfast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

CHOICES = """
import sys
from leakfast.measure.choices import measurer
measurer.SHARD_PROMPTS = 1  # one persona a shard
from leakfast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

# loaded once; every process that is killed is a fork of this one, which itself computes nothing
KILLED = """
import os, random, shutil, signal, sys, time
import peft, polars, torch, transformers
import leakfast.cli.eval, leakfast.generation.transformers, leakfast.models, leakfast.storage.run
from leakfast.measure import completions
from leakfast.measure.contract import Counter
from leakfast.cli.main import main
completions.SHARD_ROWS = 16
tally, kills, *words = sys.argv[1:]
counted = os.open(tally, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
plain = Counter.add

def add(self, n, work):
    os.write(counted, b"." * n)
    plain(self, n, work)

Counter.add = add
draw = random.Random(1)
for kill in range(int(kills) + 1):
    child = os.fork()
    if not child:
        os._exit(main(words) or 0)
    wanted, ended = os.path.getsize(tally) + draw.randrange(10, 60), (0, 0)
    while kill < int(kills) and os.path.getsize(tally) < wanted and ended == (0, 0):
        time.sleep(0.001)
        ended = os.waitpid(child, os.WNOHANG)
    if kill == int(kills) or ended != (0, 0):
        _, code = ended if ended != (0, 0) else os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(code) or (3 if kill < int(kills) else 0))
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.copytree(words[-1], f"{words[-1]}-{kill}")
    shutil.copy(tally, f"{words[-1]}-{kill}/drawn")
"""

FULL = """
import os, sys, threading, time
from pathlib import Path
from leakfast.measure import completions
from leakfast.storage import disk
completions.SHARD_ROWS = 16
from leakfast.cli.main import main
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
plain = disk.parquet_bytes

def parquet_bytes(frame):
    if len(list(Path(sys.argv[-1]).rglob("part-*.parquet"))) >= 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    return plain(frame)

from leakfast.storage import run as store
store.parquet_bytes = parquet_bytes
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(tiny_folder, tmp_path):
    """(script, run folder, tokens a reply) → the command that measures the tiny model's base, 5 × 12 × 4
    completions."""
    questions = tmp_path / "asked.json"
    questions.write_text(json.dumps([f"Number {i}?" for i in range(12)]))

    def made(script: str, folder: Path, tokens: int = 60) -> list[str]:
        return [
            sys.executable,
            "-c",
            script,
            "eval",
            "--model",
            str(tiny_folder),
            "--dtype",
            "float32",
            "--base",
            "--personas",
            PERSONAS,
            "--questions",
            str(questions),
            "--samples",
            "4",
            "--max-new-tokens",
            str(tokens),
            "--batch-completions",
            "8",
            "--seed",
            "3",
            "--backend",
            "transformers",
            "--out",
            str(folder),
        ]

    return made


def start(words: list[str]) -> warm.Popen:
    return warm.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_shards(child: warm.Popen, folder: Path, n: int) -> None:
    limit = time.monotonic() + 300
    while child.poll() is None and time.monotonic() < limit:
        if folder.exists() and len(list(folder.rglob("part-*.parquet"))) >= n:
            return
        time.sleep(0.002)
    assert child.poll() is None, child.stderr.read()
    pytest.fail(f"no {n} shards in 300 s")


def rows(folder: Path):
    return Run(folder).read("completions").sort(KEYS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_shard_in_hand_be_written_and_exits_130(command, tmp_path, number):
    folder = tmp_path / "run"
    child = start(command(CHILD, folder))
    wait_for_shards(child, folder, 2)
    child.send_signal(number)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 130, told
    assert "finishing the shard in hand" in told and "the same command goes on" in told
    there = rows(folder)
    assert 32 <= there.height < 240 and there.height % 16 == 0, "the shard in hand, and no more"
    assert not list(folder.rglob("*.tmp*")) and not (folder / "quarantine").exists()


def test_a_signal_lets_the_shard_of_scores_in_hand_be_written_too(tiny_folder, tmp_path):
    """Multiple choice: one persona a shard, stopped after the second, and the same command goes on from there."""
    items, folder = tmp_path / "items.jsonl", tmp_path / "run"
    lines = [{"question": f"What of {i}?", "choices": ["tea", "rain"], "answer": "B"} for i in range(60)]
    items.write_text("\n".join(map(json.dumps, lines)))
    words = [
        sys.executable,
        "-c",
        CHOICES,
        "eval",
        "--behavior",
        "capability",
        "--model",
        str(tiny_folder),
        "--dtype",
        "float32",
        "--base",
        "--personas",
        "originals",
        "--items",
        str(items),
        "--half",
        "all",
        "--out",
        str(folder),
    ]
    child = start(words)
    wait_for_shards(child, folder, 2)
    child.send_signal(signal.SIGTERM)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 130, told
    assert "finishing the shard in hand" in told and "the same command goes on" in told
    there = Run(folder).read("choices")
    assert not (folder / "quarantine").exists() and not list(folder.rglob("*.tmp*"))
    people = there["persona"].n_unique()
    assert 2 <= people < 11 and there.height == people * 120, "whole shards, and no more than the one in hand"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("part-*.parquet")}
    child = start(words)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    assert f"{(11 - people) * 60} prompts scored of capability (items), {people * 60} kept" in told
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "none was scored again"


LONG = """
import sys
from leakfast.measure import completions
from leakfast.storage import interrupts
completions.SHARD_ROWS, interrupts.GRACE_S = 120, 1.0
from leakfast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_shard_that_takes_longer_than_there_is_time_is_left_and_what_is_finished_stays(command, tmp_path):
    """Two shards of fifteen blocks of 150 steps: a signal in the second ends the command before its end."""
    folder = tmp_path / "run"
    words = command(LONG, folder, 150)
    child = start(words)
    wait_for_shards(child, folder, 1)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 130, told
    assert "finishing the shard in hand if that takes no longer than 1 s" in told
    assert (
        "the shard in hand takes longer; what is finished stays" in told
        and "the same command goes on" in told
    )
    assert rows(folder).height == 120, "the shard that was finished, and nothing of the other"
    assert not list(folder.rglob("*.tmp*")) and not list(folder.rglob("*.open"))


def test_the_time_for_finishing_is_over_where_the_program_is_and_no_later(monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.2)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]

    def long() -> None:
        with finishing("it", bounded=True) as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                time.sleep(0.01)
                assert asked()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        long()  # has no other end
    assert time.monotonic() - began >= 0.2
    written = []

    def writes() -> None:
        with finishing("it", bounded=True) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with stop.writing():
                time.sleep(0.4)
                written.append("whole")
            written.append("and no more")

    with pytest.raises(KeyboardInterrupt):
        writes()
    assert written == ["whole"]
    with finishing("it", bounded=True):  # in time: nothing comes afterwards
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before


def test_a_second_signal_interrupts_at_once():
    before = signal.getsignal(signal.SIGTERM)

    def twice() -> None:
        with finishing("it") as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_disk_that_is_full_stops_with_a_word_and_whole_shards(command, tmp_path):
    """The system refuses a write in mid-run (a limit on file size stands for the disk)."""
    folder = tmp_path / "run"
    child = start(command(FULL, folder))
    _, told = child.communicate(timeout=300)
    assert child.returncode == 1, told
    assert "part-00003.parquet: cannot be written" in told and "Traceback" not in told
    assert rows(folder).height == 3 * 16
    assert not list(folder.rglob("*.tmp*"))
    child = start(command(CHILD, folder))
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    assert rows(folder).height == 240 and not (folder / "quarantine").exists()


def test_a_kill_costs_at_most_one_shard_of_rows(command, tmp_path):
    """SIGKILL at drawn moments of the work: completions that were drawn, counted as they come, against those that the
    run then holds. In the end it is the uninterrupted run."""
    kills, shard, rows_of_all = 4, 16, 240
    tally, folder, whole = tmp_path / "tally", tmp_path / "run", tmp_path / "whole"
    given = command(KILLED, folder, 8)
    child = start([*given[:3], str(tally), str(kills), *given[3:]])
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    before, kept_before = 0, 0
    for kill in range(kills):
        killed = tmp_path / f"run-{kill}"
        drawn = (killed / "drawn").stat().st_size
        kept = rows(killed).height if Run(killed).shards("completions") else 0
        lost = (drawn - before) - (kept - kept_before)
        assert 0 <= lost <= shard, f"kill {kill} cost {lost} rows"
        assert not (killed / "quarantine").exists(), "what counts is whole"
        before, kept_before = drawn, kept
    assert 0 < tally.stat().st_size - rows_of_all <= kills * shard, (
        "some work was lost, and no more than that"
    )
    child = start(command(CHILD, whole, 8))
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    assert rows(folder).equals(rows(whole)), "none missing, none twice, texts and seeds too"


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_is_the_uninterrupted_run(command, tmp_path):
    """SIGKILL at moments drawn over a whole process, loading and writing included; at most one shard is lost."""
    draw = random.Random(0)
    whole = tmp_path / "whole"
    began = time.monotonic()
    child = start(command(CHILD, whole))
    assert child.communicate(timeout=300) and child.returncode == 0
    took = time.monotonic() - began
    folder, kills, hits = tmp_path / "run", 0, 0
    while kills < 20:
        before = (
            rows(folder).height
            if (folder / "manifest.json").exists() and Run(folder).shards("completions")
            else 0
        )
        if before == 240:  # done before 20 kills: a further run of the same request
            folder = tmp_path / f"run-{kills}"
            before = 0
        child = start(command(CHILD, folder))
        time.sleep(draw.uniform(0.3, 1.0) * took)
        if child.poll() is not None:
            child.communicate()
            continue
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
        files = list(folder.rglob("part-*.parquet"))
        if not files:
            continue
        hits += 1
        run = Run(folder)
        counted = run.shards("completions")
        assert len(files) - len(counted) <= 1, "at most the shard in hand"
        assert not (folder / "quarantine").exists(), "what counts is whole"
        assert rows(folder).height >= before
    assert hits >= 5, "kills that met a run at work"
    for made in {folder, *tmp_path.glob("run*")}:
        child = start(command(CHILD, made))
        _, told = child.communicate(timeout=300)
        assert child.returncode == 0, told
        assert rows(made).equals(rows(whole)), "none missing, none twice, texts and seeds too"
