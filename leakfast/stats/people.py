"""Who the personas of a run are: categories, relations, and the words behind each name. Demands an open run; what neither the
run nor its study tells is nobody's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.storage.layout import PERSONAS
from leakfast.storage.run import Run

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import Study


@dataclass(frozen=True)
class People:
    """Who the personas are. `named`: those the study names, None without a study. `prompts`: system
    prompts where they are known; without the study's own wording that is nobody. `judges`: behavior → (judge,
    smallest coherent score that counts), and `match`: the source's rate at which trainings are compared, as the study says."""

    categories: dict[str, str | None]
    named: set[str] | None = None
    sources: list[str] = field(default_factory=list)
    related_to: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    judges: dict[str, tuple[str | None, float]] = field(default_factory=dict)
    match: float | None = None


def read_people(run: Run) -> tuple[People, list[str]]:
    """Who the personas of a run are, and what could not be read."""
    from leakfast.geometry import names_extras
    from leakfast.prompts.personas import load_personas
    from leakfast.study.config import settings_in

    shipped = [*load_personas("all"), *load_personas("qwen_default,no_persona")]
    kept = kept_in(run)
    if "related_to" in kept:  # an imported study: its own personas, wording unknown
        related = {name: tuple(names) for name, names in kept["related_to"].items()}
        return People(kept["categories"], set(kept["named"]), kept["sources"], related), []
    study, told, why = run.check_study(), None, None
    own: list[Persona] = []
    judges, match = {}, None
    if study is not None:
        try:
            told = settings_in(study)
            judges, match = _judges(told), told.trajectory.match
            own = load_personas(told.personas)
        except InputError as error:  # a file that is gone: what it said of a shipped name is not known either
            why = error
            shipped = [replace(persona, prompt=None, related_to=()) for persona in shipped]
    known = [*shipped, *own]
    categories = {persona.name: persona.category for persona in known} | kept.get("categories", {})
    related = {persona.name: persona.related_to for persona in known}
    related |= {name: tuple(names) for name, names in kept.get("relations", {}).items()}
    words = {persona.name: persona.prompt for persona in known} | kept.get("prompts", {})
    prompts = {name: prompt for name, prompt in words.items() if prompt}
    settings = (judges, match)
    if "named" in kept:
        return People(categories, set(kept["named"]), kept["sources"], related, prompts, *settings), []
    if told is None or why is not None:
        reason = "" if why is None else " ".join(why.message.split())
        lacking = [f"own personas have no category: the study cannot be read: {reason}"] if reason else []
        return People(categories, None, [], related, prompts, *settings), lacking
    named = {persona.name for persona in own if names_extras(told.personas, own) or not persona.is_extra}
    return People(categories, named, list(told.sources), related, prompts, *settings), []


def kept_in(run: Run) -> dict[str, Any]:
    """What a run keeps of its personas (prompts.personas.told_of, and of a study's who is named); empty where it keeps
    nothing."""
    told: dict[str, Any] = json.loads((run.path / PERSONAS).read_bytes()) if run.has(PERSONAS) else {}
    return told


def _judges(study: Study) -> dict[str, tuple[str | None, float]]:
    """Whose scores a study counts for each behavior, and from which coherence on."""
    from leakfast.judge import stage

    found = {}
    for behavior in study.behaviors:
        cfg = stage.settings(study, behavior)
        name = stage.parse_spec(cfg.judge).name if cfg.judge else None
        found[behavior] = (name, cfg.coherent_min)
    return found
