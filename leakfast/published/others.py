"""The study's other stores: centroids as .pt tensors, and rate tables of other behaviors. Demands the shapes
told at each function; the only place that reads .pt files, with weights_only."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.errors import InputError
from leakfast.published.files import SEED, adapter_name, read_json
from leakfast.published.marker import ROUNDED, read_people
from leakfast.stats import rates as rate_tables
from leakfast.stats import summary
from leakfast.stats.rates import BASE
from leakfast.storage import schema

STEMS = {"cap": "capability", "arcc": "capability", "align": "misalignment"}  # of *_111.json; others as is
_VALUE_KEYS = ("rate", "accuracy", "mean_aligned", "mean", "value", "score")
_HITS_KEYS = ("found", "hits", "correct", "n_correct")
_UNREADABLE = (RuntimeError, ValueError, EOFError, OSError)
_TOTAL_KEYS = ("total", "n", "n_total")


def read_centroids(folder: str | Path):
    """Centroids of `centroids_layer<N>.pt` + `persona_names.json` (in `folder` or `folder`/centroids), or
    None where there are none. Each tensor is (personas, D), float32, finite, read with weights_only.

    Raises InputError for another shape or dtype, a name that stands twice, or values that are not finite."""
    folder = Path(folder)
    files = sorted(folder.glob("centroids_layer*.pt")) or sorted(folder.glob("centroids/centroids_layer*.pt"))
    if not files:
        return None
    import torch

    from leakfast.geometry import Centroids

    personas = read_json(listed := files[0].parent / "persona_names.json", kind=list)
    if len(set(personas)) != len(personas) or not all(isinstance(name, str) for name in personas):
        raise InputError(f"published: {listed} must list each persona's name once. Check the file.")
    means = {}
    for file in files:
        layer = file.stem.removeprefix("centroids_layer")
        try:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
        except (*_UNREADABLE, torch.serialization.pickle.UnpicklingError) as error:
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


def read_rate_tables(folder: str | Path) -> pl.DataFrame:
    """Schema `rates` (+ role) from every `<folder>/<stem>_111.json` below `folder`.

    A file maps persona → number, or persona → {one of rate, accuracy, mean_aligned, mean, value, score;
    and, where counted, found|hits|correct|n_correct beside total|n|n_total}; the mapping may stand under
    `results`, `per_persona` or `personas`. The stem names the behavior (cap, arcc: capability; align:
    misalignment; else itself); the folder the source, found in its name as `<source>_lr1e-05_ep3` or
    `<word>_<source>_<word>`; `baseline` is the unadapted model. Raises InputError for any other
    shape, and for shares in percent."""
    counts, adapters, people = [], {}, read_people(folder)["categories"]
    for file in sorted(Path(folder).rglob("*_111.json")):
        behavior = STEMS.get(file.stem.removesuffix("_111"), file.stem.removesuffix("_111"))
        stored = read_json(file)
        stored = next((stored[k] for k in ("results", "per_persona", "personas") if k in stored), stored)
        source = _source_of(file, set(stored) | {"qwen_default"})
        adapter = BASE if source is None else adapter_name(source, behavior)
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
    made = rate_tables.table(whole, adapters, people).drop("value")
    for behavior in made["behavior"].unique(maintain_order=True):
        off = made.filter(~pl.col("rate").is_between(0, 1), behavior=behavior)
        if off.height and summary.unit(made, behavior) == "share":
            raise InputError(
                f"published: {folder}: {behavior} of {off['persona'][0]} is {off['rate'][0]:g}, but it is a share, from 0 to 1. "
                "Divide that file's numbers by 100."
            )
    return made


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
    counted = counted and 0 <= hits <= total and abs(hits / total - rate) <= ROUNDED
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
