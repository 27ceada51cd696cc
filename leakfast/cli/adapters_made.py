"""The adapters of one `leakfast train`: rows, learning rate and training of each, one after the other or in company.
Demands settled options and a loaded model; leaves the command line to train.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.cli.settings import Settings
    from leakfast.measure.reply_sample import Sample
    from leakfast.models.loading import Loaded
    from leakfast.pipeline.adapters import Maker, Rows
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import BehaviorConfig
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe
    from leakfast.train.start import Start

log = logging.getLogger("leakfast.cli")


@dataclass(frozen=True)
class Wanted:
    """An adapter: who is taught under which seed, its name in the run, and its folder. kept: where it is there already, of
    these very rows and settings, it is not trained again."""

    source: str
    seed: int
    name: str
    out: Path
    kept: bool


@dataclass(frozen=True)
class Making:
    """What the adapters of a command have in common. run: its folder; inside: whether they are adapters of that run,
    entered in its manifest; given: rows that somebody else made; init: the adapter that all of them begin from (None: that of
    the run which the study names in `after`, or fresh weights); config.stacked: they are trained on top of it."""

    loaded: Loaded
    settings: Settings
    behavior: str
    people: Sequence[Persona]
    config: BehaviorConfig
    run: Path
    inside: bool
    given: list[Row] | None
    init: Path | None = None

    def all(self, wanted: Sequence[Wanted], *, together: bool) -> dict[Path, Sample | None]:
        """Trains what is wanted; what each adapter replied, by folder, None where nothing was drawn. Raises InputError for
        an adapter that is there and not as it is wanted."""
        from leakfast.cli.progress import progress_for
        from leakfast.storage.run import Run
        from leakfast.train import quantized, start

        quantized.check(self.loaded)  # before rows are drawn
        for one in wanted:
            start.check(self.loaded, self._start(one.source, one.seed), self.config.train)
        run, found, waiting = Run(self.run).create(), dict.fromkeys(w.out for w in wanted), []
        with run.lock():
            for one in wanted:
                maker = self._maker(run, one)
                recipe, rows = self._prepared(maker, one)
                there = one.kept and self._there(one, recipe, rows)
                if self.inside and (there or not together):
                    maker.adapter(recipe, rows, again=not there)
                elif together and not there:
                    waiting.append((maker, recipe, rows, one.out))
                elif not there:
                    with progress_for("train") as progress:
                        maker.fit(recipe, rows, one.out, progress)
                found[one.out] = maker.samples.get(recipe.name)
            if waiting:
                maker = waiting[0][0]
                if self.inside:
                    pairs = [(recipe, rows) for _, recipe, rows, _ in waiting]
                    maker.adapters(pairs, together=len(pairs), again=True)
                else:
                    with progress_for("train") as progress:
                        maker.company([its[1:] for its in waiting], progress)
                found |= {out: maker.samples.get(recipe.name) for _, recipe, _, out in waiting}
        return found

    def _maker(self, run: Any, one: Wanted) -> Maker:
        """A maker that finds a learning rate where a command of this adapter alone would."""
        from leakfast.cli.health import tell
        from leakfast.cli.progress import progress_for
        from leakfast.pipeline.adapters import Maker
        from leakfast.pipeline.steps import Steps

        settings, first = self.settings, (one.source, one.seed)
        if settings.study is not None and self.given is None:
            first = (settings.study.sources[0], settings.study.seeds[0])
        about = (self.people, self.behavior, self.config, settings.model, settings.dtype, first)
        steps = Steps(run, progress_for)
        return Maker(
            self.loaded, steps, *about, say=lambda sentence: tell([sentence], err=True), start=self._start
        )

    def _start(self, source: str, seed: int) -> Start | None:
        """The adapter that one of this source and seed begins from. Raises InputError where the study's is not there."""
        from leakfast.storage import layout
        from leakfast.train.start import Start

        if self.init is not None:
            return Start.of(self.init, stacked=self.config.stacked)
        if not self.config.after:
            return None
        folder = self.run / layout.adapter(layout.adapter_name(self.config.after, source, seed))
        if not folder.is_dir():
            raise InputError(
                f"train: {self.behavior} is taught after {self.config.after}, but there is no {folder}. Train it first (leakfast "
                f"train --behavior {self.config.after} with this study), or give another adapter: --init DIR"
            )
        return Start.of(folder, stacked=self.config.stacked)

    def _prepared(self, maker: Maker, one: Wanted) -> tuple[Recipe, Rows]:
        from leakfast.cli.progress import progress_for
        from leakfast.pipeline.adapters import Rows
        from leakfast.prompts.personas import load_personas
        from leakfast.train import contradictions
        from leakfast.train.data import write_rows

        if self.given is not None:
            if contradictions.of_chats(self.given):
                (taught,) = load_personas([one.source], among=self.people)
                design = self.config.data.design
                contradictions.check(self.loaded.tokenizer, self.given, taught.system, design)
            rows = Rows.given(self.given)
        elif self.inside or self.settings.study is not None:
            rows = maker.rows(one.source, one.seed, one.name)
        else:
            with progress_for("data") as progress:
                rows = Rows.given(maker.built(one.source, one.seed, progress))
            write_rows(one.out.parent / f"{one.out.name}.jsonl", rows.rows)
        settled = maker.settled(rows if maker.first == (one.source, one.seed) else None)
        return maker.recipe(one.source, one.seed, settled, one.out.name), rows

    def _there(self, one: Wanted, recipe: Recipe, rows: Rows) -> bool:
        """Whether the adapter is there, of these very rows and settings."""
        from leakfast.train import placed

        if not one.out.exists():
            return False
        if not placed.is_of(one.out, self.loaded, recipe, rows.rows):
            raise InputError(
                f"train: {one.out} is there already, of other rows or settings. Use --overwrite to replace it, or another "
                "--out."
            )
        log.info("train: %s is there already, of these rows and settings", one.out)
        return True
