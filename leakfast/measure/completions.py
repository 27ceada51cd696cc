"""Measuring a behavior: every persona asked every question under every adapter, completions to shards.
Demands a run directory and a loaded base model; leaves counting to stats. Running it again resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.measure.targets import (
    Asked,
    Job,
    Target,
    asked_of,
    check_targets,
    clean,
    find_targets,
    keep_card,
    plan_job,
    refuse_stale,
    take_over,
    warn_of_personas,
)
from leakfast.progress import Progress
from leakfast.storage.interrupts import finishing
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.generation.backends import Options
    from leakfast.generation.contract import Engine, Work
    from leakfast.measure.targets import Source
    from leakfast.models.loading import Loaded
    from leakfast.prompts.chat import Prompt
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig

__all__ = [
    "BASE",
    "Asked",
    "Evaluation",
    "Target",
    "asked_of",
    "evaluate",
    "evaluate_all",
    "find_targets",
    "keep_card",
    "rates",
]

log = logging.getLogger("leakfast.evaluate")


SHARD_ROWS = 2560  # completions in a shard; fixed, so that a resumed run has the same shards


@dataclass(frozen=True)
class Evaluation:
    """What evaluate did. folders: completions/<behavior>/<adapter> of every target, in order; rows_made, rows_kept:
    completions drawn now, and found intact from before or under another behavior; engine: backend, version and effective
    settings of the engine that drew, None where nothing was; questions: the set's name."""

    behavior: str
    targets: tuple[Target, ...]
    folders: tuple[str, ...]
    rows_made: int
    rows_kept: int
    engine: dict[str, Any] | None = None
    questions: str = ""


