"""The stage that makes one adapter of a study: its rows, its learning rate where that is to be found, its training.
Demands the stages of a run (pipeline.py), which know the model and the run directory; leaves measuring to them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.pipeline.stages import hash_of
from leakfast.progress import Progress
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.pipeline.stages import Stages
    from leakfast.study.config import TrainConfig

log = logging.getLogger("leakfast.run")


def rows_of(stages: Stages, behavior: str, source: str, seed: int) -> tuple[str, str]:
    """File of the training rows of (behavior, source, seed), made if it is not there, and the hash of what they
    follow from."""
    from leakfast.behaviors.registry import get
    from leakfast.train.built import file_of, inputs_of
    from leakfast.train.data import material, write_rows

    cfg = stages.study.behaviors[behavior].data
    name = layout.adapter_name(behavior, source, seed)
    relpath = file_of(name)
    questions = material(behavior, cfg, stages.study.model)
    inputs = inputs_of(stages.loaded, stages.study.dtype, stages.personas, source, seed, questions, cfg)

    def build(report: Progress) -> None:
        rows = get(behavior).build()(
            stages.loaded, stages.personas, source, questions, cfg, seed, progress=report
        )
        stages.store.add_file(relpath, lambda path: write_rows(path, rows))

    stages.stage(f"data {name}", inputs, build, [relpath])
    return relpath, inputs


def recipe_of(stages: Stages, behavior: str) -> TrainConfig:
    """How the behavior is trained; a learning rate that is to be found is found once, on the study's first source
    and seed, and kept in data/<behavior>-lr.json."""
    from leakfast.measure.targets import Asked
    from leakfast.train.collate import reading
    from leakfast.train.data import read_rows
    from leakfast.train.identity import settings_of
    from leakfast.train.search import find

    cfg = stages.study.behaviors[behavior]
    if cfg.train.lr != "auto":
        return cfg.train
    source, seed = stages.study.sources[0], stages.study.seeds[0]
    relpath = layout.learning_rate(behavior)
    rows_file, inputs = rows_of(stages, behavior, source, seed)
    read = reading(stages.loaded.tokenizer, read_rows(stages.store.path / rows_file))

    def search(report: Progress) -> None:
        rows = read_rows(stages.store.path / rows_file)
        sampling = Asked(behavior, [], cfg.eval).sampling
        lr, trials = find(stages.loaded, rows, cfg.train, behavior, source, seed, sampling, progress=report)
        kept = {"lr": lr, "source": source, "seed": seed, "trials": [vars(trial) for trial in trials]}
        stages.store.add_file(relpath, (json.dumps(kept, indent=1) + "\n").encode())

    drawing = (cfg.eval.temperature, cfg.eval.top_p, cfg.eval.max_new_tokens)
    inputs = hash_of(inputs, settings_of(cfg.train), *drawing, *read)
    stages.stage(f"learning rate of {behavior}", inputs, search, [relpath])
    found = json.loads((stages.store.path / relpath).read_text(encoding="utf-8"))
    return cfg.train.model_copy(update={"lr": found["lr"]})


def adapter_of(stages: Stages, behavior: str, source: str, seed: int) -> Path:
    """Folder of the adapter of (behavior, source, seed), trained if it is not there."""
    from leakfast.measure.choices.evaluate import checkpoints_of
    from leakfast.models.adapter_structure import CONFIG, WEIGHTS
    from leakfast.storage.layout import CARD
    from leakfast.train.collate import reading
    from leakfast.train.data import read_rows
    from leakfast.train.identity import settings_of
    from leakfast.train.lora import train

    cfg = stages.study.behaviors[behavior]
    name = layout.adapter_name(behavior, source, seed)
    folder = layout.adapter(name)
    rows_file, inputs = rows_of(stages, behavior, source, seed)
    recipe = recipe_of(stages, behavior)
    shares = stages.study.trajectory.shares if behavior in stages.followed else ()
    checkpoints = checkpoints_of(
        stages.store, behavior, name, source, stages.personas, cfg.eval, stages.study.model, kept=shares
    )

    def fit(report: Progress) -> None:
        rows = read_rows(stages.store.path / rows_file)
        path = stages.store.path / folder
        train(
            stages.loaded,
            rows,
            recipe,
            path,
            seed,
            source=source,
            behavior=behavior,
            progress=report,
            checkpoints=checkpoints,
        )
        _look(stages, path, behavior, source, seed)
        for part in sorted(p for p in path.rglob("*") if p.is_file()):
            relpath = part.relative_to(stages.store.path).as_posix()
            stages.store.add_file(relpath, part.read_bytes())
            parts.extend([relpath] if part.name in (CONFIG, WEIGHTS, CARD) else [])

    parts: list[str] = []  # the adapter and its points of training, known once they are trained
    asked_at = cfg.eval.model_dump(exclude={"stop_at_marker", "other_questions", "max_reasoning_tokens"})
    points = [asked_at] if cfg.eval.checkpoints else []
    points += [list(shares)] if shares else []
    points += reading(stages.loaded.tokenizer, read_rows(stages.store.path / rows_file))
    stages.stage(f"train {name}", hash_of(inputs, settings_of(recipe), *points), fit, parts)
    return stages.store.path / folder


def _look(stages: Stages, adapter: Path, behavior: str, source: str, seed: int) -> None:
    """A few replies of a new adapter; one that damaged the model is told at once, and stops nothing."""
    from leakfast.measure.reply_sample import after_training

    cfg = stages.study.behaviors[behavior]
    if cfg.train.sample:
        what = (stages.loaded, adapter, behavior, source, stages.personas, cfg.eval, seed, cfg.train.sample)
        for sentence in found.sentences() if (found := after_training(*what)) else ():
            log.warning("%s", sentence)
