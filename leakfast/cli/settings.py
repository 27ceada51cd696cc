"""What `data`, `train` and `eval` have in common: which study, model and settings a command means.
A flag beats LEAKFAST_*, which beats the study file. Demands nothing heavy; runs nothing."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.errors import InputError
from leakfast.storage import layout
from leakfast.storage.documents import resource

if TYPE_CHECKING:
    from leakfast.study.config import BehaviorConfig, Study

log = logging.getLogger("leakfast.cli")

RENDERING = ("template_kwargs", "system_role", "reasoning")  # what rendering_options give
_OF_NONE = re.compile(r" \(None: ([^)]*)\)")
ORGANISM_STUDIES = ("organism-marker.toml", "organism-capability.toml", "organism.toml")


@dataclass(frozen=True)
class Settings:
    """What a command works with: the study it was given (None without), and what follows from it."""

    study: Study | None
    model: str
    revision: str | None
    dtype: str
    personas: Any
    config: BehaviorConfig


def settle(
    behavior: str,
    *,
    study: Path | None = None,
    model: str | None = None,
    dtype: str | None = None,
    personas: str | None = None,
    base: str | None = None,
) -> Settings:
    """The settings of one behavior. base: the model an adapter's card names, taken if nothing else is.

    Without a study, the organism gets the settings of its shipped study (and says so); other models get
    the published ones. Raises InputError for an unknown behavior, or one the study does not have.
    """
    from leakfast import behaviors
    from leakfast.models.names import DEFAULT_MODEL
    from leakfast.study.config import behavior_config, load_study

    behaviors.get(behavior)
    given = load_study(study) if study is not None else None
    name = model or (given.model if given else None) or base or DEFAULT_MODEL
    source = given
    if given is None and name == "organism":
        studies = {file: load_study(resource(file)) for file in ORGANISM_STUDIES}
        file = next((f for f, one in studies.items() if behavior in one.behaviors), ORGANISM_STUDIES[0])
        source = studies[file]
        if behavior in source.behaviors:
            log.info("settings of configs/%s (give --study or flags for others)", file)
    if given is not None and behavior not in given.behaviors:
        raise InputError(
            f"study {study} has no behavior {behavior}, only {', '.join(given.behaviors)}. "
            f"Add [behaviors.{behavior}] to it, or use --behavior {next(iter(given.behaviors))}."
        )
    return Settings(
        study=given,
        model=name,
        revision=given.revision if given and name == given.model else None,
        dtype=dtype or (source.dtype if source and name == source.model else "auto"),
        personas=personas if personas is not None else given.personas if given else "all",
        config=(source.behaviors.get(behavior) if source else None) or behavior_config(behavior),
    )


def threads_option(command: Any) -> Any:
    """--threads of a command that computes; heard when the command line is read, set when the model is loaded."""
    import click

    from leakfast.models import threads

    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        expose_value=False,
        is_eager=True,
        callback=lambda _context, _option, value: threads.ask(value),
        help="CPU threads.  [default: OMP_NUM_THREADS, else the physical cores it may use]",
    )(command)


def stream_option(default: str) -> Callable[[Any], Any]:
    """--stream of a command that measures by the packed engine; None where not given. default: in words."""
    return click.option(
        "--stream",
        type=click.Choice(["auto", "on", "off"]),
        default=None,
        help=f"Weights stay on disk, a block in memory at a time; auto: where they do not fit.  [default: {default}]",
    )


def changed(table: Any, **flags: Any) -> Any:
    """A settings table with the flags that were given put in, checked as the study file is."""
    from pydantic import ValidationError

    from leakfast.storage.validation import reason

    given = {key: value for key, value in flags.items() if value is not None}
    if not given:
        return table
    try:
        return type(table).model_validate({**table.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        found = error.errors(include_url=False)
        name = str(found[0]["loc"][0]) if found[0]["loc"] else "settings"
        of_it = [one for one in found if one["loc"][:1] == (name,)] or found[:1]
        value = given.get(name)
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        raise InputError(
            f"--{name.replace('_', '-')} {shown} given: {reason(of_it)}. Correct that flag."
        ) from None


MATCHED = {"decls": ["--match-lengths/--any-lengths"]}  # of options_of("DataConfig")


def options_of(table: str, *keys: str, **changed: dict[str, Any]) -> Callable[[Any], Any]:
    """Options for settings of a table of the study file (its class in study/config.py), with its meanings, types and
    defaults; None where not given. What a meaning says of None is told as the default. changed: key → what click.option is
    told otherwise (`decls` for other names)."""
    from leakfast.study import config
    from leakfast.study.meanings import keys_of, meanings

    model = getattr(config, table)
    said, schemas = meanings(model)[1], keys_of(model)

    def decorate(command: Any) -> Any:
        for key in reversed([*keys, *changed]):
            how = dict(changed.get(key, {}))
            decls = how.pop("decls", [f"--{key.replace('_', '-')}"])
            default = model.model_fields[key].default
            shown = (
                "none"
                if default in (None, [])
                else str(default).lower()
                if isinstance(default, bool)
                else default
            )
            words = how.pop("help", said[key]).rstrip(".")
            if default is None and (meant := _OF_NONE.search(words)):
                words, shown = words.replace(meant[0], ""), meant[1]
            help_text = f"{words[0].upper()}{words[1:]}.  [default: the study's, {shown}]"
            how = {"type": _click_type(schemas[key]), "default": None, "help": help_text, **how}
            command = click.option(*decls, key, **how)(command)
        return command

    return decorate


def _click_type(schema: dict[str, Any]) -> Any:
    """What a key's JSON schema is on the command line."""
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    if "enum" in schema:
        return click.Choice(schema["enum"])
    return {"integer": int, "number": float, "boolean": bool}.get(schema.get("type"), str)


