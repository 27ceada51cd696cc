"""Predictors from what the model says next: KL both ways and JS between two personas' next-token distributions, along the
replies of either. Demands the sums that `divergences` made; leaves shards to the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from leakfast.measure.predictors.frame import Told

if TYPE_CHECKING:
    import polars as pl

NAMES = ("kl_forward", "kl_backward", "js")


def predictors(
    personas: Sequence[str], sums: pl.DataFrame, questions: int, lacks: Mapping[str, str]
) -> list[Told]:
    """The predictors of family `output`, nats a token, from sums along replies (columns of, persona, tokens, forward, backward,
    js). Means over all tokens of the replies read, whatever their reply: long ones weigh more, equal ones count again.

    With a the source and b the bystander: kl_forward = KL(P_a ‖ P_b), kl_backward = KL(P_b ‖ P_a), js. `*_on_source`: along
    the source's own replies, `*_on_persona`: along the bystander's own, plain: along both, each with its tokens. So
    kl_forward_on_source is how much less likely the source's replies are without it, in expectation; js alone is
    symmetric."""
    place = {name: k for k, name in enumerate(personas)}
    own = np.zeros((3, len(personas), len(personas)))  # along replies of the first: forward, backward, js
    seen = np.zeros(own.shape[1:], bool)
    tokens = np.zeros(len(personas))
    names = ["of", "persona", "tokens", "forward", "backward", "js"]
    for of, persona, n, *values in sums.select(names).iter_rows():
        own[:, place[of], place[persona]] += values
        seen[place[of], place[persona]] = True
        if of == persona:
            tokens[place[of]] += n
    own[:, ~seen] = np.nan
    turned = own.transpose(0, 2, 1)[[1, 0, 2]]
    on_source, on_persona = tokens[:, None], tokens[None, :]
    told = []
    for ending, values, n in (
        ("", own + turned, on_source + on_persona),
        ("_on_source", own, on_source),
        ("_on_persona", turned, on_persona),
    ):
        for k, name in enumerate(NAMES):
            mean = np.divide(values[k], n, out=np.full_like(values[k], np.nan), where=n > 0)
            told.append(
                Told(name + ending, "output", mean, -1, "nats a token", None, questions, lacks, "no replies")
            )
    return told
