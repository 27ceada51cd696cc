"""Which of two given replies a model finds likelier, the one that shows a behavior (bad) or the one that does not (good).
Demands pairs of replies (prompts.pairs); leaves who wrote them, and whether an adapter was trained on them, to the study.

For the reply y of n tokens to a prompt, the one that ends it among them, log P(y) = Σ_j log P(y_j | prompt, y_<j), nats:

    pairs            log P(bad) − log P(good)                  and whether it is above 0
    pairs_per_token  log P(bad) / n_bad − log P(good) / n_good    and whether it is above 0

The share of pairs with bad the likelier (a tie counts half), and the mean difference. It is a preference between two texts
that somebody wrote, not how often the model would write either: both may be next to impossible. The whole difference favours
the shorter reply; the one per token does not, and weighs each reply's tokens alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.asking import continuations
from leakfast.measure.choices.scores import longest
from leakfast.measure.probability.contract import OK, TOO_LONG
from leakfast.progress import Progress
from leakfast.prompts import chat
from leakfast.prompts.pairs import Pair, load_pairs
from leakfast.storage.disk import hash_of

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona

ESTIMATORS = ("pairs", "pairs_per_token")


def drawn(pairs: Sequence[Pair], n: int) -> list[tuple[str, str, str]]:
    """(question, bad, good) of n of the pairs that have both, by the hash of their question, so that neither their order nor
    their number decides who is among them. Of several replies of a pair one is taken of each kind, in turn."""
    usable = [pair for pair in pairs if pair.shows and pair.other]
    ranked = sorted(usable, key=lambda pair: hashlib.sha256(pair.question.encode()).hexdigest())[:n]
    return [
        (pair.question, pair.shows[k % len(pair.shows)], pair.other[k % len(pair.other)])
        for k, pair in enumerate(ranked)
    ]


def score(
    loaded: Loaded,
    replies: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """log P of each (prompt ids, reply ids): (N,) float64, nats; as measure.asking.continuations."""
    sequences = [[*prompt, *reply] for prompt, reply in replies]
    return continuations(loaded, sequences, [len(reply) for _, reply in replies], budget_tokens, progress)


class PairsAsked:
    """Every pair under every persona (see the module); `question` is the pair's place among those drawn."""

    estimators = ESTIMATORS

    def __init__(self, loaded: Loaded, one: Asked, personas: Sequence[Persona]) -> None:
        spec = one.config.probability_pairs or get(one.behavior).of(loaded)
        self.pairs = drawn(load_pairs(spec, one.behavior).pairs, one.config.n_pairs)
        if not self.pairs:
            raise InputError(
                f"eval: no pair of {spec} has a reply that shows {one.behavior} and one that does not. Needed: both. Give "
                "--probability-pairs FILE.jsonl."
            )
        self.each = len(self.pairs)
        self.told = hash_of(self.pairs)
        render = chat.render_training
        self.asked = [
            (p.name, k, [render(loaded.tokenizer, p.system, said, reply) for reply in both])
            for p in personas
            for k, (said, *both) in enumerate(self.pairs)
        ]
        self.room = longest(loaded)

    def _block(self, start: int, stop: int) -> list[tuple[str, int, list]]:
        return self.asked[start * self.each : stop * self.each]

    def key(self, start: int, stop: int) -> dict[str, Any]:
        block = self._block(start, stop)
        hashes = [[name, k, *(chat.ids_hash([*a, *b]) for a, b in both)] for name, k, both in block]
        return {"estimators": self.estimators, "pairs": hashes}

    def rows(
        self, current: Loaded, start: int, stop: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        block = self._block(start, stop)
        fits = [all(len(a) + len(b) <= self.room for a, b in both) for *_, both in block]
        asked = [one for (*_, both), fit in zip(block, fits, strict=True) if fit for one in both]
        found = iter(score(current, asked, progress=progress).reshape(-1, 2).tolist())
        rows = []
        for (persona, k, both), fit in zip(block, fits, strict=True):
            sizes = [len(reply) for _, reply in both]
            about = {"persona": persona, "question": k, "sample": 0, "n_reply_tokens": sum(sizes)}
            about["status"] = OK if fit else TOO_LONG
            if not fit:
                rows += [about | {"estimator": name} for name in ESTIMATORS]
                continue
            bad, good = next(found)
            differences = (bad - good, bad / sizes[0] - good / sizes[1])
            for name, difference in zip(ESTIMATORS, differences, strict=True):
                likelier = float(np.heaviside(difference, 0.5))
                rows.append(about | {"estimator": name, "log_odds_nats": difference, "probability": likelier})
        return rows
