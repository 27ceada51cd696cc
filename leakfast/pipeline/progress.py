"""How far a run is, seen from beside it: stages done, shards of all, their rate, the time that remains, rates so far.
Demands a run that is only read; locks and writes nothing, and knows nothing of a stage that has left no trace yet."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.partial import SUFFIX
from leakfast.measure.shards import SHARD_PROMPTS, SHARD_ROWS
from leakfast.pipeline import asks
from leakfast.pipeline.steps import SHOWN
from leakfast.prompts.personas import load_personas
from leakfast.stats import accuracy, summaries, two_way
from leakfast.stats import rates as rate_tables
from leakfast.stats.collect import completion_folders, origin
from leakfast.stats.rates import BASE
from leakfast.stats.summary import rate_interval, unit
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun, writer
from leakfast.study.config import load_study

if TYPE_CHECKING:
    from pathlib import Path

MEASURED = (layout.COMPLETIONS, layout.SETS, layout.CHOICES)  # folders whose shards are counted
WINDOW = 10  # shards behind a rate
QUIET_S = 10.0  # without a writer and without a change for so long, a run has ended


@dataclass(frozen=True)
class Expected:
    """What a study asks in all. completions: null where choices are among it. personas: how many are asked."""

    shards: int
    completions: int | None
    personas: int


@dataclass(frozen=True)
class Look:
    """A run at one moment. stage: the last trace of work in words; stages: kind → (done, of all; null: not known).

    shards, completions: in the manifest, under MEASURED; in_hand: completions of shards that are not whole yet; *_all:
    None where the study does not tell. per_min: shards a minute since the engine was opened, over the last WINDOW at most;
    left_s: seconds of measuring left at the rate of completions (of shards where there are choices), training and tables
    not counted. rates: a row an adapter, of whole shards. writer: process that holds the run; finished: the report was
    made after the last shard; ended: nobody writes it."""

    at: datetime
    stage: str
    stages: dict[str, tuple[int, int | None]]
    shards: int
    shards_all: int | None
    completions: int
    completions_all: int | None
    in_hand: int
    per_min: float | None
    left_s: float | None
    rates: list[dict[str, Any]]
    writer: int | None
    finished: bool
    ended: bool
    why: str | None = None


@dataclass
class Watched:
    """A run that is looked at again and again; what was read once is not read twice."""

    run: ReadOnlyRun
    _expected: Expected | None = None
    _why: str | None = None
    _study: dict[str, int] = field(default_factory=dict)
    _read: int = 0  # bytes of the log
    _events: list[dict[str, Any]] = field(default_factory=list)
    _counts: dict[str, pl.DataFrame] = field(default_factory=dict)
    _rated: tuple[list[str], list[dict[str, Any]]] | None = None

    def look(self, now: datetime) -> Look:
        """The run now (an aware time). Raises what reading a run raises."""
        self._know()
        self._tail()
        shards = {
            path: entry
            for path, entry in self.run.manifest["shards"].items()
            if path.split("/")[0] in MEASURED
        }
        rows = sum(e.get("rows", 0) for path, e in shards.items() if not path.startswith(layout.CHOICES))
        all_of = self._expected
        per_min, rows_per_s = self._rate(now)
        left = None
        if all_of is not None and per_min:
            left = max(0, all_of.shards - len(shards)) / per_min * 60
            if all_of.completions is not None and rows_per_s:
                left = max(0, all_of.completions - rows) / rows_per_s
        held = writer(self.run)
        last = self._time_of(self._events[-1]) if self._events else None
        quiet = last is None or (now - last).total_seconds() > QUIET_S
        return Look(
            at=now,
            stage=self._stage(),
            stages=self._stages(),
            shards=len(shards),
            shards_all=all_of.shards if all_of else None,
            completions=rows,
            completions_all=all_of.completions if all_of else None,
            in_hand=self._in_hand(),
            per_min=per_min,
            left_s=left,
            rates=self._rates(sorted(shards)),
            writer=held,
            finished=self._finished(),
            ended=held is None and quiet,
            why=self._why,
        )

    def _know(self) -> None:
        """What the study asks in all; why that is not known."""
        path = self.run.path / layout.STUDY
        if self._expected is not None or self._why is not None:
            return
        if not path.is_file():
            self._why = "the run was made without a study, so how much there will be is not known"
            return
        try:
            study = load_study(path)
            self._expected = _expected(study)
        except InputError as error:
            self._why = f"how much there will be is not known: {' '.join(error.message.split())}"
            return
        adapters = len(study.sources) * len(study.seeds) * len(asks.trained(study))
        self._study = {"centroids": 1, "data": adapters, "train": adapters}

    def _tail(self) -> None:
        """Take up the lines that were added to the log; a last line that is not whole yet waits."""
        path = self.run.path / layout.JOURNAL
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                self._time_of(event)
                self._events.append(event)
            except (ValueError, KeyError, TypeError):
                continue  # torn or damaged: the manifest, not the log, is what counts

    @staticmethod
    def _time_of(event: dict[str, Any]) -> datetime:
        return datetime.fromisoformat(event["time"])

    def _measured(self) -> list[dict[str, Any]]:
        """Events of shards of measurements since the engine was opened last, that one first."""
        opened = [i for i, event in enumerate(self._events) if event["event"] in ("engine", "model")]
        since = self._events[opened[-1] :] if opened else self._events
        kept = [e for e in since if e["event"] == "shard" and str(e.get("path")).split("/")[0] in MEASURED]
        return [*since[:1], *kept] if opened else kept

    def _rate(self, now: datetime) -> tuple[float | None, float | None]:
        """(shards a minute, completions a second) over the last WINDOW shards; None before there are any."""
        events = self._measured()[-WINDOW - 1 :]
        if len(events) < 2:
            return None, None
        first, last = self._time_of(events[0]), self._time_of(events[-1])
        took, waited = (last - first).total_seconds(), (now - first).total_seconds()
        done, rows = len(events) - 1, sum(event.get("rows", 0) for event in events[1:])
        if took <= 0:
            return None, None
        # a shard that takes longer than those before slows the rate down before it is there
        slow = min(1.0, (done + 1) / done * took / waited) if waited > 0 else 1.0
        return 60 * done / took * slow, rows / took * slow

    def _stage(self) -> str:
        for event in reversed(self._events):
            kind, path = event["event"], str(event.get("path", ""))
            folder = path.split("/")[0]
            if kind == "engine":
                return "drawing, with the engine just opened"
            if kind == "model":
                return "the model is loaded"
            if kind == "shard" and folder in (*MEASURED, layout.JUDGEMENTS, layout.SERIES, layout.POINTS):
                return f"measuring: last a shard of {path.rpartition('/')[0]}"
            if kind == "shard" and folder in (layout.TABLES, layout.FIGURES, layout.REPORT):
                return SHOWN
            if kind == "stage":
                return f"after {event.get('key')}"
        return "begun"

    def _stages(self) -> dict[str, tuple[int, int | None]]:
        """Kinds of stages that are done, of how many."""
        done: dict[str, int] = dict.fromkeys(self._study, 0)
        for key in self.run.manifest["stages"]:
            kind = str(key).split(" ")[0]
            if not str(key).startswith(("centroids of", layout.FIGURES)):
                done[kind] = done.get(kind, 0) + 1
        return {kind: (n, self._study.get(kind)) for kind, n in done.items()}

    def _finished(self) -> bool:
        places = {"report": -1, "shard": -1}
        for place, event in enumerate(self._events):
            path = str(event.get("path", ""))
            if event["event"] == "shard" and path == layout.REPORT:
                places["report"] = place
            elif event["event"] == "shard" and path.split("/")[0] in MEASURED:
                places["shard"] = place
        return places["report"] > places["shard"]

    def _in_hand(self) -> int:
        """Completions that are kept beside shards which are not whole yet."""
        files: list[Path] = [
            path
            for folder in (layout.COMPLETIONS, layout.SETS)
            for path in (self.run.path / folder).rglob(f"*{SUFFIX}")
        ]
        found = 0
        for path in files:
            try:
                found += path.read_bytes().count(b"\n")
            except FileNotFoundError:  # whole since
                continue
        return found

    def _rates(self, shards: list[str]) -> list[dict[str, Any]]:
        """A row per behavior and adapter: source's rate, mean of the bystanders so far, and how many personas."""
        if self._rated is None or self._rated[0] != shards:
            self._rated = (shards, _rated(self.run, self._counts))
        return self._rated[1]


