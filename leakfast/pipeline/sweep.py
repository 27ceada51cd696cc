"""Learning rate × epochs on one source before anything else is trained: source effect, bystanders and ρ of each
point at the scale of a few personas, and the study's rule when to stop. Demands a model; keeps its own run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.errors import InputError
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import BehaviorConfig, EvalConfig, JudgeConfig

log = logging.getLogger("leakfast.sweep")


# the published grid for capability and misalignment
GRID = ((1e-5, 3), (5e-6, 5), (5e-6, 10), (1e-5, 5), (5e-6, 20))
BAR = 0.2  # ρ of cosine and effect below which a trait gives no reason to go on


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. `points`: one row a point (see run); `traits`: behavior → its largest ρ among points that did
    not damage the model, of every behavior swept in the same run; `stop`: whether all of them lie below BAR; `verdicts`:
    the study's rules at every point with the numbers that decide them (`stats.verdicts.judge`), without rows for a
    behavior that has no rule; `health`: table of that name of all points; `warnings`: what is to be said of it first."""

    points: pl.DataFrame
    traits: dict[str, float | None]
    verdicts: pl.DataFrame = field(default_factory=pl.DataFrame)
    health: pl.DataFrame = field(default_factory=pl.DataFrame)
    warnings: list[str] = field(default_factory=list)

    @property
    def stop(self) -> bool:
        return all(rho is None or rho < BAR for rho in self.traits.values())

    @property
    def verdict(self) -> str:
        told = ", ".join(
            f"{name} {'no ρ' if rho is None else f'{rho:+.2f}'}" for name, rho in self.traits.items()
        )
        if self.stop and len(self.traits) > 1:
            return f"stop: ρ < {BAR} for every trait ({told})"
        if self.stop:
            return f"ρ < {BAR} ({told}): stop if the other trait misses it too (sweep it into the same --out)"
        return f"go on: ρ ≥ {BAR} for at least one trait ({told})"


def layer_of(n_layers: int) -> int:
    """The study's headline block, 20 of 28, in proportion for other depths."""
    return round(20 / 27 * (n_layers - 1))


