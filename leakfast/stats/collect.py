"""What a run directory holds, as frames: counts per question, rates, pairs, who the personas are, and a
sentence for each part that is not there. Demands an open run; computes no statistic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import polars as pl

from leakfast.errors import InputError, StoreError
from leakfast.stats import (
    accuracy,
    baselines,
    dropped,
    expected_rates,
    exposure,
    probabilities,
    question_sets,
)
from leakfast.stats import judged as judged_tables
from leakfast.stats import pairs as pair_tables
from leakfast.stats import prompts as prompt_checks
from leakfast.stats import rates as rate_tables
from leakfast.stats import shifts as shift_tables
from leakfast.stats import steering as steering_tables
from leakfast.stats.imported import IMPORTED, as_imported, read_imported
from leakfast.stats.people import People, read_people
from leakfast.stats.rates import BASE
from leakfast.storage import layout, schema
from leakfast.storage.disk import file_hash
from leakfast.storage.layout import PERSONAS
from leakfast.storage.run import Run

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

_ASKED = ("behavior", "adapter", "persona", "question")


@dataclass(frozen=True)
class Collected:
    """A run's measurements. `questions`: schema `question_counts`; `judged`: mean scores per question;
    `published`: numbers to compare with; `shifts`: schema `shifts`; `sets`: rates on every
    question set where there are several; `centroids`: of the base model; `replies`: of `exposure.replies`;
    `probability`: schema `probability`; `predictors`: of the unadapted model, without rows where none were asked;
    `steered`: table `steering`; `trajectory`: the table of points of training that the run holds; `told`: how
    each adapter was asked and drawn; `apart`: (behavior, adapter) whose probabilities and completions are of other
    questions."""

    rates: pl.DataFrame
    pairs: pl.DataFrame
    questions: pl.DataFrame
    people: People
    published: pl.DataFrame | None
    missing: list[str]
    judged: pl.DataFrame = field(default_factory=pl.DataFrame)
    shifts: pl.DataFrame = field(default_factory=lambda: schema.empty("shifts"))
    sets: pl.DataFrame = field(default_factory=pl.DataFrame)
    centroids: Centroids | None = None
    labels: pl.DataFrame = field(default_factory=pl.DataFrame)
    replies: pl.DataFrame = field(default_factory=pl.DataFrame)
    probability: pl.DataFrame = field(default_factory=pl.DataFrame)
    predictors: pl.DataFrame = field(default_factory=pl.DataFrame)
    steered: pl.DataFrame = field(default_factory=pl.DataFrame)
    trajectory: pl.DataFrame = field(default_factory=pl.DataFrame)
    told: baselines.Told = field(default_factory=dict)
    apart: frozenset[baselines.Side] = frozenset()


def collect(run: Run) -> Collected:
    """Read everything the statistics rest on. Raises InputError if the run holds nothing to count,
    StoreError if completions are there twice or from an unknown source."""
    run = dropped.part(run)
    people, missing = read_people(run)
    imported = read_imported(run, "rates")
    judged = _judged(run, people)
    missing += judged.missing
    scores = _scores(run)
    probable, otherwise = probabilities.read(run), set[baselines.Key]()
    counts, adapters = _count(run, people.sources, imported, missing, judged, scores)
    whole = rate_tables.totals(counts)
    if judged.totals.height:
        whole = pl.concat([whole, _in_order(judged.totals, people.sources, adapters)], how="diagonal")
    if alone := expected_rates.alone(probable, set(whole.select("behavior", "adapter").rows())):
        mine = probable.filter(pl.col("behavior").is_in(alone))
        theirs = (name for name in mine["adapter"].unique() if name != BASE)
        adapters |= {name: origin(run, name, mine.filter(adapter=name)) for name in theirs}
        others = ~pl.col("behavior").is_in(alone)  # the base's replies drawn for them are no baseline
        otherwise, told = baselines.unlike_probable(run, mine, alone)
        missing += told
        expected = _in_order(expected_rates.totals(mine), people.sources, adapters)
        counts, whole = counts.filter(others), pl.concat([whole.filter(others), expected], how="diagonal")
    outsiders = set() if people.named is None else set(whole["persona"].unique()) - people.named
    known = set() if imported is None else set(imported.select("behavior", "adapter").rows())
    fresh = [key for key in whole.select("behavior", "adapter").unique().rows() if key not in known]
    rates = schema.empty("rates")
    if fresh or imported is None:
        asked = pl.concat([counts.select(_ASKED), *(frame.select(_ASKED) for frame in judged.asked)])
        unlike, told = baselines.unlike(run, asked)
        missing += told
        ours = whole.filter(_is_one_of(fresh))
        rates = rate_tables.table(ours, adapters, people.categories, outsiders, unlike | otherwise)
        rates = rates.drop("value", strict=False)
    if imported is not None:
        rates = pl.concat([imported, rates], how="diagonal") if rates.height else imported
    rates = _with_taught(run, rates)
    missing += [*baselines.gaps(rates), *baselines.partial(rates), *baselines.seeds_apart(rates)]
    base = _base_centroids(run)
    prompt_checks.check(run, base, layout.centroids())
    pairs = _pairs(run, rates, people, base, bool(adapters) or imported is not None, missing)
    shifts, told = (schema.empty("shifts"), []) if base is None else shift_tables.read(run, rates, base)
    sets, unlike_there = question_sets.read(run, people.categories, people.named, origin)
    missing += [*told, *unlike_there]
    sets = question_sets.with_main(rates, sets, question_sets.main_sets(run, sets["behavior"].unique()))
    apart = baselines.questions_apart(run)
    trajectory = run.read(layout.table("trajectory"))
    missing += [*baselines.told_apart(apart), *baselines.points_apart(trajectory)]
    published = read_imported(run, "published")
    found = Collected(rates, pairs, counts, people, published, missing, judged.questions, shifts, sets, base)
    return replace(
        found,
        labels=pl.DataFrame() if scores is None else accuracy.chosen_labels(scores),
        told=baselines.told_of(run),
        apart=frozenset(apart),
        replies=exposure.read(run, completion_folders(run)),
        probability=probable,
        predictors=run.read(layout.PREDICTORS),
        steered=steering_tables.table(run, people.named),
        trajectory=trajectory,
    )


def _with_taught(run: Run, rates: pl.DataFrame) -> pl.DataFrame:
    """`rates` + taught: the behavior that the row's adapter was trained for, null without a card."""
    from leakfast.models.adapters import card_in

    cards = {name: card_in(run.path, name) for name in rates["adapter"].drop_nulls().unique() if name != BASE}
    told = {name: card.behavior for name, card in cards.items() if card is not None}
    return rates.with_columns(
        pl.col("adapter").replace_strict(told, default=None, return_dtype=pl.String).alias("taught")
        if told
        else pl.lit(None, pl.String).alias("taught")
    )


