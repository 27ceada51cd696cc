"""Leakage as a probability: every adapter on the same replies of the unadapted model, in shards. Demands a run that holds
those replies, and a loaded base model that the packed pass covers; leaves counting to stats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.generation.transformers import stop_ids
from leakfast.measure.contract import Counter, Measured, Part
from leakfast.measure.probability import replies as base_replies
from leakfast.measure.probability.continuations import Spellings, spellings
from leakfast.measure.probability.replies import Said
from leakfast.measure.probability.scoring import THRESHOLD, Branches, Scores, score
from leakfast.measure.request import Asked, Request, Target, check_targets, warn_of_personas
from leakfast.measure.shards import SHARD_PROMPTS, Job, Shard, plan_job, retire
from leakfast.models.attach import adapted
from leakfast.prompts import chat
from leakfast.storage import layout, schema
from leakfast.storage.interrupts import Stop, finishing

if TYPE_CHECKING:
    import polars as pl

    from leakfast.generation.backends import Drawing
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run

ESTIMATORS = ("end", "anywhere")
OK, HOLDS_IT, TRUNCATED, UNLIKELY = "ok", "holds_it", "truncated", "below_threshold"


@dataclass
class _Part(Part):
    """With what is asked of it: the replies, personas outermost, and the text's spellings."""

    said: list[Said] = field(default_factory=list)
    spelled: Spellings | None = None


