"""The same on a real Ray cluster of this machine."""

from __future__ import annotations

import os
import signal

import pytest

import leakfast
from leakfast import cluster
from leakfast.cluster import messages as m
from leakfast.cluster.actors import actors
from tests.cluster.studies import bytes_of, stages_of, written

ray = pytest.importorskip("ray", reason="ray is not installed (pip install leakfast[cluster])")
pytestmark = pytest.mark.long


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


def test_ray_is_bound_to_loopback_and_shows_no_dashboard(here, tmp_path):
    from leakfast.cluster.actors import _connected

    _connected("auto")
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert not ray._private.worker.global_worker.node.address_info.get("webui_url")


def test_no_cluster_at_an_address(tmp_path):
    from leakfast.errors import InputError

    with pytest.raises(InputError, match="no Ray cluster answers there"):
        cluster.run(written(tmp_path), actors("127.0.0.1:1", 2), out=tmp_path / "run")
