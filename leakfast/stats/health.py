"""Whether an adapter left the model able to reply: empty, cut, repeated and far too short or long replies, against the
unadapted model's. Demands frames of schema `completions`; every threshold stands here. Leaves choices to others, and
what a verdict does to other tables to `stats.marks`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import polars as pl

from leakfast import behaviors
from leakfast.stats import replies
from leakfast.stats.rates import BASE, COUNTED
from leakfast.storage import schema
from leakfast.storage.run import Run

OK, WARNING, DAMAGED = "ok", "warning", "damaged"
ORDER = (OK, WARNING, DAMAGED)  # from the best to the worst

# shares are of an adapter's completions; "above" is against the unadapted model's share under the same personas
EMPTY_WARNING = 0.05
CUT_WARNING = 0.10  # truncated, or of a further status, each apart
LENGTH_WARNING = 0.5  # mean tokens over the unadapted model's: this far from 1
REPEATED_WARNING = 0.10  # above
SAME_WARNING = 0.50  # replies that other questions got word for word; above
EMPTY_DAMAGE = 0.30
CUT_DAMAGE = 0.30  # above
MIN_COMPLETIONS = 10  # fewer of one persona are no ground for a verdict about it
_NEAR = 1e-9  # 0.4 − 0.1 reaches 0.3

_SHARES = ("empty", "bare", "truncated", "other", "repeated", "same")
_KEY = ["behavior", "adapter", "persona"]


def table(frames: Iterable[pl.DataFrame], *, capped: bool = False) -> pl.DataFrame:
    """Schema `health` of completions, each frame of one behavior and adapter; the unadapted model is the adapter `base`.

    One row an adapter (persona null) and one a persona of it. Shares are over all completions drawn, whatever their
    status. n_empty: white space alone; n_bare: nothing beside the text whose presence makes the behavior's rate, as the
    marker's, which is no reply either and adds to the empty ones in every verdict; n_other: of a status beside ok,
    empty and truncated; n_repeated: `replies.repeats`; n_same: not empty, and another question got the very same text
    of that adapter, under whichever persona. base_*: the unadapted model's under the same personas, null where it was
    not measured. mean_tokens, median_tokens: over all.

    length_ratio: mean tokens over the unadapted model's, over completions that ended by themselves (finish_reason
    stop), paired: over the (persona, question) that both have such completions of, the mean of the adapter's means by
    that of the base's. Where truncation is common those that ended are the short ones, and there are fewer pairs
    (length_pairs, of length_pairs_all); length_ratio_all is the same over all completions, in which a truncated one
    counts as long as it got. Verdicts read length_ratio where half of the pairs have it, else length_ratio_all.

    capped: max_new_tokens is smaller than replies are meant to have, so truncation is judged against the base's alone.
    health: ok, warning or damaged, null under MIN_COMPLETIONS of a persona; reason: why it is not ok.
    Raises ValueError for a frame of another schema."""
    by_behavior: dict[str, list[pl.DataFrame]] = {}
    for frame in frames:
        if frame.height:
            by_behavior.setdefault(str(frame["behavior"][0]), []).append(_flags(frame))
    parts = [_of_behavior(pl.concat(flagged), capped) for flagged in by_behavior.values()]
    return pl.concat(parts) if parts else schema.empty("health")


def read(run: Run, folders: Sequence[str] | None = None) -> pl.DataFrame:
    """The same of completions of a run; folders: completions/<behavior>/<adapter>, all of the main sets' by default."""
    if folders is None:
        folders = sorted({str(PurePosixPath(path).parent) for path in run.shards("completions")})
    return table(_frames(run, folders))


def _frames(run: Run, folders: Sequence[str]) -> Iterable[pl.DataFrame]:
    columns = list(schema.columns("completions"))
    for folder in folders:
        if run.shards(folder):
            yield run.scan(folder).select(columns).collect()