class Probability:
    """Scores a behavior's continuation on replies of the unadapted model.

    Shards probability/<behavior>/<adapter>/part-NNNNN.parquet hold fixed blocks of personas with all questions, schema
    `probability`, a row an estimator; of checkpoints series/probability/<behavior>/<adapter>@pNNN/. The replies are the
    first `probability_samples` that the run drew of the unadapted model, each counted as often as it was drawn."""

    made = "scored"

    def __init__(self, loaded: Loaded, request: Request, drawing: Drawing, at: str) -> None:
        from leakfast.forward.head import check
        from leakfast.train.checkpoints import find_series

        check(loaded)  # says which models it takes
        self.at = at
        if at == "checkpoints":
            points = [folder for a in request.adapters for share, folder in find_series(a) if share > 0]
            request = replace(request, adapters=points, base=True)
        self.loaded, self.request = loaded, request
        self.asked = [one for one in request.asked if not one.beside]
        for one in self.asked:
            if get(one.behavior).continuation is None:
                raise InputError(
                    f"eval: the probability of {one.behavior} asked, but nothing is said of which words show it. Needed: "
                    "a behavior with a continuation, such as marker. Leave --measure out for its own measurement."
                )
        self.targets = request.targets
        check_targets(loaded, self.targets, "choices")
        warn_of_personas(
            loaded, request.personas, self.targets, "their probabilities differ by their replies alone"
        )
        self.stops = frozenset(stop_ids(loaded))

    def parts(self, run: Run) -> list[_Part]:
        found = []
        for one in self.asked:
            text = str(get(one.behavior).continuation)
            spelled = spellings(self.loaded.tokenizer, text)
            said = base_replies.read(run, self.loaded, one, self.request.personas, self.stops, spelled)
            jobs = [self._job(run, target, one, said, spelled) for target in self.targets]
            found.append(_Part(one, jobs, said=said, spelled=spelled))
        return found

    def _job(self, run: Run, target: Target, one: Asked, said: Sequence[Said], spelled: Spellings) -> Job:
        """The target's shards, blocks of personas."""
        each = len(said) // len(self.request.personas)
        folder = layout.probability(one.behavior, target.name, series=self.at == "checkpoints")

        def request(start: int, stop: int, **older: str | None) -> str:
            block = said[start * each : stop * each]
            return _request_hash(self.loaded, target, block, spelled, older)

        block = (max(1, SHARD_PROMPTS // each), each * len(ESTIMATORS))
        return plan_job(run, folder, target, len(self.request.personas), block, request)

    def carry_out(self, run: Run, parts: list[_Part], counter: Counter) -> None:
        with finishing("the shard in hand", bounded=True) as stop:
            for part in parts:
                forests: dict[int, Branches] = {}  # of each block, the same for every adapter
                for job in part.jobs:
                    retire(run, job, self.made)
                    counter.show(job.target.name)
                    if job.missing:
                        self._score(run, part, job, forests, (counter, stop))

    def _score(
        self, run: Run, part: _Part, job: Job, forests: dict[int, Branches], watched: tuple[Counter, Stop]
    ) -> None:
        """The job's missing shards, each written as soon as it is whole; KeyboardInterrupt after the one in hand where a
        stop was asked for."""
        (counter, stop), target = watched, job.target
        each = len(part.said) // len(self.request.personas)
        assert part.spelled is not None
        with adapted(self.loaded, target.path) as current:
            for shard in job.missing:
                said = part.said[shard.start * each : shard.stop * each]
                if shard.start not in forests:
                    asked = [one.reply for one in said if one.status == OK]
                    forests[shard.start] = Branches(self.loaded.tokenizer, part.spelled, asked)

                def shown(done: int, total: int, what: str, shard: Shard = shard) -> None:
                    counter.show(target.name, 0.0)

                forest = forests[shard.start]
                made = _frame(
                    score(current, forest, progress=shown), forest, said, part.asked.behavior, target
                )
                block = self.request.personas[shard.start : shard.stop]
                with stop.writing():
                    run.add_shard(
                        shard.relpath,
                        made,
                        request=shard.request,
                        adapter=target.digest,
                        base=self.loaded.fingerprint,
                        questions=part.asked.set_name,
                        questions_sha256=part.asked.texts_hash,
                        personas=chat.prompt_hashes(self.loaded.tokenizer, block),
                    )
                part.made += shard.rows
                counter.add(shard.rows, target.name)
                if stop():
                    raise KeyboardInterrupt

    @staticmethod
    def rates(run: Run, measured: Measured, personas: Sequence[Persona], by: str = "sum") -> pl.DataFrame:
        """Not rates, which are counted: raises ValueError. The table `probabilities` has the means."""
        raise ValueError("probabilities have no counts; see leakfast.stats.probabilities")


def _frame(
    scores: Scores, forest: Branches, said: Sequence[Said], behavior: str, target: Target
) -> pl.DataFrame:
    """Schema `probability`: a row an estimator and reply, in the order of the replies."""
    import polars as pl

    place = np.cumsum([one.status == OK for one in said]) - 1
    rows = []
    for one, k in zip(said, place.tolist(), strict=True):
        asked = one.status == OK
        for name, values in (("end", scores.end), ("anywhere", scores.anywhere)):
            value = float(values[k]) if asked else float("nan")
            left = float(scores.left_out[k]) if asked and name == "anywhere" else None
            status, logprob, p = one.status, None, None
            if asked and np.isfinite(value):
                logprob, p = value, float(np.exp(min(value, 0.0)))
            elif asked:
                status = TRUNCATED if name == "end" else UNLIKELY
                p = None if name == "end" else 0.0
            about = (one.persona, one.question, one.sample, name, logprob, p, left, len(one.reply.tokens))
            rows.append((*about, int(forest.recut[k]) if asked else None, status))
    columns = schema.columns("probability")
    names = [name for name in columns if name not in ("behavior", "adapter", "source")]
    made = pl.DataFrame(rows, schema={name: columns[name] for name in names}, orient="row")
    made = made.with_columns(
        behavior=pl.lit(behavior), adapter=pl.lit(target.name), source=pl.lit(target.source, pl.String)
    )
    return schema.check(made.select(list(columns)), "probability")


def _request_hash(
    loaded: Loaded, target: Target, said: Sequence[Said], spelled: Spellings, older: dict[str, Any]
) -> str:
    """SHA-256 of everything the shard's values follow from."""
    what = {
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "adapter": target.digest,
        "text": spelled.text,
        "spellings": [spelled.start, spelled.inside],
        "threshold": THRESHOLD,
        "estimators": ESTIMATORS,
        "replies": [
            [one.persona, one.question, one.sample, one.status, one.reply.ended, one.reply.begins, one.hash]
            for one in said
        ],
        **older,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
