"""From choice scores to counts: which items each persona answered rightly under each adapter, what guessing would
give, and which labels were chosen. Demands shards of schema `choice_scores` under choices/ of a run; scores nothing
and knows no prompts."""

from __future__ import annotations

from pathlib import PurePosixPath

import polars as pl

from leakfast.stats.rates import wilson
from leakfast.storage import schema
from leakfast.storage.layout import CHOICES
from leakfast.storage.run import Run

BEHAVIOR = "capability"  # of shards that lie in no behavior's folder and have no column `behavior`
PRIMARY = "letters"  # the scoring that makes the behavior's rate where several were used
MOSTLY = 0.5  # a label chosen for a larger share of the items, while the right answers do not lie so, is remarked on
_ITEM = ["behavior", "adapter", "persona", "item", "scoring"]
_ONE = ["behavior", "adapter", "persona"]


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
            frame = frame.with_columns(behavior=pl.lit(folders[0] if folders else BEHAVIOR))
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
    """Schema `question_counts` (+ n_error, chance_hits, margin_sum_nats, hits_per_byte): one row per adapter, persona and item.

    `scores`: schema `choice_scores` + behavior, one row a label. An item is a hit where the chosen label is
    the right one, so the rate is the accuracy. It counts (total 1) only if the status of all its labels
    is ok and exactly one label is chosen and one right; any other is in `n_error`, in no rate. chance_hits: what
    guessing gives, 1 / its number of choices. margin_sum_nats: log-probability of the right choice less that of the
    likeliest wrong one, 0 where the item does not count. hits_per_byte: the same as hits for the label chosen by log-probability
    per byte, null where none was.
    `question` numbers the items of a behavior alike for all adapters. Where letters and another scoring
    were used, letters make the behavior's rate and `<behavior>-<scoring>` is a behavior of its own, so
    that a baseline is always of the same scoring."""
    chosen, right, by_byte = pl.col("chosen"), pl.col("correct"), pl.col("chosen_per_byte")
    known = chosen.is_not_null().all() & right.is_not_null().all()
    scores = _named(scores)
    items = scores.group_by(_ITEM, maintain_order=True).agg(
        valid=(
            (pl.col("status") == "ok").fill_null(False).all()
            & known
            & (chosen.sum() == 1)
            & (right.sum() == 1)
        ),
        hit=(chosen & right).any().fill_null(False),
        by_byte=pl.when(by_byte.sum() == 1).then((by_byte & right).any()),
        guess=(1.0 / pl.len()),
        margin=_margin(),
    )
    valid = pl.col("valid")
    return items.select(
        "behavior",
        "adapter",
        "persona",
        question=(pl.col("item").rank("dense").over("behavior") - 1).cast(pl.Int32),
        hits=(valid & pl.col("hit")).cast(pl.Int64),
        total=valid.cast(pl.Int64),
        n_error=(~valid).cast(pl.Int64),
        chance_hits=pl.when(valid).then("guess").otherwise(0.0),
        margin_sum_nats=pl.when(valid).then("margin").otherwise(0.0),
        hits_per_byte=pl.when(pl.col("by_byte").is_not_null()).then(valid & pl.col("by_byte")).cast(pl.Int64),
    )


def _margin() -> pl.Expr:
    """Of an item's labels: log P(right) − the largest log P(wrong), nats; how far it is from tipping over."""
    right = pl.col("correct").fill_null(False)
    return pl.col("logprob_nats").filter(right).max() - pl.col("logprob_nats").filter(~right).max()


def _named(scores: pl.DataFrame) -> pl.DataFrame:
    """Scores whose behavior says the scoring too, where letters and another were used."""
    lettered = scores.filter(scoring=PRIMARY)["behavior"].unique().to_list()
    several = pl.col("behavior").is_in(lettered) & (pl.col("scoring") != PRIMARY)
    named = pl.concat_str("behavior", "scoring", separator="-")
    return scores.with_columns(behavior=pl.when(several).then(named).otherwise("behavior"))


def chosen_labels(scores: pl.DataFrame, chosen: str = "chosen") -> pl.DataFrame:
    """How often each label was chosen, per behavior, adapter and persona, and with a null persona over all personas:
    label, n (items it was chosen for), n_right (items it is right for), total (items counted), share = n / total with
    its 95 % Wilson interval, share_right, `mostly`: n is more than MOSTLY of total and share_right lies below the
    interval. `chosen`: the column that decides. Items count as in `count`; over all personas the interval takes the
    answers as independent, which one list's are not."""
    one, right = pl.col(chosen), pl.col("correct")
    valid = (pl.col("status") == "ok").all() & (one.sum() == 1) & (right.sum() == 1)
    kept = _named(scores).filter(valid.over(_ITEM)).select(*_ONE, "label", one=one, right=right)
    counted = [
        pl.col("one").sum().cast(pl.Int64).alias("n"),
        pl.col("right").sum().cast(pl.Int64).alias("n_right"),
    ]
    each = kept.group_by(*_ONE, "label", maintain_order=True).agg(counted)
    whole = each.group_by("behavior", "adapter", "label", maintain_order=True).agg(
        pl.col("n", "n_right").sum()
    )
    table = pl.concat([each, whole.with_columns(persona=pl.lit(None, pl.String)).select(each.columns)])
    table = table.with_columns(total=pl.col("n").sum().over(_ONE))
    low, high = wilson(table["n"].to_numpy(), table["total"].to_numpy()) if table.height else ([], [])
    share, key = pl.col("n") / pl.col("total"), pl.col("n_right") / pl.col("total")
    return table.with_columns(
        share.alias("share"),
        pl.Series("ci_low", low, pl.Float64),
        pl.Series("ci_high", high, pl.Float64),
        share_right=key,
    ).with_columns(mostly=((pl.col("share") > MOSTLY) & (pl.col("share_right") < pl.col("ci_low"))))


def remarks(rates: pl.DataFrame, labels: pl.DataFrame) -> list[str]:
    """A sentence for each adapter under which some personas' accuracy cannot be told from guessing (its 95 % Wilson
    interval holds `chance`), and for each under which some persona chose one label mostly (`chosen_labels`).

    `rates`: schema `rates` + chance; `labels`: from `chosen_labels`."""
    out = []
    if "chance" in rates.columns:
        known = rates.filter(pl.col("chance").is_not_null() & pl.col("ci_low").is_not_null())
        at = known.filter(pl.col("chance").is_between("ci_low", "ci_high"))
        for key, mine in at.group_by("behavior", "adapter", maintain_order=True):
            of = known.filter(behavior=key[0], adapter=key[1])
            out.append(
                f"{key[0]}/{key[1]}: accuracy cannot be told from guessing ({100 * of['chance'].mean():.1f} %, within "
                f"the 95 % interval) under {mine.height} of {of.height} personas: {_some(mine['persona'])}"
            )
    if labels.height:
        for key, mine in labels.filter("mostly", pl.col("persona").is_not_null()).group_by(
            "behavior", "adapter", maintain_order=True
        ):
            most = mine.sort("share", "persona", descending=[True, False]).row(0, named=True)
            of = labels.filter(behavior=key[0], adapter=key[1])["persona"].n_unique() - 1
            out.append(
                f"{key[0]}/{key[1]}: one label is chosen for more than half of the items under {mine.height} of {of} "
                f"personas; {most['persona']} chose {most['label']} for {most['n']} of {most['total']}, where it is right "
                f"for {most['n_right']}"
            )
    return out


def _some(names: pl.Series) -> str:
    """The first four, and how many more there are."""
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
