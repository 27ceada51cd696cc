"""The published study's stored results as our tables, and a run directory made of them. Demands the
study's layout (README, "The published study"); refuses other shapes by file and key; leaves the study's own
correlations to be compared with (`stats.agreement`), never copied."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from leakfast import schema
from leakfast.errors import InputError
from leakfast.stats import CENTROIDS, PERSONAS
from leakfast.stats import rates as rate_tables
from leakfast.stats.collect import IMPORTED
from leakfast.stats.rates import BASE
from leakfast.store import Run

BEHAVIOR = "marker"
SEED = 42
CORRELATIONS = "cosine_leakage_correlation.json"
FILTERED = "cosine_leakage_filtered.json"
COMPILED = "compiled_analysis.json"
STEMS = {"cap": "capability", "arcc": "capability", "align": "misalignment"}  # of *_111.json; others as is
_LAYER = re.compile(r"layer(\d+)")
_STORED = {
    "file": pl.String,
    "quantity": pl.String,
    "source": pl.String,
    "category": pl.String,
    "subset": pl.String,  # all | related
    "layer": pl.Int32,
    "stored": pl.Float64,
}
_VALUE_KEYS = ("rate", "accuracy", "mean_aligned", "mean", "value", "score")
_HITS_KEYS = ("found", "hits", "correct", "n_correct")
_TOTAL_KEYS = ("total", "n", "n_total")


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
    """Schema `pairs` (+ `adapter`, `related`) from `cosine_leakage_correlation.json`, one row a source ×
    bystander × layer. Its cosines are the mean-centered ones, stored with four digits; `cosine_raw` and
    `delta` were not stored and are null. `related`: whether the bystander's `related_to` names the source,
    null where no `marker_eval.json` tells. Raises InputError for a file of another shape."""
    file = Path(folder) / CORRELATIONS
    stored = _read(file)
    related_to = read_people(folder)["related_to"]
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
        for name, row in _rows(_read(file), ("category",), file):
            told = list(row.get("related_to", []))
            if categories.setdefault(name, row["category"]) != row["category"]:
                raise InputError(
                    f"published: {file}: {name} has another category elsewhere. Check the files."
                )
            if related.setdefault(name, told) != told:
                raise InputError(
                    f"published: {file}: {name} is related otherwise elsewhere. Check the files."
                )
    return {"categories": categories, "related_to": related}


def read_stored(folder: str | Path) -> pl.DataFrame:
    """Every number of the study's own analysis files, one a row: file, quantity, source (`pooled` for all),
    category, subset (all, related), layer, stored. Rows that the study left NaN are dropped, their n stays.

    Reads what is there of `cosine_leakage_correlation.json`, `cosine_leakage_filtered.json`,
    `compiled_analysis.json` and `{source}/summary.json`; an empty frame if nothing is."""
    folder = Path(folder)
    rows = [
        {**key, "quantity": name, "stored": float(value)}
        for key, values in _stored_values(folder)
        for name, value in values.items()
        if not math.isnan(value)
    ]
    return pl.DataFrame(rows, schema=_STORED)


def _stored_values(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    def key(file: str, source: str, category=None, layer=None, subset="all") -> dict[str, Any]:
        return {"file": file, "source": source, "category": category, "layer": layer, "subset": subset}

    names = {"n_pairs": "n", "n": "n", "spearman_rho": "spearman", "rho": "spearman", "pearson_r": "pearson"}
    names |= {"spearman_p": "spearman_p_t", "p": "spearman_p_t", "pearson_p": "pearson_p"}

    def told(values: dict[str, Any]) -> dict[str, float]:
        return {names[name]: value for name, value in values.items() if name in names}

    for entry, block in _read(folder / CORRELATIONS, {}).items():
        if found := _LAYER.fullmatch(entry):
            layer = int(found.group(1))
            for category, values in block.get("_per_category", {}).items():
                yield key(CORRELATIONS, "pooled", category, layer), told(values)
            for source, values in block.items():
                if source == "_aggregate" or not source.startswith("_"):
                    yield key(CORRELATIONS, source.replace("_aggregate", "pooled"), None, layer), told(values)
    if filtered := _read(folder / FILTERED, {}):
        layer = filtered.get("layer")
        for block, subset in (("pooled", "all"), ("related_only", "related")):
            for category, values in filtered.get(block, {}).items():
                yield key(FILTERED, "pooled", category, layer, subset), told(values)
        for block, subset in (("_aggregate_pooled", "all"), ("_aggregate_related", "related")):
            yield key(FILTERED, "pooled", None, layer, subset), told(filtered.get(block, {}))
    for source, categories in _read(folder / COMPILED, {}).get("per_category", {}).items():
        for category, values in categories.items():
            wanted = {name: values[name] for name in ("mean", "max", "min", "std", "n") if name in values}
            yield key(COMPILED, source, category), {f"rate_{name}": v for name, v in wanted.items()}
    for file in sorted(folder.glob("*/summary.json")):
        values, wanted = _read(file), ("source_marker", "mean_bystander", "max_bystander", "n_personas")
        own = key(f"{file.parent.name}/summary.json", values.get("source", file.parent.name))
        yield own, {name: values[name] for name in wanted if name in values}


def read_centroids(folder: str | Path):
    """Centroids of `centroids_layer<N>.pt` + `persona_names.json` (in `folder` or `folder`/centroids), or
    None where there are none. Each tensor is (personas, D), float32, finite, read with weights_only.

    Raises InputError for another shape or dtype, a name that stands twice, or values that are not finite."""
    folder = Path(folder)
    files = sorted(folder.glob("centroids_layer*.pt")) or sorted(folder.glob("centroids/centroids_layer*.pt"))
    if not files:
        return None
    import torch

    from leakfast.centroids import Centroids

    personas = _read(listed := files[0].parent / "persona_names.json", kind=list)
    if len(set(personas)) != len(personas) or not all(isinstance(name, str) for name in personas):
        raise InputError(f"published: {listed} must list each persona's name once. Check the file.")
    means = {}
    for file in files:
        layer = file.stem.removeprefix("centroids_layer")
        try:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
        except (
            RuntimeError,
            ValueError,
            EOFError,
            OSError,
            torch.serialization.pickle.UnpicklingError,
        ) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"published: {file} cannot be read as a tensor ({why}). Save it again."
            ) from None
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        fits = isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and len(tensor) == len(personas)
        if not layer.isdigit() or not fits or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise InputError(
                f"published: {file} holds {shape}, but a finite float32 tensor ({len(personas)}, hidden) is "
                f"needed, one row for each name in {listed.name}. Save it again."
            )
        means[int(layer)] = tensor.numpy()
    layers = sorted(means)
    metadata = {"kind": "leakfast centroids", "personas": personas, "layers": layers, "centered_on": personas}
    return Centroids(personas, layers, metadata, means)


def read_completions(folder: str | Path) -> Iterator[tuple[str, pl.DataFrame]]:
    """(adapter, schema `completions` + source) of each `{source}/raw_completions.json`, which holds
    {persona: {question: [text, …]}}. Questions are numbered in the order of the first persona; seeds and
    lengths were not stored and are null. Raises InputError for another shape."""
    for file in sorted(Path(folder).glob("*/raw_completions.json")):
        stored = _read(file)
        shown = f"published: {file}: {{persona: {{question: [text, …]}}}} is needed"
        for persona, asked in stored.items():
            lists = asked.values() if isinstance(asked, dict) else [None]
            if not all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in lists):
                raise InputError(f"{shown}, but {persona!r} holds something else. Check the file.")
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
        columns = schema.columns("completions")
        frame = frame.with_columns(
            pl.lit(BEHAVIOR).alias("behavior"),
            pl.lit(_adapter(source := file.parent.name)).alias("adapter"),
            pl.when(pl.col("text").str.strip_chars() == "").then(pl.lit("empty")).otherwise(pl.lit("ok"))
            .alias("status"),
            *[pl.lit(None, columns[name]).alias(name) for name in ("seed", "n_tokens", "finish_reason")],
        ).with_columns(pl.col("question", "sample").cast(pl.Int32))  # fmt: skip
        frame = frame.select(*columns, pl.lit(source).alias("source"))
        yield _adapter(source), schema.check(frame, "completions")


def read_rate_tables(folder: str | Path) -> pl.DataFrame:
    """Schema `rates` (+ role) from every `<folder>/<stem>_111.json` below `folder`.

    A file maps persona → number, or persona → {one of rate, accuracy, mean_aligned, mean, value, score;
    and, where counted, found|hits|correct|n_correct beside total|n|n_total}; the mapping may stand under
    `results`, `per_persona` or `personas`. The stem names the behavior (cap, arcc: capability; align:
    misalignment; else itself); the folder the source, found in its name as `<source>_lr1e-05_ep3` or
    `<word>_<source>_<word>`; `baseline` is the unadapted model. Raises InputError for any other shape."""
    counts, adapters, people = [], {}, read_people(folder)["categories"]
    for file in sorted(Path(folder).rglob("*_111.json")):
        behavior = STEMS.get(file.stem.removesuffix("_111"), file.stem.removesuffix("_111"))
        stored = _read(file)
        stored = next((stored[k] for k in ("results", "per_persona", "personas") if k in stored), stored)
        source = _source_of(file, set(stored) | {"qwen_default"})
        adapter = BASE if source is None else _adapter(source, behavior)
        if source is not None:
            adapters[adapter] = (source, SEED)
        rows = [(name, *_measured(name, value, file)) for name, value in stored.items()]
        columns = {"persona": pl.String, "hits": pl.Int64, "total": pl.Int64, "value": pl.Float64}
        frame = pl.DataFrame(rows, schema=columns, orient="row")
        counts.append(frame.with_columns(behavior=pl.lit(behavior), adapter=pl.lit(adapter)))
    if not counts:
        return schema.empty("rates").with_columns(role=pl.lit(None, pl.String))
    whole = pl.concat(counts)
    if whole.select("behavior", "adapter", "persona").is_duplicated().any():
        raise InputError(f"published: {folder} holds two *_111.json of one behavior and source. Keep one.")
    return rate_tables.table(whole, adapters, people).drop("value")


def _measured(name: str, value: Any, file: Path) -> tuple[int | None, int | None, float]:
    """(hits, total, rate) of one entry; hits and total are null where only the rate was stored."""
    table = value if isinstance(value, dict) else {"rate": value}
    wanted = (_HITS_KEYS, _TOTAL_KEYS, _VALUE_KEYS)
    hits, total, rate = (next((table[k] for k in keys if k in table), None) for keys in wanted)
    counted = all(isinstance(v, int) and not isinstance(v, bool) for v in (hits, total)) and total > 0
    if rate is None and counted:
        rate = hits / total
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate):
        raise InputError(
            f"published: {file}: {name!r} holds {str(value)[:60]!r}; a number is needed, or an object with one "
            f"of {', '.join(_VALUE_KEYS)} (or {_HITS_KEYS[0]} and {_TOTAL_KEYS[0]}). Check the file."
        )
    counted = counted and 0 <= hits <= total and abs(hits / total - rate) < 1e-6
    return (hits, total, float(rate)) if counted else (None, None, float(rate))


def _source_of(file: Path, names: set[str]) -> str | None:
    """The source that a folder's name tells; None for the baseline."""
    words = file.parent.name
    if words.split("_")[0] in ("baseline", "base"):
        return None
    found = [name for name in names if re.search(rf"(?:^|_){re.escape(name)}(?:_|$)", words)]
    if not found:
        raise InputError(
            f"published: {file}: the folder {words!r} names neither a persona of the file nor `baseline`. "
            "Rename it to <source>_lr<rate>_ep<epochs>."
        )
    return max(found, key=len)


