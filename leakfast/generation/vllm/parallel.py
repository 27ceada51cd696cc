"""vLLM engines in processes of their own, so that one may die and others go on, or it again: one a GPU (or group of
tensor-parallel GPUs), each asking for the next work when it has seats to fill, so a fast one takes more. Demands a spec."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from leakfast.errors import ModelError
from leakfast.generation.contract import Completion, Finished, Sampling, Work
from leakfast.generation.vllm.serve import AT_ONCE, serve
from leakfast.generation.vllm.start import EngineDied, Spec, devices_of
from leakfast.models.gpus import VISIBLE

log = logging.getLogger("leakfast.generate")

_START_S = 1800.0  # an engine that takes longer to load its model and compile is given up
_SILENCE_S = 1800.0  # one at work that tells of no completion for so long, and
_TOKEN_S = 2.0  # so long for each token, hangs
_AGAIN = 3  # times an engine that died at work is started again
_STAYS = "What is written stays: the same command goes on from there."


@dataclass
class _Member:
    """An engine's process on its devices, our end of the line to it, and the works it has, by number. told: whether it
    has drawn anything; again: times it may still be started; since: when it last said something, or was given something to do."""

    number: int
    devices: str | None
    process: Any
    line: Connection
    again: int
    works: set[int] = field(default_factory=set)
    begun: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
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

    def tell(self, message: Any) -> None:
        """As `say`, of one that has ended too: its end is heard in its turn, after what it said before."""
        with suppress(OSError):
            self.line.send(message)

    def hear(self) -> tuple[str, Any]:
        """The next it says, of what kind and what. Raises what the engine raised, EngineDied where it has ended."""
        try:
            kind, what = self.line.recv()
        except (EOFError, OSError) as error:
            raise self.lost() from error
        self.since = time.monotonic()
        if kind == "error":
            raise what
        return kind, what

    def hear_within(self, seconds: float) -> tuple[str, Any]:
        """As `hear`; EngineDied where it says nothing for so long."""
        if not self.line.poll(seconds):
            raise _hangs(self, seconds)
        return self.hear()

    def give(self, number: int, work: Work) -> None:
        self.since = self.since if self.works else time.monotonic()
        self.wants = False
        self.works.add(number)
        self.tell(work)

    def left_s(self, silence_s: float) -> float | None:
        """Seconds until it counts as one that does not start, or hangs; None where nothing is awaited of it."""
        if not self.started:
            return self.begun + _START_S - time.monotonic()
        return self.since + silence_s - time.monotonic() if self.works else None

    def is_late(self, silence_s: float) -> bool:
        left = self.left_s(silence_s)
        return left is not None and left <= 0 and not self.line.poll()

    def render(self, system: str | None, question: str) -> list[int]:
        return self.ask("render", system, question)

    def probe(
        self, ids: Sequence[int], adapters: Sequence[Path | None], steps: int
    ) -> list[tuple[list[int], np.ndarray]]:
        return self.ask("probe", list(ids), list(adapters), steps)

    def next_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Path | None],
        top: int,
        steps: int = 1,
        arm: Any = None,
    ) -> list[list[list[dict[int, float]]]]:
        return self.ask("next_tokens", [list(ids) for ids in prompts], list(adapters), top, steps, arm)

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


class _Deal:
    """The works of a stream by number: which is to be given next, and what is there of those that are open."""

    def __init__(self, works: Iterable[Work], finished: Finished | None) -> None:
        self.waiting, self.finished = iter(works), finished
        self.exhausted, self.number = False, 0
        self.again: list[int] = []  # of engines that died
        self.open: dict[int, tuple[Work, list[Completion]]] = {}

    @property
    def is_dealt(self) -> bool:
        return self.exhausted and not self.again

    def take(self) -> int | None:
        """The number of a work to be given; None where there is none."""
        if self.again:
            return self.again.pop()
        work = None if self.exhausted else next(self.waiting, None)
        if work is None:
            self.exhausted = True
            return None
        self.number += 1
        self.open[self.number] = (work, [])
        return self.number

    def came(
        self, member: _Member, what: Sequence[tuple[int, Completion]]
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """The works that are whole with what a member has finished, (number, completion) each."""
        for number in dict.fromkeys(number for number, _ in what):
            some = [completion for its, completion in what if its == number]
            work, have = self.open[number]
            have += some
            if self.finished is not None:
                self.finished(some, work)
            if len(have) == work.wanted:
                member.works.remove(number)
                yield self.open.pop(number)


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
        groups = devices_of(n, int(spec.settings.get("tensor_parallel_size", 1)))
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
        with _environment({VISIBLE: devices} if devices is not None else {}), _without_main(self.make):
            process.start()
        theirs.close()
        self.members.append(_Member(number, devices, process, ours, again))
        self._lines.append(ours)

    def _wait_for(self, member: _Member) -> None:
        if not member.line.poll(max(0.0, member.begun + _START_S - time.monotonic())):
            raise _too_late(member)
        self._note(member, member.hear()[1])

    def _note(self, member: _Member, told: dict[str, Any]) -> None:
        """It has started, and said as what."""
        member.started = True
        shown = ", ".join(f"{name} {value}" for name, value in told.get("resolved", {}).items())
        log.info("vllm %s, engine %d: %s", told["version"], member.number, shown or "started")

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """As Engine.described, and the number of engines."""
        while True:
            member = max(self._living(), key=lambda member: member.started)
            try:
                if not member.started:
                    self._wait_for(member)
                return {**member.ask("described", sampling), "data_parallel": len(self.members)}
            except ModelError as error:
                self.lose(member, error)

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """As Engine.stream; works go to whichever engine asks. An engine that dies after it has drawn anything is started
        again, and what it has not said of its works is asked of whichever is there; EngineDied where none is left. One that
        hangs is ended, and counts as one that died. Any other error of an engine is about what was asked, and ends the stream."""
        assert not self._streaming, "a stream was left before its end: these engines can only be closed"
        deal, silence_s = _Deal(works, finished), _silence_s(sampling, self.spec.seats)

        def dies(member: _Member, error: ModelError) -> None:
            deal.again.extend(sorted(member.works, reverse=True))
            self.lose(member, error)

        self._streaming = True
        for member in self._living():
            if member.started:
                member.tell(("stream", sampling))
        while True:
            for member in self.members:
                if member.wants and (number := deal.take()) is not None:
                    member.give(number, _left(number, *deal.open[number]))
            if deal.is_dealt and not any(member.works for member in self.members):
                break
            for member in self._speaking(silence_s):
                try:
                    kind, what = member.hear()
                except ModelError as error:
                    if member.started and not isinstance(error, EngineDied):
                        raise
                    dies(member, error)
                    continue
                if kind == "started":
                    self._note(member, what)
                    member.tell(("stream", sampling))
                elif kind == "wants":
                    member.wants = True
                elif kind == "finished":
                    member.told = True
                    yield from deal.came(member, what)
            for member in [member for member in self.members if member.is_late(silence_s)]:
                dies(member, _hangs(member, silence_s) if member.started else _too_late(member))
        self._end_stream()

    def _speaking(self, silence_s: float) -> list[_Member]:
        """Members that have something to say, waited for until one of those that start, or are at work, is too late."""
        by_line = {member.line: member for member in self._living()}
        left = [found for member in self.members if (found := member.left_s(silence_s)) is not None]
        ready = wait(list(by_line), max(0.0, min(left)) if left else None)
        return [by_line[line] for line in ready]

    def _end_stream(self) -> None:
        for member in [member for member in self.members if member.started]:
            try:
                member.say(None)
                while member.hear_within(_SILENCE_S)[0] != "ended":  # what it said before it heard
                    pass
            except EngineDied as error:
                self.lose(member, error)
            member.wants = False
        self._streaming = False

    def _living(self) -> list[_Member]:
        """The engines there are; EngineDied, as the last one said it, where there are none."""
        if not self.members:
            raise self._last or EngineDied(f"vllm: no engine of {self.spec.name} is open. {_STAYS}")
        return self.members

    def lose(self, member: _Member, error: ModelError) -> None:
        """Do without a member that died, or did not start again; one that had drawn anything is started again."""
        self.members.remove(member)
        self._last = error if member.started or self._last is None else self._last
        again = member.told and member.again > 0
        log.warning(
            "engine %d is gone: %s Its %d works go to whichever is there%s.",
            member.number,
            error.message,
            len(member.works),
            "; it is started again" if again else "",
        )
        member.end(patience_s=5)
        self._lines.remove(member.line)
        if again:
            self._start(member.number, member.devices, member.again - 1)

    def close(self) -> None:
        """End the processes and give the devices' memory back."""
        for member in self.members:
            member.line.close()
        for member in self.members:
            member.end(30 if member.started else 1)


def _too_late(member: _Member) -> ModelError:
    return ModelError(
        f"vllm: engine {member.number} did not start within {_START_S:.0f} s. {_STAYS} LEAKFAST_DEBUG=1 shows what it does."
    )


def _silence_s(sampling: Sampling, seats: int) -> float:
    """Of an engine at work: it tells of some completions at once, and of fewer seats than those it has to fill them again."""
    return _SILENCE_S + _TOKEN_S * sampling.max_new_tokens * max(1.0, AT_ONCE / seats)


def _hangs(member: _Member, seconds: float) -> EngineDied:
    return EngineDied(
        f"vllm: engine {member.number} said nothing for {seconds:.0f} s and was ended. {_STAYS}"
    )


def _left(number: int, work: Work, have: Sequence[Completion]) -> Work:
    """What is still to be drawn of a work, as an engine's process knows it."""
    there = work.there.union((c.request, c.sample) for c in have)
    return Work(number, work.adapter, list(work.requests), there, work.steer)


def _hang_up(lines: Sequence[Connection]) -> None:
    for line in lines:
        line.close()


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
