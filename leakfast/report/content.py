"""What the report says, as plain values: headline, categories, leakers, settings, provenance. Demands
a run and its tables; rounds nothing and writes no HTML (that is the template's)."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known, sign_of
from leakfast.errors import InputError
from leakfast.judge.contract import ENOUGH
from leakfast.models.adapters import read_card
from leakfast.report import payload, picks
from leakfast.report.examples import choose
from leakfast.report.reading import questions as asked_questions
from leakfast.stats.correlations import POOLED
from leakfast.stats.health import read_ratio, without_content
from leakfast.stats.rates import BASE
from leakfast.stats.summary import rate_interval
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.version import __version__

LEAKERS = 8
_VERSIONS = ("numpy", "scipy", "polars", "matplotlib", "torch", "transformers", "peft", "vllm")


def behavior_section(run: Run, stats: Stats, behavior: str) -> dict[str, Any]:
    """Everything about one behavior: what it is, its headline rows, categories, leakers, examples."""
    layer = stats.best_layer(behavior)
    rows = picks.twins([row for row in stats.summary().rows(named=True) if row["behavior"] == behavior])
    # where ρ is defined at no layer, the rates and the reasons are there all the same
    at = layer if layer is not None or not rows else rows[0]["layer"]
    headline = [row for row in rows if row["layer"] in (None, at)]
    adapters = [row for row in headline if row["source"] != POOLED]
    trained = stats.rates.filter(pl.col("role") != "base", behavior=behavior)
    base = stats.rates.filter(behavior=behavior, role="base")
    questions = asked_questions(run, behavior)
    return {
        "name": behavior,
        "about": describe(behavior),
        "layer": layer,
        "outcome": stats.outcome(behavior),
        "unit": stats.unit(behavior),
        "most": "highest" if sign_of(behavior) > 0 else "lowest",
        "taught": _taught(trained, behavior),
        "headline": headline,
        # of a single source there is no pool: it speaks for itself
        "pooled": next((row for row in headline if row["source"] == POOLED), next(iter(adapters), None)),
        "interval": picks.interval(stats, headline, layer),
        "sources": adapters,
        "length_out": stats.length_out(behavior, layer=layer),
        "undefined": list(dict.fromkeys(row["reason"] for row in headline if row["reason"])),
        "chance": next((row["chance"] for row in headline if row["chance"] is not None), None),
        "labels": _labels(stats, behavior),
        "personas": len({row["source"] for row in adapters}),
        "several_pools": sum(row["source"] == POOLED for row in headline) > 1,
        "several_seeds": len({row["seed"] for row in adapters}) > 1,
        "base": {"hits": base["hits"].sum(), "total": base["total"].sum()} if base["total"].sum() else None,
        "has_base": base.height > 0,
        "layers": _layers(rows),
        "families": picks.families(stats, behavior),
        "widths": _widths(stats, behavior),
        "model": _model(stats, behavior),
        "shifts": _shifts(stats, behavior, layer),
        "sets": _sets(stats, behavior, layer),
        "categories": _categories(stats, behavior, layer),
        "leakers": [_leakers(stats, row, layer) for row in adapters],
        "statuses": _statuses(trained, base),
        "health": _health(stats, behavior),
        "judged": _judged(trained, base),
        "examples": [
            {"source": row, "shown": choose(run, stats, behavior, row["adapter"], layer)} for row in adapters
        ],
        "questions": questions,
    }


def in_short(section: dict[str, Any]) -> dict[str, Any]:
    """Of one behavior's section: the source whose bystanders show the most on average, the bystander that shows the most
    and whose, and the row of all sources; each with its interval, None where nothing is known. Of several with the same
    value the first. Most is the lowest rate where less means more of the behavior."""
    more = sign_of(section["name"])
    sources = [row for row in section["sources"] if row["mean_bystander"] is not None]
    leaks = [
        {**row, "source": block["source"]}
        for block in section["leakers"]
        for row in block["rows"][:1]
        if row["rate"] is not None
    ]
    return {
        "source": max(sources, key=lambda row: more * row["mean_bystander"], default=None),
        "leak": max(leaks, key=lambda row: more * row["rate"], default=None),
        "pooled": section["pooled"],
    }


def relations(stats: Stats) -> dict[str, Any]:
    """Categories against behaviors, where there are several: rows of mean changes, how much categories explain, and
    the rank correlations between behaviors."""
    table = stats.more.get("relations")
    if table is None or table["behavior"].n_unique() < 2:
        return {"columns": [], "rows": [], "alike": []}
    table = table.filter(scope="all")
    columns = table.unique(["behavior", "seed"], maintain_order=True).rows(named=True)
    for column in columns:
        column["unit"] = stats.unit(column["behavior"])
    found = {(row["category"], row["behavior"], row["seed"]): row for row in table.rows(named=True)}
    rows = [
        {"category": kind, "cells": [found.get((kind, c["behavior"], c["seed"])) for c in columns]}
        for kind in table["category"].unique().sort().to_list()
    ]
    alike = stats.more["relations_alike"].filter(scope="all").rows(named=True)
    return {"columns": columns, "rows": rows, "alike": alike, "several": table["seed"].n_unique() > 1}


def _taught(trained: pl.DataFrame, behavior: str) -> list[str]:
    """The other behaviors that the adapters were trained for, as their cards say; none where it is this one."""
    if "taught" not in trained.columns:
        return []
    return sorted(set(trained["taught"].drop_nulls()) - {behavior})


def describe(behavior: str) -> str:
    """What the behavior's rate is, in words."""
    return get(behavior).description if is_known(behavior) else f"measure of {behavior} that the run holds"


