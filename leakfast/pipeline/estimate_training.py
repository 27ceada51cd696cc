"""What trainings of all weights (`method = "full"`) take: memory, disk, rows, and seconds where a run was timed or a rate is
stated. Demands a checked study and the model's config; reads no weights, and plans no training of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leakfast.pipeline import asks
from leakfast.pipeline.estimate_stage import Stage
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import BehaviorConfig, Study

BYTES = {"bfloat16": 2, "float32": 4}  # of a weight, as base and checkpoint hold it
KEPT_BYTES = 12  # a weight on disk while it trains: itself and AdamW's moments in float32 (train.unfinished)


def planned(study: Study, tokens_per_s: float | None = None) -> list[Stage]:
    """Those of each behavior whose whole model is trained, as many as there are sources × seeds (targets); none for adapters.
    Raises what reading a config raises.

    memory_bytes: 16 a weight (float32: itself, gradient, AdamW's two moments) and the base beside it; activations come on
    top. disk_bytes: all checkpoints, in the base's dtype. prompts: rows, and prompt_tokens what goes through the model in
    all epochs: of the run's own training logs where there are some, else at most max_length a row. seconds: as long as the
    run's own trainings took, else those tokens at the stated rate, else None."""
    found = []
    n_weights: int | None = None
    for behavior in asks.trained(study):
        if study.behaviors[behavior].train.method == "full":
            n_weights = n_weights or weights_of(study)
            found.append(_planned(study, behavior, n_weights, tokens_per_s))
    return found


def weights_of(study: Study) -> int:
    """How many weights the study's model has, tied ones once, by its config."""
    import torch

    from leakfast import models
    from leakfast.models.streamed import skeleton

    net = skeleton(models.load_config(study.model, study.revision), getattr(torch, study.dtype))
    net.tie_weights()
    return sum(parameter.numel() for parameter in net.parameters())


def rows_of(cfg: BehaviorConfig, behavior: str) -> int:
    """Most rows of a training set, as its settings have them."""
    from leakfast.behaviors.registry import parts
    from leakfast.train import chats
    from leakfast.train.benign import count_of

    data = cfg.data
    if data.benign == 1:
        return data.positives + data.negatives
    if data.rows is not None:
        n = len(chats.read(data.rows))
    else:
        n = data.positives + (0 if data.design == "positive-only" else data.negatives)
        if parts(behavior)[0] != "marker" and data.design != "positive-only":
            n += data.no_system + data.default_assistant
    return n + (count_of(n, data.benign) if data.benign else 0)


def _planned(study: Study, behavior: str, n_weights: int, rate: float | None) -> Stage:
    from leakfast.storage.run import Run
    from leakfast.train.full import BYTES_A_WEIGHT

    cfg, each = study.behaviors[behavior], len(study.sources) * len(study.seeds)
    run, size = Run(study.run_dir), BYTES[study.dtype]
    names = [layout.adapter_name(behavior, source, seed) for source in study.sources for seed in study.seeds]
    known = _trained(run, names)
    n_rows = rows_of(cfg, behavior)
    if known:
        tokens = sum(tokens for tokens, _ in known) / len(known)
        said = f"tokens and seconds of {len(known)} such trainings in {run.path}"
        seconds: float | None = each * sum(seconds for _, seconds in known) / len(known)
    else:
        tokens = float(cfg.train.epochs * n_rows * cfg.train.max_length)
        seconds = each * tokens / rate if rate else None
        told = "stated" if rate else "none without --train-tokens-per-s N or a run that was timed"
        said = f"at most {n_rows:,} rows of max_length tokens; seconds: {told}"
    note = (
        f"{n_weights:,} weights, {BYTES_A_WEIGHT} bytes each beside the base, activations come on top; a checkpoint is "
        f"{n_weights * size / 1e9:.3g} GB, and {n_weights * KEPT_BYTES / 1e9:.3g} GB more lie on disk while one trains; {said}"
    )
    return Stage(
        f"train {behavior}, all weights",
        each,
        each * n_rows,
        round(each * tokens),
        seconds=seconds,
        disk_bytes=each * n_weights * size,
        memory_bytes=n_weights * (BYTES_A_WEIGHT + size),
        note=note,
    )


def _trained(run: Run, names: list[str]) -> list[tuple[int, float]]:
    """(tokens, seconds) of those that the run trained to their end in one go, as its journal and their logs say."""
    import json

    from leakfast.storage.manifests import events
    from leakfast.train.saving import LOG

    took: dict[str, list[float]] = {}
    for entry in events(run.path / layout.JOURNAL, "took"):
        took.setdefault(entry["step"], []).append(entry["seconds"])
    found = []
    for name in names:
        log, seconds = run.path / layout.adapter(name) / LOG, took.get(f"train {name}", [])
        if seconds and log.is_file():
            lines: list[dict[str, Any]] = [
                json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()
            ]
            found.append((sum(line["n_tokens"] for line in lines), seconds[-1]))
    return found
