"""The same on a real Ray cluster of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import leakfast
from leakfast import cluster
from leakfast.cluster import messages as m
from leakfast.cluster.actors import actors
from leakfast.errors import InputError
from tests.cluster.studies import bytes_of, stages_of, written

ray = pytest.importorskip("ray", reason="ray is not installed (pip install leakfast[cluster])")
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A study by one process with one thread, as every actor has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shared")
    yield leakfast.run(written(folder), out=folder / "alone").run
    torch.set_num_threads(before)


@pytest.fixture
def here(monkeypatch):
    """A cluster of this machine with two cores, however many it has."""
    plain = ray.init

    def init(*words, address=None, **more):
        return plain(*words, **more, **({"address": address} if address else {"num_cpus": 2}))

    monkeypatch.setattr(ray, "init", init)
    yield
    ray.shutdown()


def test_two_actors_make_what_one_process_makes_though_one_is_killed(alone, here):
    killed = []

    def pool(study, only):
        made = actors("auto", 2)(study, only)
        assert made.size == 2
        plain = made.next

        def next_(timeout_s):
            found = plain(timeout_s)
            if found and not killed and isinstance(found[1], m.Made) and "adapters/" in found[1].relpath:
                killed.append(int(made.where[found[0]].rpartition(":")[2]))
                os.kill(killed[0], signal.SIGKILL)
            return found

        made.next = next_
        return made

    outcome = cluster.run(alone.parent / "study.toml", pool, out=alone.parent / "ray")
    assert killed
    assert bytes_of(outcome.run) == bytes_of(alone)
    assert stages_of(outcome.run) == stages_of(alone)


LISTENING = """
import os
from leakfast.cluster.actors import _connected
ray = _connected("auto")
owned = set()
for process in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{process}/cmdline", "rb").read()
        if int(process) == os.getpid() or any(part in words for part in (b"ray::", b"/ray/")):
            owned |= {os.readlink(f"/proc/{process}/fd/{n}") for n in os.listdir(f"/proc/{process}/fd")}
    except OSError:
        pass
for kind in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{kind}").read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in owned:
            print(words[1].partition(":")[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what listens is looked up in /proc")
def test_a_cluster_that_is_started_here_listens_on_loopback_alone():
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert len(found) >= 4 and set(found) <= loopback, done.stdout + done.stderr


def test_no_cluster_at_an_address(tmp_path):
    with pytest.raises(InputError, match="no Ray cluster answers at 127.0.0.1:1"):
        cluster.run(written(tmp_path), actors("127.0.0.1:1", 2), out=tmp_path / "run")
