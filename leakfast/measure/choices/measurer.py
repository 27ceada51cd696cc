"""Multiple choice: every persona asked every item under every adapter, choice scores in shards. Demands a run and a loaded
base model; leaves counting to stats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.measure.choices import compare_engines, scoring, table
from leakfast.measure.choices.request import request_of
from leakfast.measure.choices.scores import LETTERS, prompts_of
from leakfast.measure.contract import Counter, Measured, Part
from leakfast.measure.request import Asked, Request, Target, check_targets, find_targets, warn_of_personas
from leakfast.measure.shards import SHARD_PROMPTS, Job, Shard, plan_job, retire
from leakfast.measure.steerable import steerable
from leakfast.models.attach import adapted
from leakfast.prompts import chat
from leakfast.prompts.grid import PromptGrid
from leakfast.steering.running import steered
from leakfast.storage import layout
from leakfast.storage.interrupts import Stop, finishing

if TYPE_CHECKING:
    import polars as pl

    from leakfast.generation.backends import Drawing
    from leakfast.measure.choices.scores import Scores
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.evaluate")


@dataclass
class _Part(Part):
    """shares: of training, of each job's target (None: the adapter as it is); behavior: what the scores are rows of."""

    shares: list[float | None] = field(default_factory=list)
    behavior: str = ""


