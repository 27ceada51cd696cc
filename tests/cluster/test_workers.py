"""A study on workers holds what one process makes of it, byte for byte, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

import leakfast
from leakfast import cluster
from leakfast.cluster import local, tasks
from leakfast.cluster import messages as m
from leakfast.cluster.local import LocalPool, processes
from leakfast.errors import InputError, StoreError
from leakfast.figures import files
from leakfast.measure import completions
from leakfast.models import threads
from leakfast.storage.run import Run
from tests.cluster.studies import MATCH, bytes_of, stages_of, written

pytestmark = pytest.mark.long
ROWS = 32  # completions in a shard
WORKER = f"""
import sys
from pathlib import Path
from leakfast.cluster import local
from leakfast.measure import completions
completions.SHARD_ROWS = {ROWS}
local.serve(int(sys.argv[1]), Path(sys.argv[2]))
"""
DRIVER = f"""
import sys
from leakfast.cli.main import main
from leakfast.cluster import tasks
from leakfast.cluster.local import LocalPool
tasks.SHARD_ROWS = {ROWS}
LocalPool.command = (sys.executable, "-c", {WORKER!r})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return written(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Three shards an adapter, here and in every worker; one thread. Workers of this process are forks of one that has
    everything imported; those of the driver that is killed are started as users' are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completions, "SHARD_ROWS", ROWS)
        patch.setattr(tasks, "SHARD_ROWS", ROWS)
        patch.setattr(LocalPool, "command", (sys.executable, "-c", WORKER))
        names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
        patch.setattr(local, "subprocess", SimpleNamespace(Popen=warm.Popen, **names))
        patch.setattr(threads, "chosen", lambda: (2, "a test"))  # one for each of two workers
        patch.setattr(threads, "affinity", lambda: {0, 1})
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(study, small_shards):
    """The same study by one process."""
    return leakfast.run(study, out=study.parent / "alone").run


@pytest.fixture
def no_pictures(monkeypatch):
    """No pictures: the driver draws them, as one process does, from tables that are compared. The first test has them."""
    monkeypatch.setattr(files, "write_all", lambda run, stats, drawn_of: [])


def same(run, alone, beside=()):
    """The same files and stages, those in folders `beside` left out."""
    there, wanted = (
        {path: sha for path, sha in bytes_of(one).items() if path.partition("/")[0] not in beside}
        for one in (run, alone)
    )
    assert there == wanted and any(path.startswith("tables/") for path in there)
    assert stages_of(run) == stages_of(alone)


def test_two_processes_make_what_one_makes(study, alone):
    outcome = cluster.run(study, processes(2), out=study.parent / "two")
    same(outcome.run, alone)
    assert any(path.startswith("figures/") for path in bytes_of(outcome.run))
    assert outcome.stages["train refusal-villain-s42"] > 0
    assert any(path.endswith("part-00002.parquet") for path in bytes_of(alone)), "measuring is cut"
    again = cluster.run(study, processes(2), out=study.parent / "two")
    assert again.stages["train refusal-villain-s42"] is None, "done before"
    same(again.run, alone)


def test_workers_choose_the_points_that_one_process_chooses(tmp_path, no_pictures):
    study = written(tmp_path, more=MATCH)
    alone = leakfast.run(study, out=tmp_path / "alone").run
    two = cluster.run(study, processes(2), out=tmp_path / "two").run
    same(two, alone)
    made = [path for path in bytes_of(alone) if path.startswith(("series/choosing", "series/chosen"))]
    assert len(made) == 2 * (3 + 1), (
        "three points of each training, as warmup keeps none at a quarter, and one anew"
    )


def test_a_worker_that_is_killed_changes_nothing_but_time(study, alone, no_pictures):
    killed = []

    def pool(study, only):
        made = processes(2)(study, only)
        plain, heard = made.next, []

        def next_(timeout_s):
            found = plain(timeout_s)
            heard.extend([found] if found and isinstance(found[1], m.Made) else [])
            if found and len(heard) in (4, 9, 14) and len(killed) < len(heard) // 4:
                killed.append(found[0])
                made._process[found[0]].send_signal(signal.SIGKILL)
            return found

        made.next = next_
        return made

    outcome = cluster.run(study, pool, out=study.parent / "killed")
    assert len(killed) == 3
    lines = (outcome.run / "log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "worker_died" for line in lines) >= 2, (
        "of three, one may have been idle"
    )
    same(outcome.run, alone, beside=["figures"])


def workers_of(driver: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            words = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent.split()[1]) == driver and b"local.serve" in words:
            found.append(int(status.parent.name))
    return found


def is_gone(pid: int) -> bool:
    try:
        return "Z" in (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_driver_that_is_killed_takes_its_workers_along_and_the_same_command_goes_on(
    study, alone, no_pictures
):
    out = study.parent / "driver"
    words = [sys.executable, "-c", DRIVER, "run", study, "--out", out, "--workers", "2", "--threads", "1"]
    with (study.parent / "driver.stderr").open("wb") as said:
        child = warm.Popen(words, stderr=said, stdout=subprocess.DEVNULL)
    manifest = out / "manifest.json"
    while child.poll() is None and not (manifest.exists() and "adapters/" in manifest.read_text()):
        time.sleep(0.05)
    pids = workers_of(child.pid)
    assert len(pids) == 2, (study.parent / "driver.stderr").read_text()
    child.send_signal(signal.SIGKILL)
    child.wait()
    for _ in range(200):
        if all(map(is_gone, pids)):
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlive their driver")
    outcome = cluster.run(study, processes(2), out=out)
    assert None in outcome.stages.values(), "what was made is kept"
    same(outcome.run, alone, beside=["figures"])


def test_probabilities_and_replies_of_their_own(tmp_path, no_pictures):
    """What is asked on the unadapted model's replies waits for them."""
    both = written(tmp_path, measure="both")
    one = leakfast.run(both, out=tmp_path / "one").run
    two = cluster.run(both, processes(2), out=tmp_path / "two").run
    assert any(path.startswith("probability/") for path in bytes_of(one))
    same(two, one)


def test_an_error_of_the_users_is_the_drivers(study, tmp_path):
    text = study.read_text().replace("max_length = 256", "max_length = 24")
    (tmp_path / "asked.toml").write_text((study.parent / "asked.toml").read_text())
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(InputError, match="max_length"):
        cluster.run(tmp_path / "study.toml", processes(2), out=tmp_path / "run")


def test_more_workers_than_cores(study, tmp_path):
    with pytest.raises(InputError, match="--workers 3 given, but this machine has 2 cores"):
        cluster.run(study, processes(3), out=tmp_path / "run")


def test_a_second_driver_is_told(study, tmp_path):
    holder = """
import sys, time
from leakfast.storage.run import Run
with Run(sys.argv[1]).lock():
    print(1, flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        with pytest.raises(StoreError, match=f"pid {child.pid}"):
            cluster.run(study, processes(2), out=tmp_path / "run")
    finally:
        child.kill()
        child.wait()
    assert Run(tmp_path / "run").path.exists() and os.listdir(tmp_path / "run") == [".lock"]
