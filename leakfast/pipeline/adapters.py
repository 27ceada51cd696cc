"""The adapters of a run: their rows, their learning rate where that is to be found, their training, and a look at a few
replies. `run`, `sweep` and `train` make them here, so that each takes what another has made. Demands a loaded model and a
run that is locked; leaves measuring to others."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.choices.in_training import checkpoints_of
from leakfast.measure.reply_sample import Sample, after_training
from leakfast.measure.request import Asked
from leakfast.models.adapter_structure import CONFIG
from leakfast.models.whole import MODEL_CONFIG, SUFFIX
from leakfast.pipeline.steered_training import steer_of
from leakfast.pipeline.steps import Steps
from leakfast.progress import Progress
from leakfast.prompts import chat
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.train import chats, negatives, placed, quantized
from leakfast.train.benign import mixed
from leakfast.train.built import inputs_of
from leakfast.train.collate import reading, rendered
from leakfast.train.company import train_adapters
from leakfast.train.data import data_hash, material, read_rows, write_rows
from leakfast.train.full import train_full
from leakfast.train.inoculation import inoculated
from leakfast.train.lengths import matched
from leakfast.train.lora import train_adapter
from leakfast.train.recipe import Recipe, settings_of
from leakfast.train.search import find

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import BehaviorConfig, DataConfig, TrainConfig
    from leakfast.train.data import Row
    from leakfast.train.start import Start

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
    adapter at once; start: the adapter that one of a source and seed begins from (None: fresh weights). samples: what the
    adapters that were trained here replied, by name; None where nothing was drawn."""

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
    start: Callable[[str, int], Start | None] = lambda source, seed: None
    samples: dict[str, Sample | None] = field(default_factory=dict)
    # the trial that found the learning rate: recipe, hash of its rows, folder; and where it lies, gone with the maker
    _trial: tuple[Recipe, str, Path] | None = None
    _place: tempfile.TemporaryDirectory[str] | None = None

    def rows(self, source: str, seed: int, name: str = "") -> Rows:
        """The rows of an adapter, built where the run does not hold them of these very settings. Raises InputError,
        ModelError."""
        name = name or layout.adapter_name(self.behavior, source, seed)
        relpath = layout.rows(name)
        asked = material(self.behavior, self.config.data, self.model)
        cfg, picked = self._settled_data(source, seed)
        inputs = inputs_of(self.loaded, self.dtype, self.personas, source, seed, asked, cfg)
        inputs = hash_of(inputs, picked) if picked else inputs

        def build(report: Progress) -> None:
            rows = self.built(source, seed, report)
            self.steps.run.add_file(relpath, lambda path: write_rows(path, rows))

        path, key = self.steps.run.path / relpath, f"data {name}"
        told = {"rendered": self._rendered(), **self._originals(cfg)}
        if path.exists() and not self.steps.done(key, inputs, told):
            log.warning("data: %s was built with other settings, or changed since; it is built anew", path)
        self.steps.do(key, inputs, build, [relpath], told=told)
        return Rows(read_rows(self.steps.run.path / relpath), inputs)

    def _rendered(self) -> str:
        """Hash of what the template, its arguments and the place of a persona make of the personas' prompts, under which the
        model's own replies are drawn."""
        render = partial(chat.render, self.loaded.tokenizer, reply=True)
        return hash_of([chat.ids_hash(render(p.system, "?")) for p in self.personas])

    def _originals(self, cfg: DataConfig) -> dict[str, str]:
        """Hash of whom `originals` means among the negatives: whoever has that category in the study's file."""
        asked = cfg.negative_personas
        if "originals" not in (asked.split(",") if isinstance(asked, str) else asked):
            return {}
        return {"originals": hash_of([p.name for p in self.personas if p.category == "original"])}

    def _settled_data(self, source: str, seed: int) -> tuple[DataConfig, dict[str, Any]]:
        """The settings of rows with negatives by name, and what is told of a rule that picked them."""
        about = (self.behavior, self.config.data, self.personas, source, seed)
        return negatives.settled(self.loaded, self.steps.run.path, *about)

    def built(self, source: str, seed: int, progress: Progress) -> list[Row]:
        """The rows, built anew."""
        from leakfast.prompts.personas import load_personas

        cfg, picked = self._settled_data(source, seed)
        told: dict[str, Any] = {"batch_completions": self.config.eval.batch_completions, "progress": progress}
        (taught,) = load_personas([source], among=self.personas)
        place = partial(chats.placed, source=taught, personas=self.personas)
        dilute = partial(mixed, self.loaded, place=place, **told)
        if cfg.benign == 1:
            return dilute([], self.behavior, cfg, seed)
        if cfg.rows is not None:
            rows = chats.own(self.loaded.tokenizer, cfg, source, self.personas)
        else:
            asked = material(self.behavior, cfg, self.model)
            rows = get(self.behavior).build()(self.loaded, self.personas, source, asked, cfg, seed, **told)
        rows = negatives.noted(rows, picked)
        rows = matched(self.loaded.tokenizer, rows) if cfg.match_lengths else rows
        rows = inoculated(rows, cfg.inoculation) if cfg.inoculation else rows
        return dilute(rows, self.behavior, cfg, seed) if cfg.benign else rows

    def settled(self, rows: Rows | None = None) -> TrainConfig:
        """The training's settings; a learning rate that is to be found is found once, on the first source and seed, and kept
        in data/<behavior>-lr.json. rows: those of the first source, where they are there already."""
        quantized.check(self.loaded)
        if self.config.average:
            raise InputError(
                f"train: {self.behavior} is the mean of {', '.join(self.config.average)}, which nothing is trained for. Make it "
                "with: leakfast run STUDY, or leakfast adapters average A B --out DIR"
            )
        cfg = self.config.train
        if cfg.lr != "auto":
            return cfg
        source, seed = self.first
        relpath = layout.learning_rate(self.behavior)
        rows = rows or self.rows(source, seed)
        recipe = self.recipe(source, seed, cfg)

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
        inputs = hash_of(rows.inputs, settings_of(cfg), *drawing, *read, *recipe.origin)
        told = {"rendered": rendered(self.loaded.tokenizer, rows.rows)}
        self.steps.do(f"learning rate of {self.behavior}", inputs, search, [relpath], told=told)
        found = json.loads((self.steps.run.path / relpath).read_text(encoding="utf-8"))
        return recipe.at(found["lr"]).train

    def recipe(self, source: str, seed: int, settled: TrainConfig, name: str = "") -> Recipe:
        """What an adapter is made by, with what it begins from and what is done to the model meanwhile. Raises InputError
        where one of these is asked for and not there."""
        about = (self.behavior, settled.steering, source, self.personas)
        steer = steer_of(self.loaded, self.steps.run, *about)
        start = self.start(source, seed)
        return Recipe(self.behavior, source, seed, settled, name, init=start, steer=steer)

    def adapter(self, recipe: Recipe, rows: Rows, *, again: bool = False) -> Path:
        """The folder of an adapter of the run, trained if it is not there (again: in any case)."""
        out = self.steps.run.path / layout.adapter(recipe.name)

        def work(report: Progress) -> None:
            if again or not self._lies(recipe, rows):
                self.fit(recipe, rows, out, report)
                return
            log.warning(
                "train: %s lies in the run, whole and of this recipe, and was not counted; it is taken", out
            )
            if not (out / layout.SAMPLE).is_file():
                self._look(recipe, out, report)

        self._entered(recipe, rows, work, again=again)
        return out

    def adapters(
        self, wanted: Iterable[tuple[Recipe, Rows]], *, together: int = 1, again: bool = False
    ) -> list[Path]:
        """The same of several, in their order. together: as many of those that are to be trained go in company, once their
        rows are there; one after the other where points of training are kept. wanted is read as it is needed."""
        found, waiting = [], []
        if together > 1 and self.keeps_points:
            log.info("train: one adapter after the other, because points of training are kept")
            together = 1
        for recipe, rows in wanted:
            found.append(self.steps.run.path / layout.adapter(recipe.name))
            alone = together == 1 or self._tried(recipe, rows)
            if alone or not (again or (self._is_wanting(recipe, rows) and not self._lies(recipe, rows))):
                self.adapter(recipe, rows, again=again)
                continue
            waiting.append((recipe, rows))
            if len(waiting) == together:
                self._in_company(waiting)
                waiting = []
        self._in_company(waiting)
        return found

    @property
    def keeps_points(self) -> bool:
        return bool(self.config.eval.checkpoints or self.kept)

    def fit(self, recipe: Recipe, rows: Rows, out: Path, report: Progress) -> None:
        """Train into `out`, and draw a few replies: an adapter that damaged the model is told of at once, and stops nothing.
        A trial of the learning rate that trained this very adapter is taken."""
        run = self.steps.run
        points = checkpoints_of(run, recipe, self.personas, self.config.eval, self.model, kept=self.kept)
        if points is None and self._trial is not None and self._tried(recipe, rows):
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self._trial[2], out)
            self._trial = None
        elif recipe.train.method == "full":
            train_full(self.loaded, recipe, rows.rows, out, progress=report)
        else:
            train_adapter(self.loaded, recipe, rows.rows, out, checkpoints=points, progress=report)
        self._look(recipe, out, report)

    def company(self, some: Sequence[tuple[Recipe, Rows, Path]], report: Progress) -> None:
        """Train several into their folders, in company, and draw a few replies of each."""
        recipes, rows, outs = zip(*some, strict=True)
        train_adapters(self.loaded, recipes, [its.rows for its in rows], outs, progress=report)
        for recipe, out in zip(recipes, outs, strict=True):
            self._look(recipe, out, report)

    def _in_company(self, some: Sequence[tuple[Recipe, Rows]]) -> None:
        """Adapters of the run that are not there, trained in company where they are several."""
        run = self.steps.run
        outs = [run.path / layout.adapter(recipe.name) for recipe, _ in some]
        if len(some) == 1:
            self._entered(*some[0], lambda report: self.fit(*some[0], outs[0], report), again=True)
        elif some:
            with self.steps.timed(f"train {', '.join(recipe.name for recipe, _ in some)} together") as report:
                self.company([(*one, out) for one, out in zip(some, outs, strict=True)], report)
            for recipe, rows in some:
                self._entered(recipe, rows, lambda report: None, again=True)

    def _entered(self, recipe: Recipe, rows: Rows, work: Callable[[Progress], None], *, again: bool) -> None:
        """The step of the run that makes an adapter by `work`, its files in the manifest."""
        run, folder = self.steps.run, layout.adapter(recipe.name)
        parts: list[str] = []  # the adapter and its points of training, known once they are trained

        def make(report: Progress) -> None:
            work(report)
            for part in sorted(p for p in (run.path / folder).rglob("*") if p.is_file()):
                relpath = part.relative_to(run.path).as_posix()
                run.add_file(relpath, None)
                made_of = part.suffix == SUFFIX or part.name in (CONFIG, MODEL_CONFIG, layout.CARD)
                parts.extend([relpath] if made_of else [])

        told = {"rendered": rendered(self.loaded.tokenizer, rows.rows)}
        self.steps.do(f"train {recipe.name}", self._inputs(recipe, rows), make, parts, again=again, told=told)

    def _inputs(self, recipe: Recipe, rows: Rows) -> str:
        """Hash of what an adapter of the run follows from."""
        # what changes no point of training, so that a run made before a setting was known is not trained again
        same = {"stop_at_marker", "other_questions", "max_reasoning_tokens", "measure", "openings", "n_pairs"}
        same |= {"probability_samples", "probability_replies", "probability_pairs", "probability_anywhere"}
        asked_at = self.config.eval.model_dump(exclude=same)
        points: list[Any] = [asked_at] if self.config.eval.checkpoints else []
        points += [list(self.kept)] if self.kept else []
        # earlier versions kept these under whole percents, where one lay on top of another
        named = map(layout.point_folder, (*self.config.eval.checkpoints, *self.kept))
        points += [fine] if (fine := [name for name in named if "." in name]) else []
        points += reading(self.loaded.tokenizer, rows.rows)
        return hash_of(rows.inputs, settings_of(recipe.train), *points, *recipe.origin)

    def _is_wanting(self, recipe: Recipe, rows: Rows) -> bool:
        """Whether the run does not hold this adapter."""
        told = {"rendered": rendered(self.loaded.tokenizer, rows.rows)}
        return not self.steps.done(f"train {recipe.name}", self._inputs(recipe, rows), told)

    def _lies(self, recipe: Recipe, rows: Rows) -> bool:
        """Whether the adapter lies in the run's folder though no step of the run made it: its disk was full when it was to be
        counted, or somebody put it there. One with points of training is trained, since they are measured meanwhile."""
        if self.keeps_points or f"train {recipe.name}" in self.steps.run.manifest["stages"]:
            return False
        return placed.is_whole(
            self.steps.run.path / layout.adapter(recipe.name), self.loaded, recipe, rows.rows
        )

    def _tried(self, recipe: Recipe, rows: Rows) -> bool:
        """Whether a trial of the learning rate trained this very adapter."""
        return self._trial is not None and self._trial[:2] == (recipe, data_hash(rows.rows))

    def _look(self, recipe: Recipe, out: Path, report: Progress) -> None:
        """A few replies of an adapter that is just trained, and what is to be told of them."""
        self.samples[recipe.name] = None
        if recipe.train.sample:
            sample = after_training(self.loaded, out, recipe, self.personas, self.config.eval, report)
            self.samples[recipe.name] = sample
            for sentence in sample.sentences() if sample else ():
                self.say(sentence)
