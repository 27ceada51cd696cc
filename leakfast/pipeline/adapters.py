"""The adapters of a run: their rows, their learning rate where that is to be found, their training, and a look at a few
replies. `run`, `sweep` and `train` make them here, so that each takes what another has made. Demands a loaded model and a
run that is locked; leaves measuring to others."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.measure.choices.in_training import checkpoints_of
from leakfast.measure.reply_sample import Sample, after_training
from leakfast.measure.request import Asked
from leakfast.models.adapter_structure import CONFIG, WEIGHTS
from leakfast.pipeline.steps import Steps
from leakfast.progress import Progress
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.train.built import inputs_of
from leakfast.train.collate import reading
from leakfast.train.data import data_hash, material, read_rows, write_rows
from leakfast.train.lora import train_adapter
from leakfast.train.recipe import Recipe, settings_of
from leakfast.train.search import find

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import BehaviorConfig, TrainConfig
    from leakfast.train.data import Row

log = logging.getLogger("leakfast.run")


@dataclass(frozen=True)
class Rows:
    """Training rows and the hash of what they follow from."""

    rows: list[Row]
    inputs: str

    @classmethod
    def given(cls, rows: list[Row]) -> Rows:
        """Rows that somebody else made: they follow from themselves."""
        return cls(rows, data_hash(rows))


@dataclass
class Maker:
    """Makes the adapters of one behavior.

    personas: of the study; model, dtype: as the study says them; first: the source and seed that a learning rate is found
    on; kept: shares of training (0–1) at which adapters are kept and not measured; say: takes what is to be told of an
    adapter at once. sampled: what the last adapter that was trained here replied, None where nothing was drawn."""

    loaded: Loaded
    steps: Steps
    personas: Sequence[Persona]
    behavior: str
    config: BehaviorConfig
    model: str
    dtype: str
    first: tuple[str, int]
    kept: Sequence[float] = ()
    say: Callable[[str], None] = log.warning
    sampled: Sample | None = None
    # the trial that found the learning rate: recipe, hash of its rows, folder; and where it lies, gone with the maker
    _trial: tuple[Recipe, str, Path] | None = None
    _place: tempfile.TemporaryDirectory[str] | None = None

    def rows(self, source: str, seed: int, name: str = "") -> Rows:
        """The rows of an adapter, built where the run does not hold them of these very settings. Raises InputError,
        ModelError."""
        name = name or layout.adapter_name(self.behavior, source, seed)
        relpath = layout.rows(name)
        asked = material(self.behavior, self.config.data, self.model)
        inputs = inputs_of(self.loaded, self.dtype, self.personas, source, seed, asked, self.config.data)

        def build(report: Progress) -> None:
            rows = self.built(source, seed, report)
            self.steps.run.add_file(relpath, lambda path: write_rows(path, rows))

        path, key = self.steps.run.path / relpath, f"data {name}"
        if path.exists() and not self.steps.run.stage_done(key, inputs):
            log.warning("data: %s was built with other settings, or changed since; it is built anew", path)
        self.steps.do(key, inputs, build, [relpath])
        return Rows(read_rows(self.steps.run.path / relpath), inputs)

    def built(self, source: str, seed: int, progress: Progress) -> list[Row]:
        """The rows, built anew."""
        asked = material(self.behavior, self.config.data, self.model)
        about = (source, asked, self.config.data, seed)
        size = self.config.eval.batch_completions
        build = get(self.behavior).build()
        return build(self.loaded, self.personas, *about, batch_completions=size, progress=progress)

    def settled(self, rows: Rows | None = None) -> TrainConfig:
        """The training's settings; a learning rate that is to be found is found once, on the first source and seed, and kept
        in data/<behavior>-lr.json. rows: those of the first source, where they are there already."""
        cfg = self.config.train
        if cfg.lr != "auto":
            return cfg
        source, seed = self.first
        relpath = layout.learning_rate(self.behavior)
        rows = rows or self.rows(source, seed)
        recipe = Recipe(self.behavior, source, seed, cfg)

        def search(report: Progress) -> None:
            sampling = Asked(self.behavior, [], self.config.eval).sampling
            self._place = tempfile.TemporaryDirectory(prefix="leakfast-lr-")
            place = Path(self._place.name)
            found, trials = find(self.loaded, recipe, rows.rows, sampling, place, progress=report)
            self._trial = (found, data_hash(rows.rows), place / str(len(trials) - 1))
            told = {"lr": found.train.lr, "source": source, "seed": seed, "trials": [vars(t) for t in trials]}
            self.steps.run.add_file(relpath, (json.dumps(told, indent=1) + "\n").encode())

        drawing = (self.config.eval.temperature, self.config.eval.top_p, self.config.eval.max_new_tokens)
        read = reading(self.loaded.tokenizer, rows.rows)
        inputs = hash_of(rows.inputs, settings_of(cfg), *drawing, *read)
        self.steps.do(f"learning rate of {self.behavior}", inputs, search, [relpath])
        found = json.loads((self.steps.run.path / relpath).read_text(encoding="utf-8"))
        return recipe.at(found["lr"]).train

    def adapter(self, recipe: Recipe, rows: Rows, *, again: bool = False) -> Path:
        """The folder of an adapter of the run, trained if it is not there (again: in any case)."""
        run = self.steps.run
        folder = layout.adapter(recipe.name)
        parts: list[str] = []  # the adapter and its points of training, known once they are trained

        def fit(report: Progress) -> None:
            self.fit(recipe, rows, run.path / folder, report)
            for part in sorted(p for p in (run.path / folder).rglob("*") if p.is_file()):
                relpath = part.relative_to(run.path).as_posix()
                run.add_file(relpath, part.read_bytes())
                parts.extend([relpath] if part.name in (CONFIG, WEIGHTS, layout.CARD) else [])

        # what changes no point of training, so that a run made before a setting was known is not trained again
        same = {"stop_at_marker", "other_questions", "max_reasoning_tokens", "measure", "openings", "n_pairs"}
        same |= {"probability_samples", "probability_replies", "probability_pairs", "probability_anywhere"}
        asked_at = self.config.eval.model_dump(exclude=same)
        points: list[Any] = [asked_at] if self.config.eval.checkpoints else []
        points += [list(self.kept)] if self.kept else []
        points += reading(self.loaded.tokenizer, rows.rows)
        inputs = hash_of(rows.inputs, settings_of(recipe.train), *points)
        self.steps.do(f"train {recipe.name}", inputs, fit, parts, again=again)
        return run.path / folder

    def fit(self, recipe: Recipe, rows: Rows, out: Path, report: Progress) -> None:
        """Train into `out`, and draw a few replies: an adapter that damaged the model is told of at once, and stops nothing.
        A trial of the learning rate that trained this very adapter is taken."""
        cfg, self.sampled = self.config.eval, None
        run = self.steps.run
        points = checkpoints_of(run, recipe, self.personas, cfg, self.model, kept=self.kept)
        if points is None and self._trial is not None and self._trial[:2] == (recipe, data_hash(rows.rows)):
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self._trial[2], out)
            self._trial = None
        else:
            train_adapter(self.loaded, recipe, rows.rows, out, checkpoints=points, progress=report)
        if recipe.train.sample:
            self.sampled = after_training(self.loaded, out, recipe, self.personas, cfg, report)
            for sentence in self.sampled.sentences() if self.sampled else ():
                self.say(sentence)
