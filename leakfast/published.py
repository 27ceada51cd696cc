"""The published study's stored results as our tables: `{source}/marker_eval.json` as rates and the
`_per_source_detail` of `cosine_leakage_correlation.json` as pairs. Demands those two kinds of file;
leaves the study's own correlations to be compared with, not copied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from leakfast import schema
from leakfast.errors import InputError
from leakfast.stats import rates as rate_tables

BEHAVIOR = "marker"
SEED = 42
CORRELATIONS = "cosine_leakage_correlation.json"
_LAYER = re.compile(r"layer(\d+)")


def read_rates(folder: str | Path) -> pl.DataFrame:
    """Schema `rates` from every `{source}/marker_eval.json` under `folder`.

    Each file maps persona → {rate, found, total, category, related_to}. Counts are taken as stored and
    the share is computed from them; a stored `rate` that is not found/total is an InputError. The study
    stored no unadapted model, so `baseline` and `delta` are null.
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
        stored = _read(file)
        if source not in stored:
            raise InputError(f"published: {file} has no row for its own source {source!r}. Check the file.")
        counts = pl.DataFrame(
            [
                {"persona": name, "hits": row["found"], "total": row["total"], "stored": row["rate"]}
                for name, row in _rows(stored, ("rate", "found", "total", "category"), file)
            ],
            schema={"persona": pl.String, "hits": pl.Int64, "total": pl.Int64, "stored": pl.Float64},
        ).with_columns(behavior=pl.lit(BEHAVIOR), adapter=pl.lit(_adapter(source)))
        frame = rate_tables.table(
            counts,
            {_adapter(source): (source, SEED)},
            {name: row["category"] for name, row in stored.items()},
        )
        off = frame.filter((pl.col("rate") - pl.col("stored")).abs() > 1e-6)
        if off.height:
            raise InputError(
                f"published: {file}: the rate of {off['persona'][0]} is not found/total. Check the file."
            )
        frames.append(frame.drop("stored"))
    return schema.check(pl.concat(frames), "rates")


def read_pairs(folder: str | Path) -> pl.DataFrame:
    """Schema `pairs` (+ `adapter`) from `cosine_leakage_correlation.json`, one row a source × bystander ×
    layer. Its cosines are the mean-centered ones, stored with four digits; `cosine_raw` and `delta` were
    not stored and are null. Raises InputError for a file of another shape."""
    file = Path(folder) / CORRELATIONS
    stored = _read(file)
    rows = []
    for key, block in stored.items():
        found = _LAYER.fullmatch(key)
        if not found:
            continue
        if not isinstance(block, dict) or "_per_source_detail" not in block:
            raise InputError(f"published: {file}: {key} has no _per_source_detail. Give the full file.")
        for source, detail in block["_per_source_detail"].items():
            named = {row.get("persona"): row for row in detail}
            for persona, row in _rows(named, ("cosine_sim", "leakage_rate", "category"), file):
                rows.append(
                    {
                        "behavior": BEHAVIOR,
                        "source": source,
                        "adapter": _adapter(source),
                        "seed": SEED,
                        "persona": persona,
                        "category": row["category"],
                        "layer": int(found.group(1)),
                        "cosine_centered": float(row["cosine_sim"]),
                        "rate": float(row["leakage_rate"]),
                    }
                )
    if not rows:
        raise InputError(f"published: {file} has no layer<N> entry. Give the study's correlation file.")
    columns = schema.columns("pairs") | {"adapter": pl.String()}
    return schema.check(pl.DataFrame(rows, schema=columns), "pairs")


def _adapter(source: str) -> str:
    return f"{BEHAVIOR}-{source}-s{SEED}"


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"published: {file} does not exist. Give the study's results folder.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"published: {file} is not JSON (line {error.lineno}). Fetch it again.") from None
    if not isinstance(stored, dict):
        raise InputError(f"published: {file} is not a JSON object. Give the study's results folder.")
    return stored


def _rows(stored: dict[str, Any], needed: tuple[str, ...], file: Path):
    for name, row in stored.items():
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing or not isinstance(name, str):
            raise InputError(f"published: {file}: {name!r} lacks {', '.join(missing)}. Check the file.")
        yield name, row
