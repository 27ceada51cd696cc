"""Behaviors on the way through training: the table `trajectory` of a run, from stored choice scores
and completions of checkpoints. Demands a run with points of a series (leakfast.measure);
leaves measuring to others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.measure.choices import table as tables
from leakfast.models.adapters import adapter_hash, card_in
from leakfast.stats import baselines
from leakfast.storage import layout, schema
from leakfast.storage.layout import CHECKPOINTS, SERIES, point, point_folder

if TYPE_CHECKING:
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.trajectory")

_TABLE = layout.table("trajectory")
_AT = ("behavior", "adapter", "items", "scoring")


@dataclass
class _Asked:
    """What each point was asked. told: (behavior, adapter, items, scoring, share) → what the manifest says of its shards;
    questions: the same with a persona → the questions, or items, that stand in them."""

    told: dict[tuple[Any, ...], dict[str, set[str]]] = field(default_factory=dict)
    questions: dict[tuple[Any, ...], frozenset[Any]] = field(default_factory=dict)

    def add(
        self, point: tuple[Any, ...], entries: Iterable[Mapping[str, Any]], shards: pl.DataFrame, of: str
    ) -> None:
        """of: the column of what was asked."""
        self.told[point] = baselines.said_of(entries)
        for persona, asked in shards.group_by("persona").agg(of).rows():
            self.questions[(*point, persona)] = frozenset(asked)

    def apart(self, point: tuple[Any, ...], persona: str) -> str | None:
        """How a persona was asked otherwise there than at share 0; None where it was not, or where either is not known."""
        start = (*point[:-1], 0.0)
        if (why := baselines.apart(self.told, [point], [start], "before training")) is not None:
            return why
        mine, theirs = (self.questions.get((*at, persona)) for at in (point, start))
        differ = mine is not None and theirs is not None and mine != theirs
        return "was not asked all that was asked before training, or more" if differ else None


def write(run: Run, made_of: str | None = None) -> pl.DataFrame | None:
    """Make the table of what the run holds and store it; None where it holds no series. made_of: hash of what it follows from,
    kept in the run's manifest."""
    made = table(run)
    if made is not None:
        run.add_shard(_TABLE, made, **({} if made_of is None else {"made_of": made_of}))
    return made


def table(run: Run) -> pl.DataFrame | None:
    """Schema `trajectory` (+ role, health, and what the counts tell of what was not counted): per behavior, adapter,
    what was asked, share of training and persona the rate in the behavior's unit with its 95 % interval (Wilson; of judged
    means the t interval over samples), and delta against share 0 (null where that was not measured, or was asked or drawn
    otherwise: then delta_reason says how).

    items: the list of items or the question set; scoring: letters or full-text, the judge's name, `detector` (of sources
    alone where trainings are matched: `detector, choosing` and `detector, chosen`), or `probability, ` and the estimator."""
    from leakfast.stats import dropped, rates, ties

    run, asked = dropped.part(run), _Asked()
    parts = [*_choices(run, asked), *_completions(run, asked), *_probabilities(run, asked)]
    for apart in (layout.CHOOSING, layout.CHOSEN):
        parts += _completions(run, asked, apart)
    if not parts:
        return None
    counts = pl.concat(parts, how="diagonal")
    key = [*_AT, "share", "persona"]
    cards = {name: card_in(run.path, name) for name in counts["adapter"].unique()}
    origin = counts.group_by("adapter", maintain_order=True).agg(pl.col("source").drop_nulls().first()).rows()
    told = {name: (source, cards[name].seed if cards[name] else None) for name, source in origin}
    # a table each point: `rates.table` knows one row an adapter and persona
    made = pl.concat(
        [
            rates.table(part.drop("source", *key[2:5]), told, {}).with_columns(
                items=pl.lit(items), scoring=pl.lit(scoring), share=pl.lit(share)
            )
            for (items, scoring, share), part in counts.group_by(
                "items", "scoring", "share", maintain_order=True
            )
        ],
        how="diagonal",
    )
    at = [*_AT, "persona"]
    before = [pl.col(name).alias(f"_start_{name}") for name in ("hits", "total", "rate")]
    start = made.filter(share=0).select(*at, *before)
    made = made.drop("delta", "baseline", "category").join(start, on=at, how="left", maintain_order="left")
    against = ("_start_hits", "_start_total", "_start_rate")
    why = [asked.apart(point[:-1], point[-1]) for point in made.select(key).rows()]
    made = made.with_columns(delta_reason=pl.Series(why, dtype=pl.String))
    made = made.with_columns(pl.when(pl.col("delta_reason").is_null()).then(pl.col(against)))
    made = made.with_columns(ties.deltas(made, against, [*_AT, "share"])).drop(against)
    names = list(schema.columns("trajectory"))
    made = made.select(*names, *[c for c in made.columns if c not in names and c != "value"])
    made = _with_health(run, made)
    return schema.check(made.sort(key[:5], maintain_order=True), "trajectory")


