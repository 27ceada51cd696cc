"""Which behaviors and sources the tables of a run can name, told before anything is counted, so that a name that none can have is
refused at once. Demands a run's manifest and the cards of its adapters; counts nothing."""

from __future__ import annotations

import polars as pl

from leakfast.models.adapters import card_in
from leakfast.stats import dropped
from leakfast.stats.accuracy import PRIMARY
from leakfast.stats.imported import read_imported
from leakfast.storage import layout
from leakfast.storage.run import Run

_BY_BEHAVIOR = (layout.COMPLETIONS, layout.PROBABILITY, layout.PROBABILITY_OWN)


def behaviors_of(run: Run) -> list[str] | None:
    """Sorted; None where choice scores do not say in the manifest which behavior they are of."""
    found: set[str] = set()
    scorings: dict[str, set[str]] = {}
    for path, entry in dropped.part(run).manifest["shards"].items():
        tree, *parts = path.split("/")
        if tree in _BY_BEHAVIOR and len(parts) > 2:
            found.add(parts[0])
        elif tree == layout.CHOICES:
            if not entry.get("behavior") or len(parts) < 3:
                return None
            scoring = parts[1].removeprefix(f"{entry.get('items', '')}-")
            scorings.setdefault(entry["behavior"], set()).add(scoring)
    for name, used in scorings.items():  # as accuracy.count names them
        found |= {name} | ({f"{name}-{one}" for one in used - {PRIMARY}} if PRIMARY in used else set())
    stored = read_imported(run, "rates")
    return sorted(found if stored is None else found | set(stored["behavior"]))


def sources_of(run: Run) -> list[str] | None:
    """Sorted; None where neither card nor shards of an adapter say its source."""
    part = dropped.part(run)
    shards: dict[str, str] = {}  # adapter → one of what was measured of it
    for path in part.manifest["shards"]:
        name = layout.measured_of(path)
        if path.split("/")[0] in (*_BY_BEHAVIOR, layout.CHOICES) and name not in (None, layout.BASE):
            shards.setdefault(str(name), path)
    found: set[str] = set()
    for name, path in shards.items():
        card = card_in(run.path, name)
        told = _told(run, path) if card is None else [card.source]
        if len(told) != 1:
            return None
        found |= set(told)
    stored = read_imported(run, "rates")
    return sorted(found if stored is None else found | set(stored["source"].drop_nulls()))


def _told(run: Run, path: str) -> list[str]:
    """Sources that a shard's rows name."""
    file = run.path / path
    if not file.is_file() or "source" not in pl.read_parquet_schema(file):
        return []
    return pl.read_parquet(file, columns=["source"])["source"].drop_nulls().unique().to_list()
