"""One part of a GPU run as a process of its own: its lines are read as it prints them, its rows kept at once, and when
its time is over it and all that it started are killed. Demands Linux for that last (elsewhere the part alone is)."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _rows

ROOT = Path(__file__).resolve().parent.parent
ROWS_FILE, LOG_FILE = "gpu.jsonl", "gpu.log"
_BEGAN = "LEAKFAST_BENCH_BEGAN"  # in the environment of the process behind: when the one in front began
_MARK = "LEAKFAST_BENCH_RUN"  # in the environment of whatever a part starts: how it is found again
_LOG_BYTES = 2 << 20  # of a part
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Part(NamedTuple):
    """A command; seconds it may take, and below which it is not begun; packages that it needs; settings of its
    environment; what it is reckoned to take on an H100 or H200 (seconds, measured nowhere)."""

    name: str
    words: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012
    least_s: float = 5
    reckoned_s: int | None = None


class Clock:
    """When everything must have ended, in time.monotonic(); `stop` ends it now (a signal's handler)."""

    def __init__(self, seconds: float, began: float) -> None:
        self.ends, self.why = began + seconds, "the time is over"

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def stop(self, number: int, _frame: Any) -> None:
        self.ends, self.why = 0.0, f"stopped by {signal.Signals(number).name}"


def behind(began: float) -> float:
    """To be called first. Starts this command again in a session of its own, waits for it and exits as it did; in that
    second process returns when the first began. Whoever kills the command's process group does not reach the process
    behind, which is told (SIGTERM): it takes what its part has printed, kills it and writes down what had not run.
    Elsewhere than on Linux there is one process alone."""
    if (told := os.environ.pop(_BEGAN, None)) is not None:
        return float(told)
    if sys.platform != "linux":
        return began
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, _BEGAN: repr(began)},
        start_new_session=True,
        preexec_fn=_with_parent(signal.SIGTERM),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    raise SystemExit(max(1, -code) if (code := child.wait()) < 0 else code)


def say(line: str) -> None:
    """Onto this command's own output, for people: cut, and not at all when nobody reads any more."""
    with contextlib.suppress(OSError):
        print(line if len(line) < 600 else f"{line[:600]} …", flush=True)


def missing(part: Part) -> list[str]:
    """The packages that the part needs and this Python does not find; they are not imported."""

    def there(name: str) -> bool:
        with contextlib.suppress(
            ImportError, ValueError
        ):  # what an import hook, or a broken package, may raise
            return importlib.util.find_spec(name) is not None
        return False

    return [name for name in part.needs if not there(name)]


def run(part: Part, clock: Clock, out: Path) -> list[dict[str, Any]]:
    """Runs a part, or says why not; returns the rows that stand in the file of rows because of it. Of each row that the
    part tells there is a line in `out`/gpu.jsonl before its line is in `out`/gpu.log; the last row says how it ended."""
    file = out / ROWS_FILE
    before = len(_rows.rows_in(file)) if file.exists() else 0
    if (left := clock.left_s()) < part.least_s:
        why = clock.why if left <= 0 else f"{left:.0f} s left, {part.least_s:.0f} s needed"
        keep(out, {"part": part.name, "skipped": why})
    elif gone := missing(part):
        why = f"needs {', '.join(gone)}, which this Python does not have"
        keep(out, {"part": part.name, "skipped": why, "missing": gone})
    else:
        keep(out, {"part": part.name, "begins_with_s_left": round(left, 1)})
        began = time.monotonic()
        keep(out, {"part": part.name, "wall_s": None, **_run(part, clock, out, before)}, since=began)
    return _rows.rows_in(file)[before:]


def keep(out: Path, record: dict[str, Any], since: float | None = None) -> None:
    """A row into the file, then onto this command's own output."""
    if since is not None:
        record = {**record, "wall_s": round(time.monotonic() - since, 1)}
    line = _rows.line_of(record)
    _rows.append(out / ROWS_FILE, line)
    say(line)


def _run(part: Part, clock: Clock, out: Path, before: int) -> dict[str, Any]:
    """How it ended: rc, timed_out, last_line."""
    token = f"{os.getpid()} {time.monotonic_ns()}"
    child = subprocess.Popen(
        part.words,
        cwd=ROOT,
        env=_environment(part, out, token),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_with_parent(signal.SIGKILL) if sys.platform == "linux" else None,
    )
    ends, heard, timed_out = time.monotonic() + part.limit_s, Heard(part.name, out, before), False
    os.set_blocking(child.stdout.fileno(), False)
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(child.stdout, selectors.EVENT_READ)
            is_open = True
            while child.poll() is None:
                left = min(ends, clock.ends) - time.monotonic()
                if timed_out := left <= 0:
                    break
                if not is_open:
                    time.sleep(min(left, 0.05))
                elif waiting.select(min(left, 0.2)):
                    is_open = heard.read(child.stdout.fileno())
    finally:
        kill(child, token)
        heard.read(child.stdout.fileno())  # what was in the pipe by then
        child.stdout.close()
    found = {"ended": True, "rc": child.returncode, "timed_out": timed_out, "last_line": heard.last[-300:]}
    return {**found, "why": clock.why if clock.left_s() <= 0 else "its own limit"} if timed_out else found


class Heard:
    """The lines of a part, taken as they come: a row into the file unless its bench put it there itself, then the line
    into the log and the row onto this command's output."""

    def __init__(self, name: str, out: Path, before: int) -> None:
        self.name, self.out, self.before = name, out, before
        self.rest, self.last, self.room = b"", "", _LOG_BYTES
        self._log(f"== {name}\n")

    def read(self, descriptor: int) -> bool:
        """Everything that is there now; False when nothing will come any more. Half a line at the end is kept for
        the next time."""
        while True:
            try:
                some = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not some:
                if self.rest:
                    self._take(self.rest)
                self.rest = b""
                return False
            *lines, self.rest = (self.rest + some).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r")
        if (record := _rows.record_in(line)) is None:
            self.last = line.strip() or self.last
        else:
            file = self.out / ROWS_FILE
            written = file.read_text(encoding="utf-8").splitlines()[self.before :]
            if line not in written:
                line = _rows.line_of({"part": self.name, **record})
                _rows.append(file, line)
            say(line)
        self._log(line + "\n")

    def _log(self, text: str) -> None:
        if self.room > 0:
            with (self.out / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(text[: self.room])
            self.room -= len(text)


def kill(child: subprocess.Popen[bytes], token: str) -> None:
    """Ends the child and whatever it started, in sessions of their own too: all that has the token in its
    environment, until there is none. Returns when the child is gone."""
    for _ in range(20):
        found = list(_marked(token))
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if child.poll() is None:
            child.kill()
        child.wait()
        if not found:
            return
        time.sleep(0.02)


def _marked(token: str) -> Iterator[int]:
    """Living processes that have the token in their environment; none where there is no /proc."""
    wanted = f"{_MARK}={token}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def _environment(part: Part, out: Path, token: str) -> dict[str, str]:
    """This process's own, with the source first on the path and what stood there after it: carried packages stay."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", _MARK: token}
    rows = {_rows.ROWS: str((out / ROWS_FILE).resolve()), _rows.PART: part.name}
    return {**os.environ, **mine, **rows, **part.environment}


def _with_parent(number: signal.Signals) -> Any:
    """What a child does before its program: ask for this signal when the process that starts it ends, however."""
    prctl = ctypes.CDLL(None).prctl  # found before the fork

    def ask() -> None:
        prctl(_DIE_WITH_PARENT, number)

    return ask
