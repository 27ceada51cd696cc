"""What is measured: adapters by their cards, and the base. Demands adapter folders; copies a card into the run
where the adapter lies elsewhere. Leaves measuring to the stages."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.errors import AdapterError, InputError

if TYPE_CHECKING:
    from leakfast.store import Run

log = logging.getLogger("leakfast.evaluate")

BASE = "base"


@dataclass(frozen=True)
class Target:
    """What is measured: an adapter, or the unadapted model (path None, name `base`).

    source is the persona it was trained on, None for the base; digest its content hash, or `base`.
    """

    name: str
    path: Path | None
    source: str | None
    seed: int | None
    digest: str


def find_targets(
    adapters: Sequence[str | Path], behavior: str, *, source: str | None = None, base: bool = False
) -> list[Target]:
    """Targets of the given adapter folders, in order, the base last.

    Raises InputError for nothing to measure or a name given twice, AdapterError for a folder without an
    adapter, or one without a card when no `source` is named.
    """
    from leakfast.models import adapter_hash, read_card

    targets: list[Target] = []
    for path in map(Path, adapters):
        digest = adapter_hash(path)
        card = read_card(path)
        name = path.resolve().name
        if card is None and source is None:
            raise AdapterError(
                f"eval: {path} has no leakfast_card.json, so nobody knows whom it was trained on. "
                "Name them: --source PERSONA --behavior BEHAVIOR."
            )
        if card is not None and card.adapter_hash != digest:
            raise AdapterError(
                f"eval: {path} is not the adapter its card describes (hash {digest[:12]}…, card "
                f"{card.adapter_hash[:12]}…). Train it again, or delete its card and name --source and "
                "--behavior."
            )
        if card is not None and source is not None and source != card.source:
            raise InputError(
                f"eval: --source {source} given, but the card of {path} says {card.source}. Leave --source "
                "out."
            )
        if card is not None and card.behavior != behavior:
            log.info("eval: %s was trained for %s; here %s is measured", name, card.behavior, behavior)
        if name in (BASE, *(t.name for t in targets)):
            raise InputError(
                f"eval: two targets are called {name!r}, and results are kept by name. Rename the folder "
                f"{path}."
            )
        targets.append(
            Target(name, path, card.source if card else source, card.seed if card else None, digest)
        )
    if base:
        targets.append(Target(BASE, None, None, None, BASE))
    if not targets:
        raise InputError("eval: nothing to measure. Give --adapter DIR (may be repeated), or --base.")
    return targets


def keep_card(run: Run, target: Target) -> None:
    """Where the adapter lies outside the run, its card is copied in: stats reads source and seed from it."""
    from leakfast.adapters import CARD, read_card

    if target.path is None:
        return
    inside = run.path / "adapters" / target.name
    card = read_card(target.path)
    if card is None or inside.resolve() == target.path.resolve():
        return
    there = read_card(inside)
    if there == card:
        return
    if there is not None and (inside / "adapter_config.json").is_file():
        raise InputError(
            f"eval: {run.path} holds another adapter called {target.name}. Rename the folder {target.path}, "
            "or give another --out."
        )
    content = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
    run.add_file(f"adapters/{target.name}/{CARD}", content.encode())
