"""The same on a real Ray cluster of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import leakfast
from leakfast import cluster
from leakfast.cluster import messages as m
from leakfast.cluster.actors import _answers, actors
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


JOINING = (
    "import sys; from leakfast.cluster.actors import _connected; print(len(_connected(sys.argv[1]).nodes()))"
)


@pytest.fixture
def with_token(tmp_path):
    """(address, environment with the token) of a cluster of this machine that asks for one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("0f" * 32)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    plain |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray", dir="/tmp"),
    }
    known = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray_ = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    words = f"start --head --node-ip-address 127.0.0.1 --port {port} --num-cpus 1 --include-dashboard=false --block"
    head = subprocess.Popen(
        [ray_, *words.split()], env=known, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if _answers(f"127.0.0.1:{port}"):
            break
        time.sleep(0.1)
    yield f"127.0.0.1:{port}", known, plain
    head.terminate()
    head.wait(30)
    shutil.rmtree(plain["RAY_TMPDIR"], ignore_errors=True)


def test_a_cluster_that_asks_for_a_token_is_joined_with_it_alone(with_token):
    address, known, plain = with_token
    begin = [sys.executable, "-c", JOINING, address]
    joined = subprocess.run(begin, env=known, capture_output=True, text=True, check=False)
    assert joined.stdout.split() == ["1"], joined.stderr
    refused = subprocess.run(begin, env=plain, capture_output=True, text=True, check=False)
    assert "takes no driver from here" in refused.stderr and "RAY_AUTH_MODE=token" in refused.stderr
