"""Ctrl-C and SIGTERM while something is being written: the first is noted, so that what is in hand can be
finished; the second interrupts at once, and so does the end of the time there is for finishing. Signals reach the main
thread; what another thread has in hand is stopped by `stop_threads`."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

log = logging.getLogger("leakfast")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 8.0  # for a shard that is computed here: a real model's takes minutes, and is drawn again whole


_elsewhere: set[Stop] = set()  # of threads other than the main one


class Stop:
    """Whether a stop was asked for, when called; and the time for writing what is finished, which is not cut."""

    def __init__(self) -> None:
        self.asked = self.over = False
        self._writing = 0

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A time that is over inside the block raises KeyboardInterrupt at its end."""
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1
        if self.over:
            raise KeyboardInterrupt

    def end(self) -> None:
        """The time for finishing is over."""
        self.over = True
        if not self._writing:
            raise KeyboardInterrupt


@contextmanager
def finishing(what: str, *, bounded: bool = False) -> Iterator[Stop]:
    """Inside the block, what says whether a stop was asked for when it is called. what: what is finished first, in
    words. Whoever asks it raises KeyboardInterrupt at the next point where nothing is lost; bounded: if that has not
    come GRACE_S later, it is raised wherever the program is (where the system has timers), but not within
    `writing()`."""
    stop = Stop()
    timed = bounded and hasattr(signal, "setitimer")

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        name = signal.Signals(signum).name
        rest = f" if that takes no longer than {GRACE_S:g} s" if timed else ""
        log.warning("%s: finishing %s%s, then stopping; once more stops at once", name, what, rest)
        if timed:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def over(signum: int, frame: FrameType | None) -> None:
        log.warning("%s takes longer; what is finished stays, it is begun again next time", what)
        stop.end()

    if threading.current_thread() is not threading.main_thread():
        _elsewhere.add(stop)
        try:
            yield stop
        finally:
            _elsewhere.discard(stop)
        return
    before = {number: signal.signal(number, note) for number in _SIGNALS}
    if timed:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, over)
    try:
        yield stop
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def pause(seconds: float) -> None:
    """Sleeps. In a thread other than the main one `stop_threads` ends it with KeyboardInterrupt, as Ctrl-C does in that."""
    until = time.monotonic() + seconds
    with (
        finishing("")
        if threading.current_thread() is not threading.main_thread()
        else nullcontext(bool) as stop
    ):
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            if stop():
                raise KeyboardInterrupt


def stop_threads() -> None:
    """Ask what threads other than the main one have in hand to stop where nothing is lost, as Ctrl-C asks the main one."""
    for stop in list(_elsewhere):
        stop.asked = True