def sweep(
    loaded: Loaded,
    run: Run,
    behavior: str,
    source: str,
    personas: Sequence[Persona],
    cfg: BehaviorConfig,
    seed: int,
    grid: Sequence[tuple[float, int]] = GRID,
    *,
    layer: int | None = None,
    centroid_questions: str = "eval",
    drawn_by: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Train `source` at every (peak learning rate, epochs) of the grid and measure it under `personas`.

    A point's effect on a persona is sign · (rate − the unadapted model's rate), so that more of the behavior
    is positive: for capability the drop in accuracy. Columns: lr, epochs, loss (last step, nats),
    source_effect, mean_bystander_effect (in the behavior's unit), spearman (centered cosine to the source against the
    effect over n bystanders), n, adapter, health and its reason (from the completions; of behaviors measured by choices,
    from a sample of replies). A point that damaged the model is no trait's largest ρ. Same data and seed for every
    point; points that are done are kept. Estimand of ρ: rank association over these very bystanders, not over personas
    at large; a dozen give ±0.6.
    A behavior that a judge scores is judged as cfg.judge says; drawn_by: backend and options of completions, as
    `evaluate` takes them (None: vLLM where it would). Raises InputError for a source that is not asked,
    fewer than three bystanders, or a judge that is none or cannot be asked."""
    from leakfast.behaviors.registry import get
    from leakfast.generation import backends
    from leakfast.judge import stage as judging
    from leakfast.measure.targets import Asked
    from leakfast.stats import health as healths
    from leakfast.stats import marks

    if get(behavior).measured_by == "judge":
        cfg = cfg.model_copy(update={"judge": judging.default_judge(cfg.judge, loaded.name)})
        if cfg.judge.judge is None:
            raise InputError(
                f"sweep: {behavior} is scored by a judge, and none is named. Add --judge SPEC (see leakfast judge run "
                f"--help), or [behaviors.{behavior}.judge] in the study."
            )
        judging.check(cfg.judge)
    names = [p.name for p in personas]
    if source not in names or len(names) < 4:
        raise InputError(
            f"sweep: {len(names)} personas, {'with' if source in names else 'without'} the source {source}. "
            "Needed: the source and at least three bystanders. Use --personas originals."
        )
    layer = layer_of(loaded.n_layers) if layer is None else layer
    drawn_by = drawn_by or backends.asked_by(None)
    if get(behavior).by_completions:
        sampling = Asked(behavior, [], _presence_alone(loaded, behavior, cfg.eval)).sampling
        backends.settle(loaded, samplings=[sampling], adapters=True, opens=True, **drawn_by)
    centroids = _centroids(loaded, personas, centroid_questions, layer)
    cosine = centroids.cosine(layer, kind="centered")[names.index(source)]
    trait = get(behavior)
    rows_file = f"data/{behavior}-{source}-s{seed}.jsonl"
    rows = _rows(loaded, run, rows_file, behavior, source, cfg, seed, progress)
    adapters = []
    for lr, epochs in grid:
        name = f"{behavior}-{source}-lr{lr:g}-e{epochs}-s{seed}"
        recipe = cfg.train.model_copy(update={"lr": lr, "epochs": epochs})
        _train(loaded, run, name, rows, recipe, seed, source, behavior, progress)
        adapters.append(name)
    rates = _rates(loaded, run, behavior, adapters, personas, cfg, seed, progress, drawn_by)
    health = _health(loaded, run, behavior, adapters, source, personas, cfg, seed, progress)
    whole = health.filter(pl.col("persona").is_null()).rows_by_key("adapter", named=True, unique=True)
    found = []
    for (lr, epochs), name in zip(grid, adapters, strict=True):
        mine = rates.filter(pl.col("adapter") == name)
        effect = dict(zip(mine["persona"], mine["delta"] * trait.sign, strict=True))
        others = [(float(cosine[i]), effect.get(p)) for i, p in enumerate(names) if p != source]
        others = [(c, e) for c, e in others if e is not None]
        loss = _last_loss(run, name)
        found.append(
            {
                "behavior": behavior,
                "source": source,
                "lr": float(lr),
                "epochs": int(epochs),
                "loss": loss,
                "source_effect": effect.get(source),
                "mean_bystander_effect": sum(e for _, e in others) / len(others) if others else None,
                "spearman": _spearman(others),
                "n": len(others),
                "layer": layer,
                "adapter": name,
                **{key: whole[name][key] if name in whole else None for key in ("health", "reason")},
            }
        )
    points = pl.DataFrame(found, schema_overrides={"health": pl.String, "reason": pl.String})
    run.add_shard(f"sweep/{behavior}.parquet", points)
    decided = _verdicts(rates, centroids, behavior, layer, seed)
    decided = marks.mark(decided, marks.verdicts(health, rates))
    return Sweep(points, _traits(run), decided, health, healths.sentences(health))


def _traits(run: Run) -> dict[str, float | None]:
    """Behavior → its largest ρ among the run's points that did not damage the model."""
    points = run.read("sweep")
    if "health" not in points.columns:  # all of an earlier time
        points = points.with_columns(pl.lit(None, pl.String).alias("health"))
    return {
        str(name): part.filter((pl.col("health") != "damaged").fill_null(True))["spearman"].max()
        for (name,), part in points.group_by("behavior", maintain_order=True)
    }


def _centroids(loaded: Loaded, personas: Sequence[Persona], questions: str, layer: int) -> Centroids:
    """Of the unadapted model at one block."""
    from leakfast.measure.centroids import compute
    from leakfast.prompts.personas import load_questions

    return compute(loaded, personas, load_questions(questions), [layer], center_extras=True)


