"""Judges beside the workers: a behavior is judged as soon as all that measures it is in the run, in a thread of the driver,
one behavior after the other. Demands the driver's own Run; judges that are a model here wait until the workers have ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from leakfast.pipeline.steps import Shown
from leakfast.progress import Progress
from leakfast.storage.interrupts import stop_threads

log = logging.getLogger("leakfast.cluster")

KINDS = ("measure", "trajectory")  # of tasks whose completions are judged
PATIENCE_S = 10.0  # for requests under way, when the run is interrupted


@dataclass(frozen=True)
class Judging:
    """One call of the judge: of a behavior's completions, or (series) of those through training. beside: whether it takes
    nothing that workers need."""

    behavior: str
    series: bool
    beside: bool

    @property
    def kind(self) -> str:
        return KINDS[self.series]


class Judges:
    """judge: carries out one (behavior, series, how its progress is shown; None: as usual). `look` begins what can begin,
    `finish` does the rest and raises what failed first; leaving the block otherwise asks the thread to stop where nothing is
    lost."""

    def __init__(self, wanted: Sequence[Judging], judge: Callable[[str, bool, Shown | None], None]) -> None:
        self._judge = judge
        self._so_far = (0, 0)
        self._waiting = list(wanted)
        self._begun: list[tuple[Judging, Future[None]]] = []
        self._queue: SimpleQueue[tuple[Judging, Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None:
            for _judging, future in self._begun:
                future.cancel()
            stop_threads()
        self._queue.put(None)
        self._thread.join(None if kind is None else PATIENCE_S)

    def look(self, open_tasks: Collection[tuple[str, str]]) -> None:
        """open_tasks: (kind, behavior) of the tasks that are not done."""
        for one in [w for w in self._waiting if w.beside and (w.kind, w.behavior) not in open_tasks]:
            self._waiting.remove(one)
            future: Future[None] = Future()
            self._begun.append((one, future))
            if self._thread is None:
                # a daemon, so that a batch that is waited for keeps nobody here; what is paid for is on the disk
                self._thread = threading.Thread(target=self._work, name="judges", daemon=True)
                self._thread.start()
            self._queue.put((one, future))

    def under_way(self) -> str:
        """What is being judged, in words; empty for nothing."""
        done, total = self._so_far
        said = [f"judge {one.behavior}" for one, future in self._begun if future.running()]
        return "".join(said) and f"{said[0]} {done}/{total}"

    def wait(self, report: Progress) -> None:
        """For what was begun."""
        while wait([future for _, future in self._begun], timeout=1.0).not_done:
            report(*self._so_far, self.under_way())

    def finish(self) -> None:
        """Does what had to wait. Raises the first failure of what was begun, when all others are done."""
        self.wait(lambda done, total, what="": None)
        failures = [error for _, future in self._begun if (error := future.exception()) is not None]
        for one in self._waiting:
            self._judge(one.behavior, one.series, None)
        self._waiting.clear()
        if failures:
            raise failures[0]

    @contextmanager
    def _shown(self, _title: str) -> Iterator[Progress]:
        """Progress in the driver's own line: a terminal shows one at a time."""

        def report(done: int, total: int, what: str = "") -> None:
            self._so_far = (done, total)

        report(0, 0)
        yield report

    def _work(self) -> None:
        while (given := self._queue.get()) is not None:
            one, future = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._judge(one.behavior, one.series, self._shown)
            except BaseException as error:  # noqa: BLE001 - raised by `finish`, when the workers are done
                log.warning("judge %s: %s", one.behavior, error)
                future.set_exception(error)
            else:
                future.set_result(None)
