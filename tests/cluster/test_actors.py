"""cluster/actors.py: how many actors a cluster has room for. Ray itself is stood in for: its nodes are made up."""

from __future__ import annotations

import os
import socket
import sys
from types import SimpleNamespace

import pytest

from leakfast.cluster import actors
from leakfast.errors import InputError, LeakfastError
from leakfast.study.config import VllmConfig


@pytest.fixture
def pool(monkeypatch):
    """What makes a pool of actors for a study on nodes of so many (GPUs, cores)."""

    def make(nodes, *, tensor_parallel=1, workers=None):
        given = [
            {"Alive": True, "NodeID": "a", "Resources": {"GPU": float(g), "CPU": float(c)}} for g, c in nodes
        ]
        given = [
            {**one, "Resources": {k: v for k, v in one["Resources"].items() if v}} for one in given
        ]  # Ray leaves out what a node has none of
        ray = SimpleNamespace(
            nodes=lambda: [*given, {"Alive": False, "Resources": {"GPU": 8.0, "CPU": 64.0}}],
            cluster_resources=lambda: {"GPU": sum(g for g, _ in nodes), "CPU": sum(c for _, c in nodes)},
            put=lambda told: told,
            shutdown=lambda: None,
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "a"),
        )
        monkeypatch.setattr(actors, "_connected", lambda address: ray)
        monkeypatch.setitem(sys.modules, "ray.util.queue", SimpleNamespace(Queue=lambda **about: None))
        study = SimpleNamespace(vllm=VllmConfig(tensor_parallel=tensor_parallel))
        return actors.RayPool(study, (), "auto", workers)

    return make


def test_a_worker_lies_on_one_node(pool):
    """Ray would wait for good for a place for one whose GPUs are on two, and the run ended after an hour and a half."""
    assert pool([(8, 32), (8, 32)]).size == 16
    assert pool([(3, 16), (3, 16)], tensor_parallel=2).size == 2
    with pytest.raises(InputError, match="3 workers wanted, .* room for 2 .* 2 on one node"):
        pool([(3, 16), (3, 16)], tensor_parallel=2, workers=3)
    with pytest.raises(
        InputError, match="1 workers wanted, .* room for 0 .* smaller number or tensor_parallel"
    ):
        pool([(1, 16), (1, 16)], tensor_parallel=2)


def test_workers_without_gpus_have_cores_of_one_node(pool):
    found = pool([(0, 4), (0, 12)])
    assert (found.size, found._needs) == (2, {"num_cpus": 6})
    assert pool([(0, 3), (0, 3)], workers=4)._needs == {"num_cpus": 1}
    assert pool([(0, 8), (0, 8)])._needs == {"num_cpus": 8}
    with pytest.raises(InputError, match="7 workers wanted, .* room for 6"):
        pool([(0, 3), (0, 3)], workers=7)


def test_whether_a_raylet_listens(tmp_path):
    path = str(tmp_path / "raylet")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)
        made.listen()
        nodes = [{"NodeID": "a", "RayletSocketName": path}, {"NodeID": "b", "RayletSocketName": "tcp://here"}]
        assert actors._raylet_of(nodes, "a") == path and actors._raylet_of(nodes, "b") is None
        assert actors._listens(path)
    assert os.path.exists(path) and not actors._listens(path)


def test_ray_that_does_not_start_is_told_in_one_line(monkeypatch):
    """On a busy machine its processes were not up after 30 s, and the run ended in a traceback of Ray's."""

    def init(**about):
        raise Exception("The current node timed out during startup. This could be.\nmore")

    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(actors, "_running", lambda: None)
    monkeypatch.setattr(actors.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(LeakfastError, match="Ray could not be started .* timed out during startup") as told:
        actors._connected("auto")
    assert "\n" not in str(told.value) and "--workers N" in str(told.value)
    assert str(told.value.__cause__).endswith("more"), "what Ray said is not lost"


@pytest.mark.parametrize(("address", "asked"), [("auto", "auto"), ("10.0.0.7:6379", "10.0.0.7:6379")])
def test_a_cluster_that_takes_no_driver_says_what_to_set(monkeypatch, address, asked):
    """Ray 2.60 asks for a token where `ray start` found one, and shows it to no address by itself: the run ended after 20
    seconds of warnings in a sentence about paths. Of `auto` Ray looks for itself, which it does for that word alone."""
    seen = []

    def init(**about):
        seen.append(about["address"])
        raise RuntimeError(
            "Version mismatch: the cluster has:\n    Ray: 2.49.2\nThis process:\n    Ray: 2.60.0."
        )

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(actors, "_running", lambda: "10.0.0.7:6379")
    monkeypatch.setattr(actors, "_answers", lambda address: True)
    monkeypatch.setattr(actors.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(
        InputError, match="at 10.0.0.7:6379 takes no driver from here: .* Ray: 2.49.2 This .*: 2.60.0[.] A"
    ) as told:
        actors._connected(address)
    assert seen == [asked] and "RAY_AUTH_MODE=token" in str(told.value) and "\n" not in str(told.value)
