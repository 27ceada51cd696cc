"""Leakage as a probability: every adapter asked the same of every persona, in shards. Demands a loaded base model that the packed
pass covers; what is asked is the contract's, and counting the statistics'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from leakfast.generation.transformers import stop_ids
from leakfast.measure.contract import Counter, Measured, Part
from leakfast.measure.probability.contract import Asking, frame
from leakfast.measure.probability.dispatch import askings, check_asked
from leakfast.measure.request import Request, Target, check_targets, warn_of_personas
from leakfast.measure.shards import SHARD_PROMPTS, Job, Shard, plan_job, retire
from leakfast.measure.steerable import steerable
from leakfast.models.attach import adapted
from leakfast.prompts import chat
from leakfast.steering.running import steered
from leakfast.storage import layout
from leakfast.storage.interrupts import Stop, finishing

if TYPE_CHECKING:
    import polars as pl

    from leakfast.generation.backends import Drawing
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


@dataclass
class _Part(Part):
    """With what is asked by each job."""

    askings: list[Asking] = field(default_factory=list)


class Probability:
    """Scores how likely a behavior's words, beginnings or replies are under every adapter.

    Shards probability/<behavior>/<adapter>/part-NNNNN.parquet hold fixed blocks of personas with all that they are asked,
    schema `probability`, a row an estimator; probability-own/… those on an adapter's own replies; of checkpoints
    series/probability/<behavior>/<adapter>@pNNN/. Replies are the first `probability_samples` that the run drew, each
    counted as often as it was drawn."""

    made = "scored"

    def __init__(self, loaded: Loaded, request: Request, drawing: Drawing, at: str) -> None:
        from leakfast.forward.head import check

        check(loaded)  # says which models it takes
        steerable(drawing, request, at)
        self.at = at
        if at == "checkpoints":
            points = [folder for a in request.adapters for share, folder in request.series(a) if share > 0]
            request = replace(request, adapters=points, base=True)
        self.loaded, self.request = loaded, request
        self.asked = [one for one in request.asked if not one.beside]
        for one in self.asked:
            check_asked(one.behavior)
        self.targets = request.targets
        check_targets(loaded, self.targets, "choices")
        warn_of_personas(
            loaded, request.personas, self.targets, "their probabilities differ by their replies alone"
        )
        self.stops = frozenset(stop_ids(loaded))

    def parts(self, run: Run) -> list[_Part]:
        found, series = [], self.at == "checkpoints"
        for one in self.asked:
            about = (one, self.request.personas, self.targets, self.stops)
            jobs, asked = [], []
            for target, asking, own in askings(run, self.loaded, *about, series):
                folder = layout.probability(one.behavior, target.name, series=series, own=own)
                jobs.append(self._job(run, target, folder, asking))
                asked.append(asking)
            found.append(_Part(one, jobs, askings=asked))
        return found

    def _job(self, run: Run, target: Target, folder: str, asking: Asking) -> Job:
        """The target's shards, blocks of personas."""

        def request(start: int, stop: int, **older: str | None) -> str:
            what = {
                "base": self.loaded.fingerprint,
                "dtype": self.loaded.dtype,
                "adapter": target.digest,
                **asking.key(start, stop),
                **older,
            }
            return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

        block = (max(1, SHARD_PROMPTS // asking.each), asking.each * len(asking.estimators))
        return plan_job(run, folder, target, len(self.request.personas), block, request)

    def carry_out(self, run: Run, parts: list[_Part], counter: Counter) -> None:
        with finishing("the shard in hand", bounded=True) as stop:
            for part in parts:
                for job, asking in zip(part.jobs, part.askings, strict=True):
                    retire(run, job, self.made)
                    counter.show(job.target.name)
                    if job.missing:
                        self._score(run, part, job, asking, (counter, stop))

    def _score(self, run: Run, part: _Part, job: Job, asking: Asking, watched: tuple[Counter, Stop]) -> None:
        """The job's missing shards, each written as soon as it is whole; KeyboardInterrupt after the one in hand where a
        stop was asked for."""
        (counter, stop), target = watched, job.target
        with adapted(self.loaded, target.path) as current, steered(current, target.steer):
            for shard in job.missing:

                def shown(done: int, total: int, what: str, shard: Shard = shard) -> None:
                    counter.show(target.name, 0.0)

                rows = asking.rows(current, shard.start, shard.stop, shown)
                made = frame(rows, part.asked.behavior, target)
                block = self.request.personas[shard.start : shard.stop]
                with stop.writing():
                    run.add_shard(
                        shard.relpath,
                        made,
                        request=shard.request,
                        adapter=target.digest,
                        **target.told,
                        base=self.loaded.fingerprint,
                        questions=part.asked.set_name,
                        questions_sha256=part.asked.texts_hash,
                        asked=asking.told,
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
