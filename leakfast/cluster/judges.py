"""Judges beside the workers: a behavior is judged as soon as all that measures it is in the run, in a thread of the driver,
one behavior after the other. Demands the driver's own Run; judges that are a model here wait until the workers have ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from leakfast.pipeline.steps import Shown
from leakfast.progress import Progress
from leakfast.storage.interrupts import stop_threads

log = logging.getLogger("leakfast.cluster")

KINDS = ("measure", "trajectory")  # of tasks whose completions are judged


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judges")

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=True)
        while kind is not None and wait([future for _, future in self._begun], timeout=0.5).not_done:
            stop_threads()

    def look(self, open_tasks: Collection[tuple[str, str]]) -> None:
        """open_tasks: (kind, behavior) of the tasks that are not done."""
        for one in [w for w in self._waiting if w.beside and (w.kind, w.behavior) not in open_tasks]:
            self._waiting.remove(one)
            future = self._thread.submit(self._judge, one.behavior, one.series, self._shown)
            future.add_done_callback(partial(_warn, one.behavior))
            self._begun.append((one, future))

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


def _warn(behavior: str, future: Future[None]) -> None:
    """At once of a failure, which is raised when the workers have ended."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("judge %s: %s", behavior, error or type(error).__name__)
