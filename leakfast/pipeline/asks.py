"""What a study asks of which adapters: the one reading of it that the stages carry out and the plan counts. Demands a checked
study; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from leakfast.behaviors.registry import get
from leakfast.measure.request import Asked, asked_of
from leakfast.prompts.personas import load_personas

if TYPE_CHECKING:
    from leakfast.measure.predictors.request import Request
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import Study


def trained(study: Study) -> list[str]:
    """The behaviors that adapters are trained for."""
    return [name for name in study.behaviors if not get(name).control]


def with_earlier(study: Study, behaviors: Sequence[str]) -> list[str]:
    """The behaviors, and those that they are taught after or are means of, in an order in which each comes after what it
    begins from."""
    found: dict[str, None] = {}
    for behavior in behaviors:
        found |= dict.fromkeys(with_earlier(study, begins_from(study, behavior)))
        found[behavior] = None
    return list(found)


def begins_from(study: Study, behavior: str) -> list[str]:
    """The behaviors whose adapters one of this behavior is made of, directly: the one it is taught after, those it is the mean
    of."""
    cfg = study.behaviors[behavior]
    return [*([cfg.after] if cfg.after else []), *cfg.average]


def measured_on(study: Study, behavior: str) -> list[str]:
    """The behaviors whose adapters this one is measured on: its own, of a control those of others."""
    return (study.behaviors[behavior].eval.of or trained(study)) if get(behavior).control else [behavior]


def asked(study: Study, behavior: str) -> list[Asked]:
    """What every adapter, and the base, is asked."""
    return asked_of(behavior, study.behaviors[behavior].eval, study.model)


def followed(study: Study) -> list[str]:
    """The behaviors whose training is followed on its way; means, which have an end alone, where trainings are matched."""
    cfg = study.trajectory
    of = cfg.of or [
        name for name in trained(study) if cfg.match is not None or not study.behaviors[name].average
    ]
    return of if cfg.behaviors else []


def points(study: Study, of: str) -> list[float]:
    """The shares of its training, above 0, at which adapters of a behavior are measured: all that the study names and the
    end; of a mean the end alone."""
    shares = () if study.behaviors[of].average else study.trajectory.shares
    return sorted({*(share for share in shares if share > 0), 1.0})


def asked_on_the_way(study: Study, behavior: str, personas: Sequence[Persona]) -> tuple[list[Persona], Asked]:
    """Who is asked at the points of training, and what: fewer samples or items where the study says so."""
    cfg = study.trajectory
    people = load_personas(cfg.personas, among=personas)
    people += [p for p in load_personas(study.sources, among=personas) if p not in people]
    measured = study.behaviors[behavior].eval
    if cfg.samples:
        measured = measured.model_copy(update={"samples": cfg.samples})
    if cfg.measure:
        measured = measured.model_copy(update={"measure": cfg.measure})
    one = asked_of(behavior, measured, study.model)[0]
    if one.by_choices and cfg.n_items:
        one = Asked(behavior, one.questions.sample(cfg.n_items), measured)
    return people, one


def asked_to_match(study: Study, behavior: str, personas: Sequence[Persona]) -> tuple[list[Persona], Asked]:
    """The sources, and what each is asked under its own adapters, at all points to choose one and again at the chosen one."""
    people, one = load_personas(study.sources, among=personas), asked(study, behavior)[0]
    told = {"samples": study.trajectory.match_samples, "measure": "completions"}
    return people, replace(one, config=one.config.model_copy(update=told))


def predictors(study: Study, personas: Sequence[Persona]) -> Request:
    """What is compared between every two personas before training."""
    from leakfast.geometry import names_extras
    from leakfast.measure.predictors.request import Request

    extras = names_extras(study.personas, personas)
    return Request.of(study.predictors, personas, seed=study.seeds[0], center_extras=extras)
