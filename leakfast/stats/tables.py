"""From a run's measurements to rates, pairs, correlations and what they amount to: polars in, polars out.
Demands a run directory; computes in seconds, keeps full precision, never imports torch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from threadpoolctl import threadpool_limits

from leakfast.errors import InputError
from leakfast.progress import Progress
from leakfast.stats import (
    accuracy,
    analysis,
    dropped,
    exposure,
    exposure_correlations,
    health,
    marks,
    similarity,
    specificity,
    steering,
    summaries,
    two_way,
    verdicts,
)
from leakfast.stats import summary as summary_tables
from leakfast.stats.collect import Collected, collect, inputs_hash
from leakfast.stats.correlations import correlate
from leakfast.stats.imported import IMPORTED
from leakfast.stats.pairs import layers_of
from leakfast.stats.people import read_people
from leakfast.storage import layout, schema
from leakfast.storage.run import Run
from leakfast.version import __version__, commit

log = logging.getLogger("leakfast.stats")

TABLES = ("rates", "pairs", "correlations")
_COUNTED = (layout.COMPLETIONS, layout.CHOICES, layout.PROBABILITY)  # what rates come from
METHOD = 2  # goes up when a table comes to mean something else: those that were made before are not current


@dataclass(frozen=True)
class Stats:
    """The tables of a run (schemas `rates`, `pairs`, `correlations`) and what they lack.

    `missing`: one sentence for each part the run does not have (yet); empty when nothing lacks.
    `more`: the further tables by name (`analysis.TABLES` says what each holds)."""

    rates: pl.DataFrame
    pairs: pl.DataFrame
    correlations: pl.DataFrame
    missing: tuple[str, ...] = ()
    more: dict[str, pl.DataFrame] = field(default_factory=dict)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The three tables by name."""
        return {name: getattr(self, name) for name in TABLES}

    def all_tables(self) -> dict[str, pl.DataFrame]:
        """The three and the further ones by name."""
        return self.tables() | self.more

    def behaviors(self) -> list[str]:
        """Behaviors measured, in order of appearance."""
        return self.rates["behavior"].unique(maintain_order=True).to_list()

    def layers(self) -> list[int]:
        """Layers with correlations, ascending."""
        return sorted(self.correlations["layer"].unique().to_list())

    def outcome(self, behavior: str) -> str:
        """`delta` or `rate`: what the behavior's leakage is read from (`summary.outcome`)."""
        return summary_tables.outcome(self.rates, behavior)

    def unit(self, behavior: str) -> str:
        """`share` (0–1) or `points` (0–100) of the behavior's rates."""
        return summary_tables.unit(self.rates, behavior)

    def best_layer(self, behavior: str, cosine: str = "centered", y: str | None = None) -> int | None:
        """The layer with the largest pooled |ρ|; None without any. It was picked after looking at
        every layer, so its p-value is too small; `spearman_p_max` pays for the choice."""
        y = y or self.outcome(behavior)
        return summary_tables.best_layer(self.correlations, behavior, cosine, y)

    def remarks(self) -> list[str]:
        """Sentences on accuracies that guessing would give too, and on labels chosen mostly
        (`accuracy.remarks`)."""
        return accuracy.remarks(self.rates, self.more.get("chosen_labels", pl.DataFrame()))

    def summary(self, cosine: str = "centered", y: str | None = None) -> pl.DataFrame:
        """One row per behavior, adapter (and `pooled`) and layer: rates of source and bystanders beside
        the correlations over all categories, and the source's rank among all personas put in its place (`specificity`);
        `best_layer` marks the one `best_layer()` gives, `health` the adapters
        that are not ok. `y`: rate or delta, each behavior's own (`outcome`) without it."""
        table = summary_tables.summarize(self.rates, self.correlations, cosine, y)
        table = specificity.beside(table, self.more.get("specificity"))
        table = two_way.beside(table, self.more.get("bystanders"))
        return marks.mark(table, marks.verdicts(self.health, self.rates))

    def length_out(
        self, behavior: str, cosine: str = "centered", layer: int | None = None, y: str | None = None
    ) -> str | None:
        """The line that stands below the headline rows: ρ of each source with reply length taken out, at a layer."""
        table = self.more.get("exposure_correlations")
        rows = exposure_correlations.at(table, behavior, y or self.outcome(behavior), cosine, layer)
        return exposure_correlations.sentence(rows)

    @property
    def health(self) -> pl.DataFrame | None:
        """Whether each adapter's replies are alive (`stats.health`); None where nothing was drawn, or the tables were
        made by a leakfast that did not look."""
        return self.more.get("health")

    def warnings(self) -> list[str]:
        """What is to be said before any number: a sentence or three for each adapter that is not ok, and one for each
        whose replies are truncated often enough to tell on their lengths."""
        return health.sentences(self.health) + exposure.sentences(self.more.get("exposure"), self.health)


