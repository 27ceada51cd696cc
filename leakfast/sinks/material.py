"""What every export reads of a run: tables, study, prompts and questions where their wording is known, hashes, verdicts.
Demands a run directory; a text that cannot be known is null, with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.errors import InputError
from leakfast.models.adapters import AdapterCard, card_in
from leakfast.stats import dropped
from leakfast.stats.collect import inputs_hash
from leakfast.stats.tables import Stats, current
from leakfast.storage import layout
from leakfast.storage.manifests import events
from leakfast.storage.run import Run

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import Study


@dataclass(frozen=True)
class Material:
    """A run with its tables. study: None where there is none or it cannot be read; `why` says so then."""

    run: Run
    stats: Stats
    study: Study | None
    why: str | None

    @staticmethod
    def of(run: str | Path | Run, stats: Stats | None = None) -> Material:
        """Raises InputError where `run` is no run or has nothing to count, StoreError where its study was changed."""
        from leakfast.study.config import settings_in

        run = (run if isinstance(run, Run) else Run(run)).open()
        stats, path = stats or current(run), run.check_study()
        if path is None:
            return Material(run, stats, None, "the run was made without a study file")
        try:
            return Material(run, stats, settings_in(path), None)
        except InputError as error:
            return Material(run, stats, None, " ".join(error.message.split()))

    @cached_property
    def part(self) -> Run:
        """The run without what was measured of sources, seeds and behaviors that its study dropped."""
        return dropped.part(self.run)

    @property
    def name(self) -> str:
        return self.study.name if self.study else self.run.path.resolve().name

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the names and hashes of everything that the tables rest on."""
        return inputs_hash(self.run)

    @property
    def study_hash(self) -> str | None:
        """SHA-256 of study.toml."""
        return self.run.manifest.get("study")

    @cached_property
    def people(self) -> dict[str, Persona]:
        """Name → persona of the study, with the words that the run was asked under; empty where it is not known who took part
        under which prompt."""
        from leakfast.prompts.personas import load_personas
        from leakfast.stats.people import kept_in

        if self.study is None:
            return {}
        try:
            own = load_personas(self.study.personas)
        except InputError:  # a file of the study that is gone
            return {}
        words = kept_in(self.run).get("prompts", {})
        asked = {one.name: one for one in own if words.get(one.name, one.prompt) == one.prompt}
        # of the others the file says something else by now
        changed = [one for one in own if one.name not in asked and words[one.name]]
        return asked | {one.name: replace(one, prompt=words[one.name], kind="text") for one in changed}

    def questions(self, behavior: str, name: str, digest: str | None) -> tuple[str, ...] | None:
        """The questions of a set by index, where their texts have the hash that was kept with the completions; else
        None. name: of the set, as the manifest has it."""
        from leakfast.prompts.personas import load_questions
        from leakfast.prompts.questions import texts_hash

        cfg = self.study.behaviors[behavior].eval if self.study and behavior in self.study.behaviors else None
        for spec in dict.fromkeys([*([cfg.questions, *cfg.other_questions] if cfg else []), name]):
            try:
                texts = load_questions(spec).questions
            except InputError:  # a file that is gone, or a list that was given in Python
                continue
            if texts_hash(texts) == digest:
                return texts
        return None

    @cached_property
    def roles(self) -> dict[tuple[str, str], tuple[str | None, str | None]]:
        """(adapter, persona) → (role, category)."""
        told = self.stats.rates.select("adapter", "persona", "role", "category").unique(maintain_order=True)
        return {(adapter, persona): (role, category) for adapter, persona, role, category in told.rows()}

    @cached_property
    def written(self) -> dict[str, str]:
        """File of the run → when it was written last (ISO 8601, UTC), as far as the run's log tells."""
        times: dict[str, str] = {}
        path = self.run.path / layout.JOURNAL
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                if entry["event"] == "shard":
                    times[str(entry["path"])] = str(entry["time"])
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line is said by whoever relies on it
        return times

    @cached_property
    def outdated(self) -> set[str]:
        """Pictures that were drawn when some table was another one than it is, as the run's log tells: of a study that was
        edited since, or under other settings."""
        shards = self.run.manifest["shards"]
        there: dict[str, str] = {}  # tables as they were
        drawn: dict[str, dict[str, str]] = {}
        journal = self.run.path / layout.JOURNAL
        changes = [*events(journal, "shard"), *events(journal, "quarantine")]
        for entry in sorted(changes, key=lambda one: one["time"]):
            name = str(entry["path"])
            if entry["event"] == "quarantine":
                there.pop(name, None)
            elif name.startswith(f"{layout.TABLES}/"):
                there[name] = entry["sha256"]
            elif name.startswith(f"{layout.FIGURES}/"):
                drawn[name] = dict(there)
        now = {name: entry["sha256"] for name, entry in shards.items()}
        return {name for name, tables in drawn.items() if any(now.get(t) != sha for t, sha in tables.items())}

    def adapters(self) -> list[str]:
        """Adapters whose files the run holds and that the study did not drop, those of tables first."""
        here = {path.split("/")[1] for path in self.run.shards(layout.ADAPTERS) if path.count("/") == 2}
        here -= dropped.adapters(self.run)
        told = self.stats.rates["adapter"].unique(maintain_order=True).to_list()
        return [*(name for name in told if name in here), *sorted(here - set(told))]

    def card(self, adapter: str) -> AdapterCard | None:
        return card_in(self.run.path, adapter)

    def notes(self) -> list[str]:
        """What is to be said of the whole: what the tables lack, what they leave out, and of whom they are not (yet)."""
        return [*self.stats.warnings(), *self.stats.missing, *dropped.notes(self.run, self.stats.rates)]

    def headline(self) -> pl.DataFrame:
        """The rows of `Stats.summary` at each behavior's best layer, or all there are without a layer."""
        table = self.stats.summary()
        return table.filter(pl.col("best_layer") | pl.col("layer").is_null())

    def verdict(self, behavior: str, adapter: str) -> tuple[str | None, str | None]:
        """(health, its reason) of an adapter; nulls where nobody looked."""
        if self.stats.health is None:
            return None, None
        rows = self.stats.health.filter(pl.col("persona").is_null(), behavior=behavior, adapter=adapter)
        return rows.select("health", "reason").row(0) if rows.height else (None, None)

    def base(self) -> dict[str, Any]:
        """model and fingerprint of the unadapted model, as the cards of the adapters have them."""
        cards = [card for name in self.adapters() if (card := self.card(name)) is not None]
        if cards:
            return {"model": cards[0].base, "fingerprint": cards[0].base_fingerprint}
        prints = [e["base"] for e in self.run.manifest["shards"].values() if isinstance(e.get("base"), str)]
        return {"model": self.study.model if self.study else None, "fingerprint": next(iter(prints), None)}
