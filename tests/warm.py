"""Processes that begin with everything imported: forks of one process that loads torch, transformers and leakfast once and
computes nothing, for tests that need processes of their own to be signalled or killed. How a process is started is not what
they show. Demands a system that forks; holds no tests."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

LOADED = (
    "numba",
    "peft",
    "polars",
    "scipy.stats",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "leakfast.api",
    "leakfast.cli.eval",
    "leakfast.cli.run",
    "leakfast.cluster.worker",
    "leakfast.generation.transformers",
    "leakfast.measure.completions",
    "leakfast.stats.summaries",
)
_MOST_BYTES = 1 << 20  # of a message: a script, its words and its environment
_MOST_FILES = 16
_ABOVE = 256  # descriptors that came are moved there, out of the way of the numbers they are to have
_EVERY_S = 0.02  # children are looked at


class Popen:
    """As much of subprocess.Popen as tests use, for [python, "-c", script, *words] or [python, "-m", module, *words]."""

    def __init__(
        self,
        words: Any,
        *,
        stdin: int | None = None,
        stdout: Any = None,
        stderr: Any = None,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
        pass_fds: Any = (),
        start_new_session: bool = False,
        text: bool = False,
    ) -> None:
        python, how, what, *rest = map(str, words)
        assert python == sys.executable and how in ("-c", "-m"), f"no fork can be {words[:2]}"
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None
        theirs: list[int] = []
        given: dict[int, int] = {fd: fd for fd in pass_fds}  # number there → descriptor here
        if stdin == subprocess.PIPE:
            given[0], ours = os.pipe()
            theirs.append(given[0])
            self.stdin = os.fdopen(ours, "wb")
        for number, name, asked in ((1, "stdout", stdout), (2, "stderr", stderr)):
            if asked == subprocess.PIPE:
                ours, given[number] = os.pipe()
                theirs.append(given[number])
                setattr(self, name, os.fdopen(ours, "r" if text else "rb"))
            elif asked == subprocess.DEVNULL:
                given[number] = os.open(os.devnull, os.O_WRONLY)
                theirs.append(given[number])
            elif asked is None:
                given[number] = number
            else:
                given[number] = asked.fileno()
        told = {
            "how": how,
            "what": what if how == "-m" else _server().file_of(what),
            "words": rest,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "session": start_new_session,
            "numbers": list(given),
        }
        self.pid = _server().start(told, list(given.values()))
        for descriptor in theirs:
            os.close(descriptor)

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What it says until it ends, both lines read at once."""
        said: dict[str, Any] = {}

        def read(name: str) -> None:
            said[name] = getattr(self, name).read()

        open_lines = [name for name in ("stdout", "stderr") if getattr(self, name) is not None]
        readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in open_lines]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said.get("stdout"), said.get("stderr")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = _server().ended(self.pid, timeout)
        return self.returncode


# elsewhere a line keeps no message whole: processes of their own, which take longer
if sys.platform != "linux":
    Popen = subprocess.Popen  # type: ignore[assignment, misc]


def said_by(words: Any) -> str:
    """What a fork prints that ends well."""
    child = Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    return said


class _Server:
    """The process that forks, started once, and how each of its children ended."""

    def __init__(self) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.codes: dict[int, int] = {}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(words, env=env, pass_fds=[theirs.fileno()])
        self.scripts = tempfile.TemporaryDirectory()
        theirs.close()
        atexit.register(self.close)

    def file_of(self, script: str) -> str:
        path = Path(self.scripts.name) / f"{hashlib.sha256(script.encode()).hexdigest()[:16]}.py"
        path.write_text(script)
        return str(path)

    def start(self, told: dict[str, Any], descriptors: list[int]) -> int:
        socket.send_fds(self.line, [json.dumps(told).encode()], descriptors)
        while True:
            kind, pid, code = self._hear()
            if kind == "started":
                return pid
            self.codes[pid] = code

    def ended(self, pid: int, timeout: float | None) -> int | None:
        limit = None if timeout is None else time.monotonic() + timeout
        while pid not in self.codes:
            left = None if limit is None else max(0.0, limit - time.monotonic())
            if not select.select([self.line], [], [], left)[0]:
                return None
            _, other, code = self._hear()
            self.codes[other] = code
        return self.codes.pop(pid)

    def _hear(self) -> tuple[str, int, int]:
        message = self.line.recv(_MOST_BYTES)
        assert message, f"the process that forks has ended: {self.process.wait()}"
        kind, pid, code = json.loads(message)
        return kind, pid, code

    def close(self) -> None:
        self.line.close()
        self.process.wait()
        self.scripts.cleanup()


_started: list[_Server] = []


def _server() -> _Server:
    if not _started:
        _started.append(_Server())
    return _started[0]


def _serve(line: socket.socket) -> dict[str, Any]:
    """Fork whenever asked, and tell how children end. Returns in a child, with what it is to run, and ends with the line."""
    open_children: set[int] = set()
    while True:
        while open_children:  # one that ends while nothing is asked is told too
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                open_children.remove(pid)
                with contextlib.suppress(OSError):  # nobody listens: the line ends
                    line.send(json.dumps(["ended", pid, os.waitstatus_to_exitcode(status)]).encode())
            elif select.select([line], [], [], _EVERY_S)[0]:
                break
        message, descriptors, _, _ = socket.recv_fds(line, _MOST_BYTES, _MOST_FILES)
        if not message:
            os._exit(0)
        told = json.loads(message)
        child = os.fork()
        if not child:
            line.close()
            above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _ABOVE) for descriptor in descriptors]
            for descriptor in descriptors:
                os.close(descriptor)
            for number, descriptor in zip(told["numbers"], above, strict=True):
                os.dup2(descriptor, number, inheritable=True)
                os.close(descriptor)
            return told
        for descriptor in descriptors:
            os.close(descriptor)
        open_children.add(child)
        with contextlib.suppress(OSError):
            line.send(json.dumps(["started", child, 0]).encode())


def _main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    os.fsync = lambda descriptor: None  # as in conftest.py
    gc.freeze()  # else every child's collections would copy these objects' pages
    told = _serve(socket.socket(fileno=int(sys.argv[1])))
    if told["session"]:
        os.setsid()
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["env"])
    sys.argv = ["-c", *told["words"]]
    code = 1
    try:
        if told["how"] == "-m":
            runpy.run_module(told["what"], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(told["what"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking apart all that was imported would take a second


if __name__ == "__main__":
    _main()