def stats(
    run: str | Path | Run,
    *,
    layer: int | None = None,
    rules: str | Path | None = None,
    embeddings: str | Path | None = None,
    source_rate: float | None = None,
    write: bool = True,
    progress: Progress | None = None,
    **draws: int | None,
) -> Stats:
    """Compute the tables of a run directory and write them to tables/*.parquet.

    Reads completions/ and choices/ (every intact shard), imported/ tables, the adapters' cards, and
    centroids/base.safetensors; without centroids the rates still come, pairs and correlations stay empty
    and `missing` says so. `draws`: permutations, bootstraps, seed and workers of everything drawn
    (`analysis.Draws`). `layer`: looked at closely (gradients, influence, verdicts) because it was chosen in
    advance; without it the best one is, and the verdicts' p pays for the choice. `rules`: file of verdict rules, by
    default the published study's. `embeddings`: file of similarities to control for (`stats.similarity` tells its
    shapes). `source_rate`: the source's rate at which mitigations are compared, by default the study's `match`, else the
    lowest final one. Raises InputError if `run` is no run or holds nothing to count, for a layer without pairs, a file of
    another shape and a source rate that nothing is compared at, StoreError if completions are there twice or from an unknown
    source, TypeError for another name.
    """
    drawn = analysis.Draws(**draws)
    run = (run if isinstance(run, Run) else Run(run)).open()
    given = similarity.read(embeddings) if embeddings else None
    asked = analysis.Asked(layer, verdicts.load_rules(rules or verdicts.RULES), given, source_rate)
    if layer is not None:  # before everything is read
        asked.check_layer(run.path, layers_of(run))
    found = collect(run)
    asked.check(run.path, found.pairs, found.rates)
    rates = summaries.with_intervals(found.rates, found.questions, found.judged)
    with threadpool_limits(1, user_api="blas"):  # systems of five numbers: a BLAS's threads only wait
        first = _first(run, found, rates, drawn, progress)
        more = analysis.further(found, rates, first["correlations"], drawn, asked, first["exposure"])
    made = Stats(rates, found.pairs, first["correlations"], tuple(found.missing), more)
    result = marked(run, made, first["health"])
    for sentence in [*found.missing, *dropped.notes(run, rates)]:
        log.warning("%s: %s", run.path, sentence)
    if write:
        tables = result.all_tables()
        with run.lock():
            for name in analysis.TABLES:  # a table of an earlier time that has no rows any more
                if name not in tables and run.has(layout.table(name)):
                    run.retire(layout.table(name), "the statistics made anew have no such table")
            for name, table in tables.items():
                run.add_shard(layout.table(name), table)
            run.mark_done(
                "stats",
                inputs_hash(run),
                files=[layout.table(name) for name in tables],
                permutations=drawn.permutations,
                bootstraps=drawn.bootstraps,
                seed=drawn.seed,
                missing=found.missing,
                layer=layer,
                source_rate=source_rate,
                own_files=bool(rules or embeddings),
                known=_known(),
                method=METHOD,
                leakfast=__version__,
                commit=commit(),
            )
    return result


def _first(
    run: Run, found: Collected, rates: pl.DataFrame, drawn: analysis.Draws, progress: Progress | None
) -> analysis.Made:
    """correlations, which the other tables rest on, and made beside them those that read every reply: health, exposure."""

    def correlated() -> analysis.Made:
        plain = correlate(found.pairs, **drawn._asdict(), progress=progress)
        return {"correlations": two_way.with_questions(plain, found.pairs, found.questions, drawn.seed)}

    def of_replies() -> analysis.Made:
        exposed = exposure.table(found.replies, rates, found.people)
        return {"health": health.read(dropped.part(run)), "exposure": exposed}

    one, other = analysis.side_by_side([correlated, of_replies], drawn.workers)
    return one | other


