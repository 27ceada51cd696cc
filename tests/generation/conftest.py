"""Engines of vLLM that the tests of a file share."""

from __future__ import annotations

from functools import partial
from multiprocessing import get_context

import pytest

from leakfast.generation import vllm
from leakfast.generation.vllm import parallel

LOADED = ["leakfast.generation.vllm.engine", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"]


class Kept:
    """The engine of each kind that was opened last, lent again where it runs all that is asked for: starting one takes as
    long as most of what is drawn here. A process has one at a time."""

    WIDER = ("max_model_len", "max_num_batched_tokens", "max_lora_rank", "max_loras", "max_cpu_loras")

    def __init__(self) -> None:
        self.plain = {"Engine": vllm.Engine, "Parallel": vllm.Parallel}
        self.open: dict = {}  # kind → the engine, and its arguments beside the spec

    def lent(self, kind, spec, *rest):
        if kind not in self.open or not self._runs(*self.open[kind], spec, rest):
            self.end(kind)
            self.open[kind] = self.plain[kind](spec, *rest), rest
            self.open[kind][0].close = lambda: None
        return self.open[kind][0]

    def _runs(self, engine, its_rest, spec, rest) -> bool:
        there, wanted = engine.spec.settings, spec.settings
        alike = (engine.spec.stops, engine.spec.invariant, its_rest) == (spec.stops, spec.invariant, rest)
        return alike and all(
            there.get(name, 0) >= value if name in self.WIDER else there.get(name) == value
            for name, value in wanted.items()
        )

    def end(self, kind) -> None:
        if kind in self.open:
            engine, _ = self.open.pop(kind)
            type(engine).close(engine)


@pytest.fixture(scope="module")
def kept_open():
    """Engines that are asked for in this file, lent as Kept does; `end(kind)` closes one, as has to be done after its death."""
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        for kind in kept.plain:
            patch.setattr(vllm, kind, partial(kept.lent, kind))
        yield kept
    for kind in kept.plain:
        kept.end(kind)


@pytest.fixture
def forked(monkeypatch):
    """Processes of engines are forks of one that has vLLM imported, which takes longer than most of what is drawn here: how a
    process is started is not what a test with it shows."""
    context = get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    monkeypatch.setattr(parallel, "get_context", lambda how: context)
