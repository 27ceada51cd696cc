"""A worker: a folder of its own, filled with what a task reads, in which the task is carried out as in any run; what is made
there is sent as soon as it is whole. Demands a study and somebody to send to; never touches the run itself."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from leakfast.cluster import messages as m
from leakfast.cluster.tasks import Task, carry_out
from leakfast.errors import LeakfastError, StoreError
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.progress import Progress
from leakfast.storage.run import Run, atomic_write

if TYPE_CHECKING:
    from leakfast.study.config import Study

Send = Callable[[m.Message], None]

_EVERY_S = 0.5  # progress is sent no more often


class Loan(Run):
    """A run directory that holds what was lent, and tells of every change."""

    def __init__(self, path: Path, send: Send) -> None:
        super().__init__(path)
        self._send = send

    def receive(self, needs: tuple[str, ...], files: Mapping[str, m.Lent], stages: Mapping[str, Any]) -> None:
        """Hold exactly `files` under the folders and files `needs`, and know of the finished `stages`. Raises StoreError for
        bytes that are not those of the run."""
        for relpath, lent in files.items():
            if lent.content is None:
                continue
            if hashlib.sha256(lent.content).hexdigest() != lent.entry["sha256"]:
                raise StoreError(f"{relpath}: its bytes do not match their hash on the way to a worker.")
            atomic_write(self.path / relpath, lent.content)

        def change(manifest: dict[str, Any]) -> None:
            kept = {p: entry for p, entry in manifest["shards"].items() if not _is_under(p, needs)}
            manifest["shards"] = kept | {p: dict(lent.entry) for p, lent in files.items()}
            manifest["stages"] = {key: dict(stage) for key, stage in stages.items()}

        self._change(change)

    def log(self, event: str, **fields: Any) -> None:
        if event not in ("shard", "stage", "quarantine"):  # of which the driver writes its own
            self._send(m.Logged(event, fields))

    def mark_done(self, key: str, inputs_hash: str, **outputs: Any) -> None:
        super().mark_done(key, inputs_hash, **outputs)
        self._send(m.StageDone(key, inputs_hash, outputs))

    def retire(self, relpath: str, reason: str) -> None:
        entry = self.manifest["shards"].get(relpath)
        super().retire(relpath, reason)
        if entry is not None:
            self._send(m.Struck(relpath, entry["sha256"], reason))

    def _add(self, relpath: str, content: Any, sha256: str | None, meta: dict[str, Any]) -> Path:
        path = super()._add(relpath, content, sha256, meta)
        relpath = str(PurePosixPath(relpath))
        self._send(m.Made(relpath, path.read_bytes(), self.manifest["shards"][relpath]["sha256"], meta))
        return path


def _is_under(relpath: str, needs: tuple[str, ...]) -> bool:
    parts = PurePosixPath(relpath).parts
    return any(parts[: len(wanted)] == wanted for wanted in (PurePosixPath(n).parts for n in needs))


class Worker:
    """Holds the model from its first task to its last."""

    def __init__(self, study: Study, only: tuple[str, ...], folder: Path, send: Send) -> None:
        self._send = send
        self.run = Loan(folder, send)
        self.run.create()
        self.stages = Stages(study, self.run, self._progress, chosen=chosen_of(study, only))
        logging.getLogger("leakfast").addHandler(_Sender(send))
        send(m.Ready(f"{socket.gethostname()}:{os.getpid()}"))

    def do(self, task: Task, files: Mapping[str, m.Lent], stages: Mapping[str, Any]) -> None:
        """Carry out one task, and say so; a LeakfastError is said and not raised. Any other ends the worker."""
        self.stages.steps.took.clear()
        try:
            self.run.receive(task.needs, files, stages)
            carry_out(self.stages, task)
        except LeakfastError as error:
            self._send(m.Failed(type(error).__name__, error.message))
        else:
            self._send(m.Done(dict(self.stages.steps.took)))

    @contextmanager
    def _progress(self, title: str) -> Iterator[Progress]:
        last = 0.0

        def progress(done: int, total: int, what: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY_S:
                last = time.monotonic()
                self._send(m.Shown(title, done, total, what))

        yield progress


class _Sender(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self._to = send

    def emit(self, record: logging.LogRecord) -> None:
        self._to(m.Said(record.name, record.levelno, record.getMessage()))
