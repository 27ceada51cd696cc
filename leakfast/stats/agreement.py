"""The published numbers beside ours: each value the study stored, the one recomputed from its data, and
whether they agree. Demands what `published.read_stored` returns; explains no difference away."""

from __future__ import annotations

import polars as pl

# quantity → (how it is compared, how far it may be off): the stored cosines have four digits, so ties
# differ, and with them ρ in the third digit and a small p by some percent
TOLERANCES = {
    "n": ("absolute", 0.0),
    "rate_n": ("absolute", 0.0),
    "n_personas": ("absolute", 0.0),
    "spearman": ("absolute", 2e-3),
    "pearson": ("absolute", 1e-3),
    "spearman_p_t": ("relative", 0.15),
    "pearson_p": ("relative", 0.15),
}
_OTHERS = ("absolute", 1e-9)  # rates: stored in full
_KEY = ["source", "category", "layer", "subset", "quantity"]
_PLAIN = {
    "spearman": "spearman_plain",
    "spearman_p_t": "spearman_plain_p_t",
    "pearson": "pearson_plain",
    "pearson_p": "pearson_plain_p",
}
_VALUES = ("n", "spearman", "spearman_p_t", "pearson", "pearson_p")


def compare(
    stored: pl.DataFrame,
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    related: pl.DataFrame,
    behavior: str,
) -> pl.DataFrame:
    """`stored` + found, difference, tolerance, agrees (null, with a reason, where nothing was recomputed).

    Correlations are those of centered cosine and rate; `related`: the same table over the bystanders
    whose `related_to` names the source. A stored n of 0 agrees with the absence of rows."""
    found = pl.concat(
        [
            _from_correlations(correlations, "all", behavior),
            _from_correlations(related, "related", behavior),
            _from_rates(rates.filter(behavior=behavior)),
        ]
    )
    joined = stored.join(found, on=_KEY, how="left", nulls_equal=True, maintain_order="left").with_columns(
        pl.when(pl.col("quantity") == "n").then(pl.col("found").fill_null(0)).otherwise(pl.col("found"))
    )
    kinds = {name: kind for name, (kind, _) in TOLERANCES.items()}
    bounds = {name: bound for name, (_, bound) in TOLERANCES.items()}
    relative = pl.col("quantity").replace_strict(kinds, default=_OTHERS[0]) == "relative"
    apart = (pl.col("found") - pl.col("stored")).abs()
    return joined.with_columns(
        difference=pl.when(relative).then(apart / pl.col("stored")).otherwise(apart),
        compared=pl.when(relative).then(pl.lit("relative")).otherwise(pl.lit("absolute")),
        tolerance=pl.col("quantity").replace_strict(bounds, default=_OTHERS[1]),
    ).with_columns(
        agrees=(pl.col("difference") <= pl.col("tolerance")),
        reason=pl.when(pl.col("found").is_null()).then(pl.lit("not recomputable from what was imported")),
    )


def _from_correlations(table: pl.DataFrame, subset: str, behavior: str) -> pl.DataFrame:
    rows = table.filter(behavior=behavior, cosine="centered", y="rate")
    # what the study pooled are all pairs, as they are
    rows = rows.with_columns(pl.coalesce(plain, name).alias(name) for name, plain in _PLAIN.items())
    long = rows.with_columns(pl.col("n").cast(pl.Float64)).unpivot(
        _VALUES, index=["source", "category", "layer"], variable_name="quantity", value_name="found"
    )
    return long.with_columns(subset=pl.lit(subset)).select(*_KEY, "found")


def _from_rates(rates: pl.DataFrame) -> pl.DataFrame:
    """What `compiled_analysis.json` and `summary.json` tell: rates of the source and of its bystanders."""
    others, value = rates.filter(role="bystander"), pl.col("rate")
    inside = others.group_by("source", "category", maintain_order=True).agg(
        rate_mean=value.mean(),
        rate_max=value.max(),
        rate_min=value.min(),
        rate_std=value.std(ddof=0),
        rate_n=pl.len().cast(pl.Float64),
    )
    whole = others.group_by("source", maintain_order=True).agg(
        mean_bystander=value.mean(), max_bystander=value.max(), n_personas=(pl.len() + 1).cast(pl.Float64)
    )
    own = rates.filter(role="source").select("source", source_marker=value)
    whole = whole.join(own, on="source", how="left").with_columns(category=pl.lit(None, pl.String))
    long = [
        frame.unpivot(index=["source", "category"], variable_name="quantity", value_name="found")
        for frame in (inside, whole)
    ]
    return (
        pl.concat(long)
        .with_columns(subset=pl.lit("all"), layer=pl.lit(None, pl.Int32))
        .select(*_KEY, "found")
    )
