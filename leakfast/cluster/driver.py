"""The driver: hands tasks to workers as what they need is there, writes what they make into the run, and hands out again what
a worker that died had in hand; judges that are services are asked meanwhile. Demands a study and a pool of workers; holds no
model and measures nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast import errors
from leakfast.behaviors.registry import get
from leakfast.cluster import messages as m
from leakfast.cluster.judges import Judges, Judging
from leakfast.cluster.pool import Pool
from leakfast.cluster.tasks import Task, cut, first_free, tasks_of
from leakfast.errors import LeakfastError
from leakfast.judge import stage as judging
from leakfast.pipeline.preflight import check_judges
from leakfast.pipeline.stages import Outcome, Stages, chosen_of
from leakfast.pipeline.steps import Shown, silent
from leakfast.progress import Progress
from leakfast.storage.mirror import working_copy
from leakfast.storage.run import Run
from leakfast.study.config import Study, load_study
from leakfast.version import maker

if TYPE_CHECKING:
    from leakfast.pipeline.stages import Chosen

log = logging.getLogger("leakfast.cluster")

TRIES = 3  # of a task whose workers died
SILENCE_S = 1800.0  # a worker with a task that says nothing for so long hangs
MakePool = Callable[[Study, Sequence[str]], Pool]  # study, only → workers that are not started


def run(
    study: str | Path | Study,
    pool: MakePool,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    progress: Shown = silent,
    silence_s: float = SILENCE_S,
) -> Outcome:
    """As `leakfast.pipeline.stages.run`, with the stages on workers; judges are asked here, of a behavior as soon as its last
    measurement is in the run; tables, figures and report are made here.

    pool: makes the workers. silence_s: seconds after which a worker that says nothing of its task is ended and the task
    given to another. What a worker made is in the run as soon as it is whole, so that a kill of a worker, or of the
    driver, loses what was under way; the same call again is the resume. Raises as `run`, and LeakfastError where a task
    failed TRIES times."""
    from leakfast.pipeline import finished

    study = study if isinstance(study, Study) else load_study(study)
    chosen = chosen_of(study, only)
    with working_copy(out or study.run_dir) as folder, Run(folder).lock() as store:
        store.create(study.raw_text).note_maker(*maker())

        def work() -> Outcome:
            stages = Stages(study, store, progress, chosen=chosen)
            return _on_workers(stages, lambda: pool(study, only), silence_s)

        return finished.once(study, chosen, store, work)


def _on_workers(stages: Stages, pool: Callable[[], Pool], silence_s: float) -> Outcome:
    """All stages, on workers that are made once everything that can be checked before is."""
    study, store, chosen, progress = stages.study, stages.store, stages.chosen, stages.steps.progress
    trained, controls = stages.sorted()
    check_judges(study, chosen.behaviors, store)
    stages.settle()
    with Judges(_judgings(study, chosen), stages.judge) as judges:
        workers = pool()
        try:
            tasks = cut(tasks_of(study, chosen, trained, controls), workers.size, study)
            driver = _Driver(store, workers, tasks, silence_s, judges)
            with progress(f"run on {workers.size} workers") as report:
                driver.all(report)
            stages.steps.took.update(driver.took)
        finally:
            workers.close()
        with progress("judge") as report:
            judges.wait(report)
        judges.finish()
    return stages.told()


def _judgings(study: Study, chosen: Chosen) -> list[Judging]:
    """What a judge reads, a service beside the workers."""
    found = []
    for behavior in chosen.behaviors:
        cfg = judging.settings(study, behavior)
        if get(behavior).measured_by != "judge":
            continue
        beside = cfg.judge is not None and judging.parse_spec(cfg.judge).way in ("chat", "batch")
        found.append(Judging(behavior, False, beside))
        if behavior in study.trajectory.behaviors:
            found.append(Judging(behavior, True, beside))
    return found


@dataclass
class _Seat:
    """A worker as the driver sees it. has: files that were sent to it, or made by it, path → hash; since: when it last
    said something; share: done of its task, 0–1, which never falls though a task shows several things one after the other."""

    ready: bool = False
    task: Task | None = None
    has: dict[str, str] = field(default_factory=dict)
    since: float = 0.0
    share: float = 0.0
    before: float = 0.0
    title: str = ""
    what: str = ""

    def hears(self, title: str, done: int, total: int) -> None:
        """How far one of a task's steps is; how many steps will follow nobody knows, so that each takes half of what is left."""
        if title != self.title:
            self.before, self.title = self.share, title
        now = self.before + (1 - self.before) / 2 * (min(1.0, done / total) if total else 0.0)
        self.share, self.what = max(self.share, now), f"{title} {done}/{total}"


