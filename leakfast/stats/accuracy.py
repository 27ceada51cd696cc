"""From choice scores to counts: which items each persona answered rightly under each adapter. Demands
shards of schema `choice_scores` under choices/ of a run; scores nothing and knows no prompts."""

from __future__ import annotations

from pathlib import PurePosixPath

import polars as pl

from leakfast import schema
from leakfast.stats.rates import BASE
from leakfast.store import Run

CHOICES = "choices"  # choices/*.parquet, or choices/<behavior>/<adapter>/*.parquet
BEHAVIOR = "capability"  # of shards that lie in no behavior's folder and have no column `behavior`
PRIMARY = "letters"  # the scoring that makes the behavior's rate where several were used
_ITEM = ["behavior", "adapter", "persona", "item", "scoring"]


def read(run: Run) -> pl.DataFrame | None:
    """All choice scores of a run with their behavior, or None where there are none.

    Raises ValueError for a shard of another shape, or a label of an item that stands twice."""
    frames = []
    for path in run.shards(CHOICES):
        frame = run.read(path)
        try:
            schema.check(frame, "choice_scores")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        folders = PurePosixPath(path).parts[1:-1]
        if "behavior" not in frame.columns:
            frame = frame.with_columns(pl.lit(folders[0] if folders else BEHAVIOR).alias("behavior"))
        frames.append(frame)
    if not frames:
        return None
    scores = pl.concat(frames, how="diagonal_relaxed")  # a source that is null in all rows has no type
    twice = scores.select(*_ITEM, "label").is_duplicated()
    if twice.any():
        row = scores.filter(twice).row(0, named=True)
        raise ValueError(
            f"label {row['label']} of item {row['item']} stands twice for adapter {row['adapter']}, "
            f"persona {row['persona']}, {row['scoring']}"
        )
    return scores


def count(scores: pl.DataFrame) -> pl.DataFrame:
    """Schema `question_counts` (+ n_error, hits_per_byte): one row per adapter, persona and item.

    `scores`: schema `choice_scores` + behavior, one row a label. An item is a hit where the chosen label is
    the right one, so the rate is the accuracy. It counts (total 1) only if the status of all its labels
    is ok and exactly one label is chosen and one right; any other is in `n_error`, in no rate.
    hits_per_byte: the same for the label chosen by log-probability per byte, null where none was.
    `question` numbers the items of a behavior alike for all adapters. Where letters and another scoring
    were used, letters make the behavior's rate and `<behavior>-<scoring>` is a behavior of its own, so
    that a baseline is always of the same scoring."""
    lettered = scores.filter(pl.col("scoring") == PRIMARY)["behavior"].unique()
    chosen, right, by_byte = pl.col("chosen"), pl.col("correct"), pl.col("chosen_per_byte")
    known = chosen.is_not_null().all() & right.is_not_null().all()
    items = scores.group_by(_ITEM, maintain_order=True).agg(
        ((pl.col("status") == "ok").fill_null(False).all() & known & (chosen.sum() == 1) & (right.sum() == 1))
        .alias("valid"),
        (chosen & right).any().fill_null(False).alias("hit"),
        pl.when(by_byte.sum() == 1).then((by_byte & right).any()).alias("by_byte"),
    )  # fmt: skip
    several = pl.col("behavior").is_in(lettered.to_list()) & (pl.col("scoring") != PRIMARY)
    named = pl.concat_str("behavior", "scoring", separator="-")
    items = items.with_columns(pl.when(several).then(named).otherwise("behavior").alias("behavior"))
    valid = pl.col("valid")
    return items.select(
        "behavior", "adapter", "persona",
        (pl.col("item").rank("dense").over("behavior") - 1).cast(pl.Int32).alias("question"),
        (valid & pl.col("hit")).cast(pl.Int64).alias("hits"),
        valid.cast(pl.Int64).alias("total"),
        (~valid).cast(pl.Int64).alias("n_error"),
        pl.when(pl.col("by_byte").is_not_null()).then(valid & pl.col("by_byte")).cast(pl.Int64)
        .alias("hits_per_byte"),
    )  # fmt: skip


def unlike(counts: pl.DataFrame) -> list[str]:
    """A sentence for each adapter that was not asked the very items that the unadapted model was asked:
    its change of accuracy is then not of one set of items."""
    asked = {
        key: set(group["question"])
        for key, group in counts.group_by("behavior", "adapter", maintain_order=True)
    }
    out = []
    for (behavior, adapter), items in asked.items():
        base = asked.get((behavior, BASE))
        if adapter != BASE and base is not None and base != items:
            out.append(
                f"{behavior}/{adapter}: {len(items - base)} items that the unadapted model was not asked, "
                f"{len(base - items)} the other way round; its delta mixes the two sets"
            )
    return out
