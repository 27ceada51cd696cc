"""Workers as processes of this machine, each with GPUs of its own where there are any. Demands nothing but this Python; a
worker ends with its driver, however that ends."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.cluster import lines, scratch
from leakfast.cluster import messages as m
from leakfast.cluster.tasks import Task
from leakfast.errors import InputError
from leakfast.models import gpus, threads

if TYPE_CHECKING:
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.cluster")

_END_S = 10.0  # for a process that was killed; one that the system holds (a device that does not answer) is left behind
_LAST_LINES = 20  # of what a worker that is gone had written


def workers_of(study: Study) -> int:
    """How many workers a run takes where nobody says: one for every GPU, or group of `tensor_parallel` GPUs; one without GPUs,
    and where the study asks for `data_parallel`, whose engines are on all of them already."""
    if study.vllm.data_parallel > 1:
        return 1
    return max(1, len(gpus.visible()) // study.vllm.tensor_parallel)


def processes(workers: int) -> Callable[[Study, Sequence[str]], LocalPool]:
    """So many processes of this machine, with its GPUs, or its cores, in equal parts. They raise InputError for more workers
    than there are GPUs, or cores."""

    def pool(study: Study, only: Sequence[str]) -> LocalPool:
        check_alone(study, workers)
        names, each = gpus.visible(), study.vllm.tensor_parallel
        most = len(names) // each if names else len(threads.affinity())
        if not 1 <= workers <= most:
            kind = f"groups of {each} GPUs" if names and each > 1 else "GPUs" if names else "cores"
            raise InputError(
                f"run: --workers {workers} given, but this machine has {most} {kind}. Give 1 to {most}."
            )
        devices = [",".join(names[k * each : (k + 1) * each]) or None for k in range(workers)]
        level = logging.getLogger("leakfast").getEffectiveLevel()
        n = threads.asked() or max(1, threads.chosen()[0] // workers)
        return LocalPool(study, only, devices, n, level)

    return pool


def check_alone(study: Study, workers: int) -> None:
    """Raises InputError where a study asks for several engines in a process, and there are several processes."""
    if workers > 1 and study.vllm.data_parallel > 1:
        raise InputError(
            f"run: {workers} workers, and the study says [vllm] data_parallel = {study.vllm.data_parallel}: both would take "
            "every GPU. Take data_parallel out of the study, or give --workers 1."
        )


class LocalPool:
    """command: starts the process of a worker. devices: of each, the value of CUDA_VISIBLE_DEVICES, None where there is no
    GPU; threads: of each."""

    command = (sys.executable, "-m", "leakfast.cluster.local")

    def __init__(
        self, study: Study, only: Sequence[str], devices: Sequence[str | None], threads: int, level: int
    ) -> None:
        self.size, self.devices, self.threads = len(devices), devices, threads
        self._told = (study, tuple(only), level)
        self._place = scratch.folder()
        self._process: dict[int, subprocess.Popen[bytes]] = {}
        self._line: dict[int, lines.Line] = {}

    def start(self, worker: int) -> None:
        self.kill(worker)
        folder = self._place / str(worker)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.devices[worker] is not None:
            environment[gpus.VISIBLE] = str(self.devices[worker])
        with (folder / "stderr").open("wb") as said:
            self._process[worker] = subprocess.Popen(
                [*self.command, str(theirs.fileno()), str(folder)],
                stdin=subprocess.PIPE,  # closed by the system when we end: so does the worker
                stdout=said,
                stderr=said,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the driver's to answer
            )
        theirs.close()
        self._line[worker] = lines.Line(ours)
        self._say(worker, self._told)

    def give(self, worker: int, task: Task, files: Mapping[str, m.Lent], stages: Mapping[str, Any]) -> None:
        self._say(worker, (task, dict(files), dict(stages)))

    def _say(self, worker: int, what: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone: `next` says so
            self._line[worker].send(what)

    def next(self, timeout_s: float) -> tuple[int, m.Message] | None:
        until = time.monotonic() + timeout_s
        while True:
            with selectors.DefaultSelector() as open_:
                for worker, line in self._line.items():
                    open_.register(line.end, line.awaits, worker)
                ready = open_.select(max(0.0, until - time.monotonic()))
            for key, _ in ready:
                if (said := self._heard(key.data)) is not None:
                    return key.data, said
            if time.monotonic() >= until:
                return None

    def _heard(self, worker: int) -> m.Message | None:
        """What a worker has said whole, after it was sent what it takes now."""
        try:
            with contextlib.suppress(OSError):  # it is gone: what it said before is heard first
                self._line[worker].flush()
            said: m.Message | None = self._line[worker].receive()
        except (EOFError, OSError):
            said = m.Died(self._why(worker))
            self.kill(worker)
        return said

    def _why(self, worker: int) -> str:
        """How its process ended, and the last that it wrote."""
        try:
            code: int | None = self._process[worker].wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            code = None
        ended = f"signal {-code}" if code is not None and code < 0 else f"exit {code}"
        lines = (self._place / str(worker) / "stderr").read_text(errors="replace").splitlines()
        return "\n".join([ended, *lines[-_LAST_LINES:]])

    def kill(self, worker: int) -> None:
        if line := self._line.pop(worker, None):
            line.close()
        if process := self._process.pop(worker, None):
            process.kill()
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                log.warning("worker %d: process %d does not end; it is left behind", worker, process.pid)
            if process.stdin:
                process.stdin.close()

    def close(self) -> None:
        for worker in list(self._process):
            self.kill(worker)
        shutil.rmtree(self._place, ignore_errors=True)


def serve(descriptor: int, folder: Path) -> None:
    """The process of a worker: its end of the line to the driver, its folder."""
    from leakfast.cluster.worker import Worker

    line, lock = socket.socket(fileno=descriptor), threading.Lock()

    def send(message: m.Message) -> None:
        with lock:
            try:
                lines.send(line, message)
            except OSError:
                os._exit(1)  # nobody listens

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)  # the driver has ended

    threading.Thread(target=watch, daemon=True).start()
    study, only, level = lines.receive(line)
    logging.getLogger("leakfast").setLevel(level)
    logging.getLogger("leakfast").propagate = False
    threads.ask(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker(study, only, folder / "run", send)
    while True:
        try:
            task, files, stages = lines.receive(line)
        except (EOFError, OSError):
            return
        worker.do(task, files, stages)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