def provenance(run: Run, stats: Stats) -> dict[str, Any]:
    """Hashes, versions and seeds: what one needs to make the same run again."""
    shards = run.manifest["shards"]
    folders: dict[str, list[int]] = {}
    for path, entry in shards.items():
        if path.startswith("completions/"):
            count = folders.setdefault(path.rpartition("/")[0], [0, 0])
            count[0] += 1
            count[1] += entry.get("rows", 0)
    names = stats.rates.filter(pl.col("adapter") != BASE)["adapter"].unique(maintain_order=True)
    cards = {name: read_card(run.path / layout.adapter(name)) for name in names}
    shuffles = stats.correlations.filter(pl.col("spearman_p_perm").is_not_null())
    outputs = run.manifest["stages"].get("stats", {}).get("outputs", {})
    versions = {"leakfast": __version__, "Python": platform.python_version()}
    for package in _VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cards": cards,
        "folders": dict(sorted(folders.items())),
        "centroids": _centroids(run),
        "versions": versions,
        "made": payload.makers(run),
        "tables_made": payload.maker_words(outputs.get("leakfast"), outputs.get("commit"))
        if outputs
        else None,
        "permutations": shuffles["permutations"][0] if shuffles.height else None,
        "permutation_seed": outputs.get("seed"),
    }


def settings(run: Run) -> dict[str, Any]:
    """name, model, and the study file as written; `unreadable` says why its values could not be used."""
    path = run.path / layout.STUDY
    study, why = study_of(run)
    cards = (read_card(path.parent) for path in sorted(run.path.glob("adapters/*/leakfast_card.json")))
    base = next((card.base for card in cards if card is not None), None)
    model = study.model if study else base
    return {
        "name": study.name if study else run.path.resolve().name,
        "model": model,
        "is_organism": "organism" in (model, base),
        "seeds": list(study.seeds) if study else None,
        "text": path.read_text(encoding="utf-8") if path.is_file() else None,
        "unreadable": why,
    }


def study_of(run: Run) -> tuple[Any, str | None]:
    """The run's study, its own files there or not, or None and why it cannot be read."""
    from leakfast.study.config import settings_in

    path = run.path / layout.STUDY
    if not path.is_file():
        return None, "the run was made without a study file"
    try:
        return settings_in(path), None
    except InputError as error:
        return None, " ".join(error.message.split())


def _layers(rows: list[dict]) -> dict[str, Any]:
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    people = list(dict.fromkeys((row["adapter"], row["source"], row["seed"]) for row in rows))
    found = {(row["adapter"], row["source"], row["seed"], row["layer"]): row["spearman"] for row in rows}
    marks = ("health", "health_of", "twin")
    unwell = {(row["adapter"], row["source"], row["seed"]): {key: row[key] for key in marks} for row in rows}
    return {
        "layers": layers,
        "rows": [
            {
                "adapter": who[0],
                "source": who[1],
                "seed": who[2],
                "values": [found.get((*who, layer)) for layer in layers],
                **unwell[who],
            }
            for who in people
        ],
    }


