"""vLLM engines in processes of their own, so that one may die and others go on, or it again: one a GPU (or group of
tensor-parallel GPUs), each asking for the next work when it has seats to fill, so a fast one takes more. Demands a spec."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from leakfast.errors import InputError, ModelError
from leakfast.generate import Completion, Sampling, Work
from leakfast.generate.engines import Finished
from leakfast.generate.vllm.serve import serve
from leakfast.generate.vllm.start import EngineDied, Spec

log = logging.getLogger("leakfast.generate")

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_START_S = 1800.0  # an engine that takes longer to load its model and compile is given up
_AGAIN = 3  # times an engine that died at work is started again
_STAYS = "What is written stays: the same command goes on from there."


@dataclass
class _Member:
    """An engine's process on its devices, our end of the line to it, and the works it has, by number. told: whether it
    has drawn anything; again: times it may still be started."""

    number: int
    devices: str | None
    process: Any
    line: Connection
    again: int
    works: set[int] = field(default_factory=set)
    started: bool = False
    wants: bool = False
    told: bool = False

    def ask(self, *message: Any) -> Any:
        """The answer to a question. Raises what the engine raises, EngineDied where its process ends."""
        self.say(message)
        return self.hear()[1]

    def say(self, message: Any) -> None:
        """Its process reads at any time, so this waits for nothing but the line; EngineDied where it has ended."""
        try:
            self.line.send(message)
        except OSError:
            while True:
                self.hear()  # to the last word, which says why

    def hear(self) -> tuple[str, Any]:
        """The next it says, of what kind and what. Raises what the engine raised, EngineDied where it has ended."""
        try:
            kind, what = self.line.recv()
        except (EOFError, OSError) as error:
            raise self.lost() from error
        if kind == "error":
            raise what
        return kind, what

    def render(self, system: str | None, question: str) -> list[int]:
        return self.ask("render", system, question)

    def probe(
        self, ids: Sequence[int], adapters: Sequence[Path | None], steps: int
    ) -> list[tuple[list[int], np.ndarray]]:
        return self.ask("probe", list(ids), list(adapters), steps)

    def next_tokens(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None], top: int
    ) -> list[list[dict[int, float]]]:
        return self.ask("next_tokens", [list(ids) for ids in prompts], list(adapters), top)

    def lost(self) -> EngineDied:
        self.process.join(5)
        return EngineDied(f"vllm: engine {self.number} ended (exit code {self.process.exitcode}). {_STAYS}")

    def end(self, patience_s: float = 30) -> None:
        """The end of the line ends the process; one that does not heed it is killed."""
        self.line.close()
        self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Parallel:
    """`n` engines of one spec, the i-th on the i-th group of tensor-parallel GPUs. The same face as Engine.

    make: another engine to run in the processes (a class or function that can be pickled); again: times that each is
    started anew where it dies at work. Raises InputError for more GPUs than there are, ModelError where an engine does
    not start."""

    def __init__(
        self, spec: Spec, n: int, make: Callable[[Spec], Any] | None = None, *, again: int = _AGAIN
    ) -> None:
        self.spec, self.make = spec, make
        self._last: ModelError | None = None
        self._streaming = False
        groups = _devices(n, int(spec.settings.get("tensor_parallel_size", 1)))
        self.members: list[_Member] = []
        self._lines: list[Connection] = []
        # else a script that ends with engines open would wait at its exit for them, and they for it
        Finalize(self, _hang_up, args=(self._lines,), exitpriority=1)
        with ExitStack() as unless_started:
            unless_started.callback(self.close)
            for number, devices in enumerate(groups):
                self._start(number, devices, again)
            for member in self.members:
                self._wait_for(member)
            unless_started.pop_all()
        log.info("vllm: %d engines of %d seats", n, spec.seats)

    def _start(self, number: int, devices: str | None, again: int) -> None:
        """Another member, whose process is on its way."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.spec, self.make), daemon=False)
        with _environment({_VISIBLE: devices} if devices is not None else {}), _without_main(self.make):
            process.start()
        theirs.close()
        self.members.append(_Member(number, devices, process, ours, again))
        self._lines.append(ours)

    def _wait_for(self, member: _Member) -> None:
        if not member.line.poll(_START_S):
            raise ModelError(f"vllm: engine {member.number} did not start within {_START_S:.0f} s.")
        self._note(member, member.hear()[1])

    def _note(self, member: _Member, told: dict[str, Any]) -> None:
        """It has started, and said as what."""
        member.started = True
        shown = ", ".join(f"{name} {value}" for name, value in told.get("resolved", {}).items())
        log.info("vllm %s, engine %d: %s", told["version"], member.number, shown or "started")

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """As Engine.described, and the number of engines."""
        while True:
            member = self._living()[0]
            try:
                return {**member.ask("described", sampling), "data_parallel": len(self.members)}
            except EngineDied as error:
                self.lose(member, error)

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """As Engine.stream; works go to whichever engine asks. An engine that dies after it has drawn anything is started
        again, and what it has not said of its works is asked of whichever is there; EngineDied where none is left. Any
        other error of an engine is about what was asked, and ends the stream."""
        assert not self._streaming, "a stream was left before its end: these engines can only be closed"
        waiting, again, number, exhausted = iter(works), [], 0, False
        open_works: dict[int, tuple[Work, list[Completion]]] = {}

        def dies(member: _Member, error: ModelError) -> None:
            again.extend(sorted(member.works, reverse=True))
            self.lose(member, error)
            if member.told and member.again:
                log.warning("engine %d is started again", member.number)
                self._start(member.number, member.devices, member.again - 1)

        def said(member: _Member, message: Any) -> None:
            try:
                member.say(message)
            except EngineDied as error:
                dies(member, error)

        self._streaming = True
        for member in list(self._living()):
            said(member, ("stream", sampling))
        while True:
            for member in list(self.members):
                if member.wants and not (exhausted and not again):
                    if not again:
                        work = next(waiting, None)
                        if work is None:
                            exhausted = True
                            continue
                        number += 1
                        open_works[number] = (work, [])
                        again.append(number)
                    given, member.wants = again.pop(), False
                    member.works.add(given)
                    said(member, _left(given, *open_works[given]))
            if exhausted and not again and not any(member.works for member in self.members):
                break
            by_line = {member.line: member for member in self._living()}
            late = not all(member.started for member in self.members)
            ready = wait(list(by_line), _START_S if late else None)
            for member in [] if ready else [member for member in self.members if not member.started]:
                dies(
                    member, ModelError(f"vllm: engine {member.number} did not start within {_START_S:.0f} s.")
                )
            for line in ready:
                member = by_line[line]
                try:
                    kind, what = member.hear()
                except ModelError as error:
                    if member.started and not isinstance(error, EngineDied):
                        raise
                    dies(member, error)
                    continue
                if kind == "started":
                    self._note(member, what)
                    said(member, ("stream", sampling))
                elif kind == "wants":
                    member.wants = True
                elif kind == "finished":
                    member.told = True
                    for one in dict.fromkeys(one for one, _ in what):
                        some = [completion for its, completion in what if its == one]
                        work, have = open_works[one]
                        have += some
                        if finished is not None:
                            finished(some, work)
                        if len(have) == work.wanted:
                            member.works.remove(one)
                            yield open_works.pop(one)
        for member in list(self.members):
            try:
                if member.started:
                    member.say(None)
                    while member.hear()[0] != "ended":  # what it said before it heard
                        pass
                else:
                    self._wait_for(member)
            except ModelError as error:
                self.lose(member, error)
            member.wants = False
        self._streaming = False

    def _living(self) -> list[_Member]:
        """The engines there are; EngineDied, as the last one said it, where there are none."""
        if not self.members:
            raise self._last or EngineDied(f"vllm: no engine of {self.spec.name} is open. {_STAYS}")
        return self.members

    def lose(self, member: _Member, error: ModelError) -> None:
        """Do without a member that died, or did not start again."""
        self.members.remove(member)
        self._last = error if member.started or self._last is None else self._last
        log.warning(
            "engine %d is gone: %s Its %d works go to whichever is there.", member.number, error.message, len(member.works)
        )  # fmt: skip
        member.end(patience_s=5)
        self._lines.remove(member.line)

    def close(self) -> None:
        """End the processes and give the devices' memory back."""
        for member in self.members:
            member.line.close()
        for member in self.members:
            member.end()


