"""Where a run and its study part. Sources, seeds and behaviors that an edited study dropped: what was measured of them stays in
the run and stands in no table. And those that were not measured yet. Demands what `run` keeps of its study (pipeline.settled)."""

from __future__ import annotations

from typing import Any

import polars as pl

from leakfast.stats.people import kept_in
from leakfast.storage import layout
from leakfast.storage.reading import Part
from leakfast.storage.run import Run

KINDS = ("behaviors", "sources", "seeds")
# trees of what is measured, <tree>/<behavior>/<adapter>/
_BY_BEHAVIOR = (
    *(layout.COMPLETIONS, layout.CHOOSING, layout.CHOSEN, layout.JUDGEMENTS),
    *(layout.PROBABILITY, layout.PROBABILITY_OWN),
)


def part(run: Run) -> Run:
    """The run as its study has it now: without what was measured of adapters that were taught a behavior, into a source or
    under a seed that the study dropped, and without what was measured of a behavior that it dropped. What the study never
    named (adapters and behaviors that somebody measured beside it) stays."""
    left_out = _left_out(run)
    return Part(run, left_out) if left_out else run


def notes(run: Run, rates: pl.DataFrame) -> list[str]:
    """Lines about what the tables of these rates leave out (`told`) and lack (`unmeasured`)."""
    return [*filter(None, [told(run)]), *unmeasured(run, rates)]


def told(run: Run) -> str | None:
    """One line about what is left out; None where nothing is."""
    left_out = _left_out(run)
    if not left_out:
        return None
    return (
        f"no longer in the study: {_named(run)}; {len(left_out)} files that were measured of what it named stay in the run "
        "and stand in no table"
    )


def unsent(run: Run) -> str | None:
    """The same line about what an export leaves out; None where the run has nothing of what was dropped."""
    if not _left_out(run) and not adapters(run):
        return None
    return (
        f"no longer in the study: {_named(run)}; adapters and measurements of what it named stay in the run and are not sent "
        "(what was sent of them before stays where it is)"
    )


def adapters(run: Run) -> set[str]:
    """Adapters in the run that were taught a behavior, into a source or under a seed that the study dropped."""
    dropped = _dropped(run)
    if not any(dropped.values()):
        return set()
    named = {path.split("/")[1] for path in run.manifest["shards"] if path.startswith(f"{layout.ADAPTERS}/")}
    return {name for name in named if _is_dropped(run, name, dropped)}


def _named(run: Run) -> str:
    return ", ".join(f"{kind.removesuffix('s')} {name}" for kind in KINDS for name in _dropped(run)[kind])


def _dropped(run: Run) -> dict[str, list[Any]]:
    kept = kept_in(run).get("dropped", {})
    return {kind: kept.get(kind, []) for kind in KINDS}


def _left_out(run: Run) -> set[str]:
    """Files of the manifest."""
    dropped = _dropped(run)
    if not any(dropped.values()):
        return set()
    known: dict[str, bool] = {}
    found = set()
    for path, entry in run.manifest["shards"].items():
        behavior, adapter = _of(path, entry)
        if adapter is not None and adapter not in known:
            known[adapter] = _is_dropped(run, adapter, dropped)
        if behavior in dropped["behaviors"] or (adapter is not None and known[adapter]):
            found.add(path)
    return found


def _is_dropped(run: Run, adapter: str, dropped: dict[str, list[Any]]) -> bool:
    from leakfast.models.adapters import card_in

    card = None if adapter == layout.BASE else card_in(run.path, adapter)
    if card is None:
        return False
    return (
        card.behavior in dropped["behaviors"]
        or card.source in dropped["sources"]
        or card.seed in dropped["seeds"]
    )


def _of(path: str, entry: dict[str, Any]) -> tuple[str | None, str | None]:
    """(behavior, adapter without its arm or point) that a file is a measurement of; None where it is of none."""
    parts = path.split("/")
    parts = parts[1:] if parts[0] in (layout.STEERED, layout.SERIES) else parts
    behavior, adapter = None, None
    if parts[0] in _BY_BEHAVIOR and len(parts) > 3:
        behavior, adapter = parts[1], parts[2]
    elif parts[0] == layout.SETS and len(parts) > 4:
        behavior, adapter = parts[1], parts[3]
    elif parts[0] in (layout.CHOICES, layout.POINTS) and len(parts) > 3:
        behavior, adapter = entry.get("behavior"), parts[1]
    elif parts[0] == "text" and len(parts) > 2:
        adapter = parts[1]
    if adapter is not None:
        adapter = layout.unsteered(adapter)
        point = layout.point_of(adapter)
        adapter = adapter if point is None else point[0]
    return behavior, adapter


def unmeasured(run: Run, rates: pl.DataFrame) -> list[str]:
    """A line for each behavior of the study that was not measured on an adapter of every source and seed that the study names:
    what is pooled is over the others. rates: the table."""
    kept = kept_in(run)
    if "named" not in kept or "related_to" in kept:  # no run of a study, or an imported one
        return []
    sources, seeds, found = kept["sources"], kept.get("seeds", []), []
    for behavior in rates["behavior"].unique(maintain_order=True):
        there = set(
            rates.filter(pl.col("source").is_not_null(), behavior=behavior).select("source", "seed").rows()
        )
        if not there or behavior not in kept.get("behaviors", [behavior]):
            continue
        absent = [name for name in sources if name not in {source for source, _ in there}]
        lacks = [f"source {name}" for name in absent]
        lacks += [
            f"source {name} under seed {seed}"
            for name in sources
            for seed in seeds
            if name not in absent and not {(name, seed), (name, None)} & there
        ]
        if lacks:
            found.append(
                f"{behavior}: the study names more than was measured ({', '.join(lacks)}); means and pooled rows are over the "
                "rest"
            )
    return found
