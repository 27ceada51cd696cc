"""Every number of the study's own analysis, to be held against ours (`stats.agreement`). Demands its analysis
files; copies none of them into our tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.published.files import COMPILED, CORRELATIONS, FILTERED, count, number, read_json, table, word
from leakfast.published.marker import LAYER

_STORED = dict.fromkeys(("file", "quantity", "source", "category", "subset"), pl.String)
_STORED |= {"layer": pl.Int32, "stored": pl.Float64}


def read_stored(folder: str | Path) -> pl.DataFrame:
    """Every number of the study's own analysis files, one a row: file, quantity, source (`pooled` for all),
    category, subset (all, related), layer, stored. Rows that the study left NaN are dropped, their n stays.

    Reads what is there of `cosine_leakage_correlation.json`, `cosine_leakage_filtered.json`,
    `compiled_analysis.json` and `{source}/summary.json`; an empty frame if nothing is."""
    folder = Path(folder)
    rows = [
        {**key, "quantity": name, "stored": stored}
        for key, values in _stored_values(folder)
        for name, value in values.items()
        if (stored := number(value, f"{name} of {key['source']}", folder / key["file"])) is not None
    ]
    return pl.DataFrame(rows, schema=_STORED)


def _stored_values(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    def key(file: str, source: str, category=None, layer=None, subset="all") -> dict[str, Any]:
        return {"file": file, "source": source, "category": category, "layer": layer, "subset": subset}

    names = {"n_pairs": "n", "n": "n", "spearman_rho": "spearman", "rho": "spearman", "pearson_r": "pearson"}
    names |= {"spearman_p": "spearman_p_t", "p": "spearman_p_t", "pearson_p": "pearson_p"}

    def told(values: Any, what: str, file: Path) -> dict[str, Any]:
        return {names[name]: value for name, value in table(values, what, file).items() if name in names}

    file = folder / CORRELATIONS
    for entry, block in read_json(file, {}).items():
        if found := LAYER.fullmatch(entry):
            layer, block = int(found.group(1)), table(block, entry, file)
            inside = table(block.get("_per_category", {}), f"{entry}._per_category", file)
            for category, values in inside.items():
                yield key(CORRELATIONS, "pooled", category, layer), told(values, category, file)
            for source, values in block.items():
                if source == "_aggregate" or not source.startswith("_"):
                    name = source.replace("_aggregate", "pooled")
                    yield key(CORRELATIONS, name, None, layer), told(values, source, file)
    file = folder / FILTERED
    if filtered := read_json(file, {}):
        layer = filtered.get("layer")
        layer = None if layer is None else count(layer, "layer", file)
        for block, subset in (("pooled", "all"), ("related_only", "related")):
            for category, values in table(filtered.get(block, {}), block, file).items():
                yield key(FILTERED, "pooled", category, layer, subset), told(values, category, file)
        for block, subset in (("_aggregate_pooled", "all"), ("_aggregate_related", "related")):
            yield key(FILTERED, "pooled", None, layer, subset), told(filtered.get(block, {}), block, file)
    file = folder / COMPILED
    compiled = table(read_json(file, {}).get("per_category", {}), "per_category", file)
    for source, categories in compiled.items():
        for category, values in table(categories, source, file).items():
            values = table(values, f"{source}.{category}", file)
            wanted = {name: values[name] for name in ("mean", "max", "min", "std", "n") if name in values}
            yield key(COMPILED, source, category), {f"rate_{name}": v for name, v in wanted.items()}
    for file in sorted(folder.glob("*/summary.json")):
        values, wanted = read_json(file), ("source_marker", "mean_bystander", "max_bystander", "n_personas")
        source = word(values.get("source", file.parent.name), "source", file)
        yield key(f"{file.parent.name}/summary.json", source), {n: values[n] for n in wanted if n in values}
