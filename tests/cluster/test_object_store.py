"""A whole study whose run lies on a real S3 server is the run in a folder, byte for byte: also where its driver is killed and
another machine goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import leakfast
from leakfast.cli.main import main
from leakfast.measure import completions
from leakfast.storage.mirror import reading_copy
from leakfast.storage.objects import Objects
from tests.cluster import test_workers
from tests.cluster.studies import bytes_of, stages_of, written
from tests.object_store import environment, make_bucket, serving

pytestmark = [pytest.mark.long, pytest.mark.slow]
ROWS = 32  # completions in a shard
LEASE_S = 6.0
AT = "s3://bucket/studies/shared"
DRIVER = f"""
import sys
import torch
torch.set_num_threads(1)
from leakfast.cli.main import main
from leakfast.measure import completions
from leakfast.storage import lease
completions.SHARD_ROWS, lease.SECONDS = {ROWS}, {LEASE_S}
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server with a bucket; this process and those it starts use it. (folder, what stands before the server)"""
    folder = tmp_path_factory.mktemp("stored")
    with serving() as (endpoint, faulty), pytest.MonkeyPatch.context() as patch:
        for name, value in environment(endpoint, folder / "here").items():
            patch.setenv(name, value)
        patch.setattr(completions, "SHARD_ROWS", ROWS)
        make_bucket()
        yield folder, faulty


WITH_WORKERS = test_workers.DRIVER.replace(
    "import sys\n", f"import sys\nfrom leakfast.storage import lease\nlease.SECONDS = {LEASE_S}\n", 1
)


def driver(study: Path, cache: Path, *more: str, program: str = DRIVER) -> subprocess.Popen:
    command = [sys.executable, "-c", program, "run", str(study), *more]
    return subprocess.Popen(
        command,
        env={**os.environ, "LEAKFAST_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(running: subprocess.Popen, shards: int, address: str = AT) -> None:
    """SIGKILL when so many shards of completions are in the store."""
    deadline = time.monotonic() + 300
    while completions_in(address) < shards and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    told = running.communicate()[0]
    assert running.returncode == -signal.SIGKILL, told


def completions_in(address: str) -> int:
    found = Objects(address).get("manifest.json")
    shards = json.loads(found.content)["shards"] if found is not None else {}
    return sum(path.startswith("completions/") for path in shards)


def test_a_driver_that_is_killed_is_resumed_by_another_machine(place):
    folder, faulty = place
    study = written(folder)
    study.write_text(
        study.read_text().replace('name = "shared"', 'name = "shared"\nruns = "s3://bucket/studies"')
    )
    faulty.fail_every = 10
    killed = driver(study, folder / "one")
    while completions_in(AT) < 1 and killed.poll() is None:
        time.sleep(0.2)
    refused = driver(study, folder / "two")  # while the first one works
    assert refused.wait(300) == 1
    assert "another driver" in refused.communicate()[0]
    kill_after(killed, 2)
    before = json.loads(Objects(AT).get("manifest.json").content)["shards"]
    time.sleep(LEASE_S + 2)
    resumed = driver(study, folder / "two", "--json")
    told = resumed.communicate(timeout=1500)[0]
    assert resumed.returncode == 0, told
    assert AT in told
    run = reading_copy(AT)
    kept = json.loads((run / "manifest.json").read_text())["shards"]
    assert {p: before[p]["sha256"] for p in before} == {p: kept[p]["sha256"] for p in before}
    alone = leakfast.run(study, out=folder / "alone").run
    assert bytes_of(run) == bytes_of(alone)
    assert stages_of(run) == stages_of(alone)
    assert faulty.failed > 0 and faulty.listings == 0
    _commands_read_it(run)


def _commands_read_it(run: Path) -> None:
    for words in (["show", AT, "--json"], ["verify", AT, "--json"], ["report", AT], ["stats", AT, "--json"]):
        etag = Objects(AT).get("manifest.json").etag
        assert main(words) == 0, words
        assert Objects(AT).get("manifest.json").etag == etag  # nothing was written there
    assert (run / "report.html").is_file()


def test_two_sets_of_workers_resume_each_other(place):
    folder, faulty = place
    (folder / "shared").mkdir()
    study, at, words = written(folder / "shared"), "s3://bucket/workers/shared", ("--workers", "2")
    words = (*words, "--out", at)
    faulty.fail_every = 10
    for number, shards in enumerate((2, 4)):
        kill_after(driver(study, folder / f"w{number}", *words, program=WITH_WORKERS), shards, at)
        time.sleep(LEASE_S + 2)
    last = driver(study, folder / "w0", *words, program=WITH_WORKERS)  # the first machine again
    told = last.communicate(timeout=1500)[0]
    assert last.returncode == 0, told
    alone = leakfast.run(study, out=folder / "alone-too").run
    run = reading_copy(at)
    assert bytes_of(run) == bytes_of(alone)
    assert stages_of(run) == stages_of(alone)
