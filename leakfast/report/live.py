"""What a served page shows of a run that is still filling: its newest readable state, made again in the background when
the run has changed. Demands a run; writes nothing into it, and rests between two looks so that who fills it has the
machine."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.errors import InputError, LeakfastError
from leakfast.report import content, page, payload
from leakfast.report.paged import Paged
from leakfast.stats.correlations import correlate
from leakfast.stats.preliminary import preliminary
from leakfast.stats.tables import Stats, kept
from leakfast.storage import schema
from leakfast.storage.reading import Reading, version

EVERY_S = 4.0  # between two looks at least
REST = 4.0  # and this many times as long as the last one took
# what reading a run that others write can end in
FAILURES = (LeakfastError, OSError, ValueError, pl.exceptions.PolarsError)

log = logging.getLogger("leakfast.serve")


@dataclass(frozen=True)
class Shown:
    """One state of a run. state: `whole` (the run's own tables, up to date), `preliminary` (rates and ρ of what is there,
    nothing drawn) or `empty`; html, data: the page and what its charts are drawn from, as bytes."""

    version: str
    state: str
    html: bytes
    data: bytes
    completions: Paged
    reading: Reading


class Live:
    """A run that is looked at: `now` gives what was read last, and has a newer state read where there is one."""

    def __init__(self, path: str | Path, every_s: float = EVERY_S, rest: float = REST):
        """every_s, rest: seconds between two looks, and how many times the last one's time, at least."""
        self.path, self.every_s, self.rest = Path(path), every_s, rest
        self.failed = False  # the last look could not be finished
        self._shown: Shown | None = None
        self._said = ""  # of what failed last
        self._tried: str | None = None  # version of the last look
        self._rested = 0.0  # the time from which the next may begin
        self._worker: threading.Thread | None = None
        self._lock = threading.Lock()

    def now(self, wait_s: float = 0.0) -> Shown | None:
        """The newest state that could be read; None before the first. wait_s: for that first one, at most."""
        with self._lock:
            idle = self._worker is None or not self._worker.is_alive()
            if (
                idle
                and time.monotonic() >= self._rested
                and (self.failed or version(self.path) != self._tried)
            ):
                self._worker = threading.Thread(target=self._look, name="leakfast-serve", daemon=True)
                self._worker.start()
            worker = self._worker
        if self._shown is None and wait_s and worker is not None:
            worker.join(wait_s)
        return self._shown

    def close(self, wait_s: float = 5.0) -> None:
        """Wait for a look that is under way, so that nothing is computed while the program ends."""
        if self._worker is not None:
            self._worker.join(wait_s)

    def _look(self) -> None:
        start, self.failed = time.monotonic(), True
        try:
            reading = Reading(self.path, None if self._shown is None else self._shown.reading)
            self._tried = reading.version
            self._shown = shown(reading, self._shown)
            self.failed = False
        except FAILURES as error:
            if str(error) != self._said:
                self._said = str(error)
                log.warning("%s: could not be read just now, is tried again: %s", self.path, error)
        finally:
            took = time.monotonic() - start
            self._rested = time.monotonic() + max(self.every_s, self.rest * took)


def shown(reading: Reading, before: Shown | None = None) -> Shown:
    """The state of a reading. before: an earlier one of the same run, whose shards are not read again.

    Raises LeakfastError, OSError, ValueError or PolarsError where the run cannot be read as it is now."""
    stats, state = _tables(reading)
    sections = [
        {**content.behavior_section(reading, stats, name), "figures": {}} for name in stats.behaviors()
    ]
    data = payload.payload(reading, stats, {s["name"]: s["questions"] for s in sections})
    completions = Paged(
        reading, [one["key"] for one in data["adapters"]], None if before is None else before.completions
    )
    told = {"version": reading.version, "state": state, "completions": completions.told(), "data": data}
    html = page.render(
        served=reading.version, sections=sections, drawn={}, blobs={}, **page.told(reading, stats)
    )
    return Shown(reading.version, state, html.encode("utf-8", "replace"), encoded(told), completions, reading)


def waiting(path: str | Path) -> bytes:
    """The page before anything was read: no numbers, and the script that asks for them."""
    stats = _nothing()
    html = page.render(served="", sections=[], drawn={}, blobs={}, **page.told(Reading(path), stats))
    return html.encode("utf-8", "replace")


def encoded(value: Any) -> bytes:
    """`value` as JSON in ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _tables(reading: Reading) -> tuple[Stats, str]:
    whole = kept(reading)
    if whole is not None:
        return whole, "whole"
    try:
        made = preliminary(reading)
    except InputError as error:
        log.debug("%s", error)
        return _nothing(), "empty"
    return (made, "preliminary") if made.behaviors() else (_nothing(made.missing), "empty")


def _nothing(missing: tuple[str, ...] = ()) -> Stats:
    """The tables of a run in which nothing was measured."""
    rates = schema.empty("rates").with_columns(pl.lit(None, pl.String).alias("role"))
    pairs = schema.empty("pairs")
    return Stats(rates, pairs, correlate(pairs, permutations=0, bootstraps=0, workers=1), missing)
