"""Who makes the adapters of a behavior of a study: a training, or the mean of other behaviors' adapters. Demands what
pipeline.adapters demands; leaves the arithmetic to train.averaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.models.adapters import adapter_hash
from leakfast.pipeline import asks
from leakfast.pipeline.adapters import Maker, Rows
from leakfast.progress import Progress
from leakfast.storage.disk import hash_of
from leakfast.train.averaged import average
from leakfast.train.recipe import Recipe

if TYPE_CHECKING:
    from leakfast.pipeline.stages import Stages
    from leakfast.study.config import TrainConfig


@dataclass
class Averager(Maker):
    """Makes adapters that are the mean of others, of `parts` (source, seed), by which they are known. They have no rows and no
    points of training; the rest is a maker's."""

    parts: Callable[[str, int], list[Path]] = lambda source, seed: []

    def rows(self, source: str, seed: int, name: str = "") -> Rows:
        return Rows([], "")

    def settled(self, rows: Rows | None = None) -> TrainConfig:
        return self.config.train.model_copy(update={"together": 1})

    def fit(self, recipe: Recipe, rows: Rows, out: Path, report: Progress) -> None:
        """Write the mean into `out`, and draw a few replies."""
        about = {"behavior": recipe.behavior, "source": recipe.source, "seed": recipe.seed}
        shutil.rmtree(out, ignore_errors=True)
        average(self.parts(recipe.source, recipe.seed), out, **about)
        self._look(recipe, out, report)

    def _lies(self, recipe: Recipe, rows: Rows) -> bool:
        """Not known of a mean, which takes no time."""
        return False

    def _inputs(self, recipe: Recipe, rows: Rows) -> str:
        return hash_of([adapter_hash(part) for part in self.parts(recipe.source, recipe.seed)])


def maker_of(stages: Stages, behavior: str) -> Maker:
    """The maker of a behavior's adapters, as the study has it."""
    study, cfg = stages.study, stages.study.behaviors[behavior]
    first = (study.sources[0], study.seeds[0])
    about = (stages.loaded, stages.steps, stages.personas, behavior, cfg, study.model, study.dtype, first)
    if cfg.average:
        return Averager(*about, parts=partial(_parts, stages, behavior))
    kept = study.trajectory.shares if behavior in asks.followed(study) else ()
    return Maker(*about, kept, start=partial(stages.start, cfg))


def _parts(stages: Stages, behavior: str, source: str, seed: int) -> list[Path]:
    """The adapters that the mean is of, trained where they are not there yet."""
    names = stages.study.behaviors[behavior].average
    return [stages.trained(stages.maker(name), source, seed) for name in names]
