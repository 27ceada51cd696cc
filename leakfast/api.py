"""What Python users call: the same words as the command line, one function a job. Demands a model
only when called; leaves the work to the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

    from leakfast.geometry import Centroids
    from leakfast.pipeline.stages import Outcome
    from leakfast.stats.tables import Stats

Personas = str | Path | Sequence[str] | Mapping[str, str | None]
Questions = str | Path | Sequence[str]


def centroids(
    model: Any,
    personas: Personas = "all",
    questions: Questions = "eval",
    layers: str | Sequence[int] = "all",
    *,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    keep_questions: bool = False,
    precision: str | None = None,
) -> Centroids:
    """Mean last-prompt-token states, one (P, D) float32 matrix a layer.

    model: "organism", a hub id, a Hugging Face folder, or (transformers model, tokenizer).
    layers: decoder blocks, 0-based, or "all". adapter: a LoRA folder to measure instead of the base.
    precision: "fp8" for linear layers in FP8 on a GPU that has it.
    Raises InputError (persona, set, layer), ModelError, AdapterError."""
    from leakfast.measure.centroids import measure

    return measure(
        model,
        personas,
        questions,
        layers,
        adapter=adapter,
        dtype=dtype,
        keep_questions=keep_questions,
        precision=precision,
    )


def score_choices(
    model: Any,
    items: Any = None,
    personas: Personas = "all",
    scoring: str = "letters",
    *,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
) -> pl.DataFrame:
    """Log-probabilities of multiple-choice answers under personas, schema `choice_scores`, one row a label.

    items: a JSONL file, "arc", "organism", or a list (all of it is asked); None takes the evaluation half
    of the model's own. scoring: "letters" or "full-text". Raises InputError, ModelError, AdapterError."""
    from leakfast.measure.choices.scoring import score_choices as stage

    return stage(model, items, personas, scoring, adapter=adapter, dtype=dtype)


def generate(
    model: Any, prompts: Any, adapters: Sequence[str | Path] = (), **settings: Any
) -> Iterator[pl.DataFrame]:
    """Completions as polars frames (schema `completions`), as they finish; see leakfast.generation.generate."""
    from leakfast.generation.generate import generate as stage

    return stage(model, prompts, adapters, **settings)


def stats(run: str | Path, **settings: Any) -> Stats:
    """The tables of a run: `.rates`, `.pairs`, `.correlations` (polars); see leakfast.stats."""
    from leakfast.stats.tables import stats as stage

    return stage(run, **settings)


def run(study: str | Path, **settings: Any) -> Outcome:
    """All stages of a study file; what is done is skipped. See leakfast.pipeline.stages."""
    from leakfast.pipeline.stages import run as stage

    return stage(study, **settings)
