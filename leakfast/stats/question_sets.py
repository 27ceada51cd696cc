"""The same behavior on several question sets: rates on each, ρ of leakage with the base cosine per source and set,
and how far it differs from the ρ on the main set. Demands completions under sets/ of a run; draws no completions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import polars as pl

from leakfast.errors import StoreError
from leakfast.stats import baselines, paired
from leakfast.stats import pairs as pair_tables
from leakfast.stats import rates as rate_tables
from leakfast.stats.correlations import POOLED, YS, correlate
from leakfast.stats.rates import BASE
from leakfast.storage import schema
from leakfast.storage.layout import SETS
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.storage.run import Run

MAIN = "main"  # name of the main set where the run does not tell it
_PAIRED = "percentile bootstrap over personas, the same resamples on both sets"
_CELL = ["adapter", "persona"]
_ONE = ["seed", "source", "adapter"]  # of pooled rows the adapter is null


def read(
    run: Run,
    categories: Mapping[str, str | None],
    named: Collection[str] | None,
    origin: Callable[[Run, str, pl.DataFrame], tuple[str, int | None]],
) -> tuple[pl.DataFrame, list[str]]:
    """(schema `rates` + questions (set) and role, of every sets/<behavior>/<set>/<adapter>/, empty without any; a sentence for
    each adapter whose rates have no baseline, since the unadapted model was asked or drawn otherwise).

    named: personas that may be bystanders (None: all). origin: adapter and its rows → (source, seed). Raises
    StoreError for completions that are there twice or of another shape."""
    from leakfast.behaviors.registry import get

    folders = sorted({PurePosixPath(path).parts[1:4] for path in run.shards(SETS)})
    frames, missing = [], []
    for behavior, questions in dict.fromkeys(folder[:2] for folder in folders):
        counts, adapters, asked = [], {}, []
        for adapter in [folder[2] for folder in folders if folder[:2] == (behavior, questions)]:
            path = f"{SETS}/{behavior}/{questions}/{adapter}"
            completions = run.read(path)
            try:
                schema.check(completions, "completions")
                counts.append(rate_tables.count(completions, get(behavior).detector(pl.col("text"))))
            except ValueError as error:
                raise StoreError(
                    f"{run.path}: {path}: {error}. Move that folder away and run `leakfast eval` again."
                ) from error
            asked.append(completions.select("behavior", "adapter", "persona", "question").unique())
            if adapter != BASE:
                adapters[adapter] = origin(run, adapter, completions)
        whole = pl.concat(counts)
        outsiders = set() if named is None else set(whole["persona"].unique()) - set(named)
        unlike, told = baselines.unlike(run, pl.concat(asked), f"{SETS}/{behavior}/{questions}")
        missing += told
        table = rate_tables.table(whole, adapters, categories, outsiders, unlike)
        frames.append(table.with_columns(questions=pl.lit(questions)))
    if frames:
        return pl.concat(frames, how="diagonal"), missing
    columns = {"role": pl.String(), "questions": pl.String()}
    return pl.DataFrame(schema=schema.columns("rates") | columns), missing


def main_sets(run: Run, behaviors: Collection[str]) -> dict[str, str]:
    """Behavior → name of the set its completions/ were drawn on."""
    shards = run.manifest["shards"]
    found = {}
    for behavior in behaviors:
        told = {
            entry.get("questions")
            for path, entry in shards.items()
            if path.startswith(f"completions/{behavior}/")
        }
        (name,) = told if len(told) == 1 else (None,)
        found[behavior] = name or MAIN
    return found


def with_main(rates: pl.DataFrame, others: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    """Rates on the main set above those on the others, of the behaviors and adapters that have others."""
    if others.is_empty():
        return others.with_columns(main=pl.lit(None, pl.Boolean))
    own = rates.join(others.select("behavior", "adapter").unique(), on=["behavior", "adapter"], how="semi")
    own = own.with_columns(
        questions=pl.col("behavior").replace_strict(dict(names), default=MAIN, return_dtype=pl.String),
        main=pl.lit(True),
    )
    kept = [name for name in others.columns if name in own.columns]
    both = [own.select(*kept, "main"), others.select(*kept, main=pl.lit(False))]
    return pl.concat(both).sort("behavior", maintain_order=True)


def compare(
    rates: pl.DataFrame,
    centroids: Centroids | None,
    permutations: int,
    bootstraps: int,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Schema `question_sets` (+ p-values, reasons): one row per behavior, seed, source (and pooled), set, layer, cosine
    and y. `rates`: from `with_main`.

    ρ, its interval and p-values are those of `correlations.correlate` on that set's rates. `difference` = ρ − ρ on the
    main set, both over the bystanders that have both rates; resampling unit: the persona (pooled: with its rates under
    all sources), each resample taken for both sets at once, because the personas and their cosines are the same."""
    columns = schema.columns("question_sets")
    more = {"spearman_p_perm": pl.Float64(), "spearman_p_max": pl.Float64(), "reason": pl.String()}
    more |= {"difference_reason": pl.String(), "bootstraps": pl.Int64(), "method": pl.String()}
    if rates.is_empty() or centroids is None:
        return pl.DataFrame(schema=columns | more)
    frames = []
    for (behavior,), mine in rates.group_by("behavior", maintain_order=True):
        pairs = {
            (name, main): pair_tables.table(part, centroids).with_columns(category=pl.lit(None, pl.String))
            for (name, main), part in mine.group_by("questions", "main", maintain_order=True)
        }
        standard = next((found for (_, main), found in pairs.items() if main), None)
        for (name, main), found in pairs.items():
            table = correlate(found, permutations, seed, bootstraps=bootstraps, workers=workers)
            told = _rates_of(mine.filter(questions=name))
            table = table.join(told, on=_ONE, how="left", nulls_equal=True, maintain_order="left")
            against = None if main else standard
            table = table.join(
                _differences(found, against, bootstraps, (seed, behavior), workers),
                on=[*_ONE, "layer", "cosine", "y"],
                how="left",
                nulls_equal=True,
                maintain_order="left",
            )
            frames.append(table.with_columns(questions=pl.lit(name), main=pl.lit(main)))
    whole = pl.concat(frames).with_columns(method=pl.lit(_PAIRED))
    return schema.check(whole.select(*columns, *more), "question_sets")


