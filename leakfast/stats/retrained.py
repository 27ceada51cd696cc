"""What is told of an adapter is told of one: where an adapter was trained again, or another took its name, what was measured of
the one before stands in no table. Demands a run's manifest and its adapters' cards; measures nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.models.adapters import read_card
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.stats")

_NAMED = 3  # folders that a message names


def check(run: Run) -> None:
    """Raises InputError where completions, choice scores or probabilities under an adapter's name were measured of another
    than the run's card of that name describes, or, without a card, of two. What earlier versions did not write passes."""
    for name, measured in _by_name(run).items():
        now = _on_card(run, name)
        if set(measured) <= {now} or (now is None and len(measured) == 1):
            continue
        folders = sorted(
            {path.rpartition("/")[0] for its in measured for path in measured[its] if its != now}
        )
        some = ", ".join(folders[:_NAMED]) + (f" and {len(folders) - _NAMED} more" * (len(folders) > _NAMED))
        what = (
            f"another adapter than {layout.adapter(name)} is now" if now else "several adapters of one name"
        )
        raise InputError(
            f"stats: {run.path}: {some} {'were' if len(folders) > 1 else 'was'} measured of {what}, so the tables would set "
            "numbers of two adapters beside each other. Needed: one adapter behind a name. Measure again what is meant (leakfast "
            "run STUDY, or leakfast eval --adapter DIR --replace), or move the other folders away."
        )


def set_aside(run: Run) -> None:
    """Move what was measured of adapters as they were before they were trained again to quarantine/, and say so."""
    for name, measured in _by_name(run).items():
        now = _on_card(run, name)
        gone = [path for digest, paths in measured.items() if now not in (None, digest) for path in paths]
        if gone:
            log.warning("%s: %d shards were measured before %s was trained again", run.path, len(gone), name)
        for path in gone:
            run.retire(path, "measured of the adapter before it was trained again")


def _by_name(run: Run) -> dict[str, dict[str, list[str]]]:
    """Adapter (of an arm: the one that is steered) → hash → the shards that were measured of the adapter of that hash."""
    found: dict[str, dict[str, list[str]]] = {}
    for path, entry in sorted(run.manifest["shards"].items()):
        name = layout.measured_of(path)
        digest = entry["steer"].get("digest") if "steer" in entry else entry.get("adapter")
        if name is not None and digest not in (None, layout.BASE):
            found.setdefault(layout.unsteered(name), {}).setdefault(digest, []).append(path)
    return found


def _on_card(run: Run, name: str) -> str | None:
    """The hash of the adapter that the run's card of that name, or of that point of a training, describes."""
    point = layout.point_of(name)
    folder = layout.adapter(name)
    if point is not None:
        folder = f"{layout.adapter(point[0])}/{layout.CHECKPOINTS}/{layout.point_folder(point[1])}"
    card = read_card(run.path / folder)
    return None if card is None else card.adapter_hash
