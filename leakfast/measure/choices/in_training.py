"""Choice scores taken while an adapter is in training, kept as points of its series. Demands items and the model as it is in
training; leaves when to take them to train.checkpoints. A later measurement at checkpoints makes them again where its
request differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from leakfast.behaviors.registry import get, items_of
from leakfast.measure.choices.scoring import score
from leakfast.prompts.personas import load_personas
from leakfast.storage import layout
from leakfast.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.items import ItemSet
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig
    from leakfast.train.recipe import Recipe


def checkpoints_of(
    run: Run,
    recipe: Recipe,
    personas: Sequence[Persona],
    cfg: EvalConfig,
    model: str,
    kept: Sequence[float] = (),
) -> Checkpoints | None:
    """What a training keeps and measures on the way: None where cfg.checkpoints and `kept` (shares of training, 0–1, that
    are not measured in training) are empty. At cfg.checkpoints a behavior measured by choices is scored on
    cfg.checkpoint_items drawn items, for the source and cfg.checkpoint_personas among `personas`; others are kept only."""
    shares = tuple(sorted({*cfg.checkpoints, *kept}))
    if not cfg.checkpoints or get(recipe.behavior).measured_by != "choices":
        return Checkpoints(shares) if shares else None
    people = load_personas([recipe.source], among=personas)
    people += [p for p in load_personas(cfg.checkpoint_personas, among=personas) if p.name != recipe.source]
    items = items_of(recipe.behavior, cfg, model).sample(cfg.checkpoint_items)
    take = scorer(run, recipe, people, items, cfg.scoring)
    return Checkpoints(shares, lambda now, share: take(now, share) if share in cfg.checkpoints else None)


def scorer(
    run: Run, recipe: Recipe, personas: Sequence[Persona], items: ItemSet, scoring: str
) -> Callable[[Loaded, float], str]:
    """What train.checkpoints.Checkpoints takes as `score`: stores the scores as a point, and returns its path."""
    import polars as pl

    def take(current: Loaded, share: float) -> str:
        made = score(
            current,
            personas,
            items,
            scoring,
            adapter=recipe.name,
            source=recipe.source,
            items_name=items.name,
        )
        relpath = layout.shard(layout.points(recipe.name, items.name, scoring, share))
        told = {"taken": "during training", "items": items.name, "items_sha256": items.hash}
        run.add_shard(relpath, made.with_columns(pl.lit(share).alias("share")), **told)
        return relpath

    return take