def rendering_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how prompts are rendered, for commands that take --model; they arrive as template_kwargs,
    system_role and reasoning, None where not given, to be given to `leakfast.prompts.rendering.asked_by`."""
    for option in reversed(
        [
            click.option(
                "--template-kwargs",
                callback=_template_kwargs,
                default=None,
                metavar="JSON",
                help="Arguments of the chat template: '{\"enable_thinking\": false}'.  [default: the study's, none]",
            ),
            click.option(
                "--system-role",
                type=click.Choice(["system", "user"]),
                default=None,
                help="user: personas go into the user turn.  [default: the study's, system]",
            ),
            click.option(
                "--reasoning",
                type=click.Choice(["closed", "open"]),
                default=None,
                help="open: completions begin at the generation prompt, so that a model may reason first.  [default: the "
                "study's, closed]",
            ),
        ]
    ):
        command = option(command)
    return command


def _template_kwargs(
    context: click.Context, option: click.Parameter, given: str | None
) -> dict[str, Any] | None:
    """The JSON object of --template-kwargs. Raises InputError for anything else."""
    if given is None:
        return None
    try:
        found = json.loads(given)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"--template-kwargs {given} given, but a JSON object of names and values is needed. Type: --template-kwargs "
            "'{\"enable_thinking\": false}'"
        )
    return found


def run_folder(settings: Settings, default: str) -> Path:
    """The study's run directory, else $LEAKFAST_RUNS/<default>."""
    if settings.study is not None:
        return settings.study.run_dir
    return Path(os.environ.get("LEAKFAST_RUNS") or "runs") / default


def named(settings: Settings, behavior: str, source: str, seed: int, design: str) -> str:
    """What an adapter is called: as `leakfast run` calls that of the study; another design of its rows is part of the
    name."""
    own = settings.study.behaviors[behavior].data.design if settings.study is not None else "contrastive"
    return layout.adapter_name(behavior, source, seed, "contrastive" if design == own else design)
