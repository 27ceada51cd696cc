"""`measure`: one call for every kind of measurement, of adapters or of their checkpoints, into a run directory. Demands a
run and a loaded base model; the same call again resumes. Leaves what is done with a shard to the measurers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.behaviors.registry import get
from leakfast.generation.backends import Drawing
from leakfast.measure.choices.measurer import Choices
from leakfast.measure.completions import Completions
from leakfast.measure.contract import Counter, Measured, Measurer
from leakfast.measure.probability.measurer import Probability
from leakfast.measure.request import Request, keep_card
from leakfast.measure.shards import refuse_stale
from leakfast.models import threads
from leakfast.progress import Progress
from leakfast.prompts.templates import recorded
from leakfast.storage.run import Run
from leakfast.version import maker

if TYPE_CHECKING:
    import polars as pl

    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona


def measurer_of(behavior: str) -> type[Measurer]:
    """The measurer of a behavior, by what it is measured by."""
    return Completions if get(behavior).by_completions else Choices


def _kinds(request: Request, by: str) -> list[type[Measurer]]:
    if by not in ("own", "probability"):
        raise ValueError(f"by must be own or probability, not {by!r}")
    if by == "probability":
        return [Probability]
    return list(dict.fromkeys(measurer_of(one.behavior) for one in request.asked))


def measure(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    request: Request,
    drawing: Drawing | None = None,
    *,
    at: str = "final",
    by: str = "own",
    replace: bool = True,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure every behavior of the request under every persona, for its adapters (and the base) as they are ("final"), or
    at "checkpoints": every checkpoint of the adapters, the adapters themselves and the base they begin at.

    by: "own", each behavior's own measurement, or "probability", of its words on replies of the unadapted model that the
    run holds (measure.probability).

    A shard that is intact and follows from the very same request (base, dtype, adapter, prompts, sampling, seeds, items,
    scoring) is kept, also from under another behavior of the run; any other is made again. replace: shards made by
    another request are moved to quarantine/ (False: InputError). The first Ctrl-C or SIGTERM lets the shard in hand be
    written (where that takes no longer than interrupts.GRACE_S), then KeyboardInterrupt. What is killed outright loses
    less than a shard. A completion's seed depends on (seed, adapter hash, persona, question, sample), so a resumed run
    holds what an uninterrupted one would. Returns one Measured a behavior (where sources are alone, one a source), in the
    order asked.

    Raises, before anything is measured, InputError (unknown behavior, the same adapter name twice, a prompt too long,
    at checkpoints an adapter without any), AdapterError (another base, no card and no source), ModelError; StoreError
    where it cannot write."""
    if at not in ("final", "checkpoints"):
        raise ValueError(f"at must be final or checkpoints, not {at!r}")
    run = run_or_out if isinstance(run_or_out, Run) else Run(run_or_out)
    kinds = _kinds(request, by)
    if request.source_alone and kinds != [Completions]:
        raise ValueError("sources alone are asked for completions alone")
    measurers = [kind(loaded, request, drawing or Drawing(), at) for kind in kinds]
    run.create().note_maker(*maker())
    with run.lock():
        planned = [(measurer, measurer.parts(run)) for measurer in measurers]
        parts = [part for _, some in planned for part in some]
        for part in parts:
            part.jobs = [job.portion(*request.portion) for job in part.jobs]
        for measurer, some in planned:
            if not replace:
                refuse_stale(run, [job for part in some for job in part.jobs], measurer.made)
        for measurer in measurers:
            for target in measurer.targets:
                keep_card(run, target)
        done, total = sum(part.done for part in parts), sum(part.rows for part in parts)
        counter, began = Counter(done, total, progress), time.monotonic()
        for measurer, some in planned:
            measurer.carry_out(run, some, counter)
        each = (time.monotonic() - began) / max(1, sum(part.made for part in parts))  # s a row
    found = [
        Measured(
            part.asked.behavior,
            part.asked.set_name,
            tuple(job.target for job in part.jobs),
            tuple(job.folder for job in part.jobs),
            part.made,
            part.rows - part.made,
            part.engine,
        )
        for part in parts
    ]
    for one in found:
        _note(run, loaded, one, by, each)
    order = [(one.behavior, one.set_name) for one in request.asked]
    return sorted(found, key=lambda one: order.index((one.behavior, one.questions)))


def _note(run: Run, loaded: Loaded, one: Measured, by: str, each: float) -> None:
    """A line of the journal. by: as of `measure`; each: seconds that a row took."""
    run.log(
        "eval",
        behavior=one.behavior,
        questions=one.questions,
        by=by,
        adapters=[t.name for t in one.targets],
        made=one.made,
        kept=one.kept,
        seconds=round(each * one.made, 3),
        threads=threads.in_use(),
        rendering=recorded(loaded.tokenizer),
    )


def rates(run: Run, measured: Measured, personas: Sequence[Persona], by: str = "sum") -> pl.DataFrame:
    """Schema `rates` of what was measured, and of the run's `base` if it is there: shares with 95 % intervals,
    Wilson's over samples or items and, of completions, over questions (`bb_*`). by: of full texts, what a choice is made by.
    Raises ValueError for a behavior that has no rate before a judge has read it."""
    return measurer_of(measured.behavior).rates(run, measured, personas, by)