def completion_folders(run: Run) -> list[tuple[str, str]]:
    """(behavior, adapter) of every completions/<behavior>/<adapter>/ with an intact shard; base last."""
    folders = {PurePosixPath(path).parts[1:3] for path in run.shards(layout.COMPLETIONS)}
    return sorted(folders, key=lambda folder: (folder[0], folder[1] == BASE, folder[1]))


_FOLDERS = (
    "completions/",
    f"{question_sets.SETS}/",
    f"{accuracy.CHOICES}/",
    f"{IMPORTED}/",
    f"{layout.JUDGEMENTS}/",
    f"{layout.PROBABILITY}/",
    f"{layout.PROBABILITY_OWN}/",
    f"{layout.PREDICTORS}/",
    f"{layout.STEERED}/",
)


def inputs_hash(run: Run) -> str:
    """SHA-256 over the names and hashes of everything the tables rest on."""
    rests_on = {
        path: entry["sha256"] for path, entry in run.manifest["shards"].items() if path.startswith(_FOLDERS)
    }
    for path in [
        run.path / layout.STUDY,
        run.path / PERSONAS,
        run.path / layout.table("trajectory"),
        *run.path.glob(f"{layout.CENTROIDS}/*.safetensors"),
        *run.path.glob("adapters/*/*_card.json"),
    ]:
        if path.is_file():
            rests_on[path.relative_to(run.path).as_posix()] = file_hash(path)
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()


def _judged(run: Run, people: People) -> judged_tables.Judged:
    """Scores of the behaviors that a judge measures."""
    from leakfast.behaviors.registry import get

    folders = [key for key in completion_folders(run) if get(key[0]).measured_by == "judge"]
    try:
        return judged_tables.read(run, folders, people.judges)
    except ValueError as error:
        raise StoreError(
            f"{run.path}: {layout.JUDGEMENTS}: {error}. Move that folder away and run `leakfast judge` again."
        ) from error


def _in_order(totals: pl.DataFrame, sources: list[str], adapters: dict) -> pl.DataFrame:
    """Judged totals by behavior, sources in the study's order, the base last."""
    place = {a: sources.index(s) if s in sources else len(sources) for a, (s, _) in adapters.items()}
    rank = pl.col("adapter").replace_strict(place, default=len(sources) + 1, return_dtype=pl.Int64)
    return totals.sort(pl.col("behavior"), rank, maintain_order=True)


