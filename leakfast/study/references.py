"""What a study file names: whether every word in it is something that exists (personas, question sets, items,
behaviors), and where files beside it lie. Demands a study whose shape is checked (leakfast.study.config); says what is wrong
with its line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.prompts.items import NAMED as NAMED_ITEMS
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout
from leakfast.storage.documents import Document, KeyPath, did_you_mean, find_shipped
from leakfast.study.behavior import few_replies
from leakfast.study.methods import check_methods
from leakfast.study.negatives import check_count, rule_of

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import SteeringConfig, Study, TrainSteeringConfig

_FILES = (
    "personas",
    "questions",
    "negative_personas",
    "other_questions",
    "model",
    "items",
    "pairs",
    "prices",
    "file",
    "rows",
    "benign_rows",
)  # may name a file


def _at(document: Document, key: KeyPath, error: InputError) -> InputError:
    """The error with the line of the key it is about."""
    return InputError(f"{document.where(key)}: {error.message}")


def check_words(study: Study, document: Document) -> None:
    """Personas, question sets, items and behaviors that the study names exist. Raises InputError naming file, line and
    the nearest word."""
    from leakfast.behaviors.registry import get as get_behavior

    try:
        personas = load_personas(study.personas)
    except InputError as error:
        raise _at(document, ("personas",), error) from None
    known = {persona.name for persona in personas}
    for index, source in enumerate(study.sources):
        try:
            load_personas([source], among=personas)
        except InputError:
            raise InputError(
                f"{document.where(('sources', index))}: source {source!r} is none of the study's "
                f"{len(known)} personas.{did_you_mean(source, known)} "
                "`leakfast personas list` shows the names."
            ) from None
    sets: dict[KeyPath, str] = {("centroids", "questions"): study.centroids.questions}
    sets["predictors", "questions"] = study.predictors.questions
    for name, behavior in study.behaviors.items():
        key = ("behaviors", name)
        try:
            get_behavior(name)
        except InputError as error:
            raise _at(document, key, error) from None
        for other in behavior.eval.of:
            if other not in study.behaviors:
                raise InputError(
                    f"{document.where((*key, 'eval', 'of'))}: {name} is to be measured on adapters of {other!r}, which "
                    f"the study does not train.{did_you_mean(other, study.behaviors)} Correct that line."
                )
        asked: dict[KeyPath, str] = {
            ("data", "questions"): behavior.data.questions,
            ("eval", "questions"): behavior.eval.questions,
        }
        for index, spec in enumerate(behavior.eval.other_questions):
            asked["eval", "other_questions", index] = spec
        sets |= {(*key, *field): spec for field, spec in asked.items()}
        for table, field in (("data", "negative_personas"), ("eval", "checkpoint_personas")):
            try:
                _check_personas(getattr(getattr(behavior, table), field), personas, rules=table == "data")
            except InputError as error:
                raise _at(document, (*key, table, field), error) from None
        for table in ("data", "eval"):
            items = getattr(behavior, table).items
            if items is not None and items not in NAMED_ITEMS and not find_shipped(items).is_file():
                raise InputError(
                    f"{document.where((*key, table, 'items'))}: there is no file {items}. Give a JSONL file, or "
                    f"one of {', '.join(NAMED_ITEMS)}."
                )
    _check_names(study, document)
    _check_stages(study, document)
    check_methods(study, document)
    _check_averages(study, document)
    _check_trajectory(study, document, personas)
    _check_steering(study, document, personas)
    _check_questions(study, document, sets)


def _check_personas(spec: str | list[str], personas: list[Persona], *, rules: bool) -> None:
    """The spec names personas, or (rules) is a rule that there are enough of them for."""
    rule = rule_of(spec) if rules else None
    if rule is None:
        load_personas(spec, among=personas)
    else:
        check_count(rule, sum(not p.is_extra for p in personas) - 1)


def _check_names(study: Study, document: Document) -> None:
    """Every adapter has a name of its own: behavior, source and seed are joined by dashes, which all three may hold. So have
    the directions that are made for a source."""
    made: dict[str, tuple[KeyPath, str]] = {}
    for name in study.behaviors:
        for source in study.sources:
            for seed in study.seeds:
                made_of = f"{name} and the source {source}"
                key: KeyPath = ("behaviors", name)
                _check_name(made, layout.adapter_name(name, source, seed), key, made_of, document)
    for number, table in enumerate(study.steering):
        for source in [table.source] if table.source else study.sources:
            key = ("steering", number)
            made_of = f"the steering {table.name} and the source {source}"
            _check_name(made, layout.direction(table.name, source), key, made_of, document)


def _check_name(
    made: dict[str, tuple[KeyPath, str]], name: str, key: KeyPath, made_of: str, document: Document
) -> None:
    where, others = made.setdefault(name, (key, made_of))
    if others != made_of:
        raise InputError(
            f"{document.where(key)}: {made_of} give the name {name}, which {others} give too ({document.where(where)}); what is "
            "made is kept by name. Rename a variant, a table, or a persona."
        )


def _check_stages(study: Study, document: Document) -> None:
    """What a behavior is taught after is trained by the study, is not itself, and has its rank and alpha, unless it is
    trained on top."""
    from leakfast.behaviors.registry import get as get_behavior

    for name, behavior in study.behaviors.items():
        if behavior.after is None:
            if behavior.stacked:
                raise InputError(
                    f"{document.where(('behaviors', name, 'stacked'))}: stacked given, but {name} is taught after no behavior. "
                    'Needed: the one that it is trained on top of. Add after = "…", or leave that line out.'
                )
            continue
        where = document.where(("behaviors", name, "after"))
        seen = [name]
        while (after := study.behaviors[seen[-1]].after) is not None:
            if after not in study.behaviors or get_behavior(after).control or get_behavior(name).control:
                raise InputError(
                    f"{where}: {name} is taught after {after!r}; needed: two behaviors that the study trains."
                    f"{did_you_mean(after, study.behaviors)} Correct that line."
                )
            if after in seen:
                raise InputError(
                    f"{where}: {' after '.join([*seen, after])} is a circle; one of them has to begin from the base. Leave "
                    "that line out."
                )
            seen.append(after)
        mine, its = behavior.train, _rank_and_alpha(study, seen[1])
        if not behavior.stacked and its is not None and (mine.rank, mine.alpha) != its:
            raise InputError(
                f"{where}: {name} has rank {mine.rank} and alpha {mine.alpha}, but {seen[1]}, which it is taught after, rank "
                f"{its[0]} and alpha {its[1]}. Its matrices are trained further: set both alike, or train on top "
                "(stacked = true)."
            )


def _rank_and_alpha(study: Study, name: str) -> tuple[int, int] | None:
    """Of a behavior's adapters: of stacked ones the sum of the ranks, at the scale 1; None where a mean is among them, whose
    rank is known once it is made. The chain is no circle."""
    behavior = study.behaviors[name]
    if behavior.average:
        return None
    if behavior.after is None or not behavior.stacked:
        return behavior.train.rank, behavior.train.alpha
    below = _rank_and_alpha(study, behavior.after)
    if below is None:
        return None
    rank = behavior.train.rank + below[0]
    return rank, rank


def _check_averages(study: Study, document: Document) -> None:
    """The means are of two or more behaviors that the study trains itself, each once, and begin nothing themselves."""
    from leakfast.behaviors.registry import get as get_behavior

    for name, behavior in study.behaviors.items():
        parts = behavior.average
        where = document.where(("behaviors", name, "average"))
        for part in parts:
            given = study.behaviors.get(part)
            if given is None or given.average or get_behavior(part).control:
                raise InputError(
                    f"{where}: {name} is the mean of {part!r} and others; needed: behaviors that the study trains."
                    f"{did_you_mean(part, study.behaviors)} Correct that line."
                )
        if parts and (len(set(parts)) < max(2, len(parts)) or get_behavior(name).control or behavior.after):
            raise InputError(
                f"{where}: {', '.join(parts)} given; a mean is of two or more different behaviors, and begins from none. "
                "Correct that line."
            )
        earlier = study.behaviors.get(behavior.after or "")
        if earlier is not None and earlier.average and not behavior.stacked:
            raise InputError(
                f"{document.where(('behaviors', name, 'after'))}: {behavior.after} is a mean of adapters, whose rank is another. "
                "Needed: a behavior that is trained, or stacked = true. Correct that line."
            )
        if parts and name in study.trajectory.of and study.trajectory.match is None:
            raise InputError(
                f"{document.where(('trajectory', 'of'))}: {name} is a mean, which has no training to follow. Leave it out."
            )


def _check_questions(study: Study, document: Document, sets: dict[KeyPath, str]) -> None:
    """The question sets exist, and those that a behavior asks beside each other may stand so."""
    from leakfast.behaviors.registry import check_sets

    for key, spec in sets.items():
        try:
            load_questions(spec)
        except InputError as error:
            raise _at(document, key, error) from None
    for name, behavior in study.behaviors.items():
        try:
            check_sets(name, [behavior.eval.questions, *behavior.eval.other_questions])
        except InputError as error:
            raise _at(document, ("behaviors", name, "eval", "other_questions"), error) from None


def _check_trajectory(study: Study, document: Document, personas: list[Persona]) -> None:
    """The behaviors and personas it names are the study's, and what it follows is trained."""
    from leakfast.behaviors.registry import get as get_behavior

    cfg = study.trajectory
    for field, named in (("behaviors", cfg.behaviors), ("of", cfg.of)):
        for behavior in named:
            where = document.where(("trajectory", field))
            if behavior not in study.behaviors:
                raise InputError(
                    f"{where}: the study has no behavior {behavior!r}.{did_you_mean(behavior, study.behaviors)} "
                    "Correct that line."
                )
            if field == "of" and get_behavior(behavior).control:
                raise InputError(f"{where}: {behavior} is a control, which is never trained. Leave it out.")
    try:
        load_personas(cfg.personas, among=personas)
    except InputError as error:
        raise InputError(f"{document.where(('trajectory', 'personas'))}: {error.message}") from None
    for behavior in cfg.behaviors if cfg.samples else ():
        told = study.behaviors[behavior].eval
        each, drawn = told.probability_samples, cfg.samples or 0
        if (cfg.measure or told.measure) == "both" and each > drawn:
            raise InputError(f"{document.where(('trajectory', 'samples'))}: {few_replies(each, drawn)}.")
    _check_match(study, document)


