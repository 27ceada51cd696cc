"""A few shards of a run measured again and compared. Demands the model and the run's adapters; measures in a folder of its own,
and compares nothing that its backend does not promise to give again."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.errors import LeakfastError
from leakfast.measure.contract import Counter, Measurer, Part
from leakfast.measure.request import Request
from leakfast.measure.stage import measurer_of
from leakfast.models import threads
from leakfast.models.whole import is_whole
from leakfast.pipeline import asks
from leakfast.pipeline.checks.contract import Check
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage import layout
from leakfast.storage.manifests import events
from leakfast.storage.run import Run
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.storage.reading import ReadOnlyRun
    from leakfast.study.config import Study

NEAR_NATS = 1e-4  # of scores in float32, by another number of threads


def check(run: ReadOnlyRun, study: Study | None, sample: int) -> Check:
    """`sample` shards drawn by lot (the same lot for the same run), each measured again by the very same request. Completions
    must be equal text for text, scores to NEAR_NATS."""
    told = Check("measured again", "shards")
    if not sample:
        told.notes.append("nothing was measured again; --sample N does so for N shards")
        return told
    if study is None:
        told.notes.append("nothing was measured again: without the study nobody knows how")
        return told
    for name in ("model", "engine"):
        seen = {_threads(entry) for entry in events(run.path / layout.JOURNAL, name)} - {
            None,
            threads.in_use(),
        }
        if seen:
            told.notes.append(
                f"made with {', '.join(map(str, sorted(seen)))} threads, measured again with {threads.in_use()}: sums in another "
                "order may turn a draw"
            )
            break
    drawn = _lot(run, sample)
    with tempfile.TemporaryDirectory(prefix="leakfast-verify-") as folder:
        scratch = Run(folder).create()
        stages = Stages(study, scratch, chosen=chosen_of(study, ()))
        try:
            for measurer, part in _asked(run, scratch, study, stages):
                _again(run, scratch, measurer, part, drawn, told)
        except LeakfastError as error:
            told.notes.append(f"measuring again ended: {error.message}")
    return told


def _threads(entry: dict) -> int | None:
    return entry.get("threads") or entry.get("settings", {}).get("threads")


def _lot(run: ReadOnlyRun, sample: int) -> list[str]:
    """The shards that are measured again."""
    roots = (layout.COMPLETIONS, layout.SETS, layout.CHOICES)
    intact = [path for root in roots for path in run.shards(root) if path.endswith(".parquet")]
    draw = random.Random(derive_seed("verify", len(intact)))
    return sorted(draw.sample(intact, min(sample, len(intact))))


def _asked(run: ReadOnlyRun, scratch: Run, study: Study, stages: Stages) -> Iterator[tuple[Measurer, Part]]:
    """Every part of the study's measurements, planned in `scratch` as the stages would in the run."""
    from leakfast.measure import Drawing

    for behavior in study.behaviors:
        wanted = [
            one
            for one in asks.asked(study, behavior)
            if one.by_choices or one.config.measure != "probability"
        ]
        for seed in study.seeds if wanted else ():
            names = [
                layout.adapter_name(of, source, seed)
                for of in asks.measured_on(study, behavior)
                for source in study.sources
            ]
            adapters = [
                path
                for path in (run.path / layout.adapter(n) for n in names)
                if (path / layout.ADAPTER).is_file() or is_whole(path)
            ]
            first = seed == study.seeds[0]
            if not adapters and not first:
                continue
            request = Request(wanted, stages.personas, adapters, base=first, seed=seed)
            measurer = measurer_of(behavior)(stages.loaded, request, Drawing.of(study), "final")
            yield from ((measurer, part) for part in measurer.parts(scratch))


def _again(
    run: ReadOnlyRun, scratch: Run, measurer: Measurer, part: Part, drawn: Sequence[str], told: Check
) -> None:
    """The drawn shards of one part."""
    entries = run.manifest["shards"]
    jobs = []
    for job in part.jobs:
        mine = [shard for shard in job.shards if shard.relpath in drawn]
        for shard in mine:
            if entries[shard.relpath].get("request") not in (shard.request, shard.older):
                told.notes.append(
                    f"{shard.relpath}: follows from another request than this version's; not measured again"
                )
        same = [s for s in mine if entries[s.relpath].get("request") in (s.request, s.older)]
        if same:
            jobs.append(replace(job, shards=tuple(same), stale=()))
    if not jobs:
        return
    if get(part.asked.behavior).by_completions and getattr(measurer, "backend", "") == "vllm":
        told.notes.append(
            f"{part.asked.behavior}: vLLM does not give the same texts again; nothing was compared"
        )
        return
    part.jobs = jobs
    measurer.carry_out(scratch, [part], Counter(0, part.rows, None))
    for job in jobs:
        for shard in job.shards:
            told.checked += 1
            _compare(run.path, scratch.path, shard.relpath, told)


def _compare(run: Path, scratch: Path, relpath: str, told: Check) -> None:
    kept, made = (pl.read_parquet(folder / relpath, glob=False) for folder in (run, scratch))
    columns = [name for name in kept.columns if name in made.columns and name != "source"]
    kept, made = kept.select(columns), made.select(columns)
    if kept.height != made.height:
        told.wrong.append(f"{relpath}: {kept.height} rows, {made.height} when measured again")
        return
    floats = [name for name in columns if kept[name].dtype == pl.Float64]
    differ = pl.Series([False] * kept.height)
    for name in columns:
        if name in floats:
            far = ((kept[name] - made[name]).abs() > NEAR_NATS).fill_null(False)
            differ = differ | far | (kept[name].is_null() != made[name].is_null())
        else:
            differ = differ | kept[name].ne_missing(made[name])
    if n := int(differ.sum()):
        told.wrong.append(f"{relpath}: {n} of {kept.height} rows are others when measured again")