def _left(number: int, work: Work, have: Sequence[Completion]) -> Work:
    """What is still to be drawn of a work, as an engine's process knows it."""
    there = work.there.union((c.request, c.sample) for c in have)
    return Work(number, work.adapter, list(work.requests), there)


def _hang_up(lines: Sequence[Connection]) -> None:
    for line in lines:
        line.close()


def _devices(n: int, each: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each engine; None without a GPU, where engines share the processor."""
    import torch

    if not torch.cuda.is_available():
        return [None] * n
    given = os.environ.get(_VISIBLE)
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if n * each > len(names):
        raise InputError(
            f"vllm: --data-parallel {n}{f' × --tensor-parallel {each}' if each > 1 else ''} needs {n * each} GPUs, "
            f"but there are {len(names)}. Give a smaller number."
        )
    return [",".join(names[i * each : (i + 1) * each]) for i in range(n)]


@contextmanager
def _without_main(make: Any) -> Iterator[None]:
    """A process started inside does not run the caller's script again to have its objects, which it needs only where
    `make` is one of them: a script need not guard its calls."""
    main = sys.modules["__main__"]
    names = ("__file__", "__spec__") if getattr(make, "__module__", "") != "__main__" else ()
    before = {name: getattr(main, name) for name in names if hasattr(main, name)}
    for name in before:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """What a process started inside inherits."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
