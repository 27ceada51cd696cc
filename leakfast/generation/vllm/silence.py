"""A line every few minutes while an engine in this process works and nothing of it comes: nobody else would say that it hangs.
Demands nothing; leaves ending it to people. Engines in processes of their own are ended by parallel.py."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("leakfast.generate")

EVERY_S = 300.0  # of an engine's time between two lines


class Silence:
    """How long an engine has worked since something of it came. Time in which nobody waits for the engine does not count.
    every_s: seconds between two warnings."""

    def __init__(self, name: str, every_s: float = EVERY_S) -> None:
        self.name, self.every_s = name, every_s
        self._before = 0.0  # seconds of calls that have returned since something last came
        self._since: float | None = None  # when the call under way began
        self._told = 0
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    @contextmanager
    def broken_by_end(self) -> Iterator[None]:
        """A call whose end is an answer, such as that the engine has started."""
        with self.waited():
            yield
        self.came()

    @contextmanager
    def waited(self) -> Iterator[None]:
        """A call to the engine."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, name="leakfast-silence", daemon=True)
            self._watch.start()
        began = self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None
            self._before += time.monotonic() - began

    def came(self) -> None:
        """Something of it is there, after the call that gave it."""
        self._before, self._told = 0.0, 0

    def close(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(self.every_s / 10):
            if (since := self._since) is None:
                continue
            call_s = time.monotonic() - since
            silent_s = self._before + call_s
            if silent_s >= (self._told + 1) * self.every_s:
                self._told = int(silent_s // self.every_s)
                log.warning(
                    "vllm: nothing has come from the engine of %s for %s; its last call %s. If it hangs, end this process "
                    "(Ctrl-C, else kill -9 %d) and type the same command again: what is written stays",
                    self.name,
                    _minutes(silent_s),
                    f"has not returned for {_minutes(call_s)}"
                    if call_s > self.every_s / 2
                    else "began just now",
                    os.getpid(),
                )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
