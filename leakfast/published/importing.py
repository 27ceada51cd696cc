"""The published study's stored results as our tables, and a run directory made of them. Demands the
study's layout (docs/published.md); refuses other shapes by file and key; leaves the study's own
correlations to be compared with (`stats.agreement`), never copied."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from leakfast.errors import InputError
from leakfast.published.files import BEHAVIOR, CORRELATIONS, wrong
from leakfast.published.marker import ROUNDED, read_completions, read_pairs, read_people, read_rates
from leakfast.published.numbers import read_stored
from leakfast.published.others import read_centroids, read_rate_tables
from leakfast.stats.imported import IMPORTED
from leakfast.storage import layout
from leakfast.storage.layout import PERSONAS
from leakfast.storage.run import Run


def import_run(folder: str | Path, out: str | Path) -> Run:
    """Write the study's results `folder` into the run directory `out`; `leakfast stats` then works on it.

    Takes what is there of: `{source}/marker_eval.json`, `*_111.json`, `cosine_leakage_correlation.json`,
    `centroids_layer*.pt`, `{source}/raw_completions.json`, and the study's own analysis (to be compared
    with). Rates and pairs go to imported/*.parquet, completions and centroids where our own runs have
    theirs. Raises InputError where there is nothing to import, a file has another shape, or two files tell
    different rates of one persona."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"published: {folder} is no folder. Give the study's results folder.")
    marker = list(folder.glob("*/marker_eval.json"))
    rates = [read_rates(folder)] if marker else []
    rates = pl.concat([*rates, read_rate_tables(folder)], how="diagonal")
    centroids, completions = read_centroids(folder), dict(read_completions(folder))
    if rates.is_empty() and not completions:
        raise InputError(
            f"published: {folder} holds no {{source}}/marker_eval.json, raw_completions.json or *_111.json. "
            "Give the study's results folder."
        )
    pairs = read_pairs(folder) if (folder / CORRELATIONS).is_file() else None
    if pairs is not None:
        _agree(pairs, rates, folder / CORRELATIONS)
    people = read_people(folder)
    measured = rates["persona"].unique(maintain_order=True).to_list()
    for frame in completions.values():
        measured = list(dict.fromkeys([*measured, *frame["persona"].unique(maintain_order=True)]))
    sources = rates.filter(pl.col("role") != "base")["source"].drop_nulls().unique(maintain_order=True)
    people |= {"named": measured, "sources": sources.to_list()}
    run = Run(out).create()
    with run.lock():
        run.add_file(PERSONAS, json.dumps(people, indent=1).encode())
        if rates.height:
            run.add_shard(f"{IMPORTED}/rates.parquet", rates)
        if pairs is not None:
            run.add_shard(f"{IMPORTED}/pairs.parquet", pairs)
        run.add_shard(f"{IMPORTED}/published.parquet", read_stored(folder))
        if centroids is not None:
            run.add_file(layout.centroids(), centroids.save)
        for adapter, frame in completions.items():
            run.add_shard(layout.shard(layout.completions(BEHAVIOR, adapter)), frame)
        run.log("imported", folder=folder.name, study="published")
    return run


def _agree(pairs: pl.DataFrame, rates: pl.DataFrame, file: Path) -> None:
    """The rates beside the cosines are those that were counted: ρ is of the former, every table of rates of the latter. Raises
    InputError naming the first that is another."""
    counted = rates.select("adapter", "persona", counted="rate")
    both = pairs.join(counted, on=["adapter", "persona"], how="inner", maintain_order="left")
    off = both.filter((pl.col("rate") - pl.col("counted")).abs() > ROUNDED)
    if off.height:
        row = off.row(0, named=True)
        raise wrong(
            file,
            f"leakage_rate of {row['persona']} under {row['source']} is {row['rate']:g}, but its marker_eval.json counts "
            f"{row['counted']:g}",
            "Give both files of one evaluation.",
        )
