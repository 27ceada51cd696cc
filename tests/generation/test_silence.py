"""An engine in the run's own process that hangs is told of, again and again; one that finishes something, or that nobody
waits for, is not."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest

from leakfast.errors import ModelError
from leakfast.generation.vllm import engine
from leakfast.generation.vllm.silence import Silence

EVERY_S = 0.1


def told_by(caplog, n: int = 1, within_s: float = 60.0) -> list[str]:
    """Warnings so far, once there are n."""
    end = time.monotonic() + within_s
    while len(caplog.messages) < n and time.monotonic() < end:
        time.sleep(EVERY_S / 10)
    return caplog.messages


def test_a_call_that_does_not_return_is_told_every_so_often(caplog):
    caplog.set_level(logging.WARNING, "leakfast.generate")
    silence = Silence("Qwen", EVERY_S)
    with silence.waited():
        said = told_by(caplog, 2)
    assert len(said) >= 2 and "nothing has come from the engine of Qwen for" in said[0]
    assert "its last call has not returned" in said[1] and "what is written stays" in said[1]
    silence.close()


def test_what_comes_and_what_nobody_waits_for_ends_the_silence(caplog):
    caplog.set_level(logging.WARNING, "leakfast.generate")
    silence = Silence("Qwen", EVERY_S)
    with silence.waited():
        told_by(caplog)
    silence.came()
    caplog.clear()
    time.sleep(5 * EVERY_S)
    assert not caplog.messages and silence._before == 0, "nobody waited"
    with (
        silence.waited()
    ):  # a call that begins now has not been silent for long, those before it were answered
        pass
    assert silence._before < EVERY_S
    silence.close()


def test_an_engine_that_does_not_start_is_told_of(caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "leakfast.generate")

    def hangs(spec):
        told_by(caplog)
        raise ModelError("given up")

    monkeypatch.setattr(engine, "start", hangs)
    monkeypatch.setattr(engine, "Silence", lambda name: Silence(name, EVERY_S))
    with pytest.raises(ModelError, match="given up"):
        engine.Engine(SimpleNamespace(name="Qwen"))
    assert "nothing has come from the engine of Qwen" in caplog.text