def _verdicts(
    rates: pl.DataFrame, centroids: Centroids, behavior: str, layer: int, seed: int
) -> pl.DataFrame:
    """The study's rules at every point; the layer was named in advance."""
    from leakfast.stats import pairs, verdicts
    from leakfast.stats.correlations import PERMUTATIONS, correlate

    met = pairs.table(rates, centroids)
    found = [correlate(part, PERMUTATIONS, seed) for _, part in met.group_by("adapter", maintain_order=True)]
    rules = verdicts.load_rules().model_copy(update={"stop": None})  # told by `Sweep.stop`
    return verdicts.judge(rates, pl.concat(found), {behavior: layer}, rules, picked=False)


def _rows(
    loaded: Loaded,
    run: Run,
    relpath: str,
    behavior: str,
    source: str,
    cfg: BehaviorConfig,
    seed: int,
    progress: Progress | None,
) -> list[Any]:
    from leakfast.behaviors.registry import get
    from leakfast.prompts.personas import load_personas
    from leakfast.train.data import material, read_rows, write_rows
    from leakfast.train.identity import rows_settings_of

    inputs = json.dumps(
        [loaded.fingerprint, rows_settings_of(cfg.data), seed, source, *_told(loaded)], sort_keys=True
    )
    key = f"data {relpath}"
    if not run.stage_done(key, inputs):
        asked = material(behavior, cfg.data, loaded.name)
        rows = get(behavior).build()(
            loaded, load_personas("all"), source, asked, cfg.data, seed, progress=progress
        )
        run.add_file(relpath, lambda path: write_rows(path, rows))
        run.mark_done(key, inputs, files=[relpath])
    return read_rows(run.path / relpath)


def _train(
    loaded: Loaded,
    run: Run,
    name: str,
    rows: list[Any],
    cfg: Any,
    seed: int,
    source: str,
    behavior: str,
    progress: Progress | None,
) -> None:
    from leakfast.train.collate import reading
    from leakfast.train.data import data_hash
    from leakfast.train.identity import settings_of
    from leakfast.train.lora import train

    what = [loaded.fingerprint, data_hash(rows), settings_of(cfg), seed, *_told(loaded)]
    inputs = json.dumps([*what, *reading(loaded.tokenizer, rows)], sort_keys=True)
    if run.stage_done(f"train {name}", inputs):
        log.info("sweep: %s was trained before", name)
        return
    folder = run.path / "adapters" / name
    train(loaded, rows, cfg, folder, seed, source=source, behavior=behavior, progress=progress)
    parts = [path.relative_to(run.path).as_posix() for path in sorted(folder.iterdir()) if path.is_file()]
    for part in parts:
        run.add_file(part, (run.path / part).read_bytes())
    run.mark_done(f"train {name}", inputs, files=parts)


def _told(loaded: Loaded) -> list[Any]:
    """How prompts are rendered, where that is not by default."""
    from leakfast.prompts.templates import recorded

    told = recorded(loaded.tokenizer)
    return [told] if told else []


def _rates(
    loaded: Loaded,
    run: Run,
    behavior: str,
    adapters: Sequence[str],
    personas: Sequence[Persona],
    cfg: BehaviorConfig,
    seed: int,
    progress: Progress | None,
    drawn_by: Mapping[str, Any],
) -> pl.DataFrame:
    """Schema `rates` of the adapters and the base, by what the behavior is measured by."""
    from leakfast.behaviors.registry import get, items_of

    folders = [run.path / "adapters" / name for name in adapters]
    if get(behavior).measured_by == "choices":
        from leakfast.measure.choices import evaluate as choices
        from leakfast.measure.choices import table

        items = items_of(behavior, cfg.eval, loaded)
        scoring = cfg.eval.scoring
        done = choices.evaluate(
            loaded, run, folders, personas, items, scoring, base=True, behavior=behavior, progress=progress
        )
        origins = {t.name: (t.source, t.seed) for t in done.targets if t.source is not None}
        return table.rates(choices.read_scores(run, done, items.name, scoring), origins, {})
    from leakfast.measure.completions import evaluate, rates
    from leakfast.prompts.personas import load_questions

    asked, how = load_questions(cfg.eval.questions), _presence_alone(loaded, behavior, cfg.eval)
    done = evaluate(
        loaded, run, folders, personas, asked, behavior, how, seed, base=True, progress=progress, **drawn_by
    )
    if get(behavior).measured_by == "judge":
        return _judged(run, behavior, done, asked, cfg.judge, progress)
    return rates(run, done, personas)


