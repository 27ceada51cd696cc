"""The tables of `gradients`: one fitted curve a source, one test of widths a behavior, the isotonic curve
for display. Demands pairs at the layer to look at, and rates with counts."""

from __future__ import annotations

import polars as pl

from leakfast.stats import gradients

_FITTED = ("far", "near", "midpoint", "width")
_METHOD = "beta-binomial logistic with floor and ceiling, maximum likelihood, profile intervals"


def tables(pairs: pl.DataFrame, rates: pl.DataFrame, cosine: str) -> dict[str, pl.DataFrame]:
    """`gradients`, `widths`, `isotonic` of pairs at one layer a behavior.

    gradients: far, near, midpoint, width with `_low` and `_high` (null: the likelihood does not bound that
    side, said in `interval_reason`), floor and ceiling (the lower and the higher of far and near),
    direction, overdispersion, log_likelihood. widths: likelihood-ratio statistic over the sources."""
    counts = rates.select("behavior", "adapter", "persona", "hits", "total")
    joined = pairs.join(counts, on=["behavior", "adapter", "persona"], how="left", maintain_order="left")
    rows, curves, display = [], {}, []
    keys = ["behavior", "seed", "source", "adapter", "layer"]
    for group in joined.partition_by(keys, maintain_order=True) if joined.height else []:
        key = {name: group[name][0] for name in keys} | {"cosine": cosine}
        kept = group.filter(pl.col(f"cosine_{cosine}").is_not_null() & (pl.col("total") > 0))
        if kept.is_empty():
            rows.append({**key, "n": 0, "reason": "no counts: a mean of judgements has no binomial curve"})
            continue
        data = [kept[name].to_numpy() for name in (f"cosine_{cosine}", "hits", "total")]
        curve = gradients.Curve(*data)
        found = gradients.fit_curve(curve)
        rows.append({**key, "n": kept.height, **_told(found)})
        if not isinstance(found, str):
            curves.setdefault((key["behavior"], key["seed"], key["layer"]), []).append(curve)
        x, fitted = gradients.isotonic(data[0], kept["rate"].to_numpy(), data[2])
        display.append(
            pl.DataFrame({"at": x, "fitted": fitted}).with_columns(
                *[
                    pl.lit(value, joined.schema.get(name, pl.String)).alias(name)
                    for name, value in key.items()
                ]
            )
        )
    columns = {name: pairs.schema[name] for name in keys} | {"cosine": pl.String, "n": pl.Int64}
    columns |= {f"{name}{end}": pl.Float64 for name in _FITTED for end in ("", "_low", "_high")}
    columns |= dict.fromkeys(("floor", "ceiling", "overdispersion", "log_likelihood"), pl.Float64)
    columns |= dict.fromkeys(("direction", "reason", "interval_reason", "method"), pl.String)
    return {
        "gradients": pl.DataFrame(rows, schema=columns),
        "widths": _widths(curves, pairs, cosine),
        "isotonic": pl.concat(display).select(*keys, "cosine", "at", "fitted")
        if display
        else pl.DataFrame(
            schema={**{n: columns[n] for n in [*keys, "cosine"]}, "at": pl.Float64, "fitted": pl.Float64}
        ),
    }


def _told(found: gradients.Fit | str) -> dict:
    if isinstance(found, str):
        return {"reason": found, "interval_reason": found, "method": _METHOD}
    out = {name: getattr(found, name) for name in (*_FITTED, "overdispersion", "log_likelihood")}
    for name, (low, high) in found.intervals.items():
        out |= {f"{name}_low": low, f"{name}_high": high}
    open_ends = [f"{n}_{end}" for n in _FITTED for end in ("low", "high") if out[f"{n}_{end}"] is None]
    why = f"the likelihood does not bound {', '.join(open_ends)}" if open_ends else None
    return out | {
        "floor": min(found.far, found.near),
        "ceiling": max(found.far, found.near),
        "direction": "rising" if found.near >= found.far else "falling",
        "interval_reason": why,
        "method": _METHOD,
    }


def _widths(curves: dict, pairs: pl.DataFrame, cosine: str) -> pl.DataFrame:
    rows = []
    for (behavior, seed, layer), group in curves.items():
        row = {"behavior": behavior, "seed": seed, "layer": layer, "cosine": cosine, "sources": len(group)}
        row |= {"n": sum(len(curve.cosine) for curve in group), "method": "likelihood ratio, χ²"}
        if len(group) < 2:
            rows.append({**row, "reason": "one source with a curve; widths differ between two or more"})
        else:
            rows.append(row | gradients.width_test(group))
    columns = {name: pairs.schema[name] for name in ("behavior", "seed", "layer")}
    columns |= {"cosine": pl.String, "sources": pl.Int64, "statistic": pl.Float64, "degrees": pl.Int64}
    columns |= {"p": pl.Float64, "common_width": pl.Float64, "reason": pl.String}
    columns |= {"n": pl.Int64, "method": pl.String}
    return pl.DataFrame(rows, schema=columns)
