"""Several adapters trained over one base: the rows of their steps in common passes, the frozen products shared, each with
its own rows, masks, optimizer, schedule and end. Demands what `train_adapter` demands, of each; leaves points of training
to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.progress import Progress
from leakfast.train import loop, lora, packed, start
from leakfast.train.layers import Company
from leakfast.train.memory import recomputes
from leakfast.train.saving import save
from leakfast.train.unfinished import beside, key_of, unfinished

if TYPE_CHECKING:
    from leakfast.models.adapters import AdapterCard
    from leakfast.models.loading import Loaded
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe


def train_adapters(
    loaded: Loaded,
    recipes: Sequence[Recipe],
    rows: Sequence[Sequence[Row]],
    out_dirs: Sequence[str | Path],
    *,
    progress: Progress | None = None,
) -> list[AdapterCard]:
    """Train K adapters, one for each recipe with its rows and its folder, and return their cards.

    Each is what `train_adapter` makes of its recipe and rows, but for the rounding of matrix products over more rows
    (in float32, losses within 1e-4 nats after 50 steps); the same call writes the same bytes. Blocks are recomputed where
    one of the recipes asks for it. A model whose rows cannot be packed trains them one after the other. All are
    written when all have ended. Raises as `train_adapter`; where one training diverges none is written."""
    if not len(recipes) == len(rows) == len(out_dirs):
        raise ValueError(
            f"{len(recipes)} recipes, {len(rows)} sets of rows and {len(out_dirs)} folders; one each is needed"
        )
    examples = [lora.examples_of(loaded, recipe, its) for recipe, its in zip(recipes, rows, strict=True)]
    names = ["default", *(f"adapter{k}" for k in range(1, len(recipes)))]
    jobs = list(zip(recipes, rows, out_dirs, strict=True))
    if not jobs:
        return []
    first = recipes[0]
    with lora.seeded(first.seed, loaded.device), lora.attached(loaded, first.train) as net:
        if packed.why_not(loaded, net) is None:
            for name, recipe in zip(names[1:], recipes[1:], strict=True):
                with lora.seeded(recipe.seed, loaded.device):
                    net.add_adapter(name, lora.config_of(recipe.train))
            for name, recipe in zip(names, recipes, strict=True):
                start.begin(net, recipe, name)
            trainings = []
            for name, recipe, its in zip(names, recipes, examples, strict=True):
                weights = lora.weights_of(net, name)
                for weight in weights:
                    weight.requires_grad_(True)
                trainings.append(loop.Training(weights, its, recipe.train, recipe.seed))
            company = Company(names, [r.train.dropout for r in recipes], [r.seed for r in recipes])
            everything, budget = [e for its in examples for e in its], packed.budget_of(loaded)
            # a pass holds rows of all of them; one that cannot keep its activations decides
            larger = [
                r.train.model_copy(update={"accumulation": r.train.accumulation * len(jobs)}) for r in recipes
            ]
            spare = any(recomputes(loaded, cfg, everything, budget) for cfg in larger)
            passes = packed.Packed(loaded, company, recompute=spare, steers=[r.steer for r in recipes])
            key = key_of(loaded, list(zip(recipes, examples, strict=True)), packed=True)
            with unfinished(beside(out_dirs[0]), key, trainings) as state:
                histories = loop.run_together(passes, trainings, progress, state.keep)
                cards = []
                for name, history, (recipe, its_rows, out) in zip(names, histories, jobs, strict=True):
                    card = lora.card_of(loaded, recipe, its_rows, len(history), True, len(jobs))
                    cards.append(save(loaded, net, out, history, card, {}, name))
                return cards
    return [lora.train_adapter(loaded, *job, progress=progress) for job in jobs]