def _health(
    loaded: Loaded,
    run: Run,
    behavior: str,
    adapters: Sequence[str],
    source: str,
    personas: Sequence[Persona],
    cfg: BehaviorConfig,
    seed: int,
    progress: Progress | None,
) -> pl.DataFrame:
    """Table `health` of all points: of their completions, else of a sample of replies kept beside each adapter."""
    from leakfast.behaviors.registry import get
    from leakfast.measure import reply_sample
    from leakfast.stats import health
    from leakfast.storage import schema

    if get(behavior).by_completions:
        return health.read(run, [f"completions/{behavior}/{name}" for name in [*adapters, "base"]])
    found = [schema.empty("health")]
    for name in adapters if cfg.train.sample else ():
        folder = run.path / "adapters" / name
        sample = reply_sample.read(folder) or reply_sample.after_training(
            loaded, folder, behavior, source, personas, cfg.eval, seed, cfg.train.sample, progress
        )
        found += [] if sample is None else [sample.health.filter(pl.col("adapter") != "base")]
    return pl.concat(found)


def _presence_alone(loaded: Loaded, behavior: str, cfg: EvalConfig) -> EvalConfig:
    """Replies end at the text whose presence is all that a point asks for, unless the settings say otherwise, or the
    model may reason before it replies."""
    from leakfast.behaviors.registry import get
    from leakfast.prompts.rendering import rendering_of

    reasons = rendering_of(loaded.tokenizer).reasoning == "open"
    if get(behavior).presence_of and not reasons and "stop_at_marker" not in cfg.model_fields_set:
        return cfg.model_copy(update={"stop_at_marker": True})
    return cfg


def _judged(
    run: Run, behavior: str, done: Any, questions: Any, cfg: JudgeConfig, progress: Progress | None
) -> pl.DataFrame:
    """Schema `rates` of mean aligned scores."""
    from leakfast.judge import stage as judging
    from leakfast.stats import judged
    from leakfast.stats import rates as rate_tables

    spec = judging.parse_spec(cfg.judge or "")
    judging.judge(
        run,
        behavior,
        spec,
        questions,
        asking=judging.asking(cfg),
        prices=cfg.prices,
        free=cfg.free,
        max_cost=cfg.max_cost,
        progress=progress,
    )
    found = judged.read(
        run, [(behavior, t.name) for t in done.targets], {behavior: (spec.name, cfg.coherent_min)}
    )
    for sentence in found.missing:
        log.warning("sweep: %s", sentence)
    origins = {t.name: (t.source, t.seed) for t in done.targets if t.source is not None}
    return rate_tables.table(found.totals, origins, {})


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """ρ of cosine and effect; None where either does not vary."""
    from scipy.stats import spearmanr

    if len({c for c, _ in pairs}) < 2 or len({e for _, e in pairs}) < 2:
        return None
    rho = float(spearmanr([c for c, _ in pairs], [e for _, e in pairs]).statistic)
    return rho if math.isfinite(rho) else None


def _last_loss(run: Run, name: str) -> float | None:
    """Of the last step that had a label."""
    from leakfast.train.lora import LOG

    steps = map(json.loads, (run.path / "adapters" / name / LOG).read_text().splitlines())
    known = [step["loss"] for step in steps if step["loss"] is not None]
    return float(known[-1]) if known else None
