"""What a reply looks like from its text alone: whether it repeats itself, and whether other questions got the very same
one. Demands a polars column of texts; knows no adapters and no thresholds of verdicts (`stats.health` has them)."""

from __future__ import annotations

import numpy as np
import polars as pl

N_GRAM = 4  # units in a sequence
MIN_UNITS = 16  # a shorter reply has no room to repeat itself
REPEATED = 0.5  # more than this share of its sequences stood in it before
_SIGNS_A_WORD = 20  # with more signs a word than this, signs are the units: Chinese, or a run of one sign
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64
)


def repeats(text: pl.Series) -> pl.Series:
    """Boolean per text: whether more than half of its sequences of four words are repetitions of earlier ones,

        1 − (distinct 4-grams) / (4-grams) > 0.5      (seq-rep-4 of Welleck et al. 2020)

    over words split at white space, or over signs where the text has hardly any (more than 20 signs a word). False
    below 16 units, and for null. Exact for every reply: only those are counted whose number of distinct words
    allows it (each distinct word beyond the first four ends a distinct 4-gram)."""
    plain = pl.DataFrame(
        {"_row": pl.int_range(len(text), eager=True), "text": text.fill_null("").cast(pl.String)}
    )
    for sign in "\n\t\r":
        plain = plain.with_columns(pl.col("text").str.replace_all(sign, " ", literal=True))
    words = plain.with_columns(_units=pl.col("text").str.split(" "))
    spaced = pl.col("text").str.len_chars() <= _SIGNS_A_WORD * pl.col("_units").list.len()
    dense = words.filter(~spaced).with_columns(_units=pl.col("text").str.split(""))
    flags = np.zeros(len(text), dtype=bool)
    flags[np.concatenate([_repeating(part) for part in (words.filter(spaced), dense)])] = True
    return pl.Series(text.name, flags)


def _repeating(rows: pl.DataFrame) -> np.ndarray:
    """`_row` of those that repeat themselves; rows: _row, _units (list of words or signs, with empty ones between)."""
    many = pl.col("_units").list.len()
    room = (many - (N_GRAM - 1)) * (1 - REPEATED) + N_GRAM  # the empty unit is one more
    likely = rows.filter((many >= MIN_UNITS) & (pl.col("_units").list.n_unique() < room))
    flat = likely.select("_row", "_units").explode("_units").filter(~pl.col("_units").is_in(["", " "]))
    flat = flat.filter(pl.len().over("_row") >= MIN_UNITS)
    if flat.is_empty():
        return np.empty(0, dtype=np.int64)
    unit, row = flat["_units"].hash(0).to_numpy(), flat["_row"].to_numpy()
    places = len(unit) - N_GRAM + 1
    gram = np.zeros(places, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS):  # wraps around; two sequences that meet are one in 10¹⁹
        gram = (gram ^ (gram >> np.uint64(31)) ^ unit[place : place + places]) * factor
    inside = row[:places] == row[N_GRAM - 1 :]
    grams = pl.DataFrame({"_row": row[:places][inside], "gram": gram[inside]})
    counted = grams.group_by("_row", maintain_order=True).agg(
        again=(1 - pl.col("gram").n_unique() / pl.len())
    )
    return counted.filter(pl.col("again") > REPEATED)["_row"].to_numpy()


def same_elsewhere(text: pl.Expr, question: pl.Expr) -> pl.Expr:
    """Whether another question got a reply of this very text (white space at its ends apart), over the frame."""
    return question.n_unique().over(text.str.strip_chars()) > 1
