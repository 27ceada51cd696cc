"""All stages of a study in order: centroids, then per behavior the base, and per source and seed data, training and
measurement, then the controls, tables, figures, report. Demands a checked study file; state lives only in the run
directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.pipeline import asks
from leakfast.pipeline.steps import Outcome, Shown, Steps, silent
from leakfast.progress import Progress
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.storage.documents import did_you_mean
from leakfast.storage.mirror import working_copy
from leakfast.storage.run import Run
from leakfast.study.config import Study, load_study
from leakfast.version import maker

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.pipeline.adapters import Maker, Rows
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import BehaviorConfig, TrainConfig
    from leakfast.train.recipe import Recipe
    from leakfast.train.start import Start

log = logging.getLogger("leakfast.run")


def run(
    study: str | Path | Study,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    progress: Shown = silent,
) -> Outcome:
    """Run every stage of `study` that is not done yet, in `out` (default runs/<name>), a folder or s3://bucket/prefix.

    only: names of its behaviors, sources and seeds; where any of a kind is named, the others of that kind are
    left for another call. progress: title → context manager giving a function (done, total, what). The same call again is the
    resume. Raises InputError for a study that cannot be meant, StoreError for a folder that cannot be
    written, ModelError or AdapterError from the stages."""
    from leakfast.pipeline import finished

    study = study if isinstance(study, Study) else load_study(study)
    chosen = chosen_of(study, only)
    with working_copy(out or study.run_dir) as folder, Run(folder).lock() as store:
        store.create(study.raw_text).note_maker(*maker())
        return finished.once(
            study, chosen, store, lambda: Stages(study, store, progress, chosen=chosen).all()
        )


@dataclass(frozen=True)
class Chosen:
    """The part of a study that is run."""

    behaviors: list[str]
    sources: list[str]
    seeds: list[int]


def chosen_of(study: Study, only: Sequence[str]) -> Chosen:
    known = {**dict.fromkeys(study.behaviors), **dict.fromkeys(study.sources)}
    known |= dict.fromkeys(map(str, study.seeds))
    for word in only:
        if word not in known:
            raise InputError(
                f"run: --only {word} given, but the study has no behavior, source or seed of that name."
                f"{did_you_mean(word, known)} Use some of: {', '.join(known)}."
            )

    def part(all_of: Sequence[Any]) -> list[Any]:
        return [one for one in all_of if str(one) in only] or list(all_of)

    return Chosen(part(list(study.behaviors)), part(study.sources), part(study.seeds))


class Stages:
    """One pass over a study; the model is loaded when the first stage that needs it comes."""

    def __init__(self, study: Study, store: Run, progress: Shown = silent, *, chosen: Chosen):
        self.study, self.store, self.chosen = study, store, chosen
        self.steps = Steps(store, progress)
        self._starts: dict[
            tuple[str, str, int], Start
        ] = {}  # behavior, source, seed → what others begin from
        self.personas: Sequence[Persona] = load_personas(study.personas)

    @cached_property
    def loaded(self) -> Loaded:
        from leakfast import models
        from leakfast.models import threads
        from leakfast.prompts.rendering import asked_by

        study, began = self.study, time.monotonic()
        loaded = models.load(
            study.model, dtype=study.dtype, revision=study.revision, rendering=asked_by(study)
        )
        about = {"name": loaded.name, "dtype": loaded.dtype, "threads": threads.in_use()}
        self.store.log("model", **about, seconds=round(time.monotonic() - began, 3))
        return loaded

    def all(self) -> Outcome:
        from leakfast.pipeline import preflight

        trained, controls = self.sorted()
        preflight.check(
            self.study,
            self.store,
            lambda: self.loaded,
            judged=self.chosen.behaviors,
            trained=asks.with_earlier(self.study, trained),
            drawn=[*trained, *controls],
        )
        self.settle()
        self.centroids()
        if self.study.asks_predictors:
            self.predictors()
        adapters = {behavior: self._behavior(behavior) for behavior in trained}
        for behavior in controls:
            self._control(behavior, adapters)
        for behavior in self.chosen.behaviors:
            self.judge(behavior)
        self._trajectory(adapters)
        if self.study.steering:
            self.steered(adapters)
        return self.told()

    def steered(self, adapters: dict[str, list[tuple[Path, int]]], *, base: bool = True) -> None:
        """Measure adapters (and the base, where a table asks for it) again under the arms of the study."""
        from leakfast.pipeline.steering import Steering

        steering = Steering(self.study, self.store, self.loaded, self.personas)
        steering.all(self.steps, adapters, self.chosen.behaviors, base=base)

    def check_drawing(self) -> None:
        """What of training rows and of the drawing can be known to fail before anything is spent."""
        from leakfast.pipeline import preflight

        trained, controls = self.sorted()
        earlier = asks.with_earlier(self.study, trained)
        preflight.check_layers(self.study, lambda: self.loaded)
        preflight.check_rows(self.study, earlier, self.store, lambda: self.loaded)
        preflight.check_drawing(self.study, [*trained, *controls], self.store, lambda: self.loaded)

    def told(self) -> Outcome:
        """Tables, figures and report of what is there."""
        from leakfast.pipeline import shown
        from leakfast.stats import retrained

        retrained.set_aside(self.store)
        return shown.show(self.store, self.study, self.steps)

    def settle(self) -> None:
        """What a run is to tell of its study before anything is made: who takes part, and which lists are the study's."""
        from leakfast.pipeline import settled

        settled.keep_personas(self.store, self.study, self.personas)
        settled.lists(self.store, self.study, self.chosen.behaviors)

    # ── the stages ───────────────────────────────────────────────────────────────────────────────
    def centroids(self) -> None:
        """Those of the unadapted model."""
        again = self._has_other_centroids(layout.centroids())
        files = [layout.centroids()]
        self.steps.do("centroids", self._centroid_inputs(), self._centroids, files, again=again)

    def _has_other_centroids(self, path: str) -> bool:
        from leakfast.pipeline.settled import has_other_centroids

        return has_other_centroids(self.store, self.study, self.loaded, self.personas, path)

    def _centroid_inputs(self) -> str:
        """The model, how it is asked, the personas' prompts, the questions, the layers."""
        from leakfast.prompts import chat
        from leakfast.prompts.conversation import described
        from leakfast.prompts.templates import recorded

        cfg, tokenizer = self.study.centroids, self.loaded.tokenizer
        asked, told = load_questions(cfg.questions).questions, recorded(tokenizer)
        people = [(p.name, p.kind, p.prompt) for p in self.personas]
        common = [self.loaded.fingerprint, self.study.dtype, people, *([told] if told else [])]
        read = chat.reading_of_prompts(tokenizer, "centroids", self.personas, asked)
        return hash_of(*common, described(asked), cfg.layers, *read)

    def _centroids(
        self, report: Progress, loaded: Loaded | None = None, path: str = layout.centroids()
    ) -> None:
        from leakfast.geometry import names_extras
        from leakfast.measure.centroids import compute

        cfg = self.study.centroids
        made = compute(
            loaded or self.loaded,
            self.personas,
            load_questions(cfg.questions),
            cfg.layers,
            center_extras=names_extras(self.study.personas, self.personas),
            progress=report,
        )
        self.store.add_file(path, made.save)

    def predictors(self) -> None:
        """What may predict leakage, before anything is trained."""
        from leakfast.measure import Drawing
        from leakfast.measure.predictors.stage import predictors

        request, drawing = asks.predictors(self.study, self.personas), Drawing.of(self.study)

        def work(report: Progress) -> None:
            predictors(self.loaded, self.store, request, drawing, report)

        self.steps.do("predictors", request.hash(self.loaded), work, [layout.predictors()])

    def adapted_centroids(self, adapter: Path) -> None:
        """The same under an adapter, where the study asks for them."""
        from leakfast import models

        if not self.study.centroids.adapters:
            return
        path = layout.centroids(adapter.name)

        def work(report: Progress) -> None:
            with models.with_adapter(self.loaded, adapter) as adapted:
                self._centroids(report, adapted, path)

        inputs = hash_of(self._centroid_inputs(), models.adapter_hash(adapter))
        again = self._has_other_centroids(path)
        self.steps.do(f"centroids of {adapter.name}", inputs, work, [path], again=again)

    def sorted(self) -> tuple[list[str], list[str]]:
        """Behaviors that are trained, and controls. What the former are trained on is there, before anything is
        spent. Raises InputError where it is not."""
        from leakfast.train.chats import check_files
        from leakfast.train.data import material

        controls = [b for b in self.chosen.behaviors if get(b).control]
        trained = [b for b in self.chosen.behaviors if b not in controls]
        if controls and not trained:  # the adapters of all others are what a control is measured on
            trained = asks.trained(self.study)
        trained = [b for b in asks.with_earlier(self.study, trained) if b in trained]
        for behavior in asks.with_earlier(self.study, trained):
            cfg = self.study.behaviors[behavior].data
            material(behavior, cfg, self.study.model)
            check_files(cfg)
        return trained, controls

    def maker(self, behavior: str) -> Maker:
        from leakfast.pipeline.averages import maker_of

        return maker_of(self, behavior)

    def start(self, cfg: BehaviorConfig, source: str, seed: int) -> Start | None:
        """The adapter that one of this behavior, source and seed begins from, trained where it is not there yet."""
        from leakfast.train.start import Start

        if (after := cfg.after) is None:
            return None
        if (after, source, seed) not in self._starts:
            self._starts[after, source, seed] = Start.of(self.trained(self.maker(after), source, seed))
        return replace(self._starts[after, source, seed], stacked=cfg.stacked)

    def _behavior(self, behavior: str) -> list[tuple[Path, int]]:
        """Train and measure every source under every seed; (adapter, seed) of all."""
        found, maker = [], self.maker(behavior)
        settled, sources = maker.settled(), self.chosen.sources
        together = settled.together
        for seeds in [self.chosen.seeds] if together > 1 else [[seed] for seed in self.chosen.seeds]:
            wanted = (self._wanted(maker, settled, source, seed) for seed in seeds for source in sources)
            made = maker.adapters(wanted, together=together)
            for number, seed in enumerate(seeds):
                adapters = made[number * len(sources) : (number + 1) * len(sources)]
                for adapter in adapters:
                    self.adapted_centroids(adapter)
                self._measure(behavior, adapters, seed)
                found += [(adapter, seed) for adapter in adapters]
        return found

    def trained(self, maker: Maker, source: str, seed: int) -> Path:
        """The adapter of a source and a seed, its rows and its learning rate made where they are not there yet."""
        return maker.adapter(*self._wanted(maker, maker.settled(), source, seed))

    def _wanted(self, maker: Maker, settled: TrainConfig, source: str, seed: int) -> tuple[Recipe, Rows]:
        return maker.recipe(source, seed, settled), maker.rows(source, seed)

    def _control(self, behavior: str, adapters: dict[str, list[tuple[Path, int]]]) -> None:
        """Measure a control on the adapters of other behaviors."""
        of = asks.measured_on(self.study, behavior)
        for seed in self.chosen.seeds:
            mine = [adapter for other in of for adapter, its in adapters.get(other, []) if its == seed]
            self._measure(behavior, mine, seed)

    def _measure(self, behavior: str, adapters: Sequence[Path], seed: int) -> None:
        """All adapters of a training seed, and the base, in one engine; the base is drawn under the first seed alone."""
        first = self.study.seeds[0]
        if seed != first:
            self.evaluate(behavior, [], first, base=True)
        if adapters or seed == first:
            self.evaluate(behavior, adapters, seed, base=seed == first)

    def evaluate(
        self,
        behavior: str,
        adapters: Sequence[Path],
        seed: int,
        *,
        base: bool,
        portion: tuple[int, int] = (0, 1),
        by: str = "all",
    ) -> None:
        """Measure a behavior under adapters (and the base); portion: as of a `Request`; by: as of `measure_as_asked`."""
        from leakfast.measure import Drawing, Request
        from leakfast.measure.as_asked import measure_as_asked

        several = f" (seed {seed})" if len(self.study.seeds) > 1 else ""
        asked = asks.asked(self.study, behavior)
        request = Request(asked, self.personas, adapters, base=base, seed=seed, portion=portion)
        drawing = Drawing.of(self.study)
        what = f"probability of {behavior}" if by == "probability" else f"evaluate {behavior}"
        with self.steps.timed(f"{what}{several if adapters else ' of base'}") as report:
            measure_as_asked(self.loaded, self.store, request, drawing, by=by, progress=report)

    def _trajectory(self, adapters: dict[str, list[tuple[Path, int]]]) -> None:
        """Measure behaviors at the points of training that the study names, under its few personas."""
        followed = [adapter for of in asks.followed(self.study) for adapter, _ in adapters.get(of, [])]
        for behavior in [b for b in self.chosen.behaviors if b in self.study.trajectory.behaviors]:
            self.through_training(behavior, followed)
            self.judge(behavior, series=True)

    def through_training(self, behavior: str, followed: Sequence[Path]) -> None:
        """Measure a behavior at the points of those adapters' trainings, all or (match) the chosen ones."""
        from leakfast.measure import Drawing, Request
        from leakfast.measure.as_asked import measure_as_asked

        people, one = asks.asked_on_the_way(self.study, behavior, self.personas)
        points = None if self.study.trajectory.match is None else self.matched(behavior, followed)
        request = Request([one], people, followed, seed=self.study.seeds[0], points=points)
        drawing = Drawing.of(self.study)
        with self.steps.timed(f"{behavior} through training") as report:
            measure_as_asked(self.loaded, self.store, request, drawing, at="checkpoints", progress=report)

    def matched(self, behavior: str, followed: Sequence[Path]) -> dict[str, list[float]]:
        """The points of those trainings that are matched on their sources, which are measured here."""
        from leakfast.pipeline.matching import matched

        return matched(self.study, self.loaded, self.steps, self.personas, behavior, followed)

    def judge(self, behavior: str, series: bool = False, shown: Shown | None = None) -> None:
        """Score the completions of a behavior that a judge measures (series: those of checkpoints); what was scored
        before is kept, and what the study dropped is not paid for. shown: how its progress is (None: as of all steps)."""
        from leakfast.judge import stage
        from leakfast.stats import dropped

        store = dropped.part(self.store)
        if get(behavior).measured_by != "judge" or not store.shards(
            layout.completions(behavior, series=series)
        ):
            return
        cfg = stage.settings(self.study, behavior)
        if cfg.judge is None:
            log.warning(
                '%s: the study names no judge ([behaviors.%s.judge] judge = "…"); its completions wait for one',
                behavior,
                behavior,
            )
            return
        questions = load_questions(self.study.behaviors[behavior].eval.questions)
        title = f"judge {behavior}{' through training' if series else ''}"
        with self.steps.timed(title, shown) as report:
            stage.judge(
                store,
                behavior,
                stage.parse_spec(cfg.judge),
                questions,
                series=series,
                asking=stage.asking(cfg),
                prices=cfg.prices,
                free=cfg.free,
                max_cost=cfg.max_cost,
                progress=report,
            )
