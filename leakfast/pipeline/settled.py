"""What a run is to tell of its study before anything is made: who takes part, and, of one that was edited, which list makes the
rate of a behavior that multiple choice measures; and whether its centroids are of the prompts that the study has now. Demands a
locked run and the study's items; scores nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.choices.scores import LETTERS
from leakfast.pipeline import asks
from leakfast.prompts.personas import told_of
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.run")


def keep_personas(run: Run, study: Study, personas: Sequence[Persona]) -> None:
    """Who takes part, so that the tables can be made again where the study's persona file is gone; who was asked beside them
    (measure.request.keep_people) stays behind them. And what the study dropped since it was run before, which stands in no
    table (stats.dropped)."""
    from leakfast.geometry import centered_on, names_extras
    from leakfast.stats import dropped
    from leakfast.stats.people import kept_in

    before = kept_in(run)  # a damaged one is set aside, and said
    kept: dict[str, Any] = {}
    for key, values in told_of(personas).items():
        kept[key] = values | {name: v for name, v in before.get(key, {}).items() if name not in values}
    kept["named"] = centered_on(personas, names_extras(study.personas, personas))
    named = {"behaviors": list(study.behaviors), "sources": study.sources, "seeds": study.seeds}
    earlier = before.get("dropped", {})
    kept["dropped"] = {
        kind: [
            name for name in dict.fromkeys([*earlier.get(kind, []), *before.get(kind, [])]) if name not in now
        ]
        for kind, now in named.items()
    }
    run.add_file(layout.PERSONAS, json.dumps(kept | named, indent=1).encode())
    if left_out := dropped.told(run):
        log.warning("%s: %s", run.path, left_out)


def has_other_centroids(
    run: Run, study: Study, loaded: Loaded, personas: Sequence[Persona], path: str = layout.centroids()
) -> bool:
    """Whether the run's centroids were made of other prompts than these personas have now, or are centered on others. The hash
    of the step that makes them says nothing of the chat template's text, nor of extras that the study came to name, or no
    longer names, beside the same personas."""
    from leakfast.geometry import Centroids, centered_on, names_extras
    from leakfast.prompts import chat

    if not run.has(path):
        return False
    made, mean = (
        Centroids.load(run.path / path),
        centered_on(personas, names_extras(study.personas, personas)),
    )
    other = made.other_prompts(chat.prompt_hashes(loaded.tokenizer, personas))
    return bool(other) or made.metadata["centered_on"] != mean


def lists(run: Run, study: Study, behaviors: Sequence[str]) -> None:
    """Move to quarantine/ what would stand as a behavior's rate in place of what the study asks: scores of another list under
    the behavior's own name, or of letters, where the study reads full texts and none are there yet (letters come first where
    a run has both). The study's list loses the longer name that it got as a second one. Other lists that somebody had scored
    beside it have names of their own and stay. Raises InputError where two behaviors would be scored into one folder."""
    asked_of = {b: asks.asked(study, b)[0] for b in behaviors if not get(b).by_completions}
    there: dict[str, str] = {}
    for behavior, one in asked_of.items():
        name, scoring = one.set_name, one.config.scoring
        first = there.setdefault(f"{name}-{scoring}", behavior)
        if first != behavior:
            raise InputError(
                f"study: {first} and {behavior} are both asked a list {name} by {scoring}, and scores are kept by list. "
                "Needed: a list for each. Give another file, half or number of items, or rename one of the files."
            )
    for behavior, one in asked_of.items():
        _settle(run, behavior, one.set_name, one.config.scoring)


def _settle(run: Run, behavior: str, name: str, scoring: str) -> None:
    """The same of one behavior, whose list and scoring these are."""
    entries = run.manifest["shards"]
    made = {path: entries[path] for path in run.shards(layout.CHOICES) if "items" in entries[path]}
    own = {path: entry for path, entry in made.items() if entry.get("behavior") == behavior}
    asked = [path for path in made if path.split("/")[2] == f"{name}-{scoring}"]
    other = [path for path, entry in own.items() if entry["items"] != name]
    if scoring != LETTERS and not asked:
        other += [path for path in own if path.split("/")[2] == f"{name}-{LETTERS}"]
    if other:
        folders = sorted({path.split("/")[2] for path in other})
        log.warning(
            "%s: %d shards of %s were scored by %s, which the study no longer asks; they are moved to %s",
            *(run.path, len(other), behavior, ", ".join(folders), layout.QUARANTINE),
        )
    for path in other:
        run.retire(path, "scored by a list, or a scoring, that the study no longer asks")
    for path in asked:
        if made[path].get("behavior") == f"{behavior}-{name}":
            _renamed(run, path, behavior)


def _renamed(run: Run, path: str, behavior: str) -> None:
    """The shard's scores under the behavior's own name."""
    meta = {k: v for k, v in run.manifest["shards"][path].items() if k not in ("sha256", "bytes", "rows")}
    frame = pl.read_parquet(run.path / path, glob=False).with_columns(behavior=pl.lit(behavior))
    run.add_shard(path, frame, **{**meta, "behavior": behavior})
