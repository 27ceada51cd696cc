"""SIGKILL of drivers and of workers at drawn moments of a study: what was stored stays, and in the end it is the run that one
process makes, byte for byte. The first of each kind is in tests/cluster; here are many."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import leakfast
from leakfast.measure import completions
from leakfast.pipeline.checks import verify
from tests.cluster.studies import bytes_of, stages_of, written
from tests.cluster.test_workers import DRIVER, ROWS, workers_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]
LIMIT_S = 600.0  # for a driver to store the next file


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return written(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def alone(study):
    """The same study by one process with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completions, "SHARD_ROWS", ROWS)
        out = leakfast.run(study, out=study.parent / "alone").run
    torch.set_num_threads(before)
    return out


def stored(out: Path) -> dict[str, str]:
    """Path → hash of what the manifest counts; it is replaced whole, so it can be read at any moment."""
    return bytes_of(out) if (out / "manifest.json").exists() else {}


def driver(study: Path, out: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", DRIVER, "run", study, "--out", out, "--workers", "2", "--threads", "1"]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def at_a_drawn_moment(child: subprocess.Popen, out: Path, draw: random.Random) -> bool:
    """Wait until so many more files were stored, and a moment longer; whether the driver still works then."""
    wanted, limit = len(stored(out)) + draw.randrange(0, 3), time.monotonic() + LIMIT_S
    while child.poll() is None and (len(stored(out)) < wanted or len(workers_of(child.pid)) < 2):
        assert time.monotonic() < limit, "nothing was stored for a long time"
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 1.0))
    return child.poll() is None


def kept(before: dict[str, str], out: Path) -> None:
    now = stored(out)
    lost = {
        path for path, digest in before.items() if now.get(path) != digest and not path.startswith("tables/")
    }
    assert not lost, "a file that was stored is gone or another"


def whole(study: Path, out: Path, alone: Path) -> None:
    """Finish a run, and compare."""
    child = driver(study, out)
    assert child.wait() in (0, 3)
    assert bytes_of(out) == bytes_of(alone), "none lost, none twice, every table the same"
    assert stages_of(out) == stages_of(alone)
    found = {check.name: check.wrong for check in verify(out).checks}
    assert found["bytes"] == found["journal"] == found["rows"] == []


@pytest.mark.parametrize("kills", [3, 20])
def test_drivers_that_are_killed(study, alone, kills):
    draw, runs, done = random.Random(kills), 0, 0
    out = study.parent / f"drivers-{kills}-0"
    while done < kills:
        child = driver(study, out)
        if not at_a_drawn_moment(child, out, draw):
            child.wait()
            whole(study, out, alone)
            runs += 1
            out = study.parent / f"drivers-{kills}-{runs}"
            continue
        before = stored(out)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept(before, out)
        done += 1
    whole(study, out, alone)


@pytest.mark.parametrize("kills", [3, 20])
def test_workers_that_are_killed(study, alone, kills):
    draw, runs, done = random.Random(100 + kills), 0, 0
    out = study.parent / f"workers-{kills}-0"
    child = driver(study, out)
    while done < kills:
        if not at_a_drawn_moment(child, out, draw):
            if child.wait() in (0, 3):  # else: three workers died of one task, and the same command goes on
                whole(study, out, alone)
                runs += 1
                out = study.parent / f"workers-{kills}-{runs}"
            child = driver(study, out)
            continue
        pids = workers_of(child.pid)
        if pids:
            before = stored(out)
            subprocess.run(["kill", "-9", str(draw.choice(pids))], check=False)
            kept(before, out)
            done += 1
    child.wait()
    whole(study, out, alone)
    told = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["event"] for line in told)
