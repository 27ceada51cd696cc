"""A run's tables against what they rest on: whether they are of these measurements, and whether the measurements give the same
rates and pairs now. Demands a run that is only read; draws nothing."""

from __future__ import annotations

import polars as pl

from leakfast.errors import LeakfastError
from leakfast.pipeline.checks.contract import Check
from leakfast.stats.collect import collect, inputs_hash
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun
from leakfast.version import __version__

TOLERANCE = 1e-9  # of floats, absolute and relative: sums in another order
_COSINE = 1e-6  # float32 products
_TABLES = {
    "rates": (("behavior", "adapter", "persona"), ("hits", "total", "rate", "baseline", "delta"), TOLERANCE),
    "pairs": (
        ("behavior", "adapter", "persona", "layer"),
        ("cosine_raw", "cosine_centered", "rate"),
        _COSINE,
    ),
}


def check(run: ReadOnlyRun) -> Check:
    """tables/rates and tables/pairs, row by row, against the ones that completions, scores, judgements and centroids give."""
    told = Check("tables", "rows of rates and pairs")
    stage = run.manifest["stages"].get("stats")
    if stage is None:
        told.notes.append(f"there are none yet; `leakfast stats {run.path}` makes them")
        return told
    if stage["inputs"] != inputs_hash(run):
        told.wrong.append(
            f"tables/: are older than what they rest on; `leakfast stats {run.path}` makes them anew"
        )
    by = stage["outputs"].get("leakfast")
    if by != __version__:
        told.notes.append(f"they were made by leakfast {by or 'of no known version'}, this is {__version__}")
    try:
        found = collect(run)
    except LeakfastError as error:
        told.wrong.append(f"tables/: cannot be made again: {error.message}")
        return told
    for name, (keys, values, tolerance) in _TABLES.items():
        if not run.has(layout.table(name)):
            told.wrong.append(f"{layout.table(name)}: is not there")
            continue
        kept = pl.read_parquet(run.path / layout.table(name), glob=False)
        _compare(name, kept, getattr(found, name), keys, values, tolerance, told)
    return told


def _compare(
    name: str,
    kept: pl.DataFrame,
    made: pl.DataFrame,
    keys: tuple[str, ...],
    values: tuple[str, ...],
    tolerance: float,
    told: Check,
) -> None:
    if not kept.height and not made.height:
        return
    values = tuple(value for value in values if value in kept.columns and value in made.columns)
    on = list(keys)
    both = kept.select(*on, *values).join(made.select(*on, *values), on=on, how="inner", suffix="_now")
    told.checked += both.height
    apart = max(kept.height, made.height) - both.height
    if apart:
        told.wrong.append(f"{layout.table(name)}: {apart} rows are not those that the measurements give now")
    same = pl.all_horizontal(_same(value, tolerance) for value in values)
    for row in both.filter(~same).head(3).rows(named=True):
        value = next(v for v in values if not _alike(row[v], row[f"{v}_now"], tolerance))
        where = ", ".join(str(row[key]) for key in on)
        told.wrong.append(
            f"{layout.table(name)}: {value} of {where} is {row[value]}, but the measurements give {row[f'{value}_now']}"
        )
    n = both.filter(~same).height
    if n > 3:
        told.wrong.append(f"{layout.table(name)}: {n - 3} more rows differ from what the measurements give")


def _same(value: str, tolerance: float) -> pl.Expr:
    one, other = pl.col(value).cast(pl.Float64), pl.col(f"{value}_now").cast(pl.Float64)
    near = (one - other).abs() <= tolerance * pl.max_horizontal(pl.lit(1.0), one.abs())
    return pl.when(one.is_null() | other.is_null()).then(one.is_null() & other.is_null()).otherwise(near)


def _alike(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= tolerance * max(1.0, abs(one))
