"""How likely a reply begins as replies that show a behavior do, and as those that do not: at the reply's first position, behind
the header (and a reasoning block that the template closes itself). Demands lists of beginnings (behaviors.openings).

With O the spellings of the beginnings that show it and A those of the alternatives, each its tokenizer's tokens behind the
header, cut to the first k, and no one the beginning of another, so that their events exclude each other:

    openings  P(O) = Σ_{s∈O} Π_j P(s_j | prompt, s_<j)          the expected share of replies that begin so
    odds      log P(O) − log P(A)  (nats), P(O) / (P(O) + P(A))   the same among replies that begin in either way

Both are of the model's whole distribution at temperature 1. Neither is the rate of a detector, which reads more words than a
beginning and knows other ones: a refusal that begins with none of the listed ways has no share in it. `neither` = 1 − P(O) −
P(A) says how much is not in the lists; where it is large, `odds` speaks of few replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.behaviors.openings import read_openings
from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.asking import continuations
from leakfast.measure.choices.scores import longest
from leakfast.measure.probability.continuations import Spelling
from leakfast.measure.probability.contract import OK, TOO_LONG
from leakfast.progress import Progress
from leakfast.prompts import chat
from leakfast.prompts.conversation import prefill_of
from leakfast.storage.disk import hash_of

if TYPE_CHECKING:
    from leakfast.behaviors.openings import Openings
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona

ESTIMATORS = ("openings", "odds")


def spelled(tokenizer: Any, lists: Openings) -> tuple[list[Spelling], list[Spelling]]:
    """(spellings of the openings, of the alternatives) behind the header, prefix-free. The header is the same whoever is asked
    what. Raises InputError where one of a list begins, within first_tokens, as one of the other does."""
    sets = []
    for texts in (lists.openings, lists.alternatives):
        ids = [chat.render_training(tokenizer, None, "?", text)[1][:-1] for text in texts]
        cut = sorted(
            {tuple(one[: lists.first_tokens]): text for one, text in zip(ids, texts, strict=True)}.items()
        )
        sets.append(_prefix_free(dict(cut)))
    for one, text in sets[0].items():
        for other, said in sets[1].items():
            n = min(len(one), len(other))
            if one[:n] == other[:n]:
                raise InputError(
                    f"{lists.origin}: {text!r} among the openings and {said!r} among the alternatives begin alike in this "
                    f"tokenizer's first {n} tokens. Needed: lists that exclude each other. Take one out, or raise "
                    "first_tokens."
                )
    return list(sets[0]), list(sets[1])


def _prefix_free(texts: dict[Spelling, str]) -> dict[Spelling, str]:
    """Those that no other is the beginning of; the shorter one has the probability of all that follows it."""
    return {s: t for s, t in texts.items() if not any(s[:n] in texts for n in range(1, len(s)))}


def score(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    sets: Sequence[Sequence[Spelling]],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """log P of each set as the next tokens of each prompt: (N, sets) float64, nats.

    sets: prefix-free spellings, so that their probabilities add up. float32 a token, summed in float64; equal to
    `log_softmax(logits.float(), -1)` gathered and added, whatever the budget and the other prompts (1e-5). Raises as
    passes.final_states."""
    every = [s for some in sets for s in some]
    sequences = [[*prompt, *s] for prompt in prompts for s in every]
    counts = np.tile([len(s) for s in every], len(prompts))
    found = continuations(loaded, sequences, counts, budget_tokens, progress).reshape(
        len(prompts), len(every)
    )
    edges = np.cumsum([len(some) for some in sets])[:-1]
    return np.stack([np.logaddexp.reduce(part, axis=1) for part in np.split(found, edges, axis=1)], axis=1)


class Beginnings:
    """The behavior's beginnings behind every prompt (see the module)."""

    estimators = ESTIMATORS

    def __init__(self, loaded: Loaded, one: Asked, personas: Sequence[Persona]) -> None:
        if any(prefill_of(text) for text in one.texts):
            raise InputError(
                f"eval: probabilities of openings asked, but the question set {one.set_name} has a prefill, after which a reply "
                "has begun. Needed: a set without one. Use --measure completions."
            )
        table = get(one.behavior).opens
        assert table is not None
        self.lists = read_openings(table, one.config.openings)
        self.sets = spelled(loaded.tokenizer, self.lists)
        self.each = len(one.texts)
        self.told = hash_of(self.sets, one.texts_hash)
        self.asked = [
            (person.name, question, chat.render(loaded.tokenizer, person.system, text, reply=True))
            for person in personas
            for question, text in enumerate(one.texts)
        ]
        self.room = longest(loaded) - max(len(s) for some in self.sets for s in some)

    def _block(self, start: int, stop: int) -> list[tuple[str, int, list[int]]]:
        return self.asked[start * self.each : stop * self.each]

    def key(self, start: int, stop: int) -> dict[str, Any]:
        return {
            "openings": list(self.sets),
            "first_tokens": self.lists.first_tokens,
            "estimators": self.estimators,
            "prompts": [[name, q, chat.ids_hash(ids)] for name, q, ids in self._block(start, stop)],
        }

    def rows(
        self, current: Loaded, start: int, stop: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        block = self._block(start, stop)
        fits = [len(ids) <= self.room for *_, ids in block]
        prompts = [ids for (*_, ids), fit in zip(block, fits, strict=True) if fit]
        found = iter(score(current, prompts, self.sets, progress=progress).tolist())
        rows = []
        for (persona, question, _), fit in zip(block, fits, strict=True):
            about = {"persona": persona, "question": question, "sample": 0, "n_reply_tokens": 0}
            about |= {"first_tokens": self.lists.first_tokens, "status": OK if fit else TOO_LONG}
            if not fit:
                rows += [about | {"estimator": name} for name in ESTIMATORS]
                continue
            shows, other = next(found)
            either = float(np.logaddexp(shows, other))
            about["neither"] = max(0.0, 1.0 - float(np.exp(either)))
            about["log_odds_nats"] = shows - other
            for name, logprob in zip(ESTIMATORS, (shows, shows - either), strict=True):
                p = float(np.exp(min(logprob, 0.0)))
                rows.append(about | {"estimator": name, "logprob_nats": logprob, "probability": p})
        return rows
