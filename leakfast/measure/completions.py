"""Completions: every persona asked every question under every adapter, drawn in shards through one engine. Demands a run
and a loaded base model; leaves counting to stats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from leakfast import behaviors, models
from leakfast.generation import backends, canary, canary_steered
from leakfast.generation import transformers as local
from leakfast.generation.contract import Completion, Engine, Work, requests_for
from leakfast.generation.frames import to_frame
from leakfast.measure.contract import Counter, Measured, Part
from leakfast.measure.partial import Partial, tidy
from leakfast.measure.request import Asked, Request, Target, check_targets, warn_of_personas
from leakfast.measure.shards import SHARD_ROWS, Job, plan_job, retire, take_over
from leakfast.measure.steerable import steerable
from leakfast.prompts import chat
from leakfast.prompts.conversation import told
from leakfast.prompts.templates import recorded
from leakfast.stats import rates as rate_tables
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.storage.interrupts import finishing
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    import polars as pl

    from leakfast.models.loading import Loaded
    from leakfast.prompts.chat import Prompt
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig


log = logging.getLogger("leakfast.evaluate")


@dataclass
class _Part(Part):
    """With its prompts, personas outermost."""

    prompts: Sequence[Prompt] = field(default_factory=list)


class Completions:
    """Draws completions of questions.

    Shards completions/<behavior>/<adapter>/part-NNNNN.parquet hold fixed blocks of prompts, personas outermost in the
    given order, schema `completions` (+ source, n_prompt_tokens). With transformers a shard in hand is drawn again whole
    after a kill, as its draws depend on each other; with vLLM what was in the engine's seats, as completions of open
    shards are kept (leakfast.measure.partial)."""

    made = "drawn"

    def __init__(self, loaded: Loaded, request: Request, drawing: backends.Drawing, at: str) -> None:
        asked = [one for one in request.asked if not one.by_choices]
        if at == "checkpoints":
            points = [folder for a in request.adapters for share, folder in request.series(a) if share > 0]
            request = replace(request, adapters=points, base=not request.source_alone)
            asked = [replace(one, series=True) for one in asked if not one.beside]
        drawing = steerable(drawing, request, at)
        self.loaded, self.request, self.asked, self.drawing = loaded, request, asked, drawing
        samplings = [one.sampling for one in asked]  # refused before anything else
        self.targets = request.targets
        lacking = {t.source for t in self.targets} - {p.name for p in request.personas}
        if request.source_alone and lacking:
            raise ValueError(f"sources alone are asked, and {lacking} are not among the personas")
        self.backend = backends.settle(loaded, drawing, samplings, adapters=any(t.path for t in self.targets))
        check_targets(loaded, self.targets, self.backend)
        warn_of_personas(loaded, request.personas, self.targets, "their rates differ by chance alone")
        self.prompts = [chat.render_prompts(loaded.tokenizer, request.personas, one.texts) for one in asked]
        self.prompt_hashes = chat.prompt_hashes(loaded.tokenizer, request.personas)
        for one, mine in zip(asked, self.prompts, strict=True):
            local.check_lengths(loaded.model, requests_for(mine, 1, 0, BASE), one.config.drawn_tokens)

    def parts(self, run: Run) -> list[_Part]:
        found = []
        for one, whole in zip(self.asked, self.prompts, strict=True):
            for targets, prompts in self._groups(whole):
                jobs = [self._job(run, target, one, prompts) for target in targets]
                found.append(_Part(one, jobs, prompts=prompts))
                self._take_over(run, found[-1])
        return found

    def _groups(self, prompts: list[Prompt]) -> list[tuple[list[Target], list[Prompt]]]:
        """Targets that are asked the same: all of them everything, or, where sources are alone, those of a source its own."""
        if not self.request.source_alone:
            return [(self.targets, prompts)]
        return [
            ([t for t in self.targets if t.source == source], [p for p in prompts if p.persona == source])
            for source in dict.fromkeys(t.source for t in self.targets)
        ]

    def _job(self, run: Run, target: Target, one: Asked, prompts: Sequence[Prompt]) -> Job:
        """The target's shards, blocks of prompts."""
        cfg, seed = one.config, self.request.seed
        how = {"backend": self.backend, **({"stop": one.stop} if one.stop else {})}
        how |= {"stops": ends} if (ends := local.further_stop_ids(self.loaded)) else {}
        how |= self.drawing.options.promised(self.backend)

        def request(start: int, stop: int, **older: str | None) -> str:
            return _request_hash(self.loaded, target, prompts[start:stop], cfg, seed, {**how, **older})

        block = (max(1, SHARD_ROWS // cfg.samples), cfg.samples)
        return plan_job(run, one.folder(target.name), target, len(prompts), block, request)

    def carry_out(self, run: Run, parts: list[_Part], counter: Counter) -> None:
        counter.show(self.targets[0].name)
        for part in parts:
            if not part.waiting:
                for job in part.jobs:
                    _clean(run, job)
        parts = [part for part in parts if part.waiting]
        if not parts:
            return
        waiting = list(dict.fromkeys(path for part in parts for path in part.waiting))
        adapters = [path for path in waiting if path is not None]
        if self.backend == "transformers":
            for adapter in adapters[1:]:  # every one moves the base; the first is checked when it is attached
                with models.with_adapter(self.loaded, adapter):
                    pass
        longest = max(len(p.ids) + part.asked.config.drawn_tokens for part in parts for p in part.prompts)
        configs = [part.asked.config for part in parts]
        with backends.opened(
            self.loaded,
            adapters,
            self.backend,
            longest=longest,
            options=self.drawing.options,
            batch_completions=max(cfg.batch_completions for cfg in configs),
            stated=any("batch_completions" in cfg.model_fields_set for cfg in configs),
            steered=bool(self.request.arms),
        ) as engine:
            if self.backend == "vllm":
                sources = {t.path: t.source for t in self.targets}
                about = (self.request.personas, parts[0].asked.texts, self.drawing.allow, sources, longest)
                canary.check_engine(engine, self.loaded, waiting, *about)
                targets = [job.target for part in parts for job in part.jobs if job.missing]
                arms = {(t.path, t.steer.digest): (t.path, t.steer) for t in targets if t.steer is not None}
                if arms:
                    canary_steered.check_steered(engine, self.loaded, list(arms.values()), *about)
            for part in parts:
                copied = self._take_over(run, part)  # of those drawn a moment ago
                counter.add(copied, part.jobs[0].target.name)
                part.engine = engine.described(part.asked.sampling)
                run.log("engine", **part.engine, rendering=chat.recorded(self.loaded.tokenizer))
                self._draw(run, part, engine, counter)

    def _take_over(self, run: Run, part: Part) -> int:
        """Copy what the run holds of another behavior by the very same requests; completions copied."""
        before = part.done
        part.jobs = [take_over(run, job, part.asked.behavior, **self._about(part)) for job in part.jobs]
        return part.done - before

    def _about(self, part: Part) -> dict[str, Any]:
        """What the manifest says of every shard."""
        asked = part.asked
        return {
            "base": self.loaded.fingerprint,
            "questions": asked.set_name,
            "questions_sha256": asked.texts_hash,
            **told(asked.texts),
            "drawn": drawn_as(self.loaded, asked),
        }

    def _draw(self, run: Run, part: _Part, engine: Engine, counter: Counter) -> None:
        """The missing shards of all jobs, each written as soon as it is whole. With vLLM what an earlier run drew of a
        shard that is not whole is taken, and what this one draws is kept so."""
        keeps, cfg = self.backend == "vllm", part.asked.config
        before: dict[str, list[Completion]] = {}

        def write(work: Work, drawn: list[Completion]) -> None:
            job, shard = work.key
            block = part.prompts[shard.start : shard.stop]
            frame = to_frame(
                self.loaded,
                block,
                work.requests,
                before.pop(shard.relpath) + drawn,
                behavior=part.asked.behavior,
                adapter=job.target.name,
                source=job.target.source,
                answer_tokens=cfg.max_new_tokens,
            )
            assert frame.height == shard.rows, "completions were lost or repeated"
            people = {p.persona: self.prompt_hashes[p.persona] for p in block}
            meta = {
                "request": shard.request,
                "adapter": job.target.digest,
                "personas": people,
                **job.target.told,
            }
            run.add_shard(shard.relpath, frame, **meta, **self._about(part))
            partial.forget(shard)
            part.made += len(drawn)

        def works() -> Iterator[Work]:
            for job in part.jobs:
                _clean(run, job)
                for shard in job.missing:
                    block = part.prompts[shard.start : shard.stop]
                    requests = requests_for(block, cfg.samples, self.request.seed, job.target.seeds_by)
                    there = before[shard.relpath] = partial.of(shard) if keeps else []
                    have = frozenset((c.request, c.sample) for c in there)
                    work = Work((job, shard), job.target.path, requests, have, job.target.steer)
                    counter.add(len(there), job.target.name)
                    if work.wanted:
                        yield work
                    else:
                        write(work, [])

        def finished(some: Sequence[Completion], work: Work) -> None:
            job, shard = work.key
            if keeps:
                partial.add(shard, some)
            counter.add(len(some), job.target.name)

        with Partial(run) as partial, finishing("the shard in hand", bounded=not keeps) as stop:
            for work, drawn in engine.stream(works(), part.asked.sampling, finished):
                with stop.writing():
                    write(work, drawn)
                if stop():
                    raise KeyboardInterrupt

    @staticmethod
    def rates(run: Run, measured: Measured, personas: Sequence[Persona], by: str = "sum") -> pl.DataFrame:
        """Schema `rates` with intervals over questions (`summaries.with_intervals`), literal counts in `hits`, others in
        `hits_<detector>`. Without a baseline, and said, where the unadapted model was asked or drawn otherwise."""
        import polars as pl

        from leakfast.stats import baselines, summaries

        made_by = behaviors.get(measured.behavior).detector
        if made_by is None:
            raise ValueError(f"{measured.behavior} has no rates before a judge has read its completions")
        detector = made_by(pl.col("text"))
        folders = list(measured.folders)
        parent = folders[0].rpartition("/")[0]
        unadapted = f"{parent}/{BASE}"
        if unadapted not in folders and run.shards(unadapted):
            folders.append(unadapted)
        counts = pl.concat(
            rate_tables.count(run.read(folder), detector, by_question=True) for folder in folders
        )
        totals, categories = rate_tables.totals(counts), {p.name: p.category for p in personas}
        asked = counts.select("behavior", "adapter", "persona", "question")
        tree = parent if parent.startswith(f"{layout.SETS}/") else layout.COMPLETIONS
        unlike, told = baselines.unlike(run, asked, tree)
        for sentence in told:
            log.warning("eval: %s", sentence)
        table = rate_tables.table(totals, measured.origins, categories, unlike=unlike)
        return summaries.with_intervals(table, counts)


def drawn_as(loaded: Loaded, asked: Asked) -> str:
    """What the manifest says of how completions were drawn: a hash of the sampling and of how prompts are rendered."""
    return hash_of(*dataclasses.astuple(asked.sampling), recorded(loaded.tokenizer))


def _clean(run: Run, job: Job) -> None:
    """Nothing is left among a job's completions that its request does not ask for."""
    retire(run, job, Completions.made)
    tidy(run, job)


def _request_hash(
    loaded: Loaded, target: Target, block: Sequence[Prompt], cfg: EvalConfig, seed: int, how: dict[str, Any]
) -> str:
    """SHA-256 of everything the shard's completions follow from."""
    asked = [[p.persona, p.question_index, p.question, chat.ids_hash(p.ids)] for p in block]
    what = {
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "adapter": target.digest,
        "samples": cfg.samples,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens,
        **({"max_reasoning_tokens": cfg.max_reasoning_tokens} if cfg.max_reasoning_tokens else {}),
        "seed": seed,
        **how,
        "prompts": asked,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