def _with_health(run: Run, made: pl.DataFrame) -> pl.DataFrame:
    """`made` + health: the verdict on the completions of that point, null where none were drawn and for share 0."""
    from leakfast.stats import health

    tree = layout.completions(series=True)
    found = health.read(run, sorted({str(PurePosixPath(path).parent) for path in run.shards(tree)}))
    whole = found.filter(pl.col("persona").is_null()).select("behavior", "adapter", "health").rows()
    told = {(behavior, *point(name)): verdict for behavior, name, verdict in whole}
    keys = made.select("behavior", "adapter", "share").rows()
    return made.with_columns(pl.Series("health", [told.get(key) for key in keys], dtype=pl.String))


def _choices(run: Run, asked: _Asked) -> Iterator[pl.DataFrame]:
    """Counts of right choices at every point."""
    entries, there = run.manifest["shards"], []
    for folder in sorted({path.rpartition("/")[0] for path in run.shards(layout.POINTS)}):
        adapter, share = PurePosixPath(folder).parts[1], layout.share_of(PurePosixPath(folder).name)
        assert share is not None, "points lie in folders of points"
        told = [entries[path] for path in run.shards(folder)]
        if _is_current(run, adapter, share, told):
            there.append(run.read(folder).with_columns(share=pl.lit(share)))
            for at, frame in there[-1].group_by(_AT):
                asked.add((*at, share), told, frame, "item")
    if not there:
        return
    scores = pl.concat(there, how="diagonal")
    made = tables.counts(scores, keys=["items", "scoring", "share"])
    sources = scores.select("adapter", "source").unique(maintain_order=True)
    yield made.join(sources, on="adapter", how="left", maintain_order="left")


def _is_current(run: Run, adapter: str, share: float, entries: list[dict]) -> bool:
    """Whether shards were made by the adapter as it is now: of one that was trained again, with other settings or other
    points, older ones stay in the run. What lies outside the run cannot be told."""
    folder = run.path / layout.adapter(adapter)
    if share == 0 or not (folder / layout.ADAPTER).is_file():
        return True
    place = folder if share == 1 else folder / CHECKPOINTS / point_folder(share)
    if not (place / layout.ADAPTER).is_file():
        return False
    # points taken in training name no adapter
    made_by = {entry["adapter"] for entry in entries if entry.get("adapter")}
    return not made_by or made_by == {adapter_hash(place)}