def permuted(run: str | Path | Run, permute: int, **draws: int | None) -> dict[str, pl.DataFrame]:
    """The tables of predictors of a run with the personas' labels in what was measured shuffled, from the seed `permute` and
    the same under all sources: nothing can predict there but by chance. Writes nothing. draws: as of `stats`."""
    found = collect((run if isinstance(run, Run) else Run(run)).open())
    with threadpool_limits(1, user_api="blas"):
        return analysis.of_predictors(found, found.rates, analysis.Draws(**draws), permute)


def marked(run: Run, made: Stats, found: pl.DataFrame | None = None) -> Stats:
    """The same tables with the columns health and health_of, and the table `health` before the other further ones; found:
    that table, where it was made before."""
    if found is None:
        found = health.read(dropped.part(run))
    told = marks.verdicts(found, made.rates)
    tables = {
        name: table
        if name in marks.UNMARKED
        else marks.mark(table, told, over_sources=name in marks.OVER_SOURCES)
        for name, table in made.all_tables().items()
    }
    more = ({"health": found} if found.height else {}) | {k: v for k, v in tables.items() if k not in TABLES}
    return Stats(**{name: tables[name] for name in TABLES}, missing=made.missing, more=more)


def read(run: str | Path | Run, only: Collection[str] | None = None) -> Stats:
    """The tables as `stats` wrote them last; only: of the further ones these. Raises InputError if one of the first three
    is not there."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    tables = {}
    for name in TABLES:
        if not run.has(layout.table(name)):
            raise InputError(f"{run.path}: has no table {name}. Make it with `leakfast stats {run.path}`.")
        tables[name] = schema.check(run.read(layout.table(name)), name)
    further = [name for name in analysis.TABLES if only is None or name in only]
    more = {name: run.read(layout.table(name)) for name in further if run.has(layout.table(name))}
    outputs = run.manifest["stages"].get("stats", {}).get("outputs", {})
    return Stats(**tables, missing=tuple(outputs.get("missing", ())), more=more)


def kept(run: str | Path | Run, only: Collection[str] | None = None, **asked: Any) -> Stats | None:
    """The tables of a run as they were written (`read`), where nothing they rest on has changed and they were made with
    the settings `asked` (some of those of `stats`); else None. Writes nothing."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    told = run.manifest["stages"].get("stats", {}).get("outputs", {})
    theirs = {"rules", "embeddings"} & set(asked)  # whose content is not kept
    if theirs or told.get("own_files") or any(told.get(name) != value for name, value in asked.items()):
        return None
    return read(run, only) if is_current(run) else None


def _known() -> list[str]:
    """The tables that this version makes: those of a version that made fewer are not current."""
    return sorted(analysis.TABLES)


def is_current(run: Run) -> bool:
    """Whether a run's tables are what this version makes of what it holds, by settings of whatever kind."""
    told = run.manifest["stages"].get("stats", {}).get("outputs", {})
    same = told.get("known") == _known() and told.get("method", 1) == METHOD
    return same and run.stage_done("stats", inputs_hash(run))


def current(run: str | Path | Run) -> Stats:
    """The tables of a run: read where nothing they rest on has changed, else computed (and written)."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    if is_current(run):
        return read(run)
    log.info("%s: tables are absent or older than what they rest on; computing them", run.path)
    return stats(run)


def steered_alone(run: Run) -> Stats | None:
    """The table `steering` of a run that holds steered replies and nothing else to count, beside the three without rows; None
    for any other run. Writes nothing."""
    part = dropped.part(run.open())
    counted = (*_COUNTED, IMPORTED)
    if any(part.shards(tree) for tree in counted) or not part.shards(layout.STEERED):
        return None
    table = steering.table(part, read_people(part)[0].named)
    return Stats(*(schema.empty(name) for name in TABLES), more={"steering": table})