def _check_match(study: Study, document: Document) -> None:
    """Trainings are matched by completions that a detector reads, at points above 0, and only where it is asked."""
    from leakfast.behaviors.registry import get as get_behavior

    cfg = study.trajectory
    if cfg.match is None:
        if "match_samples" in cfg.model_fields_set:
            raise InputError(
                f"{document.where(('trajectory', 'match_samples'))}: match_samples given, but no rate to match. Needed: "
                "the source's rate at which trainings are compared. Add match = 0.8, or leave that line out."
            )
        return
    where = document.where(("trajectory", "match"))
    if not cfg.behaviors:
        raise InputError(
            f"{where}: match given, but no behavior is measured through training. Name one: behaviors = "
            f'["{next(iter(study.behaviors))}"].'
        )
    for name in cfg.behaviors:
        by = get_behavior(name).measured_by
        probable = (cfg.measure or study.behaviors[name].eval.measure) == "probability"
        if by != "completions" or probable:
            raise InputError(
                f"{where}: match given, but {name} is measured by {'probability' if probable else by}. Needed: completions "
                f"that a detector reads. Leave {name} out of behaviors, or match out."
            )
        if not study.behaviors[name].eval.temperature:
            raise InputError(
                f"{where}: match given, but replies for {name} are drawn at temperature 0, so that a source answers anew what it "
                "answered before. Needed: a rate of replies that chose no point. Set a temperature, or leave match out."
            )
    if not any(share > 0 for share in cfg.shares):
        raise InputError(
            f"{where}: match given, but no point of training lies behind its beginning. Add some to shares, such as "
            "[0.25, 0.5, 0.75, 1.0]."
        )


