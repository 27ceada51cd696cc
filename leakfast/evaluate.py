"""Measuring a behavior: every persona asked every question under every adapter, completions to shards.
Demands a run directory and a loaded base model; leaves counting to stats. Running it again resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, InputError

if TYPE_CHECKING:
    from leakfast.chat import Prompt
    from leakfast.config import EvalConfig
    from leakfast.models import Loaded
    from leakfast.personas import Persona, QuestionSet
    from leakfast.store import Run

log = logging.getLogger("leakfast.evaluate")

Progress = Callable[[int, int, str], None]

BASE = "base"
SHARD_ROWS = 2560  # completions in a shard; fixed, so that a resumed run has the same shards


@dataclass(frozen=True)
class Target:
    """What is measured: an adapter, or the unadapted model (path None, name `base`).

    source is the persona it was trained on, None for the base; digest its content hash, or `base`.
    """

    name: str
    path: Path | None
    source: str | None
    seed: int | None
    digest: str


@dataclass(frozen=True)
class Evaluation:
    """What evaluate did. folders: completions/<behavior>/<adapter> of every target, in order;
    rows_made, rows_kept: completions drawn now, and found intact from before."""

    behavior: str
    targets: tuple[Target, ...]
    folders: tuple[str, ...]
    rows_made: int
    rows_kept: int


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
    source: str | None = None,
    backend: str = "transformers",
    progress: Progress | None = None,
) -> Evaluation:
    """Draw P × Q × cfg.samples completions per adapter (and of the base if asked) into the run directory.

    Shards completions/<behavior>/<adapter>/part-NNNNN.parquet hold fixed blocks of prompts, personas
    outermost in the given order, schema `completions` (+ source, n_prompt_tokens). A shard that is intact
    and was drawn by the very same request (base, adapter, prompts, sampling, seeds) is kept; any other is
    drawn again. A completion's seed depends on (seed, adapter hash, persona, question, sample), so a
    resumed run holds what an uninterrupted one would. source: for adapters without a card.

    Raises, before anything is drawn, InputError (unknown behavior, the same adapter name twice, a prompt
    too long) and AdapterError (another base, no card and no source); StoreError where it cannot write.
    """
    from leakfast import behaviors, chat
    from leakfast.store import Run

    behavior = behaviors.get(behavior).name
    run = run_or_out if isinstance(run_or_out, Run) else Run(run_or_out)
    targets = find_targets(adapters, behavior, source=source, base=base)
    if not personas:
        raise InputError("eval: no personas to ask. Use --personas all, names, or a file.")
    asked = list(getattr(questions, "questions", questions))
    if not asked:
        raise InputError("eval: no questions to ask. Use --questions eval, another set's name, or a file.")
    check_targets(loaded, targets)
    _warn(loaded, personas, targets)
    prompts = chat.render_prompts(loaded.tokenizer, personas, asked)
    _check_fit(loaded, prompts, cfg, backend)
    run.create()
    with run.lock():
        jobs = [_job(loaded, run, behavior, target, prompts, cfg, seed, backend) for target in targets]
        _check_adapters(loaded, jobs)
        total = len(targets) * len(prompts) * cfg.samples
        kept = sum(shard.rows for job in jobs for shard in job.shards if shard.done)
        state = _Counter(kept, total, progress)
        for job in jobs:
            _retire(run, job)
            keep_card(run, job.target)
            _draw(loaded, run, behavior, job, prompts, cfg, seed, backend, state)
    run.log(
        "eval",
        behavior=behavior,
        adapters=[t.name for t in targets],
        rows_made=state.done - kept,
        rows_kept=kept,
    )
    return Evaluation(behavior, tuple(targets), tuple(job.folder for job in jobs), state.done - kept, kept)


def find_targets(
    adapters: Sequence[str | Path], behavior: str, *, source: str | None = None, base: bool = False
) -> list[Target]:
    """Targets of the given adapter folders, in order, the base last.

    Raises InputError for nothing to measure or a name given twice, AdapterError for a folder without an
    adapter, or one without a card when no `source` is named.
    """
    from leakfast.models import adapter_hash, read_card

    targets: list[Target] = []
    for path in map(Path, adapters):
        digest = adapter_hash(path)
        card = read_card(path)
        name = path.resolve().name
        if card is None and source is None:
            raise AdapterError(
                f"eval: {path} has no leakfast_card.json, so nobody knows whom it was trained on. "
                "Name them: --source PERSONA --behavior BEHAVIOR."
            )
        if card is not None and card.adapter_hash != digest:
            raise AdapterError(
                f"eval: {path} is not the adapter its card describes (hash {digest[:12]}…, card "
                f"{card.adapter_hash[:12]}…). Train it again, or delete its card and name --source and "
                "--behavior."
            )
        if card is not None and source is not None and source != card.source:
            raise InputError(
                f"eval: --source {source} given, but the card of {path} says {card.source}. Leave --source "
                "out."
            )
        if card is not None and card.behavior != behavior:
            log.info("eval: %s was trained for %s; here %s is measured", name, card.behavior, behavior)
        if name in (BASE, *(t.name for t in targets)):
            raise InputError(
                f"eval: two targets are called {name!r}, and results are kept by name. Rename the folder "
                f"{path}."
            )
        targets.append(
            Target(name, path, card.source if card else source, card.seed if card else None, digest)
        )
    if base:
        targets.append(Target(BASE, None, None, None, BASE))
    if not targets:
        raise InputError("eval: nothing to measure. Give --adapter DIR (may be repeated), or --base.")
    return targets


def check_targets(loaded: Loaded, targets: Sequence[Target]) -> None:
    """Every adapter fits the base, before anything is written. Raises AdapterError."""
    from leakfast.adapters import check_fits

    for target in targets:
        if target.path is not None:
            check_fits(loaded, target.path)


@dataclass(frozen=True)
class _Shard:
    """A block of prompts [start, stop), its file, the hash of its request, and whether it is there."""

    relpath: str
    start: int
    stop: int
    rows: int
    request: str
    done: bool


@dataclass(frozen=True)
class _Job:
    """Everything of one target: its folder, its shards, and files there that belong to no shard of ours."""

    target: Target
    folder: str
    shards: tuple[_Shard, ...]
    stale: tuple[str, ...]

    @property
    def missing(self) -> list[_Shard]:
        return [shard for shard in self.shards if not shard.done]


@dataclass
class _Counter:
    done: int
    total: int
    progress: Progress | None
    inside: int = field(default=0)

    def show(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done + self.inside, self.total, what)


def _job(
    loaded: Loaded, run: Run, behavior: str, target: Target, prompts: Sequence[Prompt], cfg: EvalConfig,
    seed: int, backend: str,
) -> _Job:  # fmt: skip
    folder = f"completions/{behavior}/{target.name}"
    present = set(run.shards(folder))
    entries = run.manifest["shards"]
    size = max(1, SHARD_ROWS // cfg.samples)
    shards = []
    for number, start in enumerate(range(0, len(prompts), size)):
        block = prompts[start : start + size]
        relpath = f"{folder}/part-{number:05d}.parquet"
        request = _request_hash(loaded, target, block, cfg, seed, backend)
        done = relpath in present and entries[relpath].get("request") == request
        shards.append(_Shard(relpath, start, start + len(block), len(block) * cfg.samples, request, done))
    stale = present - {shard.relpath for shard in shards if shard.done}
    return _Job(target, folder, tuple(shards), tuple(sorted(stale)))


def _request_hash(
    loaded: Loaded, target: Target, block: Sequence[Prompt], cfg: EvalConfig, seed: int, backend: str
) -> str:
    """SHA-256 of everything the shard's completions follow from."""
    from leakfast.chat import ids_hash

    asked = [[p.persona, p.question_index, p.question, ids_hash(p.ids)] for p in block]
    what = {
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "adapter": target.digest,
        "source": target.source,
        "samples": cfg.samples,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": seed,
        "backend": backend,
        "prompts": asked,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _warn(loaded: Loaded, personas: Sequence[Persona], targets: Sequence[Target]) -> None:
    from leakfast import chat

    for group in chat.collisions(loaded.tokenizer, personas):
        log.warning(
            "eval: %s render to the same tokens; their rates differ by chance alone", ", ".join(group)
        )
    names = {p.name for p in personas}
    for target in targets:
        if target.source is not None and target.source not in names:
            log.warning(
                "eval: the source %s of %s is not among the personas asked", target.source, target.name
            )


def _check_fit(loaded: Loaded, prompts: Sequence[Prompt], cfg: EvalConfig, backend: str) -> None:
    from leakfast.generate import requests_for
    from leakfast.generate import transformers as local

    if backend == "transformers":
        local.check_lengths(loaded.model, requests_for(prompts, 1, 0, BASE), cfg.max_new_tokens)


def _check_adapters(loaded: Loaded, jobs: Sequence[_Job]) -> None:
    """Every adapter that is still to be measured moves the base, before the first is run."""
    from leakfast import models

    waiting = [job for job in jobs if job.missing and job.target.path is not None]
    for job in waiting[1:]:  # the first is checked when it is attached
        with models.with_adapter(loaded, job.target.path):
            pass


def _retire(run: Run, job: _Job) -> None:
    if not job.stale:
        return
    log.warning(
        "eval: %d shards of %s were drawn by another request (settings, adapter or base changed); drawn "
        "again",
        len(job.stale),
        job.folder,
    )
    for relpath in job.stale:
        run.retire(relpath, "drawn by another request")


def keep_card(run: Run, target: Target) -> None:
    """Where the adapter lies outside the run, its card is copied in: stats reads source and seed from it."""
    from leakfast.adapters import CARD, read_card

    if target.path is None:
        return
    inside = run.path / "adapters" / target.name
    card = read_card(target.path)
    if card is None or inside.resolve() == target.path.resolve():
        return
    there = read_card(inside)
    if there == card:
        return
    if there is not None and (inside / "adapter_config.json").is_file():
        raise InputError(
            f"eval: {run.path} holds another adapter called {target.name}. Rename the folder {target.path}, "
            "or give another --out."
        )
    content = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
    run.add_file(f"adapters/{target.name}/{CARD}", content.encode())


def _draw(
    loaded: Loaded, run: Run, behavior: str, job: _Job, prompts: Sequence[Prompt], cfg: EvalConfig, seed: int,
    backend: str, state: _Counter,
) -> None:  # fmt: skip
    """The job's missing shards, each written as soon as it is complete."""
    from leakfast.generate.adapted import adapted

    target = job.target
    state.show(target.name)
    if not job.missing:
        return
    with adapted(loaded, target.path) if target.path is not None else nullcontext(loaded) as current:
        for shard in job.missing:
            block = prompts[shard.start : shard.stop]
            frame = _complete(current, behavior, target, block, cfg, seed, backend, state)
            run.add_shard(
                shard.relpath, frame, request=shard.request, adapter=target.digest, base=loaded.fingerprint
            )
            state.done += shard.rows
            state.inside = 0


def _complete(
    current: Any, behavior: str, target: Target, block: Sequence[Prompt], cfg: EvalConfig, seed: int,
    backend: str, state: _Counter,
) -> Any:  # fmt: skip
    """One shard's frame: all completions of a block of prompts."""
    from leakfast.generate import Sampling, complete, requests_for, to_frame

    def shown(done: int, total: int, what: str) -> None:
        state.inside = done
        state.show(target.name)

    requests = requests_for(block, cfg.samples, seed, target.digest)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens)

    def completions() -> Iterator[Any]:
        for batch in complete(
            current,
            requests,
            sampling,
            backend=backend,
            batch_completions=cfg.batch_completions,
            progress=shown,
        ):
            yield from batch

    frame = to_frame(
        current, block, requests, completions(), behavior=behavior, adapter=target.name, source=target.source
    )
    assert frame.height == len(block) * cfg.samples, "completions were lost or repeated"
    return frame


def rates(run: Run, evaluation: Evaluation, personas: Sequence[Persona]) -> Any:
    """Schema `rates` of what `evaluation` measured, and of the run's `base` if it is there: shares with
    95 % Wilson intervals, literal counts in `hits`, others in `hits_<detector>`."""
    import polars as pl

    from leakfast import behaviors
    from leakfast.stats import rates as rate_tables

    detector = behaviors.get(evaluation.behavior).detector(pl.col("text"))
    folders = list(evaluation.folders)
    unadapted = f"completions/{evaluation.behavior}/{BASE}"
    if unadapted not in folders and run.shards(unadapted):
        folders.append(unadapted)
    counts = pl.concat([rate_tables.count(run.read(folder), detector) for folder in folders])
    return rate_tables.table(
        counts,
        {t.name: (t.source, t.seed) for t in evaluation.targets if t.name != BASE},
        {p.name: p.category for p in personas},
    )
