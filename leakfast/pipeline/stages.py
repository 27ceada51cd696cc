"""All stages of a study in order: centroids, then per behavior the base, and per source and seed data,
training and measurement, then the controls, tables, figures, report. Demands a checked study file; a stage whose
inputs have not changed is skipped; state lives only in the run directory."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.progress import Progress
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout
from leakfast.storage.documents import did_you_mean
from leakfast.storage.layout import PERSONAS
from leakfast.storage.run import Run
from leakfast.study.config import Study, load_study

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.stats.tables import Stats

log = logging.getLogger("leakfast.run")


@dataclass
class Outcome:
    """What a run did. `stages`: name → seconds, null where it was done before."""

    run: Path
    stats: Stats
    report: Path
    stages: dict[str, float | None] = field(default_factory=dict)


def run(
    study: str | Path | Study,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    progress: Callable[[str], Any] | None = None,
) -> Outcome:
    """Run every stage of `study` that is not done yet, in `out` (default runs/<name>).

    only: names of its behaviors, sources and seeds; where any of a kind is named, the others of that kind are
    left for another call. progress: title → context manager giving a function (done, total, what). The same call again is the
    resume. Raises InputError for a study that cannot be meant, StoreError for a folder that cannot be
    written, ModelError or AdapterError from the stages."""
    study = study if isinstance(study, Study) else load_study(study)
    chosen = _chosen(study, only)
    store = Run(out or study.run_dir)
    with store.lock():
        store.create(study.raw_text)
        return Stages(study, store, progress or _silent, chosen).all()


@dataclass(frozen=True)
class _Chosen:
    """The part of a study that is run."""

    behaviors: list[str]
    sources: list[str]
    seeds: list[int]


def _chosen(study: Study, only: Sequence[str]) -> _Chosen:
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

    return _Chosen(part(list(study.behaviors)), part(study.sources), part(study.seeds))


@contextmanager
def _silent(title: str) -> Iterator[Progress]:
    yield lambda done, total, what="": None


class Stages:
    """One pass over a study; the model is loaded when the first stage that needs it comes."""

    def __init__(self, study: Study, store: Run, progress: Callable[[str], Any], chosen: _Chosen):
        self.study, self.store, self.progress, self.chosen = study, store, progress, chosen
        self.personas: Sequence[Persona] = load_personas(study.personas)
        self.stages: dict[str, float | None] = {}
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            from leakfast import models
            from leakfast.models import threads
            from leakfast.prompts.rendering import asked_by

            self._loaded = models.load(
                self.study.model,
                dtype=self.study.dtype,
                revision=self.study.revision,
                rendering=asked_by(self.study),
            )
            self.store.log(
                "model", name=self._loaded.name, dtype=self._loaded.dtype, threads=threads.in_use()
            )
        return self._loaded

    def all(self) -> Outcome:
        from leakfast.pipeline import preflight as beforehand
        from leakfast.report import trajectory
        from leakfast.report.page import report
        from leakfast.stats.tables import current

        trained, controls = self._sorted()
        beforehand.check(
            self.study,
            self.store,
            lambda: self.loaded,
            judged=self.chosen.behaviors,
            drawn=[*trained, *controls],
        )
        self._keep_personas()
        self.stage("centroids", self._centroid_inputs(), self._centroids, [layout.centroids()])
        adapters = {behavior: self._behavior(behavior) for behavior in trained}
        for behavior in controls:
            self._control(behavior, adapters)
        for behavior in self.chosen.behaviors:
            self._judge(behavior)
        self._trajectory(adapters)
        began = time.monotonic()
        with self.progress("tables, figures, report") as shown:
            trajectory.write(self.store)
            stats = current(self.store)
            page = report(self.store, stats, shown)
        self.stages["tables, figures, report"] = time.monotonic() - began
        return Outcome(self.store.path, stats, page, self.stages)

    def stage(self, key: str, inputs: str, work: Callable[[Progress], None], files: Sequence[str]) -> None:
        """Do `work` unless `key` is done with these inputs and its files are intact."""
        if self.store.stage_done(key, inputs):
            self.stages[key] = None
            log.info("%s: done before", key)
            return
        began = time.monotonic()
        with self.progress(key) as report:
            work(report)
        self.store.mark_done(key, inputs, files=list(files))
        self.stages[key] = time.monotonic() - began
        log.info("%s: %.0f s", key, self.stages[key])

    def _keep_personas(self) -> None:
        """Who takes part, so that the tables can be made again where the study's persona file is gone."""
        from leakfast.geometry import names_extras

        extras = names_extras(self.study.personas, self.personas)
        kept = {
            "categories": {p.name: p.category for p in self.personas},
            "named": [p.name for p in self.personas if extras or not p.is_extra],
            "sources": self.study.sources,
        }
        self.store.has(PERSONAS)  # a damaged one is set aside, and said
        self.store.add_file(PERSONAS, json.dumps(kept, indent=1).encode())

    # ── the stages ───────────────────────────────────────────────────────────────────────────────
    def common(self) -> list[Any]:
        """What every stage follows from: the model, how it is asked, and the personas' prompts."""
        from leakfast.prompts.templates import recorded

        told = recorded(self.loaded.tokenizer)
        people = [(p.name, p.kind, p.prompt) for p in self.personas]
        return [self.loaded.fingerprint, self.study.dtype, people, *([told] if told else [])]

    def reading(self, key: str, questions: Sequence[str]) -> list[str]:
        from leakfast.prompts import chat

        return chat.reading_of_prompts(self.loaded.tokenizer, key, self.personas, questions)

    def _centroid_inputs(self) -> str:
        cfg = self.study.centroids
        asked = load_questions(cfg.questions).questions
        return hash_of(*self.common(), asked, cfg.layers, *self.reading("centroids", asked))

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

    def _adapted_centroids(self, adapter: Path) -> None:
        """The same under an adapter, where the study asks for them."""
        from leakfast import models

        if not self.study.centroids.adapters:
            return
        path = layout.centroids(adapter.name)

        def work(report: Progress) -> None:
            with models.with_adapter(self.loaded, adapter) as adapted:
                self._centroids(report, adapted, path)

        inputs = hash_of(self._centroid_inputs(), models.adapter_hash(adapter))
        self.stage(f"centroids of {adapter.name}", inputs, work, [path])

    def _sorted(self) -> tuple[list[str], list[str]]:
        """Behaviors that are trained, and controls. What the former are trained on is there, before anything is
        spent. Raises InputError where it is not."""
        from leakfast.behaviors.registry import get
        from leakfast.train.data import material

        controls = [b for b in self.chosen.behaviors if get(b).control]
        trained = [b for b in self.chosen.behaviors if b not in controls]
        if controls and not trained:  # the adapters of all others are what a control is measured on
            trained = [b for b in self.study.behaviors if not get(b).control]
        for behavior in trained:
            material(behavior, self.study.behaviors[behavior].data, self.study.model)
        return trained, controls

    def _behavior(self, behavior: str) -> list[tuple[Path, int]]:
        """Train and measure every source under every seed; (adapter, seed) of all."""
        from leakfast.pipeline.adapter_stage import adapter_of

        found = []
        for seed in self.chosen.seeds:
            adapters = [adapter_of(self, behavior, source, seed) for source in self.chosen.sources]
            for adapter in adapters:
                self._adapted_centroids(adapter)
            self._measure(behavior, adapters, seed)
            found += [(adapter, seed) for adapter in adapters]
        return found

    def _control(self, behavior: str, adapters: dict[str, list[tuple[Path, int]]]) -> None:
        """Measure a control on the adapters of other behaviors."""
        of = self.study.behaviors[behavior].eval.of or list(adapters)
        for seed in self.chosen.seeds:
            mine = [adapter for other in of for adapter, its in adapters.get(other, []) if its == seed]
            self._measure(behavior, mine, seed)

    def _measure(self, behavior: str, adapters: Sequence[Path], seed: int) -> None:
        """All adapters of a training seed, and the base, in one engine; the base is drawn under the first seed alone."""
        first = self.study.seeds[0]
        if seed != first:
            self._evaluate(behavior, [], first)
        if adapters or seed == first:
            self._evaluate(behavior, adapters, seed)

    def _evaluate(self, behavior: str, adapters: Sequence[Path], seed: int) -> None:
        from leakfast.behaviors.registry import get, items_of
        from leakfast.measure.choices.evaluate import evaluate as evaluate_choices
        from leakfast.measure.completions import evaluate_all
        from leakfast.measure.targets import asked_of

        cfg, began = self.study.behaviors[behavior].eval, time.monotonic()
        several = f" (seed {seed})" if len(self.study.seeds) > 1 else ""
        name = f"evaluate {behavior}{several if adapters else ' of base'}"
        with self.progress(name) as report:
            common = {"base": seed == self.study.seeds[0], "progress": report}
            if get(behavior).measured_by == "choices":
                items = items_of(behavior, cfg, self.study.model)
                evaluate_choices(
                    self.loaded,
                    self.store,
                    adapters,
                    self.personas,
                    items,
                    cfg.scoring,
                    behavior=behavior,
                    **common,
                )
            else:
                evaluate_all(
                    self.loaded,
                    self.store,
                    adapters,
                    self.personas,
                    asked_of(behavior, cfg),
                    seed,
                    **self._drawn_by,
                    **common,
                )
        self.stages[name] = time.monotonic() - began

    @property
    def _drawn_by(self) -> dict[str, Any]:
        from leakfast.generation.backends import asked_by

        return asked_by(self.study)

    def _trajectory(self, adapters: dict[str, list[tuple[Path, int]]]) -> None:
        """Measure behaviors at the points of training that the study names, under its few personas."""
        from leakfast.behaviors.registry import get, items_of
        from leakfast.measure.checkpoints import evaluate_series
        from leakfast.measure.choices.evaluate import evaluate_series as score_series
        from leakfast.measure.targets import asked_of

        cfg = self.study.trajectory
        people = load_personas(cfg.personas, among=self.personas)
        people += [p for p in load_personas(self.study.sources, among=self.personas) if p not in people]
        for behavior in [b for b in self.chosen.behaviors if b in cfg.behaviors]:
            measured, began = self.study.behaviors[behavior].eval, time.monotonic()
            name = f"{behavior} through training"
            followed = [adapter for of in self.followed for adapter, _ in adapters.get(of, [])]
            with self.progress(name) as report:
                if get(behavior).measured_by == "choices":
                    items = items_of(behavior, measured, self.study.model)
                    items = items.sample(cfg.n_items) if cfg.n_items else items
                    for adapter in followed:
                        score_series(
                            self.loaded,
                            self.store,
                            adapter,
                            people,
                            items,
                            measured.scoring,
                            behavior=behavior,
                            progress=report,
                        )
                else:
                    if cfg.samples:
                        measured = measured.model_copy(update={"samples": cfg.samples})
                    asked = asked_of(behavior, measured)[:1]
                    evaluate_series(
                        self.loaded,
                        self.store,
                        followed,
                        people,
                        asked,
                        self.study.seeds[0],
                        progress=report,
                        **self._drawn_by,
                    )
            self.stages[name] = time.monotonic() - began
            self._judge(behavior, series=True)

    @property
    def followed(self) -> list[str]:
        """Behaviors whose training is followed on its way."""
        from leakfast.behaviors.registry import get

        cfg = self.study.trajectory
        trained = [name for name in self.study.behaviors if not get(name).control]
        return (cfg.of or trained) if cfg.behaviors else []

    def _judge(self, behavior: str, series: bool = False) -> None:
        """Score the completions of a behavior that a judge measures (series: those of checkpoints); what was scored
        before is kept."""
        from leakfast.behaviors.registry import get
        from leakfast.judge import stage
        from leakfast.storage.layout import SERIES

        there = f"{SERIES}/completions" if series else "completions"
        if get(behavior).measured_by != "judge" or not self.store.shards(f"{there}/{behavior}"):
            return
        cfg, began = stage.settings(self.study, behavior), time.monotonic()
        if cfg.judge is None:
            log.warning(
                '%s: the study names no judge ([behaviors.%s.judge] judge = "…"); its completions wait for one',
                behavior,
                behavior,
            )
            return
        questions = load_questions(self.study.behaviors[behavior].eval.questions)
        name = f"judge {behavior}{' through training' if series else ''}"
        with self.progress(name) as report:
            stage.judge(
                self.store,
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
        self.stages[name] = time.monotonic() - began


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()