class Choices:
    """Scores the choices of items.

    Shards choices/<adapter>/<items>-<scoring>/part-NNNNN.parquet hold fixed blocks of personas with all items, columns of
    table.frame; of checkpoints trajectory/<adapter>/<items>-<scoring>/pNNN/, with a column `share` of the training (0–1),
    at 0 of the base itself, as an adapter does nothing before its first step. The first list scored in a run makes the
    rate of the behavior; any other is a behavior `<behavior>-<items>` of its own, so that no rate mixes two lists.
    drawing.letters says who computes letters, under a name that is part of a shard's request."""

    made = "scored"

    def __init__(self, loaded: Loaded, request: Request, drawing: Drawing, at: str) -> None:
        drawing = steerable(drawing, request, at)
        self.loaded, self.request, self.at = loaded, request, at
        self.asked = [one for one in request.asked if one.by_choices]
        self.engine, self.engine_name = None, drawing.letters
        if drawing.letters == "packed":
            from leakfast.forward.head import check

            check(loaded)  # says which models it takes
        elif at == "checkpoints":
            raise InputError("eval: checkpoints are scored by the packed engine. Leave --engine out.")
        else:
            self.engine = drawing.letters_engine or compare_engines.engine(adapters=list(request.adapters))
        self.targets = request.targets
        self.series = {t.path: request.series(t.path) for t in self.targets if t.path and at == "checkpoints"}
        check_targets(loaded, self.targets, "choices" if self.engine is None else self.engine_name)
        warn_of_personas(loaded, request.personas, self.targets, "their scores are the same")

    def parts(self, run: Run) -> list[_Part]:
        found = []
        for one in self.asked:
            scores, items = one.config.scoring, one.questions
            if self.at == "final":
                places = [(t, layout.choices(t.name, items.name, scores), None) for t in self.targets]
                behavior = _behavior(run, one.behavior, items.name)
            else:
                places = [
                    (
                        self._point(target, share, folder, one),
                        layout.points(target.name, items.name, scores, share),
                        share,
                    )
                    for target in self.targets
                    if target.path
                    for share, folder in self.series[target.path]
                ]
                behavior = one.behavior
            jobs = [self._job(run, folder, target, one) for target, folder, _ in places]
            found.append(_Part(one, jobs, shares=[share for *_, share in places], behavior=behavior))
        return found

    def _point(self, target: Target, share: float, folder: Any, one: Asked) -> Target:
        """An adapter at a share of its training, under the adapter's name."""
        if not share:
            return Target(target.name, None, target.source, target.seed, layout.BASE)
        (there,) = find_targets([folder], one.behavior, source=target.source)
        return Target(target.name, folder, target.source, target.seed, there.digest)

    def _job(self, run: Run, folder: str, target: Target, one: Asked) -> Job:
        """The target's shards, blocks of personas."""
        people, items, scores = self.request.personas, one.questions, one.config.scoring

        def request(start: int, stop: int, **older: str | None) -> str:
            return request_of(
                self.loaded, target, people[start:stop], items, scores, self.engine_name, **older
            )

        block = (max(1, SHARD_PROMPTS // len(items)), len(items))
        return plan_job(run, folder, target, len(people), block, request)

    def carry_out(self, run: Run, parts: list[_Part], counter: Counter) -> None:
        with finishing("the shard in hand", bounded=True) as stop:
            for part in parts:
                for job, share in zip(part.jobs, part.shares, strict=True):
                    retire(run, job, self.made)
                    counter.show(job.target.name)
                    if job.missing:
                        self._score(run, part, job, share, counter, stop)

    def _score(
        self, run: Run, part: _Part, job: Job, share: float | None, counter: Counter, stop: Stop
    ) -> None:
        """The job's missing shards, each written as soon as it is whole; KeyboardInterrupt after the one in hand where a
        stop was asked for."""
        import polars as pl

        target, items, how = job.target, part.asked.questions, part.asked.config.scoring
        scorer = self._scorer(part, job)
        with ExitStack() as stack:
            current = self.loaded
            if self.engine is None:
                current = stack.enter_context(adapted(self.loaded, target.path))
                stack.enter_context(steered(current, target.steer))
            for number, shard in enumerate(job.missing):
                block = self.request.personas[shard.start : shard.stop]

                def shown(done: int, total: int, what: str, shard: Shard = shard) -> None:
                    counter.show(target.name, shard.rows * done / max(1, total))

                made = table.frame(
                    scorer(current, number, block, shown),
                    [p.name for p in block],
                    list(items),
                    scoring=how,
                    adapter=target.name,
                    source=target.source,
                    items_name=items.name,
                    behavior=part.behavior,
                )
                if share is not None:
                    made = made.with_columns(pl.lit(share).alias("share"))
                with stop.writing():
                    run.add_shard(
                        shard.relpath,
                        made,
                        request=shard.request,
                        adapter=target.digest,
                        base=self.loaded.fingerprint,
                        items=items.name,
                        items_sha256=items.hash,
                        behavior=part.behavior,
                        **target.told,
                        personas=chat.prompt_hashes(self.loaded.tokenizer, block),
                        **({"answers": items.reading} if items.reading else {}),
                    )
                part.made += shard.rows
                counter.add(shard.rows, target.name)
                if stop():
                    raise KeyboardInterrupt

    def _scorer(self, part: _Part, job: Job) -> Callable[..., Scores]:
        """(model, number of the missing shard, its personas, progress) → scores of that block."""
        items, how, engine = part.asked.questions, part.asked.config.scoring, self.engine
        if engine is not None:
            return lambda current, number, block, shown: engine(current, job.target.path, block, items, shown)
        blocks = [self.request.personas[shard.start : shard.stop] for shard in job.missing]
        prompts: list[PromptGrid | None] = [None] * len(blocks)
        if how == LETTERS and isinstance(prompts_of(self.loaded, blocks[0], list(items)), PromptGrid):
            grid = prompts_of(self.loaded, [p for block in blocks for p in block], list(items))
            heads = iter(grid.heads)  # pieces of all fit in memory, lists may not
            prompts = [PromptGrid([next(heads) for _ in block], grid.tails) for block in blocks]

        def score(current: Loaded, number: int, block: Sequence[Persona], shown: Any) -> Scores:
            return scoring.measure(current, block, items, how, prompts=prompts[number], progress=shown)

        return score

    @staticmethod
    def rates(run: Run, measured: Measured, personas: Sequence[Persona], by: str = "sum") -> pl.DataFrame:
        """Schema `rates` of accuracy. Without a baseline, and said, where the unadapted model was asked other items."""
        from leakfast.stats import baselines

        scores, categories = read_scores(run, measured), {p.name: p.category for p in personas}
        asked = scores.select("behavior", "adapter", "persona", question="item").unique(maintain_order=True)
        unlike, told = baselines.unlike(run, asked)
        for sentence in told:
            log.warning("eval: %s", sentence)
        return table.rates(scores, measured.origins, categories, by, unlike)


def _behavior(run: Run, behavior: str, items: str) -> str:
    """`behavior` for the list that the run was scored on first, else a name that says the list."""
    main = {
        entry["items"]
        for path, entry in run.manifest["shards"].items()
        if path.startswith(f"{layout.CHOICES}/") and entry.get("behavior") == behavior
    }
    return behavior if not main or items in main else f"{behavior}-{items}"


def read_scores(run: Run, measured: Measured) -> Any:
    """Choice scores of what was measured, and of the run's base on the same list if it is there (polars)."""
    import polars as pl

    folders = list(measured.folders)
    beside = "/".join([layout.CHOICES, layout.BASE, *folders[0].split("/")[2:]])
    if beside not in folders and run.shards(beside):
        folders.append(beside)
    return pl.concat([run.read(folder) for folder in folders], how="diagonal")
