"""A few replies right after training, under the adapter and without it, so that a model that no longer answers is seen
before anything is measured. Demands a loaded model and an adapter folder; leaves verdicts to stats.health."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, ModelError
from leakfast.progress import Progress
from leakfast.storage.layout import SAMPLE

if TYPE_CHECKING:
    import polars as pl

    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import EvalConfig
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.sample")


QUESTIONS = 8  # under three personas: 24 replies of each, 48 in all
BYSTANDERS = 2
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """What the adapter and the unadapted model (`base`) replied. health: table of that name (polars); replies: a row a
    completion; drawn: how."""

    health: pl.DataFrame
    replies: list[dict[str, Any]]
    drawn: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """The adapter's row over all personas."""
        import polars as pl

        return self.health.filter(pl.col("persona").is_null() & (pl.col("adapter") != "base")).row(
            0, named=True
        )

    def sentences(self) -> list[str]:
        """What is to be said first: nothing where all is well."""
        from leakfast.stats import health

        return health.sentences(self.health)


def after_training(
    loaded: Loaded,
    adapter: str | Path,
    recipe: Recipe,
    personas: Sequence[Persona],
    cfg: EvalConfig,
    progress: Progress | None = None,
) -> Sample | None:
    """`draw`, written to the adapter's folder as sample.json; None, with a warning in the log, where nothing could be
    drawn, because an adapter that is trained is not to be lost over it."""
    try:
        sample = draw(loaded, adapter, recipe, personas, cfg, progress)
    except (InputError, ModelError) as error:
        log.warning("train: no sample of replies was drawn: %s", error)
        return None
    write(sample, adapter)
    return sample


def draw(
    loaded: Loaded,
    adapter: str | Path,
    recipe: Recipe,
    personas: Sequence[Persona],
    cfg: EvalConfig,
    progress: Progress | None = None,
) -> Sample:
    """The first recipe.train.sample questions of the behavior's evaluation set, asked of the source and two others of
    `personas`, one completion each, at the evaluation's temperature and top_p and of at most 64 tokens; the same of the base.

    Where the evaluation allows more tokens than that, truncation is judged against the base's alone. Raises InputError
    for prompts that do not fit, ModelError for a model that cannot be decoded."""
    import polars as pl

    from leakfast.generation.generate import generate
    from leakfast.prompts.personas import load_questions
    from leakfast.stats import health

    texts = list(load_questions(cfg.questions).questions)[: recipe.train.sample or QUESTIONS]
    who = _asked(recipe.source, personas)
    longest = min(MAX_NEW_TOKENS, cfg.max_new_tokens)
    prompts = _prompts(loaded, who, texts)
    frames = []
    for path in (None, Path(adapter)):
        parts = generate(
            loaded,
            prompts,
            [path],
            1,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_new_tokens=longest,
            seed=recipe.seed,
            behavior=recipe.behavior,
            progress=progress,
        )
        frames.append(pl.concat(parts))
    drawn = {
        "questions": len(texts),
        "question_set": cfg.questions,
        "personas": [p.name for p in who],
        "seed": recipe.seed,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": longest,
    }
    columns = ["adapter", "persona", "question", "text", "n_tokens", "finish_reason", "status"]
    replies = [
        row for frame in frames for row in frame.sort("persona", "question").select(columns).to_dicts()
    ]
    return Sample(health.table(frames, capped=longest < cfg.max_new_tokens), replies, drawn)


def _prompts(loaded: Loaded, who: Sequence[Persona], texts: Sequence[str]) -> list[Any]:
    from leakfast.prompts import chat

    return chat.render_prompts(loaded.tokenizer, who, texts)


def _asked(source: str, personas: Sequence[Persona]) -> list[Persona]:
    """The source, and others spread evenly over the list."""
    own = [p for p in personas if p.name == source]
    others = [p for p in personas if p.name != source and not p.is_extra]
    step = max(1, len(others) // (BYSTANDERS + 1))
    return own + others[step::step][:BYSTANDERS]


def write(sample: Sample, adapter: str | Path) -> Path:
    """sample.json in the adapter's folder."""
    from leakfast.storage.disk import atomic_write

    path = Path(adapter) / SAMPLE
    told = {"drawn": sample.drawn, "health": sample.health.to_dicts(), "replies": sample.replies}
    atomic_write(path, (json.dumps(told, ensure_ascii=False, indent=1) + "\n").encode())
    return path


def read(adapter: str | Path) -> Sample | None:
    """The sample in an adapter's folder; None without one, or where it was written in another form."""
    import polars as pl

    from leakfast.storage import schema

    path = Path(adapter) / SAMPLE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        frame = schema.check(pl.DataFrame(told["health"], schema=schema.columns("health")), "health")
        return Sample(frame, told["replies"], told["drawn"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read; a sample is drawn anew", path)
        return None
