"""Ctrl-C and SIGTERM while something is being written: the first is noted, so that what is in hand can be
finished; the second interrupts at once. Demands the main thread; elsewhere signals stay as they are."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("leakfast")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finishing(what: str) -> Iterator[Callable[[], bool]]:
    """Inside the block, a function that says whether a stop was asked for. what: what is finished first, in
    words. Whoever asks it raises KeyboardInterrupt at the next point where nothing is lost."""
    asked = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        name = signal.Signals(signum).name
        log.warning("%s: finishing %s, then stopping; once more stops at once", name, what)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