def _flags(frame: pl.DataFrame) -> pl.DataFrame:
    """One row a completion without its text: what is true of it. Null: not known."""
    schema.check(frame, "completions")
    empty, status = pl.col("status") == "empty", pl.col("status")
    marker = _presence(str(frame["behavior"][0]))
    rest = pl.col("text").str.replace_all(marker or "", "", literal=True).str.strip_chars()
    return frame.with_columns(repeated=replies.repeats(frame["text"])).select(
        *_KEY,
        "question",
        "n_tokens",
        (pl.col("finish_reason") == "stop").fill_null(False).alias("ended"),
        empty.alias("empty"),
        ((rest == "") & ~empty if marker else pl.lit(False)).alias("bare"),
        pl.when(pl.col("finish_reason").is_not_null() | (status == "truncated"))
        .then(status == "truncated")
        .alias("truncated"),
        (~status.is_in(COUNTED)).alias("other"),
        "repeated",
        same=(~empty & replies.same_elsewhere(pl.col("text"), pl.col("question"))),
    )


def _presence(behavior: str) -> str | None:
    """The text whose presence alone makes the behavior's rate, of one that is registered and has it."""
    return behaviors.get(behavior).presence_of if behaviors.is_known(behavior) else None


def _of_behavior(flagged: pl.DataFrame, capped: bool) -> pl.DataFrame:
    """All rows of one behavior."""
    based = flagged.filter(adapter=BASE)
    rows = []
    for over in (_KEY[:2], _KEY):
        mine = flagged.group_by(over, maintain_order=True).agg(*_summed())
        mine = mine.join(_ratios(flagged, based, over), on=over, how="left", maintain_order="left")
        own = {column: flagged.schema["persona"] for column in ("persona",) if column not in over}
        mine = mine.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in own.items())
        rows.append(mine)
    whole = pl.concat(rows, how="diagonal")
    shares = [(pl.col(f"n_{name}") / pl.col("n")).alias(f"{name}_share") for name in _SHARES]
    whole = whole.with_columns(shares)
    whole = whole.join(_of_base(flagged, based), on=_KEY, how="left", nulls_equal=True, maintain_order="left")
    whole = _judged(whole, capped)
    names = list(schema.columns("health"))
    return schema.check(
        whole.select(pl.col(n).cast(t) for n, t in schema.columns("health").items()), "health"
    )[names]


def _summed() -> list[pl.Expr]:
    counts = [
        pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum()).cast(pl.Int64).alias(f"n_{name}")
        for name in _SHARES
    ]
    tokens = pl.col("n_tokens").cast(pl.Float64)
    return [
        pl.len().cast(pl.Int64).alias("n"),
        *counts,
        tokens.mean().alias("mean_tokens"),
        tokens.median().alias("median_tokens"),
    ]


def _of_base(flagged: pl.DataFrame, based: pl.DataFrame) -> pl.DataFrame:
    """behavior, adapter, persona, base_*_share: the unadapted model's, under the personas that the adapter has."""
    shares = {f"base_{name}_share": pl.Float64 for name in _SHARES}
    if based.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(_KEY, pl.String) | shares)
    each = flagged.filter(pl.col("adapter") != BASE).select(_KEY).unique(maintain_order=True)
    counts = based.group_by("persona", maintain_order=True).agg(
        pl.len().alias("n"), *(pl.col(name).sum() for name in _SHARES)
    )
    met = each.join(counts, on="persona", how="inner")
    whole = (
        met.group_by(_KEY[:2], maintain_order=True)
        .agg(pl.col("n", *_SHARES).sum())
        .with_columns(persona=pl.lit(None, pl.String))
    )
    both = pl.concat([met, whole], how="diagonal")
    return both.select(*_KEY, *[(pl.col(name) / pl.col("n")).alias(f"base_{name}_share") for name in _SHARES])


