"""The tables of a run that is still being measured, in seconds and in memory: rates with their intervals, cosines and ρ,
nothing that is drawn. Demands completions or choice scores; leaves p-values and intervals of ρ to `leakfast.stats`."""

from __future__ import annotations

from leakfast.stats import exposure, summaries, two_way
from leakfast.stats.collect import collect
from leakfast.stats.correlations import correlate
from leakfast.stats.tables import Stats, marked
from leakfast.storage.run import Run


def preliminary(run: Run) -> Stats:
    """rates, pairs and correlations of what the run holds now, with the further tables `health`, `exposure` and
    `bystanders`.

    Estimands, units and intervals of rates are those of `stats`; what permutations and resamples give (p, intervals of
    ρ) is null. Writes nothing. Raises InputError where there is nothing to count, StoreError as `stats` does."""
    found = collect(run)
    rates = summaries.with_intervals(found.rates, found.questions)
    correlations = correlate(found.pairs, permutations=0, bootstraps=0, workers=1)
    exposed = exposure.table(found.replies, rates, found.people)
    tables = {"exposure": exposed, "bystanders": two_way.mean_bystanders(rates, found.questions)}
    more = {name: table for name, table in tables.items() if table.height}
    return marked(run, Stats(rates, found.pairs, correlations, tuple(found.missing), more))