def _expected(study: Any) -> Expected:
    """Shards and completions of a study's behaviors over all adapters and the base; points of training not counted."""
    people = len(load_personas(study.personas))
    shards, drawn, choices = 0, 0, False
    for behavior in study.behaviors:
        adapters = len(study.sources) * len(study.seeds) * len(asks.measured_on(study, behavior)) + 1
        for one in asks.asked(study, behavior):
            if one.by_choices:
                choices, n, size = True, people, max(1, SHARD_PROMPTS // len(one.questions))
            else:
                n, size = people * len(one.texts), max(1, SHARD_ROWS // one.config.samples)
                drawn += adapters * n * one.config.samples
            shards += adapters * -(-n // size)
    return Expected(shards, None if choices else drawn, people)


def _rated(run: ReadOnlyRun, known: dict[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Rates of what is whole so far; known: shard → its counts, filled here."""
    parts, adapters = [], {}
    for behavior, adapter in completion_folders(run):
        detector = get(behavior).detector
        if detector is None:  # a judge has to read them first
            continue
        files = [
            path for path in run.shards(layout.completions(behavior, adapter)) if path.endswith(".parquet")
        ]
        for path in files:
            if path not in known:
                rows = pl.read_parquet(run.path / path, glob=False)
                known[path] = rate_tables.count(rows, detector(pl.col("text")), by_question=True)
            parts.append(known[path])
        if adapter != BASE:
            adapters[adapter] = origin(run, adapter, run.scan(files[0]).head(1).collect())
    scores = accuracy.read(run)
    if scores is not None:
        counts = accuracy.count(scores)
        for adapter in counts["adapter"].unique():
            if adapter != BASE:
                adapters[adapter] = origin(run, adapter, scores.filter(adapter=adapter))
        parts.append(counts)
    if not parts:
        return []
    counts = pl.concat(parts, how="diagonal")
    rates = rate_tables.table(rate_tables.totals(counts), adapters, {})
    rates = summaries.with_intervals(rates, counts)
    means = two_way.mean_bystanders(rates, counts)
    return [
        _row(part, means.filter(behavior=behavior, adapter=adapter), unit(rates, str(behavior)))
        for (behavior, adapter), part in rates.group_by("behavior", "adapter", maintain_order=True)
    ]


def _row(part: pl.DataFrame, mean: pl.DataFrame, scale: str) -> dict[str, Any]:
    part = part.with_columns(side.alias(end) for end, side in rate_interval(part).items())
    own = (
        part.filter(role="source").select("rate", "low", "high").row(0)
        if (part["role"] == "source").any()
        else None
    )
    most = part.filter(pl.col("role") != "source", pl.col("rate") > 0).sort(
        ["rate", "persona"], descending=[True, False]
    )
    row: dict[str, Any] = part.select("behavior", "adapter", "source", "seed").row(0, named=True)
    row |= {"unit": scale, "personas": part.height, "counted": int(part["total"].sum() or 0)}
    row |= dict(zip(("source_rate", "source_low", "source_high"), own or (None,) * 3, strict=True))
    told = mean.row(0, named=True) if mean.height else {}
    row |= {name: told.get(name) for name in ("mean_bystander", "mean_bystander_low", "mean_bystander_high")}
    if part["adapter"][0] == BASE:
        row["mean_bystander"] = part["rate"].mean()
    return row | {"most": most["rate"].first(), "most_persona": most["persona"].first()}