def _check_steering(study: Study, document: Document, personas: list[Persona]) -> None:
    """The personas and behaviors that directions name are the study's, and their files are there."""
    known = {persona.name for persona in personas}
    for number, table in enumerate(study.steering):
        key: KeyPath = ("steering", number)
        _check_direction(table, study, document, key, known)
        try:
            load_personas(table.personas, among=personas)
        except InputError as error:
            raise InputError(f"{document.where((*key, 'personas'))}: {error.message}") from None
        for behavior in table.of:
            if behavior not in study.behaviors:
                raise InputError(
                    f"{document.where((*key, 'of'))}: the study has no behavior {behavior!r}."
                    f"{did_you_mean(behavior, study.behaviors)} Correct that line."
                )
    for behavior, its in study.behaviors.items():
        if its.train.steering is None:
            continue
        key = ("behaviors", behavior, "train", "steering")
        if its.average:
            raise InputError(
                f"{document.where(key)}: {behavior} is a mean of adapters, which has no training to be steered in. Leave the "
                "table out, or give it to the behaviors that the mean is of."
            )
        _check_direction(its.train.steering, study, document, key, known)


def _check_direction(
    table: SteeringConfig | TrainSteeringConfig,
    study: Study,
    document: Document,
    key: KeyPath,
    known: set[str],
) -> None:
    """The personas that a direction is made of are among `known`, the layers among those of the centroids, and its file is
    there."""
    for field, names in (("source", [table.source] if table.source else []), ("against", table.against)):
        for name in names:
            if name not in known:
                raise InputError(
                    f"{document.where((*key, field))}: {name!r} is none of the study's {len(known)} personas, of which "
                    f"there are centroids.{did_you_mean(name, known)} Correct that line."
                )
    there = study.centroids.layers
    absent = [n for n in table.layers if there != "all" and n not in there]
    if absent and table.kind != "file":
        raise InputError(
            f"{document.where((*key, 'layers'))}: layer {absent[0]} given, but the centroids have layers "
            f"{', '.join(map(str, there))}. Name it under [centroids] too."
        )
    if table.file is not None and not find_shipped(table.file).is_file():
        raise InputError(
            f"{document.where((*key, 'file'))}: there is no file {table.file}. Make it: leakfast directions --out "
            f"{table.file}"
        )


def beside(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`data` with names of files that lie beside the study file made whole."""

    def whole(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: whole(v, k) for k, v in value.items()}
        if isinstance(value, list) and key in ("pairs", "other_questions"):
            return [whole(one, key) for one in value]
        if key in _FILES and isinstance(value, str):
            file, _, inner = value.partition(".toml:")
            name = f"{file}.toml" if inner else value
            if not Path(name).exists() and (folder / name).exists():
                return str(folder / value)
        return value

    placed: dict[str, Any] = whole(data)
    return placed
