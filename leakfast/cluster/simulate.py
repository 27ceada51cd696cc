"""How long a study takes on so many workers: its tasks, scheduled as the driver does, at the rates of a run that was timed.
Demands a checked study and such a run; a task whose kind was never timed is named, and no total is given without it."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.cluster.tasks import Task, cut, first_free, tasks_of
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import Study


@dataclass(frozen=True)
class Rates:
    """Seconds of a worker: a row measured, by behavior; a training with its rows, by adapter; the search of a learning rate;
    centroids; predictors; loading the model. said: where they are from."""

    row: dict[str, float]
    training: dict[str, float]
    search: dict[str, float]
    once: dict[str, float]
    start: float
    said: str


@dataclass(frozen=True)
class Planned:
    """workers; wall_s: from the first task to the last; work_s: of all workers together; efficiency: work over wall times
    workers; critical_path_s: with as many workers as there are tasks; path: the tasks of it; last: (task, end) of the tasks
    that end last; untimed: tasks that nobody timed, then all seconds are None; usd: at a price an hour."""

    workers: int
    tasks: int
    wall_s: float | None
    work_s: float | None
    efficiency: float | None
    critical_path_s: float | None
    path: tuple[str, ...]
    last: tuple[tuple[str, float], ...]
    untimed: tuple[str, ...]
    usd: float | None
    said: str


def rates_of(run: Run) -> Rates:
    """The rates of a run's journal: what was made there, by one process or by workers, each time it was."""
    made: dict[str, int] = defaultdict(int)
    took: dict[str, float] = defaultdict(float)
    steps: dict[str, list[float]] = defaultdict(list)
    starts: list[float] = []
    lines = (run.path / layout.JOURNAL).read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if entry.get("event") == "eval" and entry.get("made") and "seconds" in entry:
            made[entry["behavior"]] += entry["made"]
            took[entry["behavior"]] += entry["seconds"]
        elif entry.get("event") == "took":
            steps[entry["step"]].append(entry["seconds"])
        elif entry.get("event") == "model" and "seconds" in entry:
            starts.append(entry["seconds"])
    once = {name: max(steps[name]) for name in ("centroids", "predictors") if name in steps}
    training, search = {}, {}
    for name, seconds in steps.items():
        if name.startswith("train "):
            adapter = name.removeprefix("train ")
            rows = max(steps.get(f"data {adapter}", [0.0]))
            training[adapter] = max(seconds) + rows
        elif name.startswith("learning rate of "):
            search[name.removeprefix("learning rate of ")] = max(seconds)
    row = {behavior: took[behavior] / made[behavior] for behavior in made}
    return Rates(row, training, search, once, max(starts, default=0.0), f"of {run.path}")


def _seconds(task: Task, study: Study, rates: Rates) -> float | None:
    if task.kind == "check":
        return 0.0
    if task.kind in ("centroids", "predictors"):
        return rates.once.get(task.kind)
    if task.kind == "train":
        alike = [s for name, s in rates.training.items() if name.startswith(f"{task.behavior}-")]
        known = sum(alike) / len(alike) if alike else None
        auto = study.behaviors[task.behavior].train.lr == "auto"
        first = (study.sources[0], study.seeds[0]) == (task.source, task.seed)
        search = rates.search.get(task.behavior) if auto and first else 0.0
        return None if known is None or search is None else known + search
    each = rates.row.get(task.behavior)
    return None if each is None else each * task.weight


def simulate(
    study: Study, run: Run, workers: int, *, usd_per_hour: float | None = None, shared: float = 1.0
) -> Planned:
    """The study's tasks on `workers` workers. run: whose rates are taken; usd_per_hour: price of a worker; shared: workers
    that share one core (1: each has its own), by which everything takes longer. Judges, tables and the report are left
    out: they come after, in the driver."""
    chosen = chosen_of(study, ())
    trained, controls = Stages(study, run, chosen=chosen).sorted()
    tasks = cut(tasks_of(study, chosen, trained, controls), workers, study)
    rates = rates_of(run)
    found = {task.name: _seconds(task, study, rates) for task in tasks}
    untimed = tuple(name for name, seconds in found.items() if seconds is None)
    if untimed:
        return Planned(workers, len(tasks), None, None, None, None, (), (), untimed, None, rates.said)
    seconds = {name: shared * (found[name] or 0.0) for name in found}
    start = shared * rates.start
    ends = _schedule(tasks, seconds, workers, start)
    wall, work = max(ends.values()), sum(seconds.values()) + start * min(workers, len(tasks))
    path, longest = _path(tasks, seconds)
    last = tuple(sorted(ends.items(), key=lambda one: -one[1])[:3])
    usd = None if usd_per_hour is None else usd_per_hour * workers * wall / 3600
    return Planned(
        workers,
        len(tasks),
        wall,
        work,
        work / (wall * workers),
        longest + start,
        path,
        last,
        (),
        usd,
        rates.said,
    )


def _schedule(
    tasks: Sequence[Task], seconds: dict[str, float], workers: int, start: float
) -> dict[str, float]:
    """When each task ends, s, as the driver hands them out."""
    waiting, done, ends = list(tasks), set[str](), dict[str, float]()
    free = [(start, k) for k in range(workers)]  # (when, worker)
    busy: list[tuple[float, int, str]] = []
    heapq.heapify(free)
    now = start
    while waiting or busy:
        while free and free[0][0] <= now and (task := first_free(waiting, done)) is not None:
            _, worker = heapq.heappop(free)
            waiting.remove(task)
            ends[task.name] = now + seconds[task.name]
            heapq.heappush(busy, (ends[task.name], worker, task.name))
        now, worker, name = heapq.heappop(busy)
        done.add(name)
        heapq.heappush(free, (now, worker))
    return ends


def _path(tasks: Sequence[Task], seconds: dict[str, float]) -> tuple[tuple[str, ...], float]:
    """The longest chain of tasks that wait for each other, and how long it takes, s."""
    end: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for task in tasks:  # in an order in which one worker could do them
        before[task.name] = max(task.after, key=lambda name: end[name], default=None)
        begun = end[before[task.name]] if before[task.name] is not None else 0.0  # type: ignore[index]
        end[task.name] = begun + seconds[task.name]
    name: Any = max(end, key=lambda one: end[one])
    longest, path = end[name], []
    while name is not None:
        path.append(name)
        name = before[name]
    return tuple(reversed(path)), longest
