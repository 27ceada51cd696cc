"""Two runs set against each other: the source's rate, the mean bystander and ρ of each adapter that both measured, with
differences that are paired wherever the two asked the same. Demands two runs' tables; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from leakfast.models.adapters import card_in
from leakfast.stats import baselines, dropped, intervals, paired, two_way
from leakfast.stats.correlations import BOOTSTRAPS
from leakfast.stats.summary import rate_interval
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.layout import BASE
from leakfast.storage.run import Run
from leakfast.storage.seeds import derive_seed

_KEY = ("behavior", "source", "seed")
PAIRED = "t over questions, paired"
SCHEMA = {
    "behavior": pl.String,
    "source": pl.String,
    "seed": pl.Int64,
    "adapter": pl.String,
    "other_adapter": pl.String,
    "quantity": pl.String,
    "layer": pl.Int32,
    "other_layer": pl.Int32,
    "value": pl.Float64,
    "other": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "personas": pl.Int64,
    "questions": pl.Int64,
    "paired": pl.Boolean,
    "method": pl.String,
    "reason": pl.String,
}


class Side(NamedTuple):
    """A run with its tables."""

    run: Run
    stats: Stats


def compare(this: Side, other: Side, *, bootstraps: int = BOOTSTRAPS, seed: int = 0) -> pl.DataFrame:
    """A row per behavior, source, training seed and quantity that both runs have; this run's value less the other's.

    `source`: the source's rate, `mean bystander`: over the bystanders of both, `rho`: Spearman's of centered cosine and
    rate over the same bystanders, each run's own cosines: at this run's headline layer where both have one base model, else
    each at its own.
    Where both asked the same questions, or items (by their hash), rates are paired by question: the mean bystander's interval is
    over personas and questions, both drawn (`two_way.of_mean`), the source's over questions (t of the questions' differences).
    Otherwise the source's two rates are taken as independent (square-and-add), the mean bystander's interval is over
    personas alone, and `paired` is false. ρ: `paired.rho_difference`, over personas."""
    rows = []
    for pair in pairs_of(this, other):
        for found in (_source(pair), _bystanders(pair), _rho(this, other, pair, bootstraps, seed)):
            rows.append(pair.told | found)
    table = pl.DataFrame(rows, schema=SCHEMA)
    return table.with_columns(pl.col(pl.Float64).fill_nan(None))


class Pair(NamedTuple):
    """An adapter that both runs measured. told: behavior, source, seed and its name in each; same: both asked the very same
    questions, or items; mine, theirs: its rows of `rates`; counts: its rows of `question_counts` in each."""

    told: dict[str, Any]
    same: bool
    mine: pl.DataFrame
    theirs: pl.DataFrame
    counts: list[pl.DataFrame]


def pairs_of(this: Side, other: Side, *, base: bool = False) -> Iterator[Pair]:
    """Every adapter that both runs measured, by behavior, source and training seed; base: the unadapted model too."""
    both = _both(this.stats, other.stats)
    if base:
        there = [
            set(side.stats.rates.filter(role="base")["behavior"].unique().to_list()) for side in (this, other)
        ]
        both += [((behavior, None, None), BASE, BASE) for behavior in sorted(there[0] & there[1])]
    items = cache(_items)
    for key, adapter, elsewhere in both:
        told = dict(zip(_KEY, key, strict=True)) | {"adapter": adapter, "other_adapter": elsewhere}
        asked = [
            _asked(run, key[0], name, items) for run, name in ((this.run, adapter), (other.run, elsewhere))
        ]
        same = asked[0] == asked[1] is not None
        named = ((this, adapter), (other, elsewhere))
        mine, theirs = (side.stats.rates.filter(behavior=key[0], adapter=name) for side, name in named)
        yield Pair(told, same, mine, theirs, [_counts(side, key[0], name) for side, name in named])


def _both(one: Stats, other: Stats) -> list[tuple[tuple, str, str]]:
    """((behavior, source, seed), the adapter's name in each) of what both measured. Where a run has several adapters of a source
    and seed (without cards, whose seeds nobody knows) those of one name are the same, and others are not met."""

    def adapters(stats: Stats) -> dict[tuple, list[str]]:
        rows = stats.rates.filter(pl.col("role") != "base", pl.col("source").is_not_null())
        found: dict[tuple, list[str]] = {}
        for row in rows.select(*_KEY, "adapter").unique(maintain_order=True).rows():
            found.setdefault(tuple(row[:3]), []).append(row[3])
        return found

    theirs, met = adapters(other), []
    for key, names in adapters(one).items():
        elsewhere = theirs.get(key, [])
        if len(names) == len(elsewhere) == 1:
            met.append((key, names[0], elsewhere[0]))
        else:
            met += [(key, name, name) for name in names if name in elsewhere]
    return met


def _asked(
    run: Run, behavior: str, adapter: str, items: Callable[[Run, str], set[str | None]]
) -> frozenset[str] | None:
    """Hashes of the questions, or the items (`_items`), an adapter was asked; None where its shards do not tell."""
    folder = layout.completions(behavior, adapter)
    told = {run.manifest["shards"][path].get("questions_sha256") for path in run.shards(folder)}
    told = told or items(run, behavior)
    return None if not told or None in told else frozenset(told)


def _items(run: Run, behavior: str) -> set[str | None]:
    """Hash of the items that all adapters of a run were asked; more than one, or None among them, is nothing to pair by: items
    are numbered among all that the run was asked of the behavior (accuracy.count), and a number would mean another item in
    another run."""
    found: set[str | None] = set()
    for path, entry in dropped.part(run).manifest["shards"].items():
        if path.startswith(f"{layout.CHOICES}/"):
            names = baselines.choice_behaviors(path, entry)
            if behavior in names or not names:
                found.add(entry.get("items_sha256"))
    return found if len(found) == 1 else set()


def _counts(side: Side, behavior: str, adapter: str) -> pl.DataFrame:
    table = side.stats.more.get("question_counts", pl.DataFrame())
    return table.filter(behavior=behavior, adapter=adapter) if table.height else table


def shares_of(counts: list[pl.DataFrame], people: list[str]) -> list[np.ndarray] | None:
    """Two (P, Q) of shares over the questions of both, none where a cell was not counted."""
    cells = cells_of(counts, people)
    return None if cells is None or any(np.isnan(side).any() for side in cells) else cells


def cells_of(counts: list[pl.DataFrame], people: list[str]) -> list[np.ndarray] | None:
    """The same with NaN where a cell was not counted; none without a question of both."""
    if not all(part.height for part in counts):
        return None
    numbers = sorted(set(counts[0]["question"]) & set(counts[1]["question"]))
    if not numbers:
        return None
    cells = []
    for part in counts:
        hits, total = two_way.counts_table(part, [part["adapter"][0]] * len(people), people, numbers)
        cells.append(np.divide(hits, total, out=np.full_like(hits, np.nan), where=total > 0))
    return cells


def _source(pair: Pair) -> dict[str, Any]:
    own = [
        part.filter(role="source").with_columns(**rate_interval(part)).head(1)
        for part in (pair.mine, pair.theirs)
    ]
    found: dict[str, Any] = {"quantity": "source", "personas": 1, "paired": False}
    if any(part.is_empty() or part["rate"][0] is None for part in own):
        return found | {"reason": "the source was not measured in both runs"}
    one, other = (part.row(0, named=True) for part in own)
    alike = pair.same and one["persona"] == other["persona"]
    shares = shares_of(pair.counts, [one["persona"]]) if alike else None
    return found | of_persona(one, other, None if shares is None else (shares[0] - shares[1])[0])


def of_persona(one: Mapping[str, Any], other: Mapping[str, Any], apart: np.ndarray | None) -> dict[str, Any]:
    """The difference of one persona's rates and its 95 % interval. one, other: rate, low and high; apart: differences by
    question (Q,), where both runs asked the same and counted alike: then t over questions, paired. Else the two rates are
    taken as independent (square-and-add)."""
    found: dict[str, Any] = {"paired": False, "value": one["rate"], "other": other["rate"]}
    found["difference"] = one["rate"] - other["rate"]
    if apart is not None and len(apart) > 1:
        _, low, high, why = intervals.of_mean(apart)
        ends = {"difference_low": low, "difference_high": high, "reason": why}
        return found | ends | {"paired": True, "questions": len(apart), "method": PAIRED}
    if any(part[end] is None for part in (one, other) for end in ("low", "high")):
        return found | {"reason": "one of the rates has no interval"}
    values = (part[name] for part in (one, other) for name in ("rate", "low", "high"))
    low, high = intervals.difference(*values)
    return found | {
        "difference_low": float(low),
        "difference_high": float(high),
        "method": "square-and-add, independent",
    }


def _bystanders(pair: Pair) -> dict[str, Any]:
    mine, theirs, counts, same = pair.mine, pair.theirs, pair.counts, pair.same
    columns = ["persona", "rate"]
    both = mine.filter(role="bystander").select(columns).drop_nulls()
    both = both.join(
        theirs.filter(role="bystander").select(columns).drop_nulls(), on="persona", suffix="_other"
    )
    found: dict[str, Any] = {"quantity": "mean bystander", "personas": both.height, "paired": False}
    if both.is_empty():
        return found | {"reason": "no bystander was measured in both runs"}
    a, b = both["rate"].to_numpy(), both["rate_other"].to_numpy()
    found |= {"value": float(a.mean()), "other": float(b.mean()), "difference": float((a - b).mean())}
    shares = shares_of(counts, both["persona"].to_list()) if same else None
    if shares is not None and min(shares[0].shape) > 1:
        _, low, high = two_way.of_mean(shares[0] - shares[1])
        ends = {
            "difference_low": low,
            "difference_high": high,
            "questions": shares[0].shape[1],
            "paired": True,
        }
        return found | ends | {"method": "analysis of variance, personas × questions, paired"}
    _, near, far, why = intervals.of_mean(a - b)
    ends = {"difference_low": near, "difference_high": far, "reason": why}
    return found | ends | {"method": "t over personas; questions or items differ or were not counted alike"}


def _rho(this: Side, other: Side, pair: Pair, bootstraps: int, seed: int) -> dict[str, Any]:
    key = tuple(pair.told[name] for name in _KEY)
    adapters = (pair.told["adapter"], pair.told["other_adapter"])
    layer = there = this.stats.best_layer(key[0])
    if _base(this, adapters[0]) != _base(other, adapters[1]):
        there = other.stats.best_layer(key[0])
    found: dict[str, Any] = {"quantity": "rho", "layer": layer, "other_layer": there, "paired": True}
    if layer is None or there is None:
        return found | {"reason": "ρ is defined at no layer of one of the runs"}
    one = _pairs(this.stats, key[0], adapters[0], layer)
    both = one.join(_pairs(other.stats, key[0], adapters[1], there), on="persona", suffix="_other").sort(
        "persona"
    )
    found["personas"] = both.height
    if both.is_empty():
        return found | {"reason": f"the other run has no cosines at layer {there} for these personas"}
    sides = [
        (both[f"cosine_centered{end}"].to_numpy(), both[f"rate{end}"].to_numpy()) for end in ("", "_other")
    ]
    drawn = derive_seed("against", seed, *key)
    apart = paired.rho_difference(sides, both["persona"], both["adapter"], bootstraps, drawn)
    values = dict(zip(("value", "other"), (paired.rho(*side) for side in sides), strict=True))
    reason = apart.pop("difference_reason", None)
    return found | values | apart | {"reason": reason, "method": "bootstrap of personas, paired"}


def _base(side: Side, adapter: str) -> str | None:
    """Fingerprint of the model an adapter was trained on; None without a card."""
    card = card_in(side.run.path, adapter)
    return None if card is None else card.base_fingerprint


def _pairs(stats: Stats, behavior: str, adapter: str, layer: int) -> pl.DataFrame:
    found = stats.pairs.filter(behavior=behavior, adapter=adapter, layer=layer)
    return found.select("persona", "cosine_centered", "rate", "adapter").drop_nulls()