def _ratios(flagged: pl.DataFrame, based: pl.DataFrame, over: list[str]) -> pl.DataFrame:
    """length_ratio, length_ratio_all and how many (persona, question) each rests on, per `over`."""
    at = ["persona", "question"]
    tokens = pl.col("n_tokens").cast(pl.Float64)
    means = [tokens.filter(pl.col("ended")).mean().alias("ended"), tokens.mean().alias("all")]
    mine = (
        flagged.filter(pl.col("adapter") != BASE)
        .group_by("behavior", "adapter", *at, maintain_order=True)
        .agg(means)
    )
    met = mine.join(based.group_by(at, maintain_order=True).agg(means), on=at, suffix="_base")
    both = {
        name: pl.col(name).is_not_null() & pl.col(f"{name}_base").is_not_null() for name in ("ended", "all")
    }
    found = met.group_by(over, maintain_order=True).agg(
        *[
            (pl.col(n).filter(b).sum() / pl.col(f"{n}_base").filter(b).sum()).alias(f"_{n}")
            for n, b in both.items()
        ],
        length_pairs=both["ended"].sum().cast(pl.Int64),
        length_pairs_all=both["all"].sum().cast(pl.Int64),
    )
    defined = {"_ended": "length_ratio", "_all": "length_ratio_all"}
    return found.select(
        *over,
        "length_pairs",
        "length_pairs_all",
        *[pl.when(pl.col(n).is_finite()).then(pl.col(n)).alias(name) for n, name in defined.items()],
    )


def _judged(whole: pl.DataFrame, capped: bool) -> pl.DataFrame:
    """+ health, reason. An adapter is warned of too where single personas of it are damaged."""
    told = [verdict(row, capped=capped) for row in whole.rows(named=True)]
    hurt: dict[tuple[str, str], list[str]] = {}
    for row, (health, _) in zip(whole.select(_KEY).rows(), told, strict=True):
        if row[2] is not None and health == DAMAGED:
            hurt.setdefault(row[:2], []).append(row[2])
    for place, row in enumerate(whole.select(_KEY).rows()):
        names = hurt.get(row[:2], [])
        if row[2] is None and names and told[place][0] != DAMAGED:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            why = f"the replies under {shown} are damaged"
            told[place] = (WARNING, f"{told[place][1]}; {why}" if told[place][1] else why)
    return whole.with_columns(
        pl.Series("health", [health for health, _ in told], dtype=pl.String),
        pl.Series("reason", [reason for _, reason in told], dtype=pl.String),
    )


def verdict(row: dict[str, Any], *, capped: bool = False) -> tuple[str | None, str | None]:
    """(health, reason) of one row of the table by the thresholds above; reason is null for ok.

    The unadapted model itself is warned of but never damaged. An adapter as empty as the unadapted model is warned
    of: whatever it is, the adapter did not do it."""
    if row["persona"] is not None and row["n"] < MIN_COMPLETIONS:
        return None, f"{row['n']} completions; a verdict about a persona needs {MIN_COMPLETIONS}"
    base, n = row["adapter"] == BASE, row["n"]
    row = row | {f"{of}empty_share": without_content(row, of) for of in ("", "base_")}
    damaged, warned = [], []

    def told(name: str, words: str) -> str:
        theirs = row[f"base_{name}_share"]
        beside = (
            ""
            if base
            else (
                " (the unadapted model was not measured)"
                if theirs is None
                else f" (the unadapted model: {_percent(theirs)})"
            )
        )
        return f"{_percent(row[f'{name}_share'])} of {n} replies {words}{beside}"

    def above(name: str, bound: float) -> bool:
        """Whether the share lies `bound` above the base's; of an unknown base, False."""
        mine, theirs = row[f"{name}_share"], row[f"base_{name}_share"]
        return mine is not None and theirs is not None and _reaches(mine - theirs, bound)

    known = row["base_empty_share"] is not None
    if _reaches(row["empty_share"], EMPTY_WARNING):
        worse = (
            not base
            and _reaches(row["empty_share"], EMPTY_DAMAGE)
            and (not known or above("empty", EMPTY_WARNING))
        )
        words = "are empty or nothing but the marker" if row["bare_share"] else "are empty"
        (damaged if worse else warned).append(told("empty", words))
    for name, words in (
        ("truncated", "are truncated"),
        ("other", "have no end that counts (another status)"),
    ):
        if not base and above(name, CUT_DAMAGE):
            damaged.append(told(name, words))
        elif above(name, CUT_WARNING) or (not capped and _reaches(row[f"{name}_share"], CUT_WARNING)):
            warned.append(told(name, words))
    for name, words, bound in (
        ("repeated", "repeat themselves", REPEATED_WARNING),
        ("same", "are word for word the reply to another question", SAME_WARNING),
    ):
        if above(name, bound) or (not known and not base and _reaches(row[f"{name}_share"], bound)):
            warned.append(told(name, words))
    ratio = read_ratio(row)
    if ratio is not None and _reaches(abs(ratio - 1), LENGTH_WARNING):
        warned.append(f"the mean reply is {ratio:.2g} × as long as the unadapted model's")
    health = DAMAGED if damaged else WARNING if warned else OK
    return health, "; ".join(damaged + warned) or None