class _Driver:
    def __init__(
        self, store: Run, pool: Pool, tasks: Sequence[Task], silence_s: float, judges: Judges | None = None
    ) -> None:
        self.store, self.pool, self.silence_s = store, pool, silence_s
        self.judges = judges if judges is not None else Judges((), lambda behavior, series, shown: None)
        self.waiting = list(tasks)
        self.total = sum(task.weight for task in tasks)
        self.done: dict[str, Task] = {}
        self.tries: dict[str, int] = {}
        self.deaths = 0  # before anything was ready, in a row
        self.seats: dict[int, _Seat] = {}
        self.took: dict[str, float | None] = {}

    def all(self, report: Progress) -> None:
        """Every task, done. Raises what a task raised."""
        for worker in range(min(self.pool.size, len(self.waiting))):
            self._start(worker)
        while self.waiting or any(seat.task for seat in self.seats.values()):
            self._hand_out()
            heard = self.pool.next(1.0)
            if heard is not None:
                self._hear(*heard)
            self._look_for_the_silent()
            self.judges.look({(task.kind, task.behavior) for task in self._open()})
            report(self._so_far(), self.total, self._what())
        self.store.log(
            "cluster", workers=self.pool.size, tasks=len(self.done), tried_again=sum(self.tries.values())
        )

    def _start(self, worker: int) -> None:
        self.pool.start(worker)
        self.seats[worker] = _Seat(since=time.monotonic())

    def _hand_out(self) -> None:
        """To every worker that is free a task that can begin."""
        for worker, seat in self.seats.items():
            if not seat.ready or seat.task is not None:
                continue
            task = first_free(self.waiting, self.done)
            if task is None:
                return
            self.waiting.remove(task)
            seat.task, seat.since, seat.share, seat.before = task, time.monotonic(), 0.0, 0.0
            seat.title = seat.what = ""
            held = {
                path: self.store.manifest["shards"][path] for n in task.needs for path in self.store.shards(n)
            }
            files = {}
            for path, entry in held.items():
                there = seat.has.get(path) == entry["sha256"]
                files[path] = m.Lent(entry, None if there else (self.store.path / path).read_bytes())
                seat.has[path] = entry["sha256"]
            self.pool.give(worker, task, files, self.store.manifest["stages"])

    # ── what workers say ─────────────────────────────────────────────────────────────────────────
    def _hear(self, worker: int, said: m.Message) -> None:
        seat = self.seats[worker]
        seat.since = time.monotonic()
        if isinstance(said, m.Ready):
            seat.ready, self.deaths = True, 0
            log.info("worker %d is ready: %s", worker, said.where)
        elif isinstance(said, m.Made):
            self.store.add_bytes(said.relpath, said.content, said.sha256, said.meta)
            seat.has[said.relpath] = said.sha256
        elif isinstance(said, m.Struck):
            if self.store.manifest["shards"].get(said.relpath, {}).get("sha256") == said.sha256:
                self.store.retire(said.relpath, said.reason)
        elif isinstance(said, m.StageDone):
            self.store.mark_done(said.key, said.inputs, **said.outputs)
        elif isinstance(said, m.Logged):
            self.store.log(said.event, **said.fields)
        elif isinstance(said, m.Said):
            logging.getLogger(said.logger).log(said.level, "worker %d: %s", worker, said.text)
        elif isinstance(said, m.Shown):
            seat.hears(said.title, said.done, said.total)
        elif isinstance(said, m.Done):
            self._finish(seat, said)
        elif isinstance(said, m.Failed):
            raise getattr(errors, said.kind, LeakfastError)(said.text)
        else:
            self._bury(worker, said.why)

    def _finish(self, seat: _Seat, said: m.Done) -> None:
        assert seat.task is not None
        self.done[seat.task.name] = seat.task
        for name, seconds in said.took.items():
            before = self.took.get(name)
            self.took[name] = before if seconds is None else (before or 0.0) + seconds
        seat.task = None

    def _bury(self, worker: int, why: str) -> None:
        """Another worker in its place; its task waits again, unless workers die of it or none comes up."""
        seat = self.seats[worker]
        task, self.deaths = seat.task, 0 if seat.ready else self.deaths + 1
        if self.deaths >= TRIES:
            raise LeakfastError(f"no worker comes up; the last one ended so: {why}")
        if task is not None:
            self.tries[task.name] = self.tries.get(task.name, 0) + 1
            self.store.log("worker_died", worker=worker, task=task.name, why=why)
            if self.tries[task.name] >= TRIES:
                raise LeakfastError(
                    f"{task.name}: {TRIES} workers died of it, the last one so: {why}\nWhat was made is kept. Mend the cause "
                    "(memory, a GPU) and run the same command again, or run it with --workers 1 to see more."
                )
            self.waiting.insert(0, task)
        log.warning(
            "worker %d died (%s)%s", worker, why, f"; {task.name} is handed out again" if task else ""
        )
        self._start(worker)

    def _look_for_the_silent(self) -> None:
        for worker, seat in list(self.seats.items()):
            busy = seat.task is not None or not seat.ready
            if busy and time.monotonic() - seat.since > self.silence_s:
                self.pool.kill(worker)
                self._bury(worker, f"said nothing for {self.silence_s:.0f} s and was ended")

    def _open(self) -> list[Task]:
        return [*self.waiting, *(seat.task for seat in self.seats.values() if seat.task)]

    # ── how far it is ────────────────────────────────────────────────────────────────────────────
    def _so_far(self) -> int:
        under_way = sum(seat.task.weight * seat.share for seat in self.seats.values() if seat.task)
        return int(sum(task.weight for task in self.done.values()) + under_way)

    def _what(self) -> str:
        said = [seat.what or seat.task.name for seat in self.seats.values() if seat.task]
        return "; ".join([*said, *filter(None, [self.judges.under_way()])])
