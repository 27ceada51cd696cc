"""LEAKFAST_AUTOTUNE=1: the shipped candidates of an op are timed on the device at hand, and the fastest is
remembered, in the process and in a file, by op, device, versions and class of shape. Off by default, because
another tile adds in another order and so gives other bits. Knows no op: callers bring candidates."""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage.disk import atomic_write

log = logging.getLogger(__name__)

_WARM, _REPEATS = 2, 5
_known: dict[str, str] = {}  # key → name of the best candidate, of this process


def asked() -> bool:
    """Whether LEAKFAST_AUTOTUNE is set to anything but 0 or nothing."""
    return os.environ.get("LEAKFAST_AUTOTUNE", "0") not in ("", "0")


def best(
    op: str,
    shape: tuple[Any, ...],
    device: Any,
    candidates: Mapping[str, Callable[[], Any]],
    failures: tuple[type[Exception], ...] = (RuntimeError,),
) -> str:
    """The name of the fastest candidate on the device for this class of shape, tried once.

    candidates: name → a call that does the work. Median of five runs after two; a candidate that raises one of
    `failures` does not compile or run here and is left out, with its reason in the log.
    Raises RuntimeError where none runs."""
    key = " | ".join(map(str, (op, _surroundings(device), *shape)))
    name = _known.get(key) or _read().get(key)
    if name not in candidates:
        times = {}
        for candidate, run in candidates.items():
            try:
                times[candidate] = _median_ms(run, device)
            except failures as error:
                log.info("tuning: %s without %s (%s)", op, candidate, _first_line(error))
        if not times:
            raise RuntimeError(f"{op}: none of {', '.join(candidates)} runs on {device}")
        name = min(times, key=lambda one: times[one])
        told = ", ".join(f"{one} {ms:.3f} ms" for one, ms in times.items())
        log.info("tuning: %s %s on %s: %s (%s)", op, shape, device, name, told)
        _write(key, name)
    _known[key] = name
    return name


def store() -> Path:
    """The file of what was found: autotune.json in LEAKFAST_CACHE, else in the user's cache folder."""
    folder = os.environ.get("LEAKFAST_CACHE") or os.environ.get("XDG_CACHE_HOME")
    base = Path(folder) if folder else Path.home() / ".cache"
    return (base if os.environ.get("LEAKFAST_CACHE") else base / "leakfast") / "autotune.json"


def _median_ms(run: Callable[[], Any], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    times = []
    for turn in range(_WARM + _REPEATS):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        if turn >= _WARM:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


@cache
def _surroundings(device: Any) -> str:
    import torch

    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read() -> dict[str, str]:
    try:
        found = json.loads(store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, name: str) -> None:
    """Kept for the next process where the folder can be written; else for this one alone."""
    text = json.dumps(_read() | {key: name}, indent=1, sort_keys=True) + "\n"
    try:
        atomic_write(store(), text.encode())
    except StoreError as error:
        log.info("tuning: this process alone remembers (%s)", error)
