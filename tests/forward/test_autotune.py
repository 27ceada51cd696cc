"""tuning.py: the fastest candidate wins, is tried once and remembered across processes, and nothing is tuned
unless LEAKFAST_AUTOTUNE says so."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch

from leakfast.forward import autotune as tuning

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Candidates that count their calls: slow takes 8 ms, quick nothing, broken raises."""
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(tuning, "_known", {})
    calls = {"slow": 0, "quick": 0, "broken": 0}

    def run(name):
        calls[name] += 1
        if name == "broken":
            raise RuntimeError("no room\nmore")
        time.sleep(0.008 if name == "slow" else 0)

    return calls, {name: lambda name=name: run(name) for name in calls}


def test_the_fastest_is_found_once_and_what_breaks_is_left_out(counted, caplog):
    calls, runs = counted
    with caplog.at_level(logging.INFO, "leakfast.forward.autotune"):
        assert tuning.best("op", (64, 896), CPU, runs) == "quick"
    assert "without broken (no room)" in caplog.text and "slow" in caplog.text
    spent = dict(calls)
    assert tuning.best("op", (64, 896), CPU, runs) == "quick"
    assert calls == spent
    tuning.best("op", (128, 896), CPU, runs)
    assert calls["quick"] == 2 * spent["quick"]  # another class of shape is another question


def test_the_next_process_remembers(counted, monkeypatch):
    calls, runs = counted
    tuning.best("op", (1,), CPU, runs)
    assert list(json.loads(tuning.store().read_text()).values()) == ["quick"]
    spent = dict(calls)
    monkeypatch.setattr(tuning, "_known", {})
    assert tuning.best("op", (1,), CPU, runs) == "quick"
    assert calls == spent


@pytest.mark.parametrize("content", ["", "[1]", '{"half'])
def test_a_damaged_file_is_made_anew(counted, content):
    _, runs = counted
    tuning.store().parent.mkdir()
    tuning.store().write_text(content)
    assert tuning.best("op", (1,), CPU, runs) == "quick"
    assert list(json.loads(tuning.store().read_text()).values()) == ["quick"]


def test_a_remembered_name_that_is_no_longer_shipped_is_tried_anew(counted, monkeypatch):
    _, runs = counted
    tuning.best("op", (1,), CPU, {"old": lambda: None})
    monkeypatch.setattr(tuning, "_known", {})
    assert tuning.best("op", (1,), CPU, runs) == "quick"


def test_nothing_that_runs_is_an_error_and_no_folder_is_not(counted, monkeypatch, tmp_path, caplog):
    _, runs = counted
    with pytest.raises(RuntimeError, match="none of broken"):
        tuning.best("op", (1,), CPU, {"broken": runs["broken"]})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "leakfast.forward.autotune"):
        assert tuning.best("op", (1,), CPU, runs) == "quick"
    assert "this process alone remembers" in caplog.text


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_asked(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv("LEAKFAST_AUTOTUNE", raising=False)
    else:
        monkeypatch.setenv("LEAKFAST_AUTOTUNE", value)
    assert tuning.asked() is expected


def test_what_a_kernel_may_fail_with_is_left_out_and_nothing_else(monkeypatch, tmp_path):
    """Triton's errors are no RuntimeErrors: a tile too large for the device ends no run."""
    errors = pytest.importorskip("triton.runtime.errors")
    from leakfast.kernels import choice_logprobs, last_token_centroids

    assert choice_logprobs.FAILURES == last_token_centroids.FAILURES
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path))

    def fails():
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    runs = {"wide": fails, "narrow": lambda: None}
    device = torch.device("cpu")
    assert tuning.best("a kernel", (1,), device, runs, choice_logprobs.FAILURES) == "narrow"
    with pytest.raises(errors.OutOfResources):
        tuning.best("another", (1,), device, runs)