def import_run(folder: str | Path, out: str | Path) -> Run:
    """Write the study's results `folder` into the run directory `out`; `leakfast stats` then works on it.

    Takes what is there of: `{source}/marker_eval.json`, `*_111.json`, `cosine_leakage_correlation.json`,
    `centroids_layer*.pt`, `{source}/raw_completions.json`, and the study's own analysis (to be compared
    with). Rates and pairs go to imported/*.parquet, completions and centroids where our own runs have
    theirs. Raises InputError where there is nothing to import or a file has another shape."""
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
        if (folder / CORRELATIONS).is_file():
            run.add_shard(f"{IMPORTED}/pairs.parquet", read_pairs(folder))
        run.add_shard(f"{IMPORTED}/published.parquet", read_stored(folder))
        if centroids is not None:
            run.add_file(CENTROIDS, centroids.save)
        for adapter, frame in completions.items():
            run.add_shard(f"completions/{BEHAVIOR}/{adapter}/part-00000.parquet", frame)
        run.log("imported", folder=folder.name, study="published")
    return run


def _adapter(source: str, behavior: str = BEHAVIOR) -> str:
    return f"{behavior}-{source}-s{SEED}"


def _read(file: Path, otherwise: Any = None, kind: type = dict) -> Any:
    """The JSON object (or list) in a file; `otherwise`, if given, where there is no such file."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise is not None:
            return otherwise
        raise InputError(f"published: {file} does not exist. Give the study's results folder.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"published: {file} is not JSON (line {error.lineno}). Fetch it again.") from None
    if not isinstance(stored, kind):
        needed = "object" if kind is dict else "list"
        raise InputError(f"published: {file} is not a JSON {needed}. Give the study's results folder.")
    return stored


def _rows(stored: dict[str, Any], needed: tuple[str, ...], file: Path):
    for name, row in stored.items():
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing or not isinstance(name, str):
            raise InputError(f"published: {file}: {name!r} lacks {', '.join(missing)}. Check the file.")
        yield name, row
