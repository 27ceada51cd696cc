"""SIGKILL of the raylet of a study on Ray actors at drawn moments: the command ends and says so, what was stored stays, and the
same command goes on to the run that one process makes, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.studies import bytes_of
from tests.faults.test_kills import kept, stored

pytest.importorskip("ray", reason="ray is not installed (pip install leakfast[cluster])")
pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]
LIMIT_S = 900.0


def command(study: Path, out: Path, said: Path) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "leakfast",
        "run",
        study,
        "--out",
        out,
        "--cluster",
        "auto",
        "--workers",
        "2",
    ]
    with said.open("w") as file:
        return subprocess.Popen(
            list(map(str, words)),
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def raylets_of(pid: int) -> list[int]:
    """Processes of that name that a command has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid), "-x", "raylet"], capture_output=True, text=True, check=False
    )
    return [int(word) for word in found.stdout.split()]


@pytest.mark.parametrize("kills", [20])
def test_raylets_that_are_killed(small_study, undisturbed, tmp_path, kills):
    draw, done, runs, ends = random.Random(kills), 0, 0, []
    out, said = tmp_path / "run-0", tmp_path / "said"
    while done < kills:
        child, limit = command(small_study, out, said), time.monotonic() + LIMIT_S
        while child.poll() is None and not raylets_of(child.pid):
            assert time.monotonic() < limit, said.read_text()
            time.sleep(0.05)
        more = draw.randrange(3)
        wanted = len(stored(out)) + more
        while child.poll() is None and len(stored(out)) < wanted:
            assert time.monotonic() < limit, said.read_text()
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 2.0))
        before, raylets = stored(out), raylets_of(child.pid)
        if child.poll() is None and raylets:
            os.kill(raylets[0], signal.SIGKILL)
            began = time.monotonic()
            code = child.wait(LIMIT_S)
            ends.append(time.monotonic() - began)
            print(
                f"try {done}: {more} files more, {len(before)} then, code {code}, {ends[-1]:.0f} s",
                flush=True,
            )
            kept(before, out)
            assert code in (0, 1, 3), said.read_text()
            last = said.read_text().strip().splitlines()[-1]
            assert code != 1 or ("Error:" in last and "Ray" in last), said.read_text()
            assert "Traceback" not in said.read_text(), said.read_text()
            done += 1
            if code == 1:
                continue
        assert child.wait(LIMIT_S) in (0, 3), said.read_text()
        assert bytes_of(out) == bytes_of(undisturbed)
        runs += 1
        out = tmp_path / f"run-{runs}"
    assert command(small_study, out, said).wait(LIMIT_S) in (0, 3), said.read_text()
    assert bytes_of(out) == bytes_of(undisturbed), "none lost, none twice, every table the same"
    print(f"{done} tries, {runs + 1} whole runs; a command ends {max(ends):.0f} s after it at most")
