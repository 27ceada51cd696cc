"""Behaviors on the way through training: the table `trajectory` of a run, from stored choice scores
and completions of checkpoints. Demands a run with points of a series (leakfast.measure);
leaves measuring to others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import polars as pl

from leakfast.measure.choices import table as tables
from leakfast.models.adapters import adapter_hash, card_in
from leakfast.storage import layout, schema
from leakfast.storage.layout import CHECKPOINTS, SERIES, point, point_folder

if TYPE_CHECKING:
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.trajectory")

_TABLE = layout.table("trajectory")


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
    means the t interval over samples), and delta against share 0 (null where that was not measured).

    items: the list of items or the question set; scoring: letters or full-text, the judge's name, `detector` (of sources
    alone where trainings are matched: `detector, choosing` and `detector, chosen`), or `probability, ` and the estimator."""
    from leakfast.stats import dropped, rates, ties

    run = dropped.part(run)
    parts = [*_choices(run), *_completions(run), *_probabilities(run)]
    parts += [*_completions(run, layout.CHOOSING), *_completions(run, layout.CHOSEN)]
    if not parts:
        return None
    counts = pl.concat(parts, how="diagonal")
    key = ["behavior", "adapter", "items", "scoring", "share", "persona"]
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
    at = ["behavior", "adapter", "items", "scoring", "persona"]
    before = [pl.col(name).alias(f"_start_{name}") for name in ("hits", "total", "rate")]
    start = made.filter(share=0).select(*at, *before)
    made = made.drop("delta", "baseline", "category").join(start, on=at, how="left", maintain_order="left")
    against = ("_start_hits", "_start_total", "_start_rate")
    made = made.with_columns(ties.deltas(made, against, [*at[:4], "share"])).drop(against)
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


def _choices(run: Run) -> Iterator[pl.DataFrame]:
    """Counts of right choices at every point."""
    entries, there = run.manifest["shards"], []
    for folder in sorted({path.rpartition("/")[0] for path in run.shards(layout.POINTS)}):
        adapter, share = PurePosixPath(folder).parts[1], layout.share_of(PurePosixPath(folder).name)
        assert share is not None, "points lie in folders of points"
        if _is_current(run, adapter, share, [entries[path] for path in run.shards(folder)]):
            there.append(run.read(folder).with_columns(share=pl.lit(share)))
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


def _probabilities(run: Run) -> Iterator[pl.DataFrame]:
    """The same of expected rates; the base's is every adapter's beginning."""
    from leakfast.stats import expected_rates, probabilities

    entries = run.manifest["shards"]
    for tree in (layout.probability(series=True), layout.probability(series=True, own=True)):
        found: dict[str, list[str]] = {}
        for path in run.shards(tree):
            found.setdefault(path.rpartition("/")[0], []).append(path)
        there = []
        for folder, paths in found.items():
            adapter, share = point(PurePosixPath(folder).name)
            if adapter is None or _is_current(run, adapter, share, [entries[path] for path in paths]):
                told = ", ".join(sorted({entries[path].get("questions") or "list" for path in paths}))
                there.append(run.read(folder).with_columns(items=pl.lit(told)))
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
            for one in [adapter] if adapter is not None else of:
                yield mine.drop("estimator").with_columns(
                    adapter=pl.lit(one),
                    source=pl.lit(of[one]),
                    items=pl.lit(items[behavior]),
                    scoring=pl.lit(f"probability, {mine['estimator'][0]}"),
                    share=pl.lit(share),
                )


def _completions(run: Run, apart: str = "") -> Iterator[pl.DataFrame]:
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
            told = {entries[path].get("questions") or "list" for path in shards[name]}
            by = f"detector, {apart}" if apart else "detector"
            scoring = by if detector is not None else mine["judge"][0]
            for one in [adapter] if adapter is not None else sources:
                yield mine.with_columns(
                    adapter=pl.lit(one),
                    source=pl.lit(sources[one]),
                    items=pl.lit(", ".join(sorted(told))),
                    scoring=pl.lit(scoring),
                    share=pl.lit(share),
                )