def _model(stats: Stats, behavior: str) -> list[dict]:
    """Terms and sources' slopes of the mixed model, in the table's order; those without a value have a reason. None where the
    model was not fitted."""
    table = stats.more.get("mixed")
    if table is None:
        return []
    rows = table.filter(pl.col("part").is_in(["fixed", "source"]) & (pl.col("term") != "intercept"))
    rows = rows.filter(behavior=behavior)
    return rows.rows(named=True) if rows["coefficient"].count() else []


def _widths(stats: Stats, behavior: str) -> list[dict]:
    """The tests of whether the 10–90 % width differs between sources, where there is one."""
    if "widths" not in stats.more:
        return []
    return stats.more["widths"].filter(pl.col("p").is_not_null(), behavior=behavior).rows(named=True)


def _shifts(stats: Stats, behavior: str, layer: int | None) -> list[dict]:
    """Per adapter and pooled: lengths of the shifts, mean alignment, ρ of each geometry; none without shifts."""
    if "shifts" not in stats.more or layer is None:
        return []
    mine = stats.more["shifts"].filter(behavior=behavior, layer=layer)
    relative, own = pl.col("shift_centered") / pl.col("base_spread"), pl.col("role") == "source"
    lengths = {
        row["adapter"]: row
        for row in mine.group_by("adapter", maintain_order=True)
        .agg(
            own=relative.filter(own).first(),
            others=relative.filter(role="bystander").mean(),
            alignment=pl.col("alignment_centered").filter(role="bystander").mean(),
        )
        .rows(named=True)
    }
    found = stats.more["shift_correlations"].filter(
        behavior=behavior, layer=layer, cosine="centered", y=stats.outcome(behavior)
    )
    out = []
    for (adapter, source, seed), rows in found.group_by("adapter", "source", "seed", maintain_order=True):
        rho = dict(rows.select("geometry", "spearman").rows())
        told = lengths.get(adapter, dict.fromkeys(("own", "others", "alignment")))
        about = {"adapter": adapter, "source": source, "seed": seed}
        out.append({**told, **about, "rho": rho, "n": rows["n"].max()})
    return picks.twins(out)


def _sets(stats: Stats, behavior: str, layer: int | None) -> dict[str, Any]:
    """names of the question sets, the main one first, and per source its row of each; nothing where there is one set."""
    if "question_sets" not in stats.more or layer is None:
        return {"names": [], "rows": []}
    mine = (
        stats.more["question_sets"]
        .filter(behavior=behavior, layer=layer, cosine="centered", y=stats.outcome(behavior))
        .sort("main", descending=True, maintain_order=True)
    )
    rows = [
        {
            "source": source,
            "seed": seed,
            "adapter": adapter,
            "by_set": {r["questions"]: r for r in part.rows(named=True)},
        }
        for (source, seed, adapter), part in mine.group_by("source", "seed", "adapter", maintain_order=True)
    ]
    rows = picks.twins(rows)
    rows.sort(key=lambda row: row["source"] == POOLED)
    return {"names": mine["questions"].unique(maintain_order=True).to_list(), "rows": rows}


def _categories(stats: Stats, behavior: str, layer: int | None) -> list[dict]:
    """Per category: bystander pairs, mean rate per adapter, pooled ρ inside the category."""
    bystanders = stats.rates.filter(pl.col("category").is_not_null(), behavior=behavior, role="bystander")
    pooled = stats.correlations.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)),
        pl.col("category").is_not_null(),
        behavior=behavior,
        source=POOLED,
        cosine="centered",
        y=stats.outcome(behavior),
    )
    within = {row["category"]: row for row in pooled.rows(named=True)}
    out = []
    for (category,), group in bystanders.group_by("category", maintain_order=True):
        by_adapter = dict(group.group_by("adapter", maintain_order=True).agg(pl.col("rate").mean()).rows())
        out.append(
            {
                "category": category,
                "personas": group["persona"].n_unique(),
                "mean": group["rate"].mean(),
                "by_adapter": by_adapter,
                "within": within.get(category),
            }
        )
    return sorted(out, key=lambda row: (-sign_of(behavior) * (row["mean"] or 0), row["category"]))


