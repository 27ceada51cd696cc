"""`leakfast eval`: measure a behavior under every persona, for adapters and the base, into a run.
Demands a model; what was drawn before is kept, so the same command again is the resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli import steering
from leakfast.cli.places import FOLDER_OUT
from leakfast.cli.settings import RENDERING, options_of, rendering_options, stream_option, threads_option
from leakfast.cli.steering import steering_options
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.measure.contract import Measured
    from leakfast.measure.request import Request
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig

_OWN = "own"  # --base without a model


@click.command()
@click.option(
    "--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="Adapter; may be repeated."
)
@click.option(
    "--base",
    is_flag=False,
    flag_value=_OWN,
    default=None,
    metavar="[MODEL]",
    help="Measure the unadapted model too, as the baseline. With a MODEL, --model is a checkpoint that was trained from it, "
    "measured as an adapter is.",
)
@click.option(
    "--behavior", default=None, help="Behaviors to measure, split by commas.  [default: the cards', marker]"
)
@click.option(
    "--source",
    default=None,
    help="Persona trained, for adapters without a card: one for all, or one each, by commas, in their order.",
)
@click.option("--model", default=None, help="organism, a hub id, or a folder.  [default: the card's base]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option("--personas", default=None, help="all, names, or a file.  [default: the study's, all]")
@options_of(
    "EvalConfig",
    "samples",
    "temperature",
    "top_p",
    "max_new_tokens",
    "max_reasoning_tokens",
    "batch_completions",
    "measure",
    "probability_samples",
    "probability_replies",
    "probability_pairs",
    "n_pairs",
    "openings",
    "items",
    "half",
    "scoring",
    questions={"help": "Question set or file; several, split by commas, are compared."},
    probability_anywhere={"decls": ["--probability-anywhere/--probability-at-end"]},
    stop_at_marker={"decls": ["--stop-at-marker/--whole-replies"]},
)
@options_of("VllmConfig", "lora", "data_parallel", "tensor_parallel")
@click.option(
    "--by",
    type=click.Choice(["sum", "char", "byte"]),
    default="sum",
    help="Full text: log-probability of a choice, in all, per character or per byte.",
)
@steering_options
@click.option(
    "--checkpoints",
    is_flag=True,
    help="Every checkpoint of the adapters instead, and the base they begin at.",
)
@click.option(
    "--engine",
    type=click.Choice(["packed", "vllm"]),
    default="packed",
    help="Capability: who computes letters.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default=None,
    help="Who draws completions; auto takes vLLM on a GPU where it is installed.  [default: the study's, auto]",
)
@click.option("--invariant", is_flag=True, help="vLLM: the same text whatever else is in the batch (GPUs).")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(["default-system", "token-ids", "logits"]),
    help="Let a failed check of the model or engine pass, by name; may be repeated.",
)
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of the draws.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@stream_option("the study's, auto")
@click.option("--out", type=FOLDER_OUT, default=None, help="Run directory.  [default: the adapter's]")
@click.option(
    "--replace",
    is_flag=True,
    help="Move what was measured there by another request to quarantine/ and measure anew.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=5, help="Bystanders to show, the highest rates first."
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print all rates as JSON.")
@rendering_options
def cli(
    adapters: tuple[Path, ...],
    base: str | None,
    behavior: str | None,
    source: str | None,
    model: str | None,
    study: Path | None,
    personas: str | None,
    by: str,
    checkpoints: bool,
    engine: str,
    backend: str | None,
    invariant: bool,
    allow: tuple[str, ...],
    seed: int,
    dtype: str | None,
    stream: str | None,
    out: Path | None,
    replace: bool,
    top: int,
    as_json: bool,
    **given: Any,
) -> int | None:
    """Measure behaviors under every persona.

    Example: leakfast eval --model organism --adapter adapters/villain --base --personas all
    """
    from leakfast.behaviors.registry import get
    from leakfast.cli.progress import progress_for
    from leakfast.cli.settings import changed, settle
    from leakfast.measure.request import Request, asked_of, check_sources, keep_people
    from leakfast.models.adapters import read_card
    from leakfast.prompts.personas import load_personas
    from leakfast.storage.run import Run

    model, adapters = _against(model, base, adapters)
    cards = [card for card in map(read_card, adapters) if card is not None]
    names = [word.strip() for word in (behavior or "").split(",") if word.strip()]
    names = list(dict.fromkeys(names)) or [_agreed("behavior", [card.behavior for card in cards]) or "marker"]
    bases = _agreed("base", [card.base for card in cards])
    settled = {
        name: settle(name, study=study, model=model, dtype=dtype, personas=personas, base=bases)
        for name in names
    }
    settings = settled[names[0]]
    questions = given.pop("questions")
    sets = [word.strip() for word in (questions or "").split(",") if word.strip()]
    if questions is not None and not sets:
        sets = [questions]  # an empty name, which is refused as any unknown one
    how = {key: given.pop(key) for key in ("lora", "data_parallel", "tensor_parallel")}
    how["invariant"] = invariant or None
    scored = {key: given.pop(key) for key in ("items", "half", "scoring")}
    rendering = {key: given.pop(key) for key in RENDERING}
    arms = steering.arms(**{key: given.pop(key) for key in steering.OPTIONS})
    asked_for = {"questions": sets[0] if sets else None, **given}
    drawn = {**asked_for, "other_questions": sets[1:] if sets else None}  # told by --questions
    flags = {name: drawn if get(name).by_completions else scored for name in names}
    _no_stray({**asked_for, **how, **scored}, names)
    if checkpoints and (base is not None or not adapters):
        raise InputError(
            "eval: --checkpoints takes --adapter; the base they begin at is measured without --base."
        )
    cfgs = {name: changed(settled[name].config.eval, **flags[name]) for name in names}
    _check(cfgs, by=by, engine=engine, checkpoints=checkpoints)
    asked = [one for name in names for one in asked_of(name, cfgs[name], settings.model)]
    request = Request(
        asked,
        load_personas(settings.personas),
        adapters,
        base is not None,
        seed,
        _sources(source, adapters),
        arms,
    )
    targets = request.targets
    check_sources(targets, request.personas)
    run = Run(out or _run_of(targets, settings))
    for one in asked:
        if reading := getattr(one.questions, "reading", None):
            click.echo(f"eval: {one.set_name}: {reading}", err=True)

    from leakfast import models
    from leakfast.measure import Drawing
    from leakfast.measure.as_asked import measure_as_asked
    from leakfast.prompts.rendering import asked_by

    drawing = Drawing.of(settings.study, backend=backend, allow=allow or None, letters=engine, **how)
    rendered = asked_by(settings.study, _rendered_alike(cards), **rendering)
    loaded = models.load(
        settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        rendering=rendered,
        stream=_streamed(stream, settings, asked, engine),
    )
    if arms:
        steering.measured(loaded, run, request, drawing, replace, as_json)
        keep_people(run, request.personas)
        return None
    with progress_for("eval") as progress:
        at = "checkpoints" if checkpoints else "final"
        done, probable = measure_as_asked(
            loaded, run, request, drawing, at=at, replace_others=replace, progress=progress
        )
    keep_people(run, request.personas)
    return _show(run, request, done, probable, checkpoints=checkpoints, by=by, top=top, as_json=as_json)


def _check(cfgs: Mapping[str, EvalConfig], *, by: str, engine: str, checkpoints: bool) -> None:
    """What is asked of each behavior goes with how it is measured. Raises InputError."""
    from leakfast.behaviors.registry import check_sets, get

    for name, cfg in cfgs.items():
        if get(name).by_completions:
            check_sets(name, [cfg.questions, *cfg.other_questions])
        elif by != "sum" and cfg.scoring == "letters":
            raise InputError("eval: --by char and --by byte compare full texts. Add --scoring full-text.")
        elif engine == "vllm" and (cfg.scoring != "letters" or checkpoints):
            raise InputError(
                "eval: --engine vllm scores letters, of adapters as they are. Leave --engine out, or use --scoring "
                "letters without --checkpoints."
            )


def _show(
    run: Run,
    request: Request,
    done: Sequence[Measured],
    probable: Sequence[Measured],
    *,
    checkpoints: bool,
    by: str,
    top: int,
    as_json: bool,
) -> int | None:
    """Rates of what was measured: through training, or at its end; probabilities where these alone, or these too, were. Returns
    the exit code."""
    from leakfast.cli import probabilities
    from leakfast.cli import rates as shown

    for one in [*done, *probable]:
        shown.tell(run, one)
    if not done:
        return probabilities.show(run, probable, top=top, as_json=as_json)
    if checkpoints:
        shown.trajectory(run, as_json)
        return None
    if not probable:
        return shown.rates(run, done, request.personas, by=by, top=top, as_json=as_json)
    found = probabilities.of(run, probable)
    if not as_json:
        probabilities.tell(found, top)
    more = {"probabilities": found.to_dicts()}
    code = shown.rates(run, done, request.personas, by=by, top=top, as_json=as_json, more=more)
    return code or probabilities.exit_code(found)


def _against(
    model: str | None, base: str | None, adapters: tuple[Path, ...]
) -> tuple[str | None, tuple[Path, ...]]:
    """(base model, adapters): with --base MODEL the checkpoint of --model is one of them. Raises InputError."""
    from leakfast.models.whole import is_whole

    if base in (None, _OWN):
        return model, adapters
    if model is None or not is_whole(model):
        raise InputError(
            f"eval: --base {base} given with --model {model}, but a base stands beside a checkpoint: a folder with config.json "
            f"and safetensors. Type: leakfast eval --model FOLDER --base {base}; or --base alone, for the baseline of --model."
        )
    return base, (*adapters, Path(model))


def _streamed(given: str | None, settings: Any, asked: Sequence[Any], engine: str) -> str:
    """--stream, else the study's, else auto, where all that is measured is log-probabilities by the packed engine; off where
    completions are drawn. Raises InputError where on is given there."""
    drawn = [o.behavior for o in asked if not o.by_choices and o.config.measure != "probability"]
    if not drawn and engine == "packed":
        return given or (settings.study.stream if settings.study else "auto")
    if given == "on":
        what = (
            f"{', '.join(dict.fromkeys(drawn))} is measured by completions"
            if drawn
            else "vLLM scores letters"
        )
        raise InputError(
            f"eval: --stream on given, but {what}, which takes the model in memory. Use --stream off, --measure probability, "
            "or --engine packed."
        )
    return "off"


def _sources(given: str | None, adapters: Sequence[Path]) -> str | dict[Path, str] | None:
    """--source as find_targets takes it."""
    names = [word.strip() for word in (given or "").split(",") if word.strip()]
    if len(names) < 2:
        return names[0] if names else None
    if len(names) != len(adapters):
        raise InputError(
            f"eval: {len(names)} sources for {len(adapters)} adapters given. Give one for all, or one each in the order "
            "of --adapter."
        )
    return dict(zip(adapters, names, strict=True))


def _no_stray(given: dict, names: list[str]) -> None:
    """No flag that none of the behaviors has to do with. Raises InputError naming it."""
    from leakfast.behaviors.registry import get

    kinds = {"completions" if get(name).by_completions else "choices" for name in names}
    of_choices = ("items", "half", "scoring")
    stray = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if value is not None and ("choices" if name in of_choices else "completions") not in kinds
    ]
    if stray:
        raise InputError(
            f"eval: {', '.join(names)} is measured by {get(names[0]).measured_by}, which {', '.join(stray)} does not "
            "belong to. Leave it out, or name another --behavior."
        )


def _rendered_alike(cards: list) -> Any:
    """A card whose rendering is that of all, None where they differ (each that is not met is warned of)."""
    alike = cards and all(card.recipe.get("rendering") == cards[0].recipe.get("rendering") for card in cards)
    return cards[0] if alike else None


def _agreed(what: str, values: list[str]) -> str | None:
    """The one value the adapters' cards share; None without cards."""
    found = sorted(set(values))
    if len(found) > 1:
        raise InputError(
            f"eval: the adapters' cards name {len(found)} different values of {what}: {', '.join(found)}. "
            f"Measure them one command each, or name it: --{'model' if what == 'base' else what} …"
        )
    return found[0] if found else None


def _run_of(targets, settings) -> Path:
    """The run the first adapter lies in, the study's, or one named after the adapter."""
    from leakfast.cli.settings import run_folder

    first = next((t.path.resolve() for t in targets if t.path is not None), None)
    if settings.study is None and first is not None and first.parent.name == "adapters":
        folder = first.parent.parent
        return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    return run_folder(settings, targets[0].name if first is not None else "base")