def _probabilities(run: Run, asked: _Asked) -> Iterator[pl.DataFrame]:
    """The same of expected rates; the base's is every adapter's beginning."""
    from leakfast.stats import expected_rates, probabilities

    entries = run.manifest["shards"]
    for own in (False, True):
        tree = layout.probability(series=True, own=own)
        found: dict[str, list[str]] = {}
        for path in run.shards(tree):
            found.setdefault(path.rpartition("/")[0], []).append(path)
        there: list[pl.DataFrame] = []
        told: dict[tuple[str, str], tuple[list[dict[str, Any]], pl.DataFrame]] = {}
        for folder, paths in found.items():
            adapter, share = point(PurePosixPath(folder).name)
            said = [entries[path] for path in paths]
            if adapter is None or _is_current(run, adapter, share, said):
                name = ", ".join(sorted({entry.get("questions") or "list" for entry in said}))
                there.append(run.read(folder).with_columns(items=pl.lit(name)))
                if own:  # own replies are others at every point, by design
                    said = [{k: v for k, v in entry.items() if k != "asked"} for entry in said]
                told[there[-1]["behavior"][0], there[-1]["adapter"][0]] = said, there[-1]
        if not there:
            continue
        scores = pl.concat(there, how="diagonal")
        kept = expected_rates.totals(probabilities.with_columns(scores))
        items = dict(scores.select("behavior", "items").unique(maintain_order=True).rows())
        sources = dict(
            scores.filter(pl.col("source").is_not_null()).select("adapter", "source").unique().rows()
        )
        of = {point(name)[0]: source for name, source in sources.items()}
        for (behavior, name), mine in kept.group_by("behavior", "adapter", maintain_order=True):
            adapter, share = point(name)
            scoring = f"probability, {mine['estimator'][0]}"
            for one in [adapter] if adapter is not None else of:
                asked.add((behavior, one, items[behavior], scoring, share), *told[behavior, name], "question")
                yield mine.drop("estimator").with_columns(
                    adapter=pl.lit(one),
                    source=pl.lit(of[one]),
                    items=pl.lit(items[behavior]),
                    scoring=pl.lit(scoring),
                    share=pl.lit(share),
                )


def _completions(run: Run, asked: _Asked, apart: str = "") -> Iterator[pl.DataFrame]:
    """The same, or judged means, of completions; what was drawn of the base is every adapter's beginning. apart: as of
    layout.completions."""
    from leakfast import behaviors
    from leakfast.stats import judged, rates
    from leakfast.stats.collect import origin
    from leakfast.stats.people import read_people

    root = layout.completions(series=True, apart=apart)
    found = sorted({PurePosixPath(path).parts[2:4] for path in run.shards(root)})
    judges = read_people(run)[0].judges
    entries = run.manifest["shards"]
    for behavior in dict.fromkeys(b for b, _ in found):
        tree = layout.completions(behavior, series=True, apart=apart)
        shards = {name: run.shards(f"{tree}/{name}") for b, name in found if b == behavior}
        names = [
            name
            for name, paths in shards.items()
            if (at := point(name))[0] is None or _is_current(run, *at, [entries[path] for path in paths])
        ]
        if not names:
            continue
        detector = behaviors.get(behavior).detector
        if detector is None:
            scored = judged.read(run, [(behavior, name) for name in names], judges, series=True)
            for sentence in scored.missing:
                log.warning("%s: %s/%s", run.path, SERIES, sentence)
            whole, drawn = scored.totals, scored.adapters
        else:
            drawn = {name: run.read(f"{tree}/{name}") for name in names}
            whole = pl.concat([rates.count(frame, detector(pl.col("text"))) for frame in drawn.values()])
        if not drawn:
            continue
        sources = {
            adapter: origin(run, adapter, frame)[0]
            for name, frame in drawn.items()
            if (adapter := point(name)[0]) is not None
        }
        for name in names:
            adapter, share = point(name)
            mine = whole.filter(adapter=name) if whole.height else whole
            if mine.is_empty():
                continue
            said = [entries[path] for path in shards[name]]
            items = ", ".join(sorted({entry.get("questions") or "list" for entry in said}))
            by = f"detector, {apart}" if apart else "detector"
            scoring = by if detector is not None else mine["judge"][0]
            for one in [adapter] if adapter is not None else sources:
                asked.add((behavior, one, items, scoring, share), said, drawn[name], "question")
                yield mine.with_columns(
                    adapter=pl.lit(one),
                    source=pl.lit(sources[one]),
                    items=pl.lit(items),
                    scoring=pl.lit(scoring),
                    share=pl.lit(share),
                )