def _leakers(stats: Stats, source: dict, layer: int | None) -> dict[str, Any]:
    """The bystanders that show most of the behavior (the lowest rates where less is more of it), with interval, cosine and
    the cosine's place among all."""
    mine = stats.rates.filter(behavior=source["behavior"], adapter=source["adapter"], role="bystander")
    near = stats.pairs.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)),
        behavior=source["behavior"],
        source=source["source"],
    )
    # cosines are of the base model: the same in every adapter's pairs of that source
    near = near.unique("persona", keep="first", maintain_order=True).select(
        "persona",
        "cosine_centered",
        place=pl.col("cosine_centered").rank("min", descending=True).cast(pl.Int64),
    )
    mine = mine.with_columns(side.alias(f"shown_{end}") for end, side in rate_interval(mine).items())
    top = mine.join(near, on="persona", how="left").sort(
        ["rate", "persona"], descending=[sign_of(source["behavior"]) > 0, False], nulls_last=True
    )
    return {"source": source, "rows": top.head(LEAKERS).rows(named=True), "of": mine.height}


def _health(stats: Stats, behavior: str) -> list[dict]:
    """The verdict on each adapter's replies with its numbers; nothing where none were drawn."""
    if stats.health is None:
        return []
    whole = stats.health.filter(pl.col("persona").is_null(), behavior=behavior)
    rows = whole.sort(pl.col("adapter") == BASE, maintain_order=True).rows(named=True)
    return [row | {"length": read_ratio(row), "empty": without_content(row)} for row in rows]


def _statuses(trained: pl.DataFrame, base: pl.DataFrame) -> list[dict]:
    counts = ("total", "n_empty", "n_truncated", "n_unclosed", "n_error")
    both = pl.concat([trained, base])
    if "n_unclosed" in both.columns:  # told in a column of their own
        both = both.with_columns(pl.col("n_error") - pl.col("n_unclosed").fill_null(0))
    absent = [pl.lit(None, pl.Int64).alias(name) for name in counts if name not in both.columns]
    return (
        both.with_columns(absent)
        .group_by("adapter", maintain_order=True)
        .agg(  # what was counted nowhere is not 0
            pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum()).alias(name) for name in counts
        )
        .rows(named=True)
    )


def _judged(trained: pl.DataFrame, base: pl.DataFrame) -> list[dict]:
    """What a judge scored, per adapter; nothing where no judge measures the behavior."""
    both = pl.concat([trained, base])
    if "n_judged" not in both.columns or both["n_judged"].null_count() == both.height:
        return []
    names = ["n_judged", "n_incoherent", "n_unscored"]
    drawn, scored = pl.sum_horizontal(*names), pl.sum_horizontal(*names[:2])
    summed = both.group_by("adapter", maintain_order=True).agg(pl.col("judge").first(), pl.col(names).sum())
    covered = summed.with_columns(coverage=(scored / drawn))
    return covered.with_columns(marked=(pl.col("coverage") < ENOUGH)).rows(named=True)


def _labels(stats: Stats, behavior: str) -> list[dict]:
    """Per adapter the labels chosen over all personas: adapter and labels (label, share, share_right)."""
    table = stats.more.get("chosen_labels")
    if table is None:
        return []
    mine = table.filter(pl.col("persona").is_null(), behavior=behavior)
    return [
        {"adapter": name, "labels": part.sort("label").rows(named=True)}
        for (name,), part in mine.group_by("adapter", maintain_order=True)
    ]


def _centroids(run: Run) -> dict[str, str]:
    """The metadata of the base centroids, long lists as their length."""
    path = run.path / layout.centroids()
    if not path.is_file():
        return {}
    from leakfast.geometry import Centroids

    metadata = Centroids.load(path).metadata
    return {
        key: f"{len(value)} entries" if isinstance(value, list | tuple | dict) else str(value)
        for key, value in sorted(metadata.items())
    }
