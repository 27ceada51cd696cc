"""What an edited study dropped: sources, seeds and behaviors that it named when it was run before and names no longer. What was
measured of them stays in the run and stands in no table. Demands what `run` keeps of its study (pipeline.settled)."""

from __future__ import annotations

from typing import Any

from leakfast.models.adapters import card_in
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


def told(run: Run) -> str | None:
    """One line about what is left out; None where nothing is."""
    left_out = _left_out(run)
    if not left_out:
        return None
    names = [f"{kind.removesuffix('s')} {name}" for kind in KINDS for name in _dropped(run)[kind]]
    return (
        f"no longer in the study: {', '.join(names)}; {len(left_out)} files that were measured of what it named stay in the run "
        "and stand in no table"
    )


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