def _rates_of(rates: pl.DataFrame) -> pl.DataFrame:
    """seed, source (and pooled), adapter, source_rate, source_delta, mean_bystander, mean_delta on one set."""
    own = rates.filter(role="source").select(*_ONE, source_rate=pl.col("rate"), source_delta=pl.col("delta"))
    others = rates.filter(role="bystander")
    means = [pl.col("rate").mean().alias("mean_bystander"), pl.col("delta").mean().alias("mean_delta")]
    single = others.group_by(_ONE, maintain_order=True).agg(means)
    once = others.group_by("seed", "source", "persona", maintain_order=True).agg(
        pl.col("rate", "delta").mean()  # a source with several adapters counts once
    )
    pooled = once.group_by("seed", maintain_order=True).agg(means)
    pooled = pooled.with_columns(source=pl.lit(POOLED), adapter=pl.lit(None, pl.String))
    whole = pl.concat([single, pooled.select(single.columns)])
    return whole.join(own, on=_ONE, how="left", nulls_equal=True)


def _differences(
    pairs: pl.DataFrame, main: pl.DataFrame | None, bootstraps: int, parts: tuple, workers: int | None
) -> pl.DataFrame:
    """seed, source, adapter, layer, cosine, y, difference, its interval and why there is none."""
    rows: list[dict] = []
    if main is not None:
        ys = [pl.col(y).alias(f"{y}_main") for y in YS]
        both = pairs.join(main.select(*_CELL, "layer", *ys), on=[*_CELL, "layer"], how="inner").sort(
            "layer", *_CELL
        )
        for (seed,), group in both.group_by("seed", maintain_order=True):
            alone = group["adapter"].n_unique() == group["source"].n_unique()
            names = group.select("adapter", "source").unique(maintain_order=True).rows()
            scopes = [(name, source, group.filter(adapter=name)) for name, source in names]
            for adapter, source, part in [*scopes, *([(None, POOLED, group)] if alone else [])]:
                for row in _scope(
                    part, bootstraps, derive_seed("question sets", *parts, seed, source), workers
                ):
                    rows.append({"seed": seed, "source": source, "adapter": adapter, **row})
    columns = {"seed": pl.Int64, "source": pl.String, "adapter": pl.String, "layer": pl.Int32}
    columns |= {"cosine": pl.String, "y": pl.String}
    columns |= dict.fromkeys(("difference", "difference_low", "difference_high"), pl.Float64)
    return pl.DataFrame(rows, schema=columns | {"difference_reason": pl.String})


def _scope(part: pl.DataFrame, bootstraps: int, seed: int, workers: int | None) -> list[dict]:
    """Every layer × cosine × y of one source's (or all sources') bystanders."""
    rows = []
    for (layer,), at in part.group_by("layer", maintain_order=True):
        for y in YS:
            for kind in ("centered", "raw"):
                key = {"layer": layer, "cosine": kind, "y": y}
                some = at.drop_nulls([f"cosine_{kind}", y, f"{y}_main"])
                rows.append(key | _one(some, f"cosine_{kind}", y, bootstraps, seed, workers))
    return rows


def _one(some: pl.DataFrame, x: str, y: str, bootstraps: int, seed: int, workers: int | None) -> dict:
    sides = [(some[x].to_numpy(), some[name].to_numpy()) for name in (y, f"{y}_main")]
    return paired.rho_difference(sides, some["persona"], some["adapter"], bootstraps, seed, workers)
