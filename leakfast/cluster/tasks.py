"""A study as tasks: what workers carry out one at a time, what has to be there before, and which files of the run they read.
Demands a checked study; carries out nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from leakfast.behaviors.registry import get
from leakfast.measure.shards import SHARD_PROMPTS, SHARD_ROWS
from leakfast.pipeline import asks
from leakfast.prompts.personas import load_personas
from leakfast.storage import layout
from leakfast.study.negatives import rule_of

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.pipeline.stages import Chosen, Stages
    from leakfast.study.config import Study

MANY = 4  # measuring is cut until there are so many tasks a worker, or a task is a shard
ROW = 10  # completions that take as long as a row that is trained on once (SmolLM2: 10, the organism: 8)


@dataclass(frozen=True)
class Task:
    """One thing that one worker does. kind: check (what can be known to fail), centroids, predictors, train, measure, probability
    (where it is measured beside completions), match (the source alone, at points of its training), trajectory or steering.
    adapters: names of those that are trained or measured (of none: the base). after: names of tasks; needs: folders and files
    of the run that are read. weight: completions or prompts scored, of the other kinds about as many as take as long: for the
    order and the count of what is done."""

    kind: str
    behavior: str = ""
    adapters: tuple[str, ...] = ()
    source: str = ""
    seed: int = 0
    portion: tuple[int, int] = (0, 1)
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    weight: int = 1

    @property
    def name(self) -> str:
        words = [self.kind, self.behavior if self.kind != "train" else ""]
        words += self.adapters or ([layout.BASE] if self.kind in ("measure", "probability") else [])
        k, n = self.portion
        return " ".join(filter(None, [*words, f"{k + 1}/{n}" if n > 1 else ""]))


def tasks_of(study: Study, chosen: Chosen, trained: Sequence[str], controls: Sequence[str]) -> list[Task]:
    """All tasks of a study, in an order in which one worker could do them. trained, controls: the behaviors of either kind
    (`Stages.sorted`)."""
    check = Task("check")
    found = [Task("centroids", needs=(layout.centroids(),), weight=1000)]
    if study.asks_predictors:
        needs = (layout.predictors(), layout.PREDICTORS, layout.DIVERGENCES)
        found.append(Task("predictors", needs=needs, weight=10_000))
    pairs = _pairs(chosen, asks.with_earlier(study, trained))
    every = [_training(study, chosen, b, seed, source) for b, seed, source in pairs]
    found += every
    trainings = [t for t in every if t.behavior in trained]  # what the others begin from is trained alone
    for behavior in [*trained, *controls]:
        found += _measuring(study, behavior, trainings, found)
    for behavior in [b for b in chosen.behaviors if b in study.trajectory.behaviors]:
        mine = [t for t in trainings if t.behavior in asks.followed(study)]
        names = tuple(t.adapters[0] for t in mine)
        told = list(
            dict.fromkeys([*_copied(study, behavior, names, found), *_asked_on(study, behavior, found)])
        )
        asked = [f"{layout.completions(t.behavior)}/{(*t.adapters, layout.BASE)[0]}" for t in told]
        needs = (*map(layout.adapter, names), layout.SERIES, layout.POINTS, *asked)
        matching = _matching(study, behavior, mine)
        after = _names([*mine, *matching, *told])
        found += [*matching, Task("trajectory", behavior, names, after=after, needs=needs, weight=5000)]
    if study.steering:
        found += _steering(study, trainings, found)
    return [check, *(replace(task, after=(check.name, *task.after)) for task in found)]


def _pairs(chosen: Chosen, trained: Sequence[str]) -> list[tuple[str, int, str]]:
    return [(b, seed, source) for b in trained for seed in chosen.seeds for source in chosen.sources]


def _names(tasks: Sequence[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


def _training(study: Study, chosen: Chosen, behavior: str, seed: int, source: str) -> Task:
    """With its rows and its look at replies; where a learning rate is to be found, it is found with the adapter of the first
    source and seed, and all others wait for it."""
    cfg = study.behaviors[behavior]
    name = layout.adapter_name(behavior, source, seed)
    needs: tuple[str, ...] = (layout.rows(name), layout.adapter(name), layout.centroids(name))
    needs += (f"{layout.POINTS}/{name}",)
    after: tuple[str, ...] = ()
    if cfg.train.lr == "auto":
        first = layout.adapter_name(behavior, study.sources[0], study.seeds[0])
        needs += (layout.learning_rate(behavior), layout.rows(first))
        here = layout.adapter_name(behavior, chosen.sources[0], chosen.seeds[0])
        after = () if name == here else (Task("train", adapters=(here,)).name,)
    if (rule := rule_of(cfg.data.negative_personas)) is not None and rule.by_geometry:
        after, needs = (*after, Task("centroids").name), (*needs, layout.centroids())
    if cfg.train.steering is not None:
        after, needs = (*after, Task("centroids").name), (*needs, layout.centroids(), layout.DIRECTIONS)
    for other in asks.begins_from(study, behavior):
        earlier = _training(study, chosen, other, seed, source)
        after, needs = (*after, earlier.name), (*needs, *earlier.needs)
    if cfg.average:
        return Task("train", behavior, (name,), source, seed, after=after, needs=needs)
    weight = int(ROW * (cfg.data.positives + cfg.data.negatives) * cfg.train.epochs)
    return Task("train", behavior, (name,), source, seed, after=after, needs=needs, weight=weight)


def _measuring(study: Study, behavior: str, trainings: Sequence[Task], before: Sequence[Task]) -> list[Task]:
    """The base under the first seed, and every adapter that the behavior is measured on. Probabilities come after the replies
    that they are asked on: where completions are measured too, as tasks of their own, else drawn with them, the base's first."""
    asked = asks.asked(study, behavior)
    measures = {one.config.measure for one in asked if not one.by_choices}
    alone, beside = "probability" in measures, "both" in measures
    rows = _rows(study, asked)
    folder = _folders(behavior, asked)
    # the base of a behavior that asks the same, which is copied and not drawn again
    twins = [t for t in before if t.kind == "measure" and not t.adapters and _alike(study, t.behavior, asked)]
    needs = tuple(f"{prefix}/{layout.BASE}" for prefix in folder)
    twin_needs = tuple(f"{p}/{layout.BASE}" for t in twins for p in _folders(t.behavior, asked))
    choices = (layout.CHOICES,) if asked[0].by_choices else ()
    first = study.seeds[0]
    base = Task(
        "measure",
        behavior,
        seed=first,
        after=_names(twins),
        needs=(*needs, *twin_needs, *choices),
        weight=rows,
    )
    found = [base]
    for training in trainings:
        if training.behavior not in asks.measured_on(study, behavior):
            continue
        (name,) = training.adapters
        mine = tuple(f"{prefix}/{name}" for prefix in folder)
        read = (layout.adapter(name), *mine, *choices, *(needs if alone else ()))
        after = (training.name, *([base.name] if alone else []))
        about = (behavior, (name,), training.source, training.seed)
        found.append(Task("measure", *about, after=after, needs=read, weight=rows))
    if not beside:
        return found
    prompts = -(-rows // max(one.config.samples for one in asked))
    later = [
        replace(
            task,
            kind="probability",
            after=_names([base] if task is base else [base, task]),
            needs=tuple(dict.fromkeys((*task.needs, *needs))),
            weight=prompts,
        )
        for task in found
    ]
    return [*found, *later]


def _copied(study: Study, behavior: str, names: Sequence[str], before: Sequence[Task]) -> list[Task]:
    """The measurements of the base and of the ends that points of training copy and do not draw again: those that ask as many
    replies of the same personas to the same questions, by the same seed. Where fewer are asked on the way, none is."""
    everybody = load_personas(study.personas)
    people, one = asks.asked_on_the_way(study, behavior, everybody)
    if [p.name for p in people] != [p.name for p in everybody]:
        return []

    def same(task: Task) -> bool:
        mine = task.behavior == behavior if not task.adapters else task.adapters[0] in names
        if task.kind != "measure" or not mine or task.seed != study.seeds[0]:
            return False
        samples = asks.asked(study, task.behavior)[0].config.samples
        return samples == one.config.samples and _alike(study, task.behavior, [one])

    return [task for task in before if same(task)]


def _asked_on(study: Study, behavior: str, before: Sequence[Task]) -> list[Task]:
    """The measurement of the base whose replies are asked on at points of training, where probabilities of words are. Without
    them a worker would draw a few of its own, and put them in the place of the run's."""
    cfg = asks.asked_on_the_way(study, behavior, load_personas(study.personas))[1].config
    asked = get(behavior).probable_by == "words" and cfg.measure != "completions"
    if not asked or cfg.probability_replies == "own":
        return []
    return [
        task for task in before if task.kind == "measure" and (task.behavior, task.adapters) == (behavior, ())
    ]


def _matching(study: Study, behavior: str, trainings: Sequence[Task]) -> list[Task]:
    """Where trainings are matched on their sources: the source of each alone, as soon as it is there."""
    if study.trajectory.match is None:
        return []
    each = study.trajectory.match_samples * len(asks.asked(study, behavior)[0].texts)
    found = []
    for task in trainings:
        points = asks.points(study, task.behavior)
        named = [layout.point_name(task.adapters[0], share) for share in points]
        folders = [
            layout.completions(behavior, name, series=True, apart=kind)
            for name in named
            for kind in (layout.CHOOSING, layout.CHOSEN)
        ]
        needs = (layout.adapter(task.adapters[0]), *folders)
        weight = (len(points) + 1) * each
        about = (behavior, task.adapters, task.source, task.seed)
        found.append(Task("match", *about, after=(task.name,), needs=needs, weight=weight))
    return found


def _steering(study: Study, trainings: Sequence[Task], before: Sequence[Task]) -> list[Task]:
    """Every adapter under all arms, and the base where a table asks for it, after what is measured without."""
    base = tuple(f"{layout.completions(b)}/{layout.BASE}" for b in study.behaviors)
    needs = (layout.centroids(), layout.DIRECTIONS, layout.STEERED, *base)
    first = tuple(t.name for t in before if t.kind == "centroids" or (t.kind == "measure" and not t.adapters))
    found = []
    for task in trainings:
        about = (task.behavior, task.adapters, task.source, task.seed)
        read = (layout.adapter(task.adapters[0]), *needs)
        found.append(Task("steering", *about, after=(task.name, *first), needs=read, weight=5000))
    if any(table.base for table in study.steering):
        found.append(Task("steering", after=first, needs=needs, weight=5000))
    return found


def _folders(behavior: str, asked: Sequence[Asked]) -> list[str]:
    """Where what is measured of a behavior lies, under each adapter's name."""
    if asked[0].by_choices:
        return [layout.CHOICES]
    of = [one.folder("") for one in asked]
    return [*of, layout.probability(behavior), layout.probability(behavior, own=True)]


def _alike(study: Study, behavior: str, asked: Sequence[Asked]) -> bool:
    """Whether another behavior asks the very same by the same sampling."""
    other = asks.asked(study, behavior)[0]
    if other.by_choices or asked[0].by_choices:
        return False
    return (other.texts_hash, other.sampling) == (asked[0].texts_hash, asked[0].sampling)


def _rows(study: Study, asked: Sequence[Asked]) -> int:
    """Completions, or prompts scored, of one adapter."""
    people = len(load_personas(study.personas))
    return sum(people * len(one.texts) * (1 if one.by_choices else one.config.samples) for one in asked)


def cut(tasks: Sequence[Task], workers: int, study: Study) -> list[Task]:
    """The same with measuring cut into portions, so that every worker has work to the end: as few as make MANY tasks a
    worker, and never less than a shard. Where probabilities alone are asked, they stay whole: they read what was drawn of all."""
    whole = [task for task in tasks if task.kind == "measure" and _can_be_cut(study, task.behavior)]
    wanted = -(-MANY * workers // max(1, len(whole)))
    names: dict[str, tuple[str, ...]] = {}
    found = []
    for task in tasks:
        n = min(wanted, _shards(study, task)) if task in whole else 1
        parts = [replace(task, portion=(k, n), weight=-(-task.weight // n)) for k in range(n)]
        names[task.name] = _names(parts)
        found += parts
    return [replace(t, after=tuple(name for old in t.after for name in names[old])) for t in found]


def _can_be_cut(study: Study, behavior: str) -> bool:
    cfg = study.behaviors[behavior].eval
    return not get(behavior).by_completions or cfg.measure != "probability"


def _shards(study: Study, task: Task) -> int:
    """Shards of the first of what is asked: further sets have their own, as many or fewer."""
    one = asks.asked(study, task.behavior)[0]
    people, asked = len(load_personas(study.personas)), len(one.texts)
    if one.by_choices:
        return -(-people // max(1, SHARD_PROMPTS // asked))
    return -(-people * asked // max(1, SHARD_ROWS // one.config.samples))


def first_free(waiting: Sequence[Task], done: Collection[str]) -> Task | None:
    """The next task for a worker that is free: of those that can begin the heaviest, trainings, which others wait for,
    first. done: names of tasks."""
    free = [task for task in waiting if all(name in done for name in task.after)]
    order = {"check": 0, "train": 1}
    return min(free, key=lambda task: (order.get(task.kind, 2), -task.weight), default=None)


def carry_out(stages: Stages, task: Task) -> None:
    """Do it, in the folder of `stages`; what is done there already is skipped. Raises what the stages raise."""
    adapters = [stages.store.path / layout.adapter(name) for name in task.adapters]
    if task.kind == "check":
        stages.check_drawing()
    elif task.kind == "centroids":
        stages.centroids()
    elif task.kind == "predictors":
        stages.predictors()
    elif task.kind == "train":
        stages.adapted_centroids(stages.trained(stages.maker(task.behavior), task.source, task.seed))
    elif task.kind == "measure":
        by = "own" if stages.study.behaviors[task.behavior].eval.measure == "both" else "all"
        stages.evaluate(task.behavior, adapters, task.seed, base=not adapters, portion=task.portion, by=by)
    elif task.kind == "probability":
        stages.evaluate(task.behavior, adapters, task.seed, base=not adapters, by="probability")
    elif task.kind == "steering":
        named = {task.behavior: [(adapter, task.seed) for adapter in adapters]} if adapters else {}
        stages.steered(named, base=not adapters)
    elif task.kind == "match":
        stages.matched(task.behavior, adapters)
    elif task.kind == "trajectory":
        stages.through_training(task.behavior, adapters)
    else:
        raise ValueError(f"no such task: {task.kind}")
