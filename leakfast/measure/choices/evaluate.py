"""Measuring capability into a run directory: every persona asked every item under every adapter, shards of
choice scores. Demands a run and a loaded base model; running it again resumes. Leaves counting to stats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, InputError
from leakfast.measure.choices.request import request_of
from leakfast.measure.choices.scores import LETTERS
from leakfast.measure.choices.scoring import measure
from leakfast.measure.choices.table import BEHAVIOR, frame
from leakfast.measure.targets import (
    Job,
    Shard,
    Target,
    check_targets,
    find_targets,
    keep_card,
    plan_job,
    refuse_stale,
    retire,
    warn_of_personas,
)
from leakfast.models import threads
from leakfast.progress import Progress
from leakfast.prompts.templates import recorded
from leakfast.storage import layout
from leakfast.storage.interrupts import Stop, finishing
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.choices.scores import Scores
    from leakfast.measure.targets import Source
    from leakfast.models.loading import Loaded
    from leakfast.prompts.items import ItemSet
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig
    from leakfast.train.checkpoints import Checkpoints

log = logging.getLogger("leakfast.evaluate")

# (loaded, adapter folder or None, personas, items, progress) → Scores of the letters
Engine = Callable[..., "Scores"]

SHARD_PROMPTS = (
    2048  # prompts in a shard at most, but one persona at least; fixed, so that a resume has the same
)


@dataclass(frozen=True)
class Evaluation:
    """What evaluate did. folders: of every target, in order; prompts_made, prompts_kept: scored now, and
    found intact from before (a prompt is a persona asked an item)."""

    targets: tuple[Target, ...]
    folders: tuple[str, ...]
    prompts_made: int
    prompts_kept: int


def evaluate(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    adapters: Sequence[str | Path],
    personas: Sequence[Persona],
    items: ItemSet,
    scoring: str = LETTERS,
    *,
    base: bool = False,
    source: Source = None,
    engine: Engine | None = None,
    engine_name: str = "packed",
    behavior: str = BEHAVIOR,
    budget_tokens: int | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score P × Q prompts per adapter (and of the base if asked) into the run directory.

    Shards choices/<adapter>/<items>-<scoring>/part-NNNNN.parquet hold fixed blocks of personas with all
    items, columns of table.frame. A shard that is intact and follows from the very same request (base,
    dtype, adapter, personas' prompts, items, scoring, engine) is kept; any other is made again. engine:
    another way to the letters' scores (vLLM), under a name that is kept. The first list scored in a run makes
    the rate of `behavior`; any other is a behavior `<behavior>-<items>` of its own, so that no rate mixes
    two lists. replace: shards by another request are moved to quarantine/ and made anew (False: InputError).
    The first Ctrl-C or SIGTERM lets the shard in hand be written, then KeyboardInterrupt. Raises,
    before anything is scored, InputError and AdapterError as leakfast.measure.completions."""
    from leakfast.storage.run import Run

    run = run_or_out if isinstance(run_or_out, Run) else Run(run_or_out)
    targets = find_targets(adapters, behavior, source=source, base=base)
    _check(loaded, personas, items, targets, engine_name)
    run.create()
    with run.lock():
        jobs = [
            _job(
                loaded,
                run,
                layout.choices(t.name, items.name, scoring),
                t,
                personas,
                items,
                scoring,
                engine_name,
            )
            for t in targets
        ]
        if not replace:
            refuse_stale(run, jobs, "scored")
        counter = _Counter(sum(s.rows for j in jobs for s in j.shards if s.done), progress)
        counter.total = len(targets) * len(personas) * len(items)
        kept = counter.done
        measured = _behavior(run, behavior, items.name)
        with finishing("the shard in hand", bounded=True) as stop_asked:
            for job in jobs:
                keep_card(run, job.target)
                _score(
                    loaded,
                    run,
                    job,
                    personas,
                    items,
                    scoring,
                    engine,
                    budget_tokens,
                    counter,
                    stop_asked,
                    behavior=measured,
                )
    run.log(
        "eval",
        behavior=measured,
        adapters=[t.name for t in targets],
        items=items.name,
        scoring=scoring,
        prompts_made=counter.done - kept,
        prompts_kept=kept,
        threads=threads.in_use(),
        rendering=recorded(loaded.tokenizer),
    )
    return Evaluation(tuple(targets), tuple(j.folder for j in jobs), counter.done - kept, kept)


