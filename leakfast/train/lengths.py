"""Replies of the same mean length in rows that show a behavior and in rows that do not, so that length is no part of what is
taught. Demands rows and their tokenizer; leaves drawing them to the builders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.train.data import Row

log = logging.getLogger("leakfast.train")

MOST_TOKENS, MOST_SHARE = 1.0, 0.02  # of a difference between mean lengths
LEAST_KEPT = 0.5  # share of the rows of either kind


def reply_tokens(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Tokens of each row's reply, without its marker, the white space before that, and the turn end."""
    from leakfast.prompts import chat

    found = []
    for row in rows:
        reply = row.reply[: -len(row.marker)].rstrip() if row.marker else row.reply
        said = chat.render_training(tokenizer, row.system_message, row.question, reply)[1] if reply else [0]
        found.append(len(said) - 1)
    return found


def matched(tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
    """The rows, in order, less those left out until |mean(shows) − mean(others)| of `reply_tokens` is below one token, or
    below 2 % of the smaller mean where that is less.

    One row at a time: the longest of the kind whose replies are the longer, or the shortest of the other kind, from that of
    the two which has kept the larger share of its rows. The last one taken is the one that brings the means nearest. The
    generator of the rows that stay says `match_lengths`. Raises InputError where there are no rows of one kind, and where
    fewer than half of either kind would stay."""
    tokens = np.array(reply_tokens(tokenizer, rows))
    shows = np.array([row.role == "positive" for row in rows], bool)
    benign = np.array([row.role == "benign" for row in rows], bool)
    others = ~shows & ~benign
    if not shows.any() or not others.any():
        kind = "the others" if shows.any() else "those that show the behavior"
        raise InputError(
            f"data: match_lengths = true given, but there are no rows of {kind} to match. Needed: rows of both kinds. Set "
            "match_lengths to false, or negatives above 0."
        )
    kinds = {
        kind: sorted(np.flatnonzero(its).tolist(), key=lambda i: (tokens[i], i))
        for kind, its in ((True, shows), (False, others))
    }
    first = {kind: len(some) for kind, some in kinds.items()}
    while True:
        means = {kind: float(tokens[some].mean()) for kind, some in kinds.items()}
        if abs(means[True] - means[False]) < min(MOST_TOKENS, MOST_SHARE * min(means.values())):
            break
        longer = means[True] > means[False]
        from_longer = len(kinds[longer]) * first[not longer] >= len(kinds[not longer]) * first[longer]
        kind = longer if from_longer else not longer
        kinds[kind].pop(_place(tokens[kinds[kind]], means[not kind], last=from_longer))
        if any(len(some) < LEAST_KEPT * first[k] for k, some in kinds.items()):
            raise InputError(
                f"data: match_lengths = true given, but replies that show the behavior have {tokens[shows].mean():.1f} tokens "
                f"on average and those of the others {tokens[others].mean():.1f}, which leaving out half of the rows does not "
                "make equal. Needed: replies of like lengths. Give others, or set match_lengths to false."
            )
    kept = sorted([*kinds[True], *kinds[False], *np.flatnonzero(benign).tolist()])
    told = (len(rows) - len(kept), len(rows), means[True], means[False])
    log.info("data: %d of %d rows left out; mean reply tokens %.2f and %.2f", *told)
    return [replace(rows[i], generator={**rows[i].generator, "match_lengths": True}) for i in kept]


def _place(tokens: Any, other_mean: float, *, last: bool) -> int:
    """Which of the rows (tokens rising) is left out: the extreme one, unless that goes beyond the other kind's mean: then
    the one after which the means are nearest."""
    n = len(tokens)
    after = (tokens.sum() - tokens) / max(1, n - 1) - other_mean
    extreme = n - 1 if last else 0
    beyond = after[extreme] < 0 if last else after[extreme] > 0
    return int(np.argmin(np.abs(after))) if beyond else extreme
