"""What runs in an engine's own process, so that the parent can lose it, or be lost to it, without harm: it answers the
parent (parallel.py) until their line ends. Leaves to the parent which work goes to whom, and signals to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from leakfast.errors import LeakfastError
from leakfast.generation.contract import Completion, Sampling, Work
from leakfast.generation.vllm.start import EngineDied, Spec, first_line

log = logging.getLogger("leakfast.generate")

AT_ONCE = 16  # completions told at once, so that the parent is not woken for each
_GRACE_S = 25.0  # after the parent is gone, before a process that is still at something ends anyway
_GONE = object()


def serve(line: Connection, spec: Spec, make: Callable[[Spec], Any] | None) -> None:
    """Answer the parent until the line ends. A session of its own keeps the terminal's Ctrl-C from this process and
    from those it starts; the parent lets a shard in hand be finished and then ends the line."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from leakfast.generation.vllm.engine import Engine

    wire, engine = _Wire(line), None
    with _Told(wire, spec.name):
        engine = (make or Engine)(spec)
        told = {"version": engine.version, "resolved": getattr(engine, "resolved", {})}
        wire.send("started", told)
        while True:
            name, *rest = wire.take()
            if name == "stream":
                _stream(engine, wire, rest[0])
            else:
                wire.send("answer", getattr(engine, name)(*rest))
    wire.flush()
    if hasattr(engine, "close"):
        engine.close()  # workers and memory of its own, shared between them


class _Told:
    """Whatever ends the engine is told to the parent, which would else wait until this process is gone; that the parent
    itself is gone is nothing to tell."""

    def __init__(self, wire: _Wire, name: str) -> None:
        self.wire, self.name = wire, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, EOFError):
            return True
        foreign = not isinstance(error, LeakfastError)
        if foreign or os.environ.get("LEAKFAST_DEBUG") == "1":
            log.error("in the engine's process:", exc_info=error)
        if foreign:
            why = f"{type(error).__name__}: {first_line(error)}"
            error = EngineDied(
                f"vllm: the engine of {self.name} died: {why}. What is written stays: the same command goes on from there."
            )
        self.wire.send("error", error)
        return True


class _Wire:
    """Our end of the line. What comes is read and what goes is written by threads of their own: a side that waits to
    be read by the other, which waits for the same, would wait for good, and no step is held up by a shard's writing."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._gone = False
        self._in: SimpleQueue[Any] = SimpleQueue()
        self._out: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def send(self, kind: str, what: Any) -> None:
        self._out.put((kind, what))

    def take(self) -> Any:
        """The next message, waited for. Raises EOFError once the parent is gone."""
        message = self._in.get()
        if message is _GONE:
            self._in.put(_GONE)
            raise EOFError
        return message

    def empty(self) -> bool:
        return self._in.empty()

    def check(self) -> None:
        """Raises EOFError once the parent is gone, whatever it had sent before."""
        if self._gone:
            raise EOFError

    def flush(self) -> None:
        """Wait until all that was said is on its way."""
        self._out.put(_GONE)
        self._writer.join(_GRACE_S)

    def _read(self) -> None:
        try:
            with suppress(EOFError, OSError):
                while True:
                    self._in.put(self._line.recv())
        finally:
            self._gone = True
            self._in.put(_GONE)
        time.sleep(_GRACE_S)
        os._exit(1)  # starting, or in a step that does not end: nobody wants it any more

    def _write(self) -> None:
        sound = False
        try:
            with suppress(OSError):
                while (message := self._out.get()) is not _GONE:
                    self._line.send(message)
            sound = True
        finally:
            if not sound:  # the parent hears nothing more: what it cannot be told ends the process
                os._exit(1)


def _stream(engine: Any, wire: _Wire, sampling: Sampling) -> None:
    """Works from the line through the engine, asking for one whenever it has seats to fill."""
    open_works, asked, ended = 0, False, False

    def works() -> Iterator[Work | None]:
        nonlocal open_works, asked, ended
        while not ended:
            if not asked:
                wire.send("wants", None)
                asked = True
            if open_works and wire.empty():
                yield None  # nothing yet: decode on
                continue
            given = wire.take()
            if given is None:
                ended = True
                return
            asked = False
            open_works += 1
            yield given

    news: list[tuple[int, Completion]] = []

    def tell() -> None:
        if news:
            wire.send("finished", list(news))
            news.clear()

    def finished(some: Sequence[Completion], work: Work) -> None:
        wire.check()  # nobody would hear of it, and the device is wanted by who comes next
        news.extend((work.key, one) for one in some)
        if len(news) >= AT_ONCE:
            tell()

    try:
        for _ in engine.stream(works(), sampling, finished):
            open_works -= 1
            tell()
    finally:
        tell()  # what is drawn is drawn, whatever ends the rest
    wire.send("ended", None)