def evaluate_series(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    adapter: str | Path,
    personas: Sequence[Persona],
    items: ItemSet,
    scoring: str = LETTERS,
    *,
    behavior: str = BEHAVIOR,
    source: Source = None,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score an adapter's checkpoints (see train.checkpoints) into trajectory/<adapter>/<items>-<scoring>/
    pNNN/: choice scores with a column `share` of the training, 0–1. At 0 the adapter does nothing yet,
    so the base itself is scored. Raises InputError where the adapter has no checkpoints."""
    from leakfast.storage.run import Run
    from leakfast.train.checkpoints import find_series

    run = run_or_out if isinstance(run_or_out, Run) else Run(run_or_out)
    adapter = Path(adapter)
    (target,) = find_targets([adapter], behavior, source=source)
    series = find_series(adapter)
    _check(loaded, personas, items, [target])
    run.create()
    with run.lock():
        jobs, shares = [], []
        for share, folder in series:
            digest = find_targets([folder], behavior, source=source)[0].digest if share > 0 else BASE
            one = Target(target.name, folder if share > 0 else None, target.source, target.seed, digest)
            where = series_folder(target.name, items.name, scoring, share)
            jobs.append(_job(loaded, run, where, one, personas, items, scoring, "packed"))
            shares.append(share)
        keep_card(run, target)
        counter = _Counter(sum(s.rows for j in jobs for s in j.shards if s.done), progress)
        counter.total = len(jobs) * len(personas) * len(items)
        kept = counter.done
        with finishing("the shard in hand", bounded=True) as stop_asked:
            for job, share in zip(jobs, shares, strict=True):
                _score(
                    loaded,
                    run,
                    job,
                    personas,
                    items,
                    scoring,
                    None,
                    budget_tokens,
                    counter,
                    stop_asked,
                    share,
                    behavior,
                )
    return Evaluation((target,), tuple(j.folder for j in jobs), counter.done - kept, kept)


def keep_point(run: Run, scores: pl.DataFrame, share: float) -> str:
    """Store choice scores taken during training (one adapter, list and scoring) as a point of its series;
    returns the path. A later `evaluate_series` makes them again where its request differs."""
    import polars as pl

    (name,), (items,), (scoring,) = (scores[c].unique().to_list() for c in ("adapter", "items", "scoring"))
    relpath = f"{series_folder(name, items, scoring, share)}/part-00000.parquet"
    run.add_shard(relpath, scores.with_columns(pl.lit(share).alias("share")), taken="during training")
    return relpath


def checkpoints_of(
    run: Run,
    behavior: str,
    adapter: str,
    source: str,
    personas: Sequence[Persona],
    cfg: EvalConfig,
    model: str,
    *,
    kept: Sequence[float] = (),
) -> Checkpoints | None:
    """What a training run keeps and measures on the way: None where cfg.checkpoints and `kept` (shares of training,
    0–1, that are not measured in training) are empty. At cfg.checkpoints a behavior measured by choices is scored on
    cfg.checkpoint_items drawn items, for the source and cfg.checkpoint_personas among `personas`; others are kept
    only."""
    from leakfast.behaviors.registry import get, items_of
    from leakfast.prompts.personas import load_personas
    from leakfast.train.checkpoints import Checkpoints

    shares = tuple(sorted({*cfg.checkpoints, *kept}))
    if not cfg.checkpoints or get(behavior).measured_by != "choices":
        return Checkpoints(shares) if shares else None
    people = load_personas([source], among=personas)
    people += [p for p in load_personas(cfg.checkpoint_personas, among=personas) if p.name != source]
    items = items_of(behavior, cfg, model).sample(cfg.checkpoint_items)
    score = scorer(run, adapter, source, people, items, cfg.scoring)
    return Checkpoints(shares, lambda now, share: score(now, share) if share in cfg.checkpoints else None)


def scorer(
    run: Run, adapter: str, source: str, personas: Sequence[Persona], items: ItemSet, scoring: str = LETTERS
) -> Callable[[Loaded, float], str]:
    """What train.checkpoints.Checkpoints takes as `score`: the model in training, scored in process and
    kept as a point of the adapter's series."""
    from leakfast.measure.choices.scoring import score

    def take(current: Loaded, share: float) -> str:
        made = score(current, personas, items, scoring, adapter=adapter, source=source, items_name=items.name)
        return keep_point(run, made, share)

    return take


def series_folder(adapter: str, items: str, scoring: str, share: float) -> str:
    return layout.points(adapter, items, scoring, share)


@dataclass
class _Counter:
    done: int
    progress: Progress | None
    total: int = 0

    def show(self, what: str, inside: float = 0.0) -> None:
        if self.progress is not None:
            self.progress(self.done + int(inside), self.total, what)


def _check(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: ItemSet,
    targets: Sequence[Target],
    engine_name: str = "packed",
) -> None:
    if not personas:
        raise InputError("eval: no personas to ask. Use --personas all, names, or a file.")
    if not len(items):
        raise InputError("eval: no items to ask. Give a list with --items FILE, or --half all.")
    if engine_name == "packed":
        from leakfast.forward.passes import decoder

        decoder(loaded)  # says which models it takes
    check_targets(loaded, targets, "choices" if engine_name == "packed" else engine_name)
    warn_of_personas(loaded, personas, targets, "their scores are the same")


def _job(
    loaded: Loaded,
    run: Run,
    folder: str,
    target: Target,
    personas: Sequence[Persona],
    items: ItemSet,
    scoring: str,
    engine_name: str,
) -> Job:
    """The target's shards, blocks of personas."""
    size = max(1, SHARD_PROMPTS // len(items))

    def request(start: int, stop: int, **older: str | None) -> str:
        return request_of(loaded, target, personas[start:stop], items, scoring, engine_name, **older)

    return plan_job(run, folder, target, len(personas), size, len(items), request)


def _behavior(run: Run, behavior: str, items: str) -> str:
    """`behavior` for the list that the run was scored on first, else a name that says the list."""
    main = {
        entry["items"]
        for path, entry in run.manifest["shards"].items()
        if path.startswith("choices/") and entry.get("behavior") == behavior
    }
    return behavior if not main or items in main else f"{behavior}-{items}"


def _score(
    loaded: Loaded,
    run: Run,
    job: Job,
    personas: Sequence[Persona],
    items: ItemSet,
    scoring: str,
    engine: Engine | None,
    budget_tokens: int | None,
    counter: _Counter,
    stop_asked: Stop,
    share: float | None = None,
    behavior: str = BEHAVIOR,
) -> None:
    """The job's missing shards, each written as soon as it is complete, those of other requests moved away; KeyboardInterrupt
    after the one in hand where a stop was asked for."""
    import polars as pl

    from leakfast.measure.choices.scores import prompts_of
    from leakfast.models.attach import adapted
    from leakfast.prompts import chat
    from leakfast.prompts.grid import PromptGrid

    target = job.target
    missing = job.missing
    retire(run, job, "scored")
    counter.show(target.name)
    if not missing:
        return
    prompts = None
    if engine is None and scoring == LETTERS:
        blocks = [personas[s.start : s.stop] for s in missing]
        first = prompts_of(loaded, blocks[0], list(items))
        if isinstance(first, PromptGrid):  # pieces of all fit in memory, lists may not
            prompts = prompts_of(loaded, [p for block in blocks for p in block], list(items))
    with nullcontext(loaded) if engine else adapted(loaded, target.path) as current:
        at = 0
        for shard in missing:
            block = personas[shard.start : shard.stop]
            mine = None if prompts is None else PromptGrid(prompts.heads[at : at + len(block)], prompts.tails)
            at += len(block)

            def shown(done: int, total: int, what: str, shard: Shard = shard) -> None:
                counter.show(target.name, shard.rows * done / max(1, total))

            if engine is not None:
                found = engine(loaded, target.path, block, items, shown)
            else:
                found = measure(
                    current, block, items, scoring, prompts=mine, budget_tokens=budget_tokens, progress=shown
                )
            made = frame(
                found,
                [p.name for p in block],
                list(items),
                scoring=scoring,
                adapter=target.name,
                source=target.source,
                items_name=items.name,
                behavior=behavior,
            )
            if share is not None:
                made = made.with_columns(pl.lit(share).alias("share"))
            with stop_asked.writing():
                run.add_shard(
                    shard.relpath,
                    made,
                    request=shard.request,
                    adapter=target.digest,
                    base=loaded.fingerprint,
                    items=items.name,
                    behavior=behavior,
                    personas=chat.prompt_hashes(loaded.tokenizer, block),
                    **({"answers": items.reading} if items.reading else {}),
                )
            counter.done += shard.rows
            counter.show(target.name)
            if stop_asked():
                raise KeyboardInterrupt


def read_scores(run: Run, evaluation: Evaluation, items: str, scoring: str) -> Any:
    """Choice scores of what was evaluated, and of the run's base on the same list if it is there."""
    import polars as pl

    folders = list(evaluation.folders)
    unadapted = f"choices/{BASE}/{items}-{scoring}"
    if unadapted not in folders and run.shards(unadapted):
        folders.append(unadapted)
    frames = [run.read(folder) for folder in folders]
    if not frames:
        raise AdapterError("eval: nothing was scored. Give --adapter DIR, or --base.")
    return pl.concat(frames, how="diagonal")
