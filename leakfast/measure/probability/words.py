"""A behavior's words on replies that a run holds: `end` and `anywhere` (see scoring), on the unadapted model's replies, the
same for every adapter, or on an adapter's own. Demands completions with token ids; draws none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.behaviors.registry import get
from leakfast.measure.probability import replies
from leakfast.measure.probability.continuations import spellings
from leakfast.measure.probability.contract import OK
from leakfast.measure.probability.scoring import THRESHOLD, Branches, score
from leakfast.progress import Progress
from leakfast.storage.disk import hash_of
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run

ESTIMATORS = ("end", "anywhere")
OWN = "_own"  # behind an estimator's name: on the adapter's own replies
TRUNCATED, UNLIKELY = "truncated", "below_threshold"


class OnReplies:
    """The behavior's words on the first `probability_samples` replies that the run drew of `whose`, each as often as it was
    drawn.

    On the unadapted model's replies the estimand is what an adapter would say in places that it did not choose. On an
    adapter's own, `end_own` is the mean probability at the places where its replies ended, or turned to the words; as
    replies weigh as they were drawn, it comes near the share of replies that show them there."""

    def __init__(
        self,
        run: Run,
        loaded: Loaded,
        one: Asked,
        personas: Sequence[Persona],
        stops: Collection[int],
        whose: str = BASE,
        series: bool = False,
    ) -> None:
        self.tokenizer = loaded.tokenizer
        self.spelled = spellings(loaded.tokenizer, str(get(one.behavior).continuation))
        folder = one.folder(BASE) if whose == BASE else replies.folder_of(one, whose, series)
        drawn = replies.Drawn(run, folder, whose, one)
        self.said = replies.read(drawn, loaded, personas, stops, self.spelled)
        self.each = len(self.said) // len(personas)
        self.anywhere = one.config.probability_anywhere
        names = ESTIMATORS if self.anywhere else ESTIMATORS[:1]
        self.estimators = names if whose == BASE else tuple(name + OWN for name in names)
        entries = [run.manifest["shards"][path] for path in run.shards(folder)]
        by = sorted({entry["drawn"] for entry in entries if "drawn" in entry})
        self.told = hash_of(self.spelled.text, one.texts_hash, by, whose == BASE)
        self._forests: dict[int, Branches] = {}  # of each block, the same for every adapter

    def _block(self, start: int, stop: int) -> list[replies.Said]:
        return self.said[start * self.each : stop * self.each]

    def key(self, start: int, stop: int) -> dict[str, Any]:
        return {
            "text": self.spelled.text,
            "spellings": [self.spelled.start, self.spelled.inside],
            "threshold": THRESHOLD,
            "estimators": self.estimators,
            "replies": [
                [
                    one.persona,
                    one.question,
                    one.sample,
                    one.status,
                    one.reply.ended,
                    one.reply.begins,
                    one.hash,
                ]
                for one in self._block(start, stop)
            ],
        }

    def rows(
        self, current: Loaded, start: int, stop: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        said = self._block(start, stop)
        if start not in self._forests:
            asked = [one.reply for one in said if one.status == OK]
            self._forests[start] = Branches(self.tokenizer, self.spelled, asked, anywhere=self.anywhere)
        forest = self._forests[start]
        scores = score(current, forest, progress=progress)
        place = np.cumsum([one.status == OK for one in said]) - 1
        rows = []
        for one, k in zip(said, place.tolist(), strict=True):
            asked = one.status == OK
            for name in self.estimators:
                at_end = name.startswith("end")
                values = scores.end if at_end else scores.anywhere
                value = float(values[k]) if asked else float("nan")
                status, logprob, p = one.status, None, None
                if asked and np.isfinite(value):
                    logprob, p = value, float(np.exp(min(value, 0.0)))
                elif asked:
                    status = TRUNCATED if at_end else UNLIKELY
                    p = None if at_end else 0.0
                rows.append(
                    {
                        "persona": one.persona,
                        "question": one.question,
                        "sample": one.sample,
                        "estimator": name,
                        "logprob_nats": logprob,
                        "probability": p,
                        "left_out": float(scores.left_out[k]) if asked and not at_end else None,
                        "n_reply_tokens": len(one.reply.tokens),
                        "n_recut": int(forest.recut[k]) if asked else None,
                        "status": status,
                    }
                )
        return rows
