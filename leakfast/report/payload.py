"""What the page's charts are drawn from: rates, cosines, correlations and a sample of completions as columns, packed so
that no text of a run can end a script element. Demands a run and its tables; rounds nothing but cosines."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known, sign_of
from leakfast.report import ordering
from leakfast.stats import expected_rates
from leakfast.stats.matching import one_each
from leakfast.stats.people import People, read_people
from leakfast.stats.rates import BASE
from leakfast.stats.summary import rate_interval
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run

# a behavior's axis can show these, where the run has them
YS = ("rate", "delta", "probability")
_MEASURES = {"judge": "aligned score", "choices": "accuracy"}  # what a rate is called
COSINES = ("centered", "raw")
_COSINE_DIGITS = 6
_RATES = [
    "rate",
    "low",
    "high",
    "hits",
    "total",
    "delta",
    "delta_low",
    "delta_high",
    "baseline",
    "mean_tokens",
    "probability",
    "probability_low",
    "probability_high",
]


def payload(run: Run, stats: Stats, texts: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Everything the charts need, as plain values.

    texts: behavior → its questions, where the study tells them. Columns are lists of one length; a persona, an adapter
    and a behavior are named by their place in the lists `personas`, `adapters` and `behaviors`."""
    people, _ = read_people(run)
    personas = _personas(stats, people)
    adapters = _adapters(stats)
    place = {name: number for number, name in enumerate(personas)}
    return {
        "run": _run(run),
        "personas": [_persona(name, people) for name in personas],
        "categories": _categories(people, personas),
        "adapters": adapters,
        "behaviors": [_behavior(stats, behavior, texts.get(behavior, ())) for behavior in stats.behaviors()],
        "rates": _rates(stats, place, [a["key"] for a in adapters]),
        "cosines": _cosines(stats, place),
        "correlations": _correlations(stats),
        "picked": _picked(stats),
        "trajectory": _trajectory(run, place),
        "order": ordering.orders(run, stats, personas),
        "tables": _hashes(run),
    }


def packed(value: Any) -> str:
    """JSON, gzip, base64: letters, digits, + / = alone, the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode()


def _run(run: Run) -> dict[str, Any]:
    """What a citation names: the run, its study's hash, the version and commit that its tables were made with, and those
    that made it."""
    made = run.manifest["stages"].get("stats", {}).get("outputs", {})
    told = {"leakfast": made.get("leakfast"), "commit": made.get("commit")}
    return {"name": run.path.resolve().name, **told, "study": run.manifest.get("study"), "made": makers(run)}


def makers(run: Run) -> list[str]:
    """Who made a run, in words: each version of leakfast with its commit, in order; none where the manifest does not say."""
    return [maker_words(one["leakfast"], one["commit"]) for one in run.manifest.get("made", [])]


def maker_words(version: str | None, commit: str | None) -> str:
    """A version of leakfast and its commit, as far as they are known."""
    if version is None:
        return "leakfast of a version not recorded"
    return (
        f"leakfast {version}, {f'commit {commit}' if commit else 'no commit (not run from a git checkout)'}"
    )


def _hashes(run: Run) -> dict[str, str]:
    """Table → SHA-256 of its file, as the manifest has it."""
    shards = run.manifest["shards"]
    paths = {name: layout.table(name) for name in ("rates", "pairs", "correlations", "probabilities")}
    return {name: shards[path]["sha256"] for name, path in paths.items() if path in shards}


def _personas(stats: Stats, people: People) -> list[str]:
    """Those measured, in the study's order."""
    seen = set(stats.rates["persona"].unique())
    known = [name for name in people.categories if name in seen]
    return known + sorted(seen - set(known))


def _persona(name: str, people: People) -> dict[str, Any]:
    return {
        "name": name,
        "category": people.categories.get(name),
        "prompt": people.prompts.get(name),
        "related": list(people.related_to.get(name, ())),
    }


def _categories(people: People, personas: Iterable[str]) -> list[str]:
    kinds = (people.categories.get(name) for name in personas)
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def _adapters(stats: Stats) -> list[dict[str, Any]]:
    """One an adapter and behavior measured under it; the unadapted model, per behavior, last."""
    columns = ["behavior", "adapter", "source", "seed", *_there(stats.rates, "health", "health_of")]
    rows = stats.rates.filter(pl.col("role") != "base").select(columns)
    rows = rows.unique(["behavior", "adapter"], keep="first", maintain_order=True).rows(named=True)
    base = stats.rates.filter(role="base").select("behavior").unique(maintain_order=True)["behavior"]
    rows += [{"behavior": b, "adapter": BASE, "source": None, "seed": None} for b in base]
    for row in rows:
        row["key"] = f"{row['behavior']}/{row['adapter']}"
    return rows


def _behavior(stats: Stats, behavior: str, questions: tuple[str, ...]) -> dict[str, Any]:
    rates = stats.rates.filter(pl.col("role") != "base", behavior=behavior)
    known = rates["delta"].drop_nulls()
    probable = _probable(stats).filter(pl.col("probability").is_not_null(), behavior=behavior)
    return {
        "name": behavior,
        "unit": stats.unit(behavior),
        "outcome": stats.outcome(behavior),
        "sign": sign_of(behavior),
        "measure": _MEASURES.get(get(behavior).measured_by, "rate") if is_known(behavior) else "rate",
        "layer": stats.best_layer(behavior),
        "ys": ["rate", *(["delta"] if known.len() else []), *(["probability"] if probable.height else [])],
        "questions": list(questions),
    }