def _count(
    run: Run,
    sources: list[str],
    imported: pl.DataFrame | None,
    missing: list[str],
    judged: judged_tables.Judged,
    scores: pl.DataFrame | None,
) -> tuple[pl.DataFrame, dict[str, tuple[str, int | None]]]:
    """Counts per question of all shards, and adapter → (source, seed), those of `judged` too; sources in the
    study's order."""
    frames, adapters = [], {}
    for behavior, adapter, counts, rows in [*_completions(run), *_choices(scores, missing)]:
        stored = None if imported is None else imported.filter(_is_one_of([(behavior, adapter)]))
        if stored is not None and stored.height:
            counts, sentence = as_imported(counts, stored, f"{behavior}/{adapter}")
            missing += sentence
        elif adapter != BASE:
            adapters[adapter] = origin(run, adapter, rows)
        frames.append(counts)
    for adapter, rows in judged.adapters.items():
        if adapter != BASE and adapter not in adapters:
            adapters[adapter] = origin(run, adapter, rows)
    if not frames:
        nothing = not judged.adapters and not judged.missing and not run.shards(layout.PROBABILITY)
        if imported is None and nothing:
            raise InputError(
                f"{run.path}: holds no completions and no choice scores, so there is nothing to count. "
                "Make them with `leakfast eval`, or all at once with `leakfast run STUDY.toml`."
            )
        return schema.empty("question_counts"), adapters
    place = {a: sources.index(s) if s in sources else len(sources) for a, (s, _) in adapters.items()}
    place[BASE] = len(sources) + 1
    frames.sort(key=lambda frame: place.get(frame["adapter"][0], 0) if frame.height else 0)
    return pl.concat(frames, how="diagonal").sort("behavior", maintain_order=True), adapters


def _completions(run: Run) -> Iterator[tuple[str, str, pl.DataFrame, pl.DataFrame]]:
    """(behavior, adapter, counts per question, what they were counted in) of each folder of completions."""
    from leakfast.behaviors.registry import get

    for behavior, adapter in completion_folders(run):
        detector = get(behavior).detector
        if detector is None:  # a judge's scores are read elsewhere
            continue
        completions = run.read(layout.completions(behavior, adapter))
        try:
            schema.check(completions, "completions")
            counts = rate_tables.count(completions, detector(pl.col("text")), by_question=True)
        except ValueError as error:
            raise StoreError(
                f"{run.path}: completions/{behavior}/{adapter}: {error}. "
                "Move that folder away and run `leakfast eval` again."
            ) from error
        yield behavior, adapter, counts, completions


def _scores(run: Run) -> pl.DataFrame | None:
    """The choice scores of a run, None where there are none."""
    try:
        return accuracy.read(run)
    except ValueError as error:
        raise StoreError(
            f"{run.path}: {accuracy.CHOICES}: {error}. Move that file away and run `leakfast eval` again."
        ) from error


def _choices(
    scores: pl.DataFrame | None, missing: list[str]
) -> Iterator[tuple[str, str, pl.DataFrame, pl.DataFrame]]:
    """As `_completions`, of the choice scores."""
    if scores is None:
        return
    counts = accuracy.count(scores)
    for (behavior, adapter), group in counts.group_by("behavior", "adapter", maintain_order=True):
        yield behavior, adapter, group, scores.filter(adapter=adapter)


def _base_centroids(run: Run) -> Centroids | None:
    from leakfast.geometry import Centroids

    there = run.has(layout.centroids()) or (run.path / layout.centroids()).is_file()
    return Centroids.load(run.path / layout.centroids()) if there else None


def _pairs(
    run: Run,
    rates: pl.DataFrame,
    people: People,
    centroids: Centroids | None,
    expected: bool,
    missing: list[str],
) -> pl.DataFrame:
    if centroids is not None:
        measured = rates.filter(pl.col("role").is_in(["source", "bystander"]))["persona"].unique()
        if lacking := sorted(set(measured) - set(centroids.personas)):
            missing.append(f"no centroid for {', '.join(lacking)}: their pairs have no cosine")
        if broken := centroids.broken():
            told = ", ".join(f"{name} (layers {', '.join(map(str, at))})" for name, at in broken.items())
            missing.append(
                f"{layout.centroids()}: {len(broken)} centroids hold NaN or infinity and are left out, of the mean of all "
                f"too: {told}"
            )
        return pair_tables.table(rates, centroids, people.related_to)
    stored = read_imported(run, "pairs")
    if stored is not None:
        return stored
    if expected:
        missing.append(
            f"no {layout.centroids()}: pairs and correlations are empty "
            "(make it with `leakfast centroids --model MODEL --personas PERSONAS --dtype DTYPE --out "
            f"{run.path / layout.centroids()}`, of the model and personas that were measured)"
        )
    return schema.empty("pairs")


def _is_one_of(keys: list[tuple[str, str]]) -> pl.Expr:
    """Whether a row's (behavior, adapter) is among `keys`."""
    return pl.any_horizontal(
        pl.lit(False), *[(pl.col("behavior") == b) & (pl.col("adapter") == a) for b, a in keys]
    )


def origin(run: Run, adapter: str, rows: pl.DataFrame) -> tuple[str, int | None]:
    """Source and training seed of an adapter: from its card in the run, else from its rows' `source`."""
    from leakfast.models.adapters import card_in

    card = card_in(run.path, adapter)
    if card is not None:
        return card.source, card.seed
    found = rows["source"].drop_nulls().unique().to_list() if "source" in rows.columns else []
    if len(found) != 1:
        raise StoreError(
            f"{run.path}: adapter {adapter} has no card and its rows name "
            f"{len(found)} sources, where one is needed. "
            "Run `leakfast eval --adapter DIR --source NAME` again."
        )
    return found[0], None
