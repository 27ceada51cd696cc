"""Who is shown without the behavior, picked by where they lie: the nearest to the source, the farthest, spread over all, or at
random. Demands the run's centroids of the unadapted model, of which cosines are taken; leaves rows to the builders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import InputError
from leakfast.geometry import AGAIN, unadapted
from leakfast.storage import layout
from leakfast.storage.seeds import derive_seed
from leakfast.study.negatives import Rule, check_count, rule_of
from leakfast.train.groups import DEFAULT_ASSISTANT

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig
    from leakfast.train.data import Row


def settled(
    loaded: Loaded,
    run: Path,
    behavior: str,
    cfg: DataConfig,
    personas: Sequence[Persona],
    source: str,
    seed: int,
) -> tuple[DataConfig, dict[str, Any]]:
    """cfg with names in place of a rule, and what the card is to tell of it: rule, layer, names, their cosines to the source;
    cfg as it is and nothing where negative_personas is no rule.

    nearest, farthest: by centered cosine to the source at cfg.negatives_layer (None: the middle one of the centroids' layers);
    spread: one after the other, each the persona whose largest cosine to the source and those picked before is smallest
    (greedy k-centers: Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"); random: drawn from `seed`.
    Equal cosines fall to the persona that the study names first. Neither the source nor controls (no_persona,
    qwen_default) are picked, nor `assistant` where the behavior's rows have it anyway.
    Raises InputError without centroids of this model under these prompts, for a layer they have not, for too few personas."""
    from leakfast.behaviors.registry import get

    rule = rule_of(cfg.negative_personas)
    if rule is None:
        return cfg, {}
    taken = {source} | (set() if get(behavior).presence_of else {DEFAULT_ASSISTANT})
    names = [p.name for p in personas if not p.is_extra and p.name not in taken]
    told: dict[str, Any] = {"rule": str(rule)}
    if rule.by_geometry:
        found, layer = _centroids(loaded, run, cfg.negatives_layer, rule, personas, [source, *names])
        cosine = found.cosine(layer)
        at = {name: found.personas.index(name) for name in [source, *names]}
        names = [name for name in names if np.isfinite(cosine[at[source], at[name]])]
        check_count(rule, len(names))
        matrix = cosine[np.ix_([at[source], *map(at.get, names)], [at[source], *map(at.get, names)])]  # type: ignore[arg-type]
        picked = [names[i - 1] for i in pick(matrix, rule)]
        told |= {"layer": layer, "cosines": [float(cosine[at[source], at[name]]) for name in picked]}
    else:
        check_count(rule, len(names))
        picked = sorted(names, key=lambda name: derive_seed("negatives", seed, source, name))[: rule.k]
    return cfg.model_copy(update={"negative_personas": picked}), {**told, "names": picked}


def pick(cosine: np.ndarray, rule: Rule) -> list[int]:
    """Places of rule.k rows of cosine (P, P), in the order they are picked; the source is row 0, which is not picked."""
    to_source = cosine[0, 1:]
    if rule.kind == "nearest":
        return [int(i) + 1 for i in np.argsort(-to_source, kind="stable")[: rule.k]]
    if rule.kind == "farthest":
        return [int(i) + 1 for i in np.argsort(to_source, kind="stable")[: rule.k]]
    if rule.kind != "spread":
        raise ValueError(f"{rule.kind} does not ask for a cosine")
    chosen, nearest = [], cosine[0].copy()
    nearest[0] = np.inf
    for _ in range(rule.k):
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, cosine[chosen[-1]])
        nearest[[0, *chosen]] = np.inf
    return chosen


def noted(rows: Sequence[Row], told: dict[str, Any]) -> list[Row]:
    """The rows, those of others with `told` in their generator."""
    if not told:
        return list(rows)
    return [
        replace(row, generator={**row.generator, "negatives": told}) if row.role == "negative" else row
        for row in rows
    ]


def _centroids(
    loaded: Loaded,
    run: Path,
    layer: int | None,
    rule: Rule,
    personas: Sequence[Persona],
    names: Sequence[str],
) -> tuple[Centroids, int]:
    """The run's, which must have `names`, and the layer that is asked."""
    from leakfast.prompts import chat

    asked, path = f"data: negative_personas = '{rule}' given", run / layout.centroids()
    found = unadapted(path, loaded.fingerprint, chat.prompt_hashes(loaded.tokenizer, personas), asked)
    if absent := [name for name in names if name not in found.personas]:
        raise InputError(
            f"{asked}, but {path} has no centroid of {absent[0]}. Needed: those of all the study's personas. {AGAIN}"
        )
    at = found.layers[len(found.layers) // 2] if layer is None else layer
    if at not in found.layers:
        raise InputError(
            f"data: negatives_layer = {at} given, but the centroids have layers {', '.join(map(str, found.layers))}. Name one "
            "of them, or leave the line out."
        )
    return found, at