def read_ratio(row: dict[str, Any]) -> float | None:
    """The ratio of lengths that a verdict reads: over replies that ended by themselves where half of the pairs have
    them, else over all."""
    ended, pairs = row["length_pairs"] or 0, row["length_pairs_all"] or 0
    return row["length_ratio"] if ended and 2 * ended >= pairs else row["length_ratio_all"]


def without_content(row: dict[str, Any], of: str = "") -> float | None:
    """Share of replies without content: the empty ones and those that are nothing but the marker; of: "" or "base_"."""
    empty, bare = row[f"{of}empty_share"], row[f"{of}bare_share"]
    return None if empty is None else empty + (bare or 0.0)


def rule() -> str:
    """The thresholds in words."""
    return (
        f"A warning from {_percent(EMPTY_WARNING)} empty replies, {_percent(CUT_WARNING)} truncated ones, or a mean length "
        f"off by {_percent(LENGTH_WARNING)}; damaged from {_percent(EMPTY_DAMAGE)} empty, or a truncated share "
        f"{100 * CUT_DAMAGE:.0f} points above the unadapted model's."
    )


def sentences(health: pl.DataFrame | None) -> list[str]:
    """What is to be said first, a sentence or three for each adapter that is not ok, the damaged ones first. Where the
    unadapted model is not ok either, that comes last."""
    if health is None or health.is_empty():
        return []
    whole = health.filter(pl.col("persona").is_null() & pl.col("health").is_in([WARNING, DAMAGED]))
    rows = sorted(whole.rows(named=True), key=lambda row: (row["health"] != DAMAGED, row["adapter"] == BASE))
    several = whole["behavior"].n_unique() > 1
    return [_sentence(row, several) for row in rows]


def _sentence(row: dict[str, Any], several: bool) -> str:
    base = row["adapter"] == BASE
    name = "the unadapted model" if base else row["adapter"]
    name = f"{name} ({row['behavior']})" if several or base else name
    if row["health"] == DAMAGED:
        return (
            f"{name}: {row['reason']}. The adapter damaged the model; its rates and correlations say nothing about "
            'leakage. Train it again with a smaller lr or loss = "completion".'
        )
    what = (
        "what adapters do is measured against that" if base else "read its rates and correlations with care"
    )
    cut = _reaches(row["truncated_share"], CUT_WARNING)
    alike = base or (
        cut and not _reaches(row["truncated_share"] - (row["base_truncated_share"] or 0), CUT_WARNING)
    )
    do = (
        " Raise max_new_tokens."
        if cut and alike
        else ""
        if base
        else " Look at its replies before anything else."
    )
    return f"{name}, warning: {row['reason']}; {what}.{do}"


def worst(found: Iterable[str | None]) -> str | None:
    """The worst of several verdicts; null where none is known."""
    known = [ORDER.index(one) for one in found if one is not None]
    return ORDER[max(known)] if known else None


def _reaches(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound - _NEAR


def _percent(share: float) -> str:
    """0.7733 → 77 %; below a tenth with one digit where it is not 0."""
    return f"{100 * share:.{0 if share >= 0.1 else 1}f}".removesuffix(".0") + " %"
