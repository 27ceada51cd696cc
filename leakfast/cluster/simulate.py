"""How long a study takes on so many workers: its tasks, scheduled as the driver does, at the rates of a run that was timed.
Demands a checked study and such a run; a task whose kind was never timed is named, and no total is given without it."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.cluster.tasks import Task, cut, first_free, tasks_of
from leakfast.pipeline import estimate_shown
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage import layout
from leakfast.storage.manifests import events

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import Study


@dataclass(frozen=True)
class Rates:
    """Seconds of a worker: a row measured by what a behavior is measured by itself, and a whole adapter by probability, both by
    behavior; a training with its rows, by adapter; an adapter under all arms; steps that are done once, by their name;
    loading the model. said: where they are from."""

    row: dict[str, float]
    probability: dict[str, float]
    training: dict[str, float]
    steered: float | None
    once: dict[str, float]
    start: float
    said: str


@dataclass(frozen=True)
class Planned:
    """workers; wall_s: from the first task to the last; work_s: of all workers together; efficiency: work over wall times
    workers; critical_path_s: with as many workers as there are tasks; path: the tasks of it; last: (task, end) of the tasks
    that end last; untimed: tasks that nobody timed, then all seconds are None; usd: at a price an hour; shown_s: tables, figures
    and report, which the driver makes after all of it, None where the run did not time them at this size (shown_said)."""

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
    shown_s: float | None
    shown_said: str


def rates_of(run: Run) -> Rates:
    """The rates of a run's journal: what was made there, by one process or by workers, each time it was."""
    journal = run.path / layout.JOURNAL
    made: dict[str, dict[str, float]] = {"own": defaultdict(float), "probability": defaultdict(float)}
    took: dict[str, dict[str, float]] = {"own": defaultdict(float), "probability": defaultdict(float)}
    for entry in events(journal, "eval"):
        if entry.get("made") and "seconds" in entry:
            by, behavior = entry["by"], entry["behavior"]
            whole = len(entry["adapters"]) / (entry["made"] + entry["kept"])  # adapters a row
            made[by][behavior] += entry["made"] * (1 if by == "own" else whole)
            took[by][behavior] += entry["seconds"]
    each = {by: {behavior: took[by][behavior] / n for behavior, n in made[by].items()} for by in made}
    once: dict[str, float] = {}  # a step that was begun again counts as it took longest
    for entry in events(journal, "took"):
        once[entry["step"]] = max(entry["seconds"], once.get(entry["step"], 0.0))
    steered: dict[str, float] = defaultdict(float)
    for step, seconds in once.items():
        if step.startswith("steer "):
            steered[step.partition(" along ")[0]] += seconds
    mean = sum(steered.values()) / len(steered) if steered else None
    start = max((entry.get("seconds", 0.0) for entry in events(journal, "model")), default=0.0)
    return Rates(each["own"], each["probability"], _trainings(once), mean, once, start, f"of {run.path}")


def _trainings(once: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a training with its rows, by adapter; those that were trained in company share theirs."""
    found: dict[str, float] = {}
    for step, seconds in once.items():
        if step.startswith("train "):
            names = step.removeprefix("train ").removesuffix(" together").split(", ")
            for name in names:
                found[name] = max(found.get(name, 0.0), seconds / len(names))
    return {name: seconds + once.get(f"data {name}", 0.0) for name, seconds in found.items()}


def _seconds(task: Task, study: Study, rates: Rates) -> float | None:
    if task.kind == "check":
        return 0.0
    if task.kind == "trajectory":
        return rates.once.get(f"{task.behavior} through training")
    if task.kind == "steering":
        return rates.steered
    if task.kind == "train":
        alike = [s for name, s in rates.training.items() if name.startswith(f"{task.behavior}-")]
        known = sum(alike) / len(alike) if alike else None
        auto = study.behaviors[task.behavior].train.lr == "auto"
        first = (study.sources[0], study.seeds[0]) == (task.source, task.seed)
        search = rates.once.get(f"learning rate of {task.behavior}") if auto and first else 0.0
        return None if known is None or search is None else known + search
    if task.kind == "match":
        return _measured(task, "completions", rates)
    if task.kind == "measure":
        return _measured(task, study.behaviors[task.behavior].eval.measure, rates)
    if task.kind == "probability":
        return rates.probability.get(task.behavior)
    return rates.once.get(task.kind)


def _measured(task: Task, measure: str, rates: Rates) -> float | None:
    """By probability alone a task draws few replies, as many as are lacking, and its weight is not their number: untimed."""
    own = rates.row.get(task.behavior)
    if own is None or (measure == "probability" and get(task.behavior).by_completions):
        return None
    return own * task.weight


def simulate(
    study: Study, run: Run, workers: int, *, usd_per_hour: float | None = None, shared: float = 1.0
) -> Planned:
    """The study's tasks on `workers` workers. run: whose rates are taken; usd_per_hour: price of a worker; shared: workers
    that share one core (1: each has its own), by which everything takes longer. Judges are left out, and tables and the report
    stand apart: they come after, in the driver."""
    chosen = chosen_of(study, ())
    trained, controls = Stages(study, run, chosen=chosen).sorted()
    tasks = cut(tasks_of(study, chosen, trained, controls), workers, study)
    rates, shown = rates_of(run), estimate_shown.planned(study, run)
    after = (shown.seconds, shown.note)
    found = {task.name: _seconds(task, study, rates) for task in tasks}
    untimed = tuple(name for name, seconds in found.items() if seconds is None)
    if untimed:
        return Planned(workers, len(tasks), None, None, None, None, (), (), untimed, None, rates.said, *after)
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
        *after,
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
