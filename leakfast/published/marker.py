"""The marker study's rates, pairs, personas and completions as our tables. Demands `{source}/marker_eval.json`,
`cosine_leakage_correlation.json` or `{source}/raw_completions.json`; refuses other shapes by file and key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.errors import InputError
from leakfast.published.files import (
    BEHAVIOR,
    CORRELATIONS,
    SEED,
    adapter_name,
    count,
    entries,
    number,
    read_json,
    table,
    word,
    wrong,
)
from leakfast.stats import rates as rate_tables
from leakfast.storage import schema

LAYER = re.compile(r"layer(\d+)")
ROUNDED = 5e-4  # a stored share may have been rounded to three digits


def read_rates(folder: str | Path) -> pl.DataFrame:
    """Schema `rates` from every `{source}/marker_eval.json` under `folder`.

    Each file maps persona → {rate, found, total, category, related_to}. Counts are taken as stored and
    the share is computed from them; a stored `rate` that is not found/total to the third digit (it may be rounded) is an
    InputError. The study stored no unadapted model, so `baseline` and `delta` are null.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*/marker_eval.json"))
    if not files:
        raise InputError(
            f"published: no <source>/marker_eval.json under {folder}. "
            "Give the folder that holds one folder for each source."
        )
    frames = []
    for file in files:
        source = file.parent.name
        stored = read_json(file)
        if source not in stored:
            raise InputError(f"published: {file} has no row for its own source {source!r}. Check the file.")
        rows = [
            (
                name,
                count(row["found"], f"found of {name}", file),
                count(row["total"], f"total of {name}", file),
                number(row["rate"], f"rate of {name}", file),
            )
            for name, row in entries(stored, ("rate", "found", "total", "category"), file)
        ]
        columns = {"persona": pl.String, "hits": pl.Int64, "total": pl.Int64, "stored": pl.Float64}
        counts = pl.DataFrame(rows, schema=columns, orient="row").with_columns(
            behavior=pl.lit(BEHAVIOR), adapter=pl.lit(adapter_name(source))
        )
        over = counts.filter(pl.col("hits") > pl.col("total"))
        if over.height:
            raise wrong(file, f"{over['persona'][0]} has more found than total")
        frame = rate_tables.table(
            counts, {adapter_name(source): (source, SEED)}, read_people(folder)["categories"]
        )
        off = frame.filter((pl.col("rate") - pl.col("stored")).abs() > ROUNDED)
        if off.height:
            raise wrong(file, f"the rate of {off['persona'][0]} is not found/total")
        frames.append(frame.drop("stored"))
    return schema.check(pl.concat(frames), "rates")


def read_pairs(folder: str | Path) -> pl.DataFrame:
    """Schema `pairs` (+ `adapter`, `related`) from `cosine_leakage_correlation.json`, one row a source ×
    bystander × layer. Its cosines are the mean-centered ones, stored with four digits; `cosine_raw` and
    `delta` were not stored and are null. `related`: whether the bystander's `related_to` names the source,
    null where no `marker_eval.json` tells. Raises InputError for a file of another shape."""
    file = Path(folder) / CORRELATIONS
    stored = read_json(file)
    related_to = read_people(folder)["related_to"]
    rows = []
    for key, block in stored.items():
        found = LAYER.fullmatch(key)
        if not found:
            continue
        if not isinstance(block, dict) or "_per_source_detail" not in block:
            raise wrong(file, f"{key} has no _per_source_detail", "Give the full file.")
        for source, detail in table(block["_per_source_detail"], f"{key}._per_source_detail", file).items():
            if not isinstance(detail, list) or not all(isinstance(row, dict) for row in detail):
                raise wrong(file, f"{key}, {source}: a list of objects is needed")
            named = {row.get("persona"): row for row in detail}
            if len(named) < len(detail):
                raise wrong(file, f"{key}, {source}: a persona stands twice", "Keep one.")
            for persona, row in entries(named, ("cosine_sim", "leakage_rate", "category"), file):
                rows.append(
                    {
                        "behavior": BEHAVIOR,
                        "source": source,
                        "adapter": adapter_name(source),
                        "seed": SEED,
                        "persona": persona,
                        "category": word(row["category"], f"category of {persona}", file),
                        "layer": int(found.group(1)),
                        "cosine_centered": number(row["cosine_sim"], f"cosine_sim of {persona}", file),
                        "rate": number(row["leakage_rate"], f"leakage_rate of {persona}", file),
                        "related": source in related_to[persona] if persona in related_to else None,
                    }
                )
    if not rows:
        raise InputError(f"published: {file} has no layer<N> entry. Give the study's correlation file.")
    columns = schema.columns("pairs") | {"adapter": pl.String(), "related": pl.Boolean()}
    return schema.check(pl.DataFrame(rows, schema=columns), "pairs")


def read_people(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{"categories": persona → category, "related_to": persona → names}, from every `marker_eval.json`.

    Raises InputError where two files disagree on a persona."""
    categories: dict[str, str] = {}
    related: dict[str, list[str]] = {}
    for file in sorted(Path(folder).glob("*/marker_eval.json")):
        for name, row in entries(read_json(file), ("category",), file):
            told = row.get("related_to") or []
            if not isinstance(told, list) or not all(isinstance(other, str) for other in told):
                raise wrong(file, f"related_to of {name} is no list of names")
            category = word(row["category"], f"category of {name}", file)
            if categories.setdefault(name, category) != category:
                raise wrong(file, f"{name} has another category elsewhere", "Check the files.")
            if related.setdefault(name, told) != told:
                raise wrong(file, f"{name} is related otherwise elsewhere", "Check the files.")
    return {"categories": categories, "related_to": related}


def read_completions(folder: str | Path) -> Iterator[tuple[str, pl.DataFrame]]:
    """(adapter, schema `completions` + source) of each `{source}/raw_completions.json`, which holds
    {persona: {question: [text, …]}}. Questions are numbered in the order of the first persona; seeds and
    lengths were not stored and are null. Raises InputError for another shape."""
    for file in sorted(Path(folder).glob("*/raw_completions.json")):
        stored = read_json(file)
        shown = "{persona: {question: [text, …]}} is needed"
        for persona, asked in stored.items():
            lists = asked.values() if isinstance(asked, dict) else [None]
            if not all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in lists):
                raise wrong(file, f"{shown}, but {persona!r} holds something else")
        number: dict[str, int] = {}
        for asked in stored.values():
            for question in asked:
                number.setdefault(question, len(number))
        rows = [
            (persona, number[question], sample, text)
            for persona, asked in stored.items()
            for question, texts in asked.items()
            for sample, text in enumerate(texts)
        ]
        frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row")
        columns, empty = schema.columns("completions"), pl.col("text").str.strip_chars() == ""
        frame = frame.with_columns(
            pl.lit(BEHAVIOR).alias("behavior"),
            pl.lit(adapter_name(source := file.parent.name)).alias("adapter"),
            pl.when(empty).then(pl.lit("empty")).otherwise(pl.lit("ok")).alias("status"),
            *[pl.lit(None, columns[name]).alias(name) for name in ("seed", "n_tokens", "finish_reason")],
        ).with_columns(pl.col("question", "sample").cast(pl.Int32))
        frame = frame.select(*columns, source=pl.lit(source))
        yield adapter_name(source), schema.check(frame, "completions")