def evaluate(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    adapters: Sequence[str | Path],
    personas: Sequence[Persona],
    questions: QuestionSet | Sequence[str],
    behavior: str,
    cfg: EvalConfig,
    seed: int,
    *,
    base: bool = False,
    source: Source = None,
    backend: str = "transformers",
    template_system: str | None = None,
    allow: Collection[str] = (),
    options: Options | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw P × Q × cfg.samples completions per adapter (and of the base if asked) into the run directory.

    Shards completions/<behavior>/<adapter>/part-NNNNN.parquet hold fixed blocks of prompts, personas outermost in the
    given order, schema `completions` (+ source, n_prompt_tokens). A shard that is intact and was drawn by the very same
    request (base, adapter, prompts, sampling, seeds) is kept, also from under another behavior of the run; any other is
    drawn again. A completion's seed depends on (seed, adapter hash, persona, question, sample), so a resumed run holds
    what an uninterrupted one would. source: for adapters without a card. backend: transformers, vllm, or auto; all
    adapters go through one engine. template_system: what the chat template is to say by itself; allow: names of checks
    (canary.CHECKS) whose failure is a warning; options: how vLLM is to run; replace: shards by another request are moved
    to quarantine/ and drawn anew (False: InputError). The first Ctrl-C or SIGTERM lets the shard in hand be written (with
    transformers if it takes no longer than interrupts.GRACE_S), then KeyboardInterrupt. What is killed outright loses
    less than a shard: with transformers the one in hand, drawn again whole, as its draws depend on each other; with vLLM
    what was in the engine's seats, as completions of open shards are kept (leakfast.measure.partial). Seeds are the same.

    Raises, before anything is drawn, InputError (unknown behavior, the same adapter name twice, a prompt
    too long) and AdapterError (another base, no card and no source); StoreError where it cannot write.
    """
    (done,) = evaluate_all(
        loaded,
        run_or_out,
        adapters,
        personas,
        [Asked(behavior, questions, cfg)],
        seed,
        base=base,
        source=source,
        backend=backend,
        template_system=template_system,
        allow=allow,
        options=options,
        replace=replace,
        progress=progress,
    )
    return done


def evaluate_all(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    adapters: Sequence[str | Path],
    personas: Sequence[Persona],
    asked: Sequence[Asked],
    seed: int,
    *,
    base: bool = False,
    source: Source = None,
    backend: str = "transformers",
    template_system: str | None = None,
    allow: Collection[str] = (),
    options: Options | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """As `evaluate`, for several behaviors in one call and one engine; one Evaluation each, in order.

    All behaviors' prompts are rendered and checked before the first completion is drawn."""
    from leakfast import behaviors
    from leakfast.generation import backends, canary
    from leakfast.generation import transformers as local
    from leakfast.generation.contract import requests_for
    from leakfast.prompts import chat
    from leakfast.storage.run import Run

    run = run_or_out if isinstance(run_or_out, Run) else Run(run_or_out)
    for one in asked:
        if not behaviors.get(one.behavior).by_completions:
            raise ValueError(f"{one.behavior} is measured by choices, not by completions")
        _ = one.stop  # refused before anything else
    targets = find_targets(adapters, asked[0].behavior, source=source, base=base)
    if not personas:
        raise InputError("eval: no personas to ask. Use --personas all, names, or a file.")
    if not all(one.texts for one in asked):
        raise InputError("eval: no questions to ask. Use --questions eval, another set's name, or a file.")
    options = options or backends.Options()
    backend = backends.settle(
        loaded,
        backend,
        options,
        [one.sampling for one in asked],
        template_system,
        allow,
        adapters=any(target.path is not None for target in targets),
    )
    check_targets(loaded, targets, backend)
    warn_of_personas(loaded, personas, targets, "their rates differ by chance alone")
    prompts = [chat.render_prompts(loaded.tokenizer, personas, one.texts) for one in asked]
    prompt_hashes = chat.prompt_hashes(loaded.tokenizer, personas)
    for one, mine in zip(asked, prompts, strict=True):
        local.check_lengths(loaded.model, requests_for(mine, 1, 0, BASE), one.config.drawn_tokens)
    run.create()
    with run.lock():
        plans = []
        for one, mine in zip(asked, prompts, strict=True):
            how = {"backend": backend, **({"stop": one.stop} if one.stop else {})}
            how |= options.promised(backend)
            jobs = [_job(loaded, run, one, t, mine, seed, how) for t in targets]
            plans.append(_Plan(one, mine, jobs, prompt_hashes))
            _take_over(run, plans[-1], loaded)
        if not replace:
            refuse_stale(run, [job for plan in plans for job in plan.jobs], "drawn")
        for target in targets:
            keep_card(run, target)
        state = _Counter(sum(plan.kept for plan in plans), sum(plan.rows for plan in plans), progress)
        state.show(targets[0].name)
        open_plans = [plan for plan in plans if plan.waiting]
        for plan in plans:
            if not plan.waiting:
                for job in plan.jobs:
                    clean(run, job)
        if open_plans:
            waiting = list(dict.fromkeys(path for plan in open_plans for path in plan.waiting))
            adapters = [path for path in waiting if path is not None]
            if backend == "transformers":
                _check_adapters(loaded, adapters)
            longest = max(
                len(p.ids) + plan.asked.config.drawn_tokens for plan in open_plans for p in plan.prompts
            )
            with backends.opened(
                loaded,
                adapters,
                backend,
                longest=longest,
                options=options,
                batch_completions=max(plan.asked.config.batch_completions for plan in open_plans),
                stated=any("batch_completions" in p.asked.config.model_fields_set for p in open_plans),
            ) as engine:
                if backend == "vllm":
                    canary.check_engine(
                        engine,
                        loaded,
                        waiting,
                        personas,
                        open_plans[0].asked.texts,
                        allow,
                        {t.path: t.source for t in targets},
                        longest,
                    )
                for plan in open_plans:
                    state.add(_take_over(run, plan, loaded), plan.jobs[0])  # of those drawn a moment ago
                    plan.told = engine.described(plan.asked.sampling)
                    run.log("engine", **plan.told, rendering=chat.recorded(loaded.tokenizer))
                    plan.made = _draw(run, plan, seed, engine, loaded, state, keeps=backend == "vllm")
    done = []
    for plan in plans:
        name, kept = plan.asked.behavior, plan.rows - plan.made
        run.log(
            "eval",
            behavior=name,
            questions=plan.asked.set_name,
            adapters=[t.name for t in targets],
            rows_made=plan.made,
            rows_kept=kept,
        )
        folders = tuple(job.folder for job in plan.jobs)
        told = (plan.told, plan.asked.set_name)
        done.append(Evaluation(name, tuple(targets), folders, plan.made, kept, *told))
    return done


@dataclass
class _Plan:
    """One behavior's part of a call: its prompts, a job a target, hashes of the personas' prompts, and what came of it."""

    asked: Asked
    prompts: Sequence[Prompt]
    jobs: list[Job]
    prompt_hashes: dict[str, str]
    made: int = 0
    told: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        return sum(shard.rows for job in self.jobs for shard in job.shards)

    @property
    def kept(self) -> int:
        return sum(shard.rows for job in self.jobs for shard in job.shards if shard.done)

    @property
    def waiting(self) -> list[Path | None]:
        """Adapters (None: the base) with shards that are not there yet."""
        return [job.target.path for job in self.jobs if job.missing]


@dataclass
class _Counter:
    """Completions there are, out of all."""

    done: int
    total: int
    progress: Progress | None

    def add(self, n: int, job: Job) -> None:
        self.done += n
        self.show(job.target.name)

    def show(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _job(
    loaded: Loaded,
    run: Run,
    asked: Asked,
    target: Target,
    prompts: Sequence[Prompt],
    seed: int,
    how: dict[str, Any],
) -> Job:
    cfg = asked.config
    size = max(1, SHARD_ROWS // cfg.samples)

    def request(start: int, stop: int, **older: str | None) -> str:
        return _request_hash(loaded, target, prompts[start:stop], cfg, seed, {**how, **older})

    return plan_job(run, asked.folder(target.name), target, len(prompts), size, cfg.samples, request)


def _request_hash(
    loaded: Loaded, target: Target, block: Sequence[Prompt], cfg: EvalConfig, seed: int, how: dict[str, Any]
) -> str:
    """SHA-256 of everything the shard's completions follow from."""
    from leakfast.prompts.chat import ids_hash

    asked = [[p.persona, p.question_index, p.question, ids_hash(p.ids)] for p in block]
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


def _check_adapters(loaded: Loaded, adapters: Sequence[Path]) -> None:
    """Every adapter that is still to be measured moves the base, before the first is run."""
    from leakfast import models

    for adapter in adapters[1:]:  # the first is checked when it is attached
        with models.with_adapter(loaded, adapter):
            pass


def _take_over(run: Run, plan: _Plan, loaded: Loaded) -> int:
    """Copy what the run holds of another behavior by the very same requests; completions copied."""
    before, asked = plan.kept, plan.asked
    about = {"base": loaded.fingerprint, "questions": asked.set_name, "questions_sha256": asked.texts_hash}
    plan.jobs = [take_over(run, job, asked.behavior, **about) for job in plan.jobs]
    return plan.kept - before


def _draw(
    run: Run, plan: _Plan, seed: int, engine: Engine, loaded: Loaded, state: _Counter, *, keeps: bool
) -> int:
    """The missing shards of all jobs through one engine, each written as soon as it is whole; completions made.
    keeps: what an earlier run drew of a shard that is not whole is taken, and what this one draws is kept so."""
    from leakfast.generation.contract import Completion, Work, requests_for
    from leakfast.generation.frames import to_frame
    from leakfast.measure.partial import Unfinished

    prompts, samples, longest = plan.prompts, plan.asked.config.samples, plan.asked.config.max_new_tokens
    before: dict[str, list[Completion]] = {}
    made = 0

    def write(work: Work, drawn: list[Completion]) -> None:
        nonlocal made
        job, shard = work.key
        frame = to_frame(
            loaded,
            prompts[shard.start : shard.stop],
            work.requests,
            before.pop(shard.relpath) + drawn,
            behavior=plan.asked.behavior,
            adapter=job.target.name,
            source=job.target.source,
            answer_tokens=longest,
        )
        assert frame.height == shard.rows, "completions were lost or repeated"
        run.add_shard(
            shard.relpath,
            frame,
            request=shard.request,
            adapter=job.target.digest,
            base=loaded.fingerprint,
            questions=plan.asked.set_name,
            questions_sha256=plan.asked.texts_hash,
            personas={p.persona: plan.prompt_hashes[p.persona] for p in prompts[shard.start : shard.stop]},
        )
        unfinished.forget(shard)
        made += len(drawn)

    def works() -> Iterator[Work]:
        for job in plan.jobs:
            clean(run, job)
            for shard in job.missing:
                requests = requests_for(prompts[shard.start : shard.stop], samples, seed, job.target.digest)
                there = before[shard.relpath] = unfinished.of(shard) if keeps else []
                work = Work(
                    (job, shard), job.target.path, requests, frozenset((c.request, c.sample) for c in there)
                )
                state.add(len(there), job)
                if work.wanted:
                    yield work
                else:
                    write(work, [])

    def finished(some: Sequence[Completion], work: Work) -> None:
        job, shard = work.key
        if keeps:
            unfinished.add(shard, some)
        state.add(len(some), job)

    with Unfinished(run) as unfinished, finishing("the shard in hand", bounded=not keeps) as stop:
        for work, drawn in engine.stream(works(), plan.asked.sampling, finished):
            with stop.writing():
                write(work, drawn)
            if stop():
                raise KeyboardInterrupt
    return made


def rates(run: Run, evaluation: Evaluation, personas: Sequence[Persona]) -> Any:
    """Schema `rates` of what `evaluation` measured, and of the run's `base` if it is there: shares with
    95 % Wilson intervals, literal counts in `hits`, others in `hits_<detector>`."""
    import polars as pl

    from leakfast import behaviors
    from leakfast.stats import rates as rate_tables

    made_by = behaviors.get(evaluation.behavior).detector
    if made_by is None:
        raise ValueError(f"{evaluation.behavior} has no rates before a judge has read its completions")
    detector = made_by(pl.col("text"))
    folders = list(evaluation.folders)
    unadapted = f"{folders[0].rpartition('/')[0]}/{BASE}"
    if unadapted not in folders and run.shards(unadapted):
        folders.append(unadapted)
    counts = pl.concat([rate_tables.count(run.read(folder), detector) for folder in folders])
    return rate_tables.table(
        counts,
        {t.name: (t.source, t.seed) for t in evaluation.targets if t.name != BASE},
        {p.name: p.category for p in personas},
    )
