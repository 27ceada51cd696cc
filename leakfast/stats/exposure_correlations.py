"""Is it the cosine, or how much there was to read? ρ of cosine and leakage with reply length, prompt length and edit
distance taken out, and ρ with rates that length cannot move. Demands pairs and the table `exposure`; decides nothing."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.stats.confounds import by_adapter, partial_cells
from leakfast.stats.correlations import COSINES, POOLED, YS

LENGTH = "reply_tokens"  # the control whose ρ stands beside the headline
# control → columns that are taken out
CONTROLS = {
    "none": (),
    LENGTH: (LENGTH,),
    "base_tokens": ("base_tokens",),
    "prompt_length": ("prompt_length",),
    "edit_distance": ("edit_distance",),
    "all": (LENGTH, "prompt_length", "edit_distance"),
}
# y → column of `exposure`; set against the cosine as it is
ADJUSTED = {
    "hazard": "hazard_per_100_tokens",
    "standardized": "standardized_rate",
    "logistic": "logistic_rate",
}
_KEY = ["behavior", "adapter", "persona"]
_AT_MARKER = "replies end at the marker, so their length is part of what is measured"


def correlated(pairs: pl.DataFrame, exposure: pl.DataFrame) -> pl.DataFrame:
    """ρ per behavior, training seed, source and pooled over sources, layer, cosine, y and control.

    y rate or delta: `control` is taken out of the ranks of both sides (`confounds.partial_spearman`); `none` is plain ρ.
    reply_tokens: mean tokens of the persona's replies under the adapter; base_tokens: the same under the unadapted
    model, which no behavior has lengthened; prompt_length: mean prompt tokens where they were kept, else characters of
    the system prompt (`prompt_length_in`); edit_distance: of the bystander's system prompt to the source's; all: reply
    tokens, prompt length and edit distance. y hazard, standardized, logistic: the rates of `exposure`, control none.

    Estimand: rank association over the bystanders, pooled of ranks within each source. p and the 95 % interval take pairs
    as independent draws, pooled ones too, where a persona stands once a source: there they are too good. No rows for
    adapters without exposure."""
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    measured = exposure.select("behavior", "adapter").unique()
    here = pairs.join(measured, on=["behavior", "adapter"], how="semi")
    if here.is_empty():
        return pl.DataFrame(schema=_COLUMNS)
    whole = here.join(_controls(exposure), on=_KEY, how="left", maintain_order="left")
    each = [name for name in COSINES if whole[f"cosine_{name}"].null_count() < whole.height]
    rows = [row for cosine in each for one in by_adapter(whole, cosine) for row in _rows(one, cosine)]
    rows += [
        row for cosine in each for one in by_adapter(_as_one(whole), cosine) for row in _rows(one, cosine)
    ]
    return pl.DataFrame(rows, schema=_COLUMNS)


_COLUMNS = {"behavior": pl.String, "seed": pl.Int64, "source": pl.String, "adapter": pl.String}
_COLUMNS |= {"layer": pl.Int32, "cosine": pl.String, "y": pl.String, "control": pl.String}
_COLUMNS |= {"n": pl.Int64, "controls": pl.Int64}
_COLUMNS |= dict.fromkeys(("partial", "low", "high", "p_t"), pl.Float64)
_COLUMNS |= dict.fromkeys(("prompt_length_in", "reason", "method"), pl.String)


def _controls(exposure: pl.DataFrame) -> pl.DataFrame:
    """behavior, adapter, persona and the columns of CONTROLS and ADJUSTED; at_marker: whether replies end there."""
    place = ["behavior", "adapter"]
    in_tokens = (pl.col("prompt_tokens").is_not_null().all()).over(place)
    at_marker = (pl.col("n_at_marker") > 0).any().over(place)
    return exposure.select(
        *_KEY,
        *ADJUSTED.values(),
        "base_tokens",
        "edit_distance",
        pl.when(~at_marker).then("mean_tokens").alias(LENGTH),
        at_marker=at_marker,
        prompt_length=pl.when(in_tokens).then("prompt_tokens").otherwise(pl.col("prompt_chars")),
        prompt_length_in=pl.when(in_tokens).then(pl.lit("tokens")).otherwise(pl.lit("characters")),
    )


def _as_one(whole: pl.DataFrame) -> pl.DataFrame:
    """The same pairs as those of one adapter for each behavior and seed, `pooled`, every value as its rank within its
    own adapter ((rank − ½) / n), as in the correlations; twins: sources that stand twice."""
    key = ["behavior", "seed"]
    values = [*(f"cosine_{kind}" for kind in COSINES), *YS, *ADJUSTED.values()]
    values += list(dict.fromkeys(name for names in CONTROLS.values() for name in names))
    ranked = [
        ((pl.col(v).rank() - 0.5) / pl.col(v).count()).over("behavior", "adapter", "layer") for v in values
    ]
    whole = whole.with_columns(ranked)
    adapters = whole.select(*key, "source", "adapter").unique(maintain_order=True)
    twice = adapters.filter(pl.len().over(*key, "source") > 1)
    twins = twice.group_by(key, maintain_order=True).agg(
        twins=pl.col("source").unique(maintain_order=True).str.join(", ")
    )
    return whole.join(twins, on=key, how="left", nulls_equal=True, maintain_order="left").with_columns(
        persona=pl.concat_str("adapter", "persona", separator="\n"),
        source=pl.lit(POOLED),
        adapter=pl.lit(None, pl.String),
    )


def _rows(one, cosine: str) -> list[dict]:
    """The rows of one adapter, or of `pooled`, at every layer."""
    people, rows = one.people, []
    twins = people["twins"].drop_nulls() if "twins" in people.columns else []
    why = f"{twins[0]} has more than one adapter: a pool takes one for each source" if len(twins) else None
    values = {name: one.column(name) for name in dict.fromkeys(n for c in CONTROLS.values() for n in c)}
    units = people["prompt_length_in"].drop_nulls().unique()
    told = {**one.key, "cosine": cosine, "prompt_length_in": units[0] if len(units) == 1 else None}
    if len(units) > 1:
        values["prompt_length"] = np.full(people.height, np.nan)
    alike, cut, same = one.alike(), bool(people["at_marker"].any()), one.same()
    solved: dict[tuple, list[dict]] = {}
    cells = [(y, y, control) for y in YS for control in CONTROLS]
    cells += [(y, column, "none") for y, column in ADJUSTED.items()]
    for y_name, column, control in cells:
        y, names = one.column(column), list(CONTROLS[control])
        z = np.column_stack([values[name] for name in names]) if names else np.empty((len(y), 0))
        for which, known in alike:
            both = known & np.isfinite(y)
            key = (which.tobytes(), YS[0] if same and column in YS else column, control)
            if key not in solved:
                solved[key] = partial_cells(one.x[:, which], y, z, both, names, None)
            for j, cell in zip(which, solved[key], strict=True):
                cell = cell | {"y": y_name, "control": control, "layer": one.layers[j]}
                if why:
                    cell |= dict.fromkeys(("partial", "low", "high", "p_t")) | {"reason": why}
                elif cut and LENGTH in names:
                    cell["reason"] = _AT_MARKER
                rows.append({**told, **cell})
    return sorted(rows, key=lambda row: row["layer"])


def at(table: pl.DataFrame | None, behavior: str, y: str, cosine: str, layer: int | None) -> list[dict]:
    """Per source, and pooled last: ρ with reply length out (`partial`) at a layer; nothing without the table."""
    if table is None or layer is None:
        return []
    return table.filter(behavior=behavior, y=y, cosine=cosine, layer=layer, control=LENGTH).rows(named=True)


def sentence(rows: list[dict]) -> str | None:
    """`ρ with length out: villain +0.66, …` of `at`; None where there is none. A seed stands beside the source where
    there are several."""
    seeds = len({row["seed"] for row in rows}) > 1
    told = []
    for row in rows:
        if row["partial"] is not None:
            seed = f" (seed {row['seed']})" if seeds else ""
            told.append(f"{row['source']}{seed} {row['partial']:+.2f}")
    return f"ρ with length out: {', '.join(told)} (mean reply tokens)." if told else None
