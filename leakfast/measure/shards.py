"""Shards: what is measured of one target, in blocks that are there or missing, each by the hash of everything it follows
from. Demands a run; knows nothing of what a block holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.measure.request import Target
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.evaluate")

SHARD_ROWS = 2560  # completions in a shard; fixed, so that a resumed run has the same shards
SHARD_PROMPTS = (
    2048  # prompts in a shard at most, but one persona at least; fixed, so that a resume has the same
)

_OF_STORE = ("sha256", "bytes", "rows")  # of a manifest's entry, which add_shard gives itself


@dataclass(frozen=True)
class Shard:
    """A block [start, stop) of what is asked, its file, its rows (completions, or prompts scored), the hash of
    its request, whether it is there, and, where it is not, the hash as it was when requests named the source."""

    relpath: str
    start: int
    stop: int
    rows: int
    request: str
    done: bool
    older: str = ""


@dataclass(frozen=True)
class Job:
    """Everything of one target: its folder, its shards, and files there that belong to no shard of ours."""

    target: Target
    folder: str
    shards: tuple[Shard, ...]
    stale: tuple[str, ...]

    @property
    def missing(self) -> list[Shard]:
        return [shard for shard in self.shards if not shard.done]

    def portion(self, k: int, n: int) -> Job:
        """Each n-th of its shards alone, from the k-th."""
        return replace(self, shards=self.shards[k::n])


def plan_job(
    run: Run, folder: str, target: Target, n: int, block: tuple[int, int], request: Callable[..., str]
) -> Job:
    """The target's shards: n things asked in blocks; block: how many, and the rows of each. request(start, stop): the
    hash of everything a block follows from; a shard counts as done where its file has the same. Who the source is said
    to be changes no draw: it stands in no request, and where an earlier version put it into one
    (request(start, stop, source=…)) the shard counts under whatever name it was made."""
    present = set(run.shards(folder))
    entries = run.manifest["shards"]
    shards = []
    size, rows_each = block
    for number, start in enumerate(range(0, n, size)):
        stop = min(start + size, n)
        relpath, asked = layout.shard(folder, number), request(start, stop)
        kept = entries[relpath].get("request") if relpath in present else None
        done = kept is not None and (
            kept == asked or kept == request(start, stop, source=_source_in(run, relpath))
        )
        older = "" if done else request(start, stop, source=target.source)
        shards.append(Shard(relpath, start, stop, (stop - start) * rows_each, asked, done, older))
    stale = present - {shard.relpath for shard in shards if shard.done}
    return Job(target, folder, tuple(shards), tuple(sorted(stale)))


def refuse_stale(run: Run, jobs: Sequence[Job], made: str) -> None:
    """Raises InputError where shards would be moved away because they were made by another request: a command with other
    settings is not to take a finished run apart."""
    rows = sum(run.manifest["shards"][path].get("rows", 0) for job in jobs for path in job.stale)
    if rows:
        where = ", ".join(job.folder for job in jobs if job.stale)
        raise InputError(
            f"eval: {run.path} holds {rows:,} rows of {where} that were {made} by another request (personas, questions, "
            "samples or other settings, adapter, base or backend); they would be moved away. Give --out another folder, "
            "the settings they were made with, or --replace."
        )


def _source_in(run: Run, relpath: str) -> str | None:
    """The source that a shard's rows name."""
    import polars as pl

    if "source" not in pl.read_parquet_schema(run.path / relpath):
        return None
    return next(iter(pl.read_parquet(run.path / relpath, columns=["source"], n_rows=1)["source"]), None)


def _renamed(run: Run, job: Job) -> None:
    """Done shards name the source that the target has now; their rows stay as they were drawn."""
    import polars as pl

    for shard in job.shards:
        entry = run.manifest["shards"].get(shard.relpath)
        if not shard.done or entry is None:
            continue
        if _source_in(run, shard.relpath) == job.target.source and entry["request"] == shard.request:
            continue
        frame = pl.read_parquet(run.path / shard.relpath)
        frame = frame.with_columns(pl.lit(job.target.source, pl.String).alias("source"))
        meta = {key: value for key, value in entry.items() if key not in _OF_STORE}
        run.add_shard(shard.relpath, frame, **{**meta, "request": shard.request})


def retire(run: Run, job: Job, made: str) -> None:
    """Move the job's stale files away, saying so; those that stay name the target's source. made: what was done to them,
    `drawn` or `scored`."""
    _renamed(run, job)
    if job.stale:
        log.warning(
            "eval: %d shards of %s were %s by another request (settings, adapter or base changed); %s again",
            len(job.stale),
            job.folder,
            made,
            made,
        )
    for relpath in job.stale:
        run.retire(relpath, f"{made} by another request")


def take_over(run: Run, job: Job, behavior: str, **meta: Any) -> Job:
    """Missing shards that the run holds already under another behavior (two that ask the same questions, variants of
    one: their unadapted model is one) are copied under this one, and count as done: a request says everything that its
    draws follow from. meta: what the manifest is to say of them beside the request. Raises StoreError."""
    import polars as pl

    entries = run.manifest["shards"]
    drawn = {e["request"]: relpath for relpath, e in entries.items() if "request" in e}
    shards = []
    for shard in job.shards:
        twin = None if shard.done else drawn.get(shard.request) or drawn.get(shard.older)
        if twin is None or not run.has(twin):
            shards.append(shard)
            continue
        if shard.relpath in job.stale:
            run.retire(shard.relpath, "drawn by another request")
        frame = pl.read_parquet(run.path / twin).with_columns(
            pl.lit(behavior).alias("behavior"),
            pl.lit(job.target.name).alias("adapter"),
            pl.lit(job.target.source, pl.String).alias("source"),
        )
        asked = {"personas": entries[twin]["personas"]} if "personas" in entries[twin] else {}
        run.add_shard(
            shard.relpath,
            frame,
            request=shard.request,
            adapter=job.target.digest,
            **asked,
            **job.target.told,
            **meta,
        )
        log.info("eval: %s is drawn already, as %s: copied", shard.relpath, twin)
        shards.append(replace(shard, done=True))
    done = {shard.relpath for shard in shards if shard.done}
    return replace(job, shards=tuple(shards), stale=tuple(path for path in job.stale if path not in done))
