"""`leakfast predictors`: what may predict leakage between every two personas, from the unadapted model alone, into a run.
Demands a model; leaves the computing to leakfast.measure.predictors, and whether anything is predicted to stats."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FOLDER_OUT
from leakfast.cli.settings import RENDERING, options_of, rendering_options, stream_option, threads_option
from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.predictors.request import Request
    from leakfast.study.config import Study


def _listed(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
    """Words between commas, those that are whole numbers as such; "all" and nothing as they are."""
    if text is None or text == "all":
        return text
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [int(word) if re.fullmatch(r"-?\d+", word) else word for word in words]


@click.command()
@click.option(
    "--model", default=None, help="organism, a hub id, or a folder.  [default: the study's, else Qwen2.5-7B]"
)
@click.option(
    "--study", type=click.Path(path_type=Path), default=None, help="Study file; its [predictors] and its run."
)
@click.option("--personas", default=None, help="all, names, or a file.  [default: the study's, all]")
@options_of(
    "PredictorConfig",
    "questions",
    "replies",
    "reply_tokens",
    families={"type": str, "callback": _listed, "metavar": "LIST"},
    positions={"type": str, "callback": _listed, "metavar": "LIST"},
    statements={"decls": ["--statements/--no-statements"], "type": None},
)
@click.option(
    "--layers", default=None, help="Decoder blocks from 0: all, 0,2,4, or 0-5.  [default: the study's, all]"
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default=None,
    help="Who draws the replies.  [default: the study's, auto]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=None,
    help="Seed of the replies.  [default: the study's, 42]",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@stream_option("the study's, auto")
@click.option(
    "--out",
    type=FOLDER_OUT,
    default=None,
    help="Run directory.  [default: the study's, else runs/predictors-MODEL]",
)
@click.option(
    "--show", multiple=True, metavar="PERSONA", help="Print who is nearest to this source; may be repeated."
)
@click.option("--top", type=click.IntRange(min=1), default=5, help="Bystanders to print.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@rendering_options
def cli(
    model: str | None,
    study: Path | None,
    personas: str | None,
    layers: str | None,
    backend: str | None,
    seed: int | None,
    dtype: str | None,
    stream: str | None,
    out: Path | None,
    show: tuple[str, ...],
    top: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare every two personas before any training.

    Example: leakfast predictors --model organism --personas originals --show villain
    """
    from leakfast import models
    from leakfast.cli.progress import progress_for
    from leakfast.geometry import parse_layers
    from leakfast.measure import Drawing
    from leakfast.measure.predictors.stage import predictors
    from leakfast.models.names import DEFAULT_MODEL
    from leakfast.prompts.rendering import asked_by
    from leakfast.storage.run import Run
    from leakfast.study.config import load_study

    rendering = {key: given.pop(key) for key in RENDERING}
    known = load_study(study) if study is not None else None
    request = _request(known, personas, layers, seed, given)
    names = [one.name for one in request.personas]
    for name in show:
        if name not in names:
            raise InputError(
                f"predictors: --show {name}, but it is none of the {len(names)} personas asked.{did_you_mean(name, names)} "
                "Add it to --personas, or show another."
            )
    name = model or (known.model if known else DEFAULT_MODEL)
    own = known is not None and name == known.model
    revision = known.revision if own else None
    parse_layers(request.layers, models.load_config(name, revision).num_hidden_layers, name)
    loaded = models.load(
        name,
        dtype=dtype or (known.dtype if own else "float32" if name == "organism" else "auto"),
        revision=revision,
        rendering=asked_by(known, None, **rendering),
        stream=stream or (known.stream if known else "auto"),
    )
    run = Run(out or (known.run_dir if known else _default_run(name)))
    with progress_for("predictors") as progress:
        made = predictors(loaded, run, request, Drawing.of(known, backend=backend), progress)
    _print(made, run.path, show, top, as_json)


def _request(
    study: Study | None, personas: str | None, layers: str | None, seed: int | None, flags: dict[str, Any]
) -> Request:
    """What is asked, of a study and flags that go before it."""
    from leakfast.cli.settings import changed
    from leakfast.geometry import names_extras
    from leakfast.measure.predictors.request import Request
    from leakfast.prompts.personas import load_personas
    from leakfast.study.config import PredictorConfig

    cfg = changed(study.predictors if study else PredictorConfig(), **flags)
    spec = personas if personas is not None else study.personas if study else "all"
    people = load_personas(spec)
    more = {"seed": seed if seed is not None else study.seeds[0] if study else 42}
    if layers is not None:
        more["layers"] = layers
    return Request.of(cfg, people, center_extras=names_extras(spec, people), **more)


def _default_run(model: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(model).name)
    return Path(os.environ.get("LEAKFAST_RUNS") or "runs") / f"predictors-{slug}"


def _print(made: pl.DataFrame, run: Path, show: tuple[str, ...], top: int, as_json: bool) -> None:
    """A line a predictor, and the nearest bystanders of the sources shown at the last layer."""
    import polars as pl

    from leakfast.cli.text import print_json, print_table
    from leakfast.storage import layout

    kinds = ["family", "predictor", "unit"]
    told = made.group_by(kinds, maintain_order=True).agg(
        layers=pl.col("layer").drop_nulls().n_unique(),
        questions=pl.col("questions").first(),
        pairs=pl.struct("source", "persona").n_unique(),
        without=pl.col("value").null_count(),
        median=pl.col("value").median(),
    )
    nearest = {name: _nearest(made, name, top) for name in show}
    path = run / layout.predictors()
    if as_json:
        rows = {name: table.to_dicts() for name, table in nearest.items()}
        print_json({"run": str(run), "file": str(path), "predictors": told.to_dicts(), "nearest": rows})
        return
    for name, table in nearest.items():
        print_table(
            ["predictor", "layer", "nearest to the source, with their values"],
            [
                (r["predictor"], r["layer"], ", ".join(f"{who} {value:.3g}" for who, value in r["nearest"]))
                for r in _by_predictor(table)
            ],
            title=f"{name} as the source",
        )
    rows = [
        (
            *(r[k] for k in ("family", "predictor", "unit")),
            r["layers"] or None,
            r["without"],
            _short(r["median"]),
        )
        for r in told.iter_rows(named=True)
    ]
    print_table(["family", "predictor", "unit", "layers", "without a value", "median"], rows)
    click.echo(f"{path}: {told['pairs'].max()} ordered pairs, {told.height} predictors, {made.height} rows")


def _nearest(made: pl.DataFrame, source: str, top: int) -> pl.DataFrame:
    """The `top` bystanders nearest to a source by each predictor, of those at several layers at the last."""
    import polars as pl

    mine = made.filter(pl.col("source") == source, pl.col("value").is_not_null())
    mine = mine.filter(pl.col("layer").eq_missing(pl.col("layer").max().over("predictor")))
    return (
        mine.with_columns(_closeness=pl.col("value") * pl.col("orientation").cast(pl.Float64))
        .sort("_closeness", "persona", descending=[True, False])
        .group_by("predictor", "layer", maintain_order=False)
        .head(top)
        .sort("predictor", "_closeness", "persona", descending=[False, True, False])
        .select("predictor", "layer", "persona", "value", "orientation")
    )


def _by_predictor(table: pl.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for r in table.iter_rows(named=True):
        if not rows or rows[-1]["predictor"] != r["predictor"]:
            rows.append({"predictor": r["predictor"], "layer": r["layer"], "nearest": []})
        rows[-1]["nearest"].append((r["persona"], r["value"]))
    return rows


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
