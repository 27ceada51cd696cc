"""Which further tables a run gets, in one place, each a function of the first three. Demands what
`collect` found; computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from leakfast.stats import agreement, summaries
from leakfast.stats.collect import Collected
from leakfast.stats.correlations import correlate

# name → what it holds; a table without rows is not written
TABLES = {
    "question_counts": "hits and total per question of each persona",
    "layers": "ρ at every layer, with a p-value that has paid for picking one",
    "means": "random-effects means of ρ over sources and over training seeds",
    "disattenuated": "ρ freed of the noise in the rates, with the rates' reliability",
    "related": "correlations over the bystanders whose related_to names the source",
    "published": "each number the published study stored, beside ours",
}


@dataclass(frozen=True)
class Draws:
    """How much is drawn, from which seed, by how many threads (None: all cores)."""

    permutations: int
    bootstraps: int
    seed: int = 0
    workers: int | None = None


def rates_with_intervals(found: Collected) -> pl.DataFrame:
    """The rates with intervals over questions and of the deltas (`summaries.with_intervals`)."""
    return summaries.with_intervals(found.rates, found.questions)


def further(
    found: Collected,
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    draws: Draws,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, pl.DataFrame]:
    """The tables of TABLES that have rows."""
    pairs, tables = found.pairs, {}
    shared = (draws.permutations, draws.seed)
    tables["question_counts"] = found.questions.select(pl.exclude("^hits_.*$"))
    tables["layers"] = summaries.layers(correlations)
    tables["means"] = summaries.means(correlations)
    tables["disattenuated"] = summaries.disattenuated(
        pairs, found.questions, draws.bootstraps, draws.seed, draws.workers
    )
    if "related" in pairs.columns:
        near = pairs.filter(pl.col("related"))
        tables["related"] = correlate(near, *shared, bootstraps=draws.bootstraps, workers=draws.workers)
    if found.published is not None and found.published.height:
        tables["published"] = agreement.compare(
            found.published, rates, correlations, tables.get("related", correlations.clear()), "marker"
        )
    return {name: tables[name] for name in TABLES if name in tables and tables[name].height}