def _probable(stats: Stats) -> pl.DataFrame:
    """Rates with the probability beside them, where the run has both."""
    return expected_rates.beside(stats.rates, stats.more.get("probabilities", pl.DataFrame()))


def _there(table: pl.DataFrame, *names: str) -> list[str]:
    return [name for name in names if name in table.columns]


def _rates(stats: Stats, place: dict[str, int], adapters: list[str]) -> dict[str, list]:
    """Columns adapter, persona (places), role and _RATES; rows of every adapter and of the unadapted model."""
    rates = _probable(stats).with_columns(**rate_interval(stats.rates))
    exposure = stats.more.get("exposure")
    if exposure is not None and exposure.height:
        rates = rates.join(
            exposure.select("behavior", "adapter", "persona", "mean_tokens").unique(
                ["behavior", "adapter", "persona"], keep="first"
            ),
            on=["behavior", "adapter", "persona"],
            how="left",
            maintain_order="left",
        )
    key = (pl.col("behavior") + "/" + pl.col("adapter")).alias("key")
    found = rates.select(key, "persona", "role", *_there(rates, *_RATES))
    number = {name: at for at, name in enumerate(adapters)}
    return {
        "adapter": [number[name] for name in found["key"]],
        "persona": [place[name] for name in found["persona"]],
        "role": found["role"].to_list(),
        **{name: _plain(found[name]) if name in found.columns else [None] * found.height for name in _RATES},
    }


def _plain(column: pl.Series) -> list:
    """Values that JSON has: what is not finite is null."""
    if column.dtype in (pl.Float32, pl.Float64):
        column = column.fill_nan(None).cast(pl.Float64)
        column = column.set(column.is_infinite().fill_null(False), None)
    return column.to_list()


def _cosines(stats: Stats, place: dict[str, int]) -> dict[str, Any]:
    """layers, and per source, kind and layer the cosine of every persona, six digits; null where unknown."""
    pairs = stats.pairs.unique(["source", "persona", "layer"], keep="first", maintain_order=True)
    layers = sorted(pairs["layer"].drop_nulls().unique())
    at = {layer: number for number, layer in enumerate(layers)}
    out: dict[str, Any] = {}
    for (source,), mine in pairs.filter(pl.col("layer").is_not_null()).group_by(
        "source", maintain_order=True
    ):
        empty = {kind: [[None] * len(place) for _ in layers] for kind in COSINES}
        who = [place.get(name) for name in mine["persona"]]
        where = [at[layer] for layer in mine["layer"]]
        for kind in COSINES:
            values = _plain(mine[f"cosine_{kind}"].round(_COSINE_DIGITS))
            for layer, persona, value in zip(where, who, values, strict=True):
                if persona is not None:
                    empty[kind][layer][persona] = value
        out[source] = empty
    return {"layers": layers, "sources": out}


def _correlations(stats: Stats) -> dict[str, list]:
    """ρ over all categories of each adapter and pooled, with what stands beside it, as columns."""
    whole = [stats.summary(cosine, y) for cosine in COSINES for y in YS[:2]]
    if "probability_correlations" in stats.more:
        whole.append(stats.more["probability_correlations"].filter(pl.col("category").is_null()))
    filled = [part for part in whole if part.height]
    table = pl.concat(filled, how="diagonal_relaxed") if filled else pl.DataFrame()
    names = ["behavior", "adapter", "source", "seed", "layer", "cosine", "y", "n", "spearman"]
    names += ["spearman_both_low", "spearman_both_high", "spearman_ci_low", "spearman_ci_high"]
    names += ["spearman_p_perm", "spearman_p_max", "rank", "candidates", "p_source_max"]
    names += ["mean_bystander", "mean_bystander_low", "mean_bystander_high"]
    table = table.filter(pl.col("layer").is_not_null()) if "layer" in table.columns else table
    return {name: _plain(table[name]) if name in table.columns else [None] * table.height for name in names}


def _picked(stats: Stats) -> list[dict[str, Any]]:
    """The picked layer's ρ with the interval that pays for the pick."""
    table = stats.more.get("picked")
    if table is None:
        return []
    names = [
        "behavior",
        "source",
        "adapter",
        "seed",
        "cosine",
        "y",
        "layer",
        "spearman",
        "picked_low",
        "picked_high",
    ]
    return table.select(_there(table, *names)).rows(named=True)


def _trajectory(run: Run, place: dict[str, int]) -> dict[str, list] | None:
    """Rates at shares of training as columns, where the run has them: a line is of one measurement, so of an adapter that was
    measured in several ways (probability beside completions, say) those of one alone, probability the last."""
    if not run.has(layout.table("trajectory")):
        return None
    table = one_each(run.read(layout.table("trajectory"))).sort(
        "behavior", "adapter", "share", maintain_order=True
    )
    table = table.filter(pl.col("persona").is_in(list(place)))
    ways = table.select("behavior", "adapter", "items", "scoring").unique(maintain_order=True)
    ways = ways.sort(pl.col("scoring").str.starts_with("probability"), maintain_order=True)
    ways = ways.unique(["behavior", "adapter"], keep="first", maintain_order=True)
    table = table.join(ways, on=ways.columns, how="semi", maintain_order="left")
    names = ["behavior", "adapter", "source", "items", "share", "role", "rate"]
    out = {name: _plain(table[name]) for name in names}
    return {**out, "persona": [place[name] for name in table["persona"]]}
