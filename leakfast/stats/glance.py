"""A run's tables for somebody who only looks: as they are kept, else rates and correlations computed in memory without
draws. Demands a run with something to count; writes nothing, and leaves intervals of ρ and p-values to `stats.tables`."""

from __future__ import annotations

from leakfast.stats.preliminary import preliminary
from leakfast.stats.tables import Stats, kept
from leakfast.storage.reading import ReadOnlyRun

# what is looked at beside rates, pairs and correlations
FURTHER = (
    "health",
    "exposure",
    "chosen_labels",
    "specificity",
    "bystanders",
    "picked",
    "isotonic",
    "verdicts",
)


def glance(run: ReadOnlyRun) -> tuple[Stats, str | None]:
    """The tables of a run, and a sentence where they are not the kept ones.

    Kept tables are taken where nothing they rest on has changed since. Else rates with their intervals, pairs, ρ and r
    of every layer and the health of the replies are computed anew; what is drawn (p by permutation, intervals of ρ) and
    every further table is absent, never a guess. Raises as `stats.tables.stats`."""
    found = kept(run, FURTHER)
    if found is not None:
        return found, None
    told = run.manifest["stages"].get("stats")
    made = preliminary(run)
    why = (
        "There are no tables yet"
        if told is None
        else "The tables are older than what they rest on, or of another version"
    )
    note = (
        f"{why}: rates, ρ and r are computed now, in memory, without draws (no p by permutation, no interval of ρ). "
        f"Make the tables with: leakfast stats {run.path}"
    )
    return made, note
