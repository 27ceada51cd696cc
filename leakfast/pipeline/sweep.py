"""Learning rate × epochs on one source before anything else is trained: source effect, bystanders and ρ of each
point at the scale of a few personas, and the study's rule when to stop. Demands a model; keeps its own run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.generation import backends
from leakfast.generation.backends import Drawing
from leakfast.judge import stage as judging
from leakfast.measure import Asked, Request, asked_of, measure, rates, reply_sample
from leakfast.measure.centroids import compute
from leakfast.pipeline.adapters import Maker
from leakfast.pipeline.steps import Shown, Steps, silent
from leakfast.progress import Progress
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.stats import health as healths
from leakfast.stats import judged, marks, pairs, verdicts
from leakfast.stats import rates as rate_tables
from leakfast.stats.correlations import PERMUTATIONS, correlate
from leakfast.storage import layout, schema
from leakfast.train.recipe import Recipe

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.measure import Measured
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import BehaviorConfig, EvalConfig

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


@dataclass(frozen=True)
class Plan:
    """What is swept: a behavior (its settings in cfg) and the persona it is taught to, by (peak learning rate, epochs).
    personas: who is asked; among: the study's, whom rows are built from; layer: block of the cosines (None: layer_of);
    centroid_questions: their question set; drawing: how completions are drawn (None: vLLM where it would)."""

    behavior: str
    source: str
    personas: Sequence[Persona]
    cfg: BehaviorConfig
    seed: int = 42
    grid: Sequence[tuple[float, int]] = GRID
    among: Sequence[Persona] = ()
    layer: int | None = None
    centroid_questions: str = "eval"
    drawing: Drawing | None = None

    def name(self, lr: float, epochs: int) -> str:
        """The adapter of a point."""
        return f"{self.behavior}-{self.source}-lr{lr:g}-e{epochs}-s{self.seed}"

    def checked(self, loaded: Loaded) -> Plan:
        """With what was left open settled. Raises InputError for a source that is not asked, fewer than three bystanders,
        a name with one prompt where rows are built and another where it is asked, a judge that is none or cannot be asked,
        and what no backend could draw. Points are measured when they are
        trained alone, and no sample is drawn of replies that are all drawn anyway."""
        names = [p.name for p in self.personas]
        if self.source not in names or len(names) < 4:
            raise InputError(
                f"sweep: {len(names)} personas, {'with' if self.source in names else 'without'} the source {self.source}. "
                "Needed: the source and at least three bystanders. Use --personas all."
            )
        if self.cfg.after or self.cfg.average:
            of = (
                f"taught after {self.cfg.after}"
                if self.cfg.after
                else f"the mean of {', '.join(self.cfg.average)}"
            )
            raise InputError(
                f"sweep: {self.behavior} is {of}, and a sweep trains fresh adapters. Needed: a behavior "
                "that begins from the base. Sweep it without that line."
            )
        if self.cfg.train.steering is not None:
            raise InputError(
                f"sweep: {self.behavior} is trained under steering along a direction of its study's run, and a sweep has none. "
                "Needed: a training of the model as it is. Sweep it without [behaviors.NAME.train.steering]."
            )
        among = self.among or load_personas("all")
        known = {p.name: (p.kind, p.prompt) for p in among}
        for one in self.personas:
            mine = (one.kind, one.prompt)
            if known.get(one.name, mine) != mine:
                raise InputError(
                    f"sweep: {one.name} is measured under another prompt than rows are built with (a persona of that name in "
                    "each of two sets). Needed: one prompt a name. Leave --personas out, or rename one of the two."
                )
        cfg, drawing = self.cfg, self.drawing or Drawing.of(None)
        if get(self.behavior).measured_by == "judge":
            cfg = cfg.model_copy(update={"judge": judging.default_judge(cfg.judge, loaded.name)})
            if cfg.judge.judge is None:
                raise InputError(
                    f"sweep: {self.behavior} is scored by a judge, and none is named. Add --judge SPEC (see leakfast judge "
                    f"run --help), or [behaviors.{self.behavior}.judge] in the study."
                )
            judging.check(cfg.judge)
        measured = _presence_alone(loaded, self.behavior, cfg.eval).model_copy(update={"checkpoints": []})
        cfg = cfg.model_copy(update={"eval": measured})
        if get(self.behavior).by_completions:  # whose health is read from all its completions
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"sample": 0})})
            sampling = Asked(self.behavior, [], cfg.eval).sampling
            backends.settle(loaded, drawing, [sampling], adapters=True, opens=True)
        layer = layer_of(loaded.n_layers) if self.layer is None else self.layer
        return replace(self, cfg=cfg, drawing=drawing, layer=layer, among=among)


def sweep(loaded: Loaded, run: Run, plan: Plan, *, progress: Shown = silent) -> Sweep:
    """Train the source at every point of the grid and measure it under the personas.

    A point's effect on a persona is sign · (rate − the unadapted model's rate), so that more of the behavior
    is positive: for capability the drop in accuracy. Columns: lr, epochs, loss (last step, nats),
    source_effect, mean_bystander_effect (in the behavior's unit), spearman (centered cosine to the source against the
    effect over n bystanders), n, adapter, health and its reason (from the completions; of behaviors measured by choices,
    from a sample of replies). A point that damaged the model is no trait's largest ρ. Same data and seed for every
    point; points that are done are kept. Estimand of ρ: rank association over these very bystanders, not over personas
    at large; a dozen give ±0.6. Raises InputError as Plan.checked."""
    plan = plan.checked(loaded)
    questions = load_questions(plan.centroid_questions)
    centroids = compute(loaded, plan.personas, questions, [plan.layer], center_extras=True)
    steps = Steps(run, progress)
    first = (plan.source, plan.seed)
    maker = Maker(loaded, steps, plan.among, plan.behavior, plan.cfg, loaded.name, loaded.dtype, first)
    rows = maker.rows(*first)
    recipes = []
    for lr, epochs in plan.grid:
        cfg = plan.cfg.train.model_copy(update={"lr": lr, "epochs": epochs})
        recipes.append(Recipe(plan.behavior, plan.source, plan.seed, cfg, name=plan.name(lr, epochs)))
    folders = maker.adapters([(recipe, rows) for recipe in recipes], together=plan.cfg.train.together)
    asked = asked_of(plan.behavior, plan.cfg.eval, loaded)[0]
    with steps.timed("evaluate") as report:
        request = Request([asked], plan.personas, folders, base=True, seed=plan.seed)
        (done,) = measure(loaded, run, request, plan.drawing, progress=report)
        judged = get(plan.behavior).measured_by == "judge"
        met = _judged(run, plan, done, asked.questions, report) if judged else rates(run, done, plan.personas)
    health = _health(loaded, run, plan, recipes)
    points = _points(run, plan, recipes, met, centroids, health)
    run.add_shard(f"sweep/{plan.behavior}.parquet", points)
    decided = marks.mark(_verdicts(met, centroids, plan), marks.verdicts(health, met))
    return Sweep(points, _traits(run), decided, health, healths.sentences(health))


def _points(
    run: Run,
    plan: Plan,
    recipes: Sequence[Recipe],
    met: pl.DataFrame,
    centroids: Centroids,
    health: pl.DataFrame,
) -> pl.DataFrame:
    """A row a point (see sweep)."""
    names = [p.name for p in plan.personas]
    cosine = centroids.cosine(plan.layer, kind="centered")[names.index(plan.source)]
    whole = health.filter(pl.col("persona").is_null()).rows_by_key("adapter", named=True, unique=True)
    found = []
    for recipe in recipes:
        mine = met.filter(pl.col("adapter") == recipe.name)
        effect = dict(zip(mine["persona"], mine["delta"] * get(plan.behavior).sign, strict=True))
        others = [(float(cosine[i]), effect.get(p)) for i, p in enumerate(names) if p != plan.source]
        others = [(c, e) for c, e in others if e is not None]
        found.append(
            {
                "behavior": plan.behavior,
                "source": plan.source,
                "lr": float(recipe.train.lr),
                "epochs": int(recipe.train.epochs),
                "loss": _last_loss(run, recipe.name),
                "source_effect": effect.get(plan.source),
                "mean_bystander_effect": sum(e for _, e in others) / len(others) if others else None,
                "spearman": _spearman(others),
                "n": len(others),
                "layer": plan.layer,
                "adapter": recipe.name,
                **{key: whole.get(recipe.name, {}).get(key) for key in ("health", "reason")},
            }
        )
    return pl.DataFrame(found, schema_overrides={"health": pl.String, "reason": pl.String})


def _traits(run: Run) -> dict[str, float | None]:
    """Behavior → its largest ρ among the run's points that did not damage the model."""
    points = run.read("sweep")
    if "health" not in points.columns:  # all of an earlier time
        points = points.with_columns(pl.lit(None, pl.String).alias("health"))
    return {
        str(name): part.filter((pl.col("health") != "damaged").fill_null(True))["spearman"].max()
        for (name,), part in points.group_by("behavior", maintain_order=True)
    }


def _verdicts(met: pl.DataFrame, centroids: Centroids, plan: Plan) -> pl.DataFrame:
    """The study's rules at every point; the layer was named in advance."""
    there = pairs.table(met, centroids).group_by("adapter", maintain_order=True)
    found = [correlate(part, PERMUTATIONS, plan.seed) for _, part in there]
    rules = verdicts.load_rules().model_copy(update={"stop": None})  # told by `Sweep.stop`
    return verdicts.judge(met, pl.concat(found), {plan.behavior: plan.layer}, rules, picked=False)


def _health(loaded: Loaded, run: Run, plan: Plan, recipes: Sequence[Recipe]) -> pl.DataFrame:
    """Table `health` of all points: of their completions, else of the sample of replies kept beside each adapter."""
    if get(plan.behavior).by_completions:
        names = [*(recipe.name for recipe in recipes), layout.BASE]
        return healths.read(run, [layout.completions(plan.behavior, name) for name in names])
    found = [schema.empty("health")]
    for recipe in recipes if plan.cfg.train.sample else ():
        folder = run.path / layout.adapter(recipe.name)
        sample = reply_sample.read(folder) or reply_sample.after_training(
            loaded, folder, recipe, plan.personas, plan.cfg.eval
        )
        found += [] if sample is None else [sample.health.filter(pl.col("adapter") != layout.BASE)]
    return pl.concat(found)


def _presence_alone(loaded: Loaded, behavior: str, cfg: EvalConfig) -> EvalConfig:
    """Replies end at the text whose presence is all that a point asks for, unless the settings say otherwise, or the
    model may reason before it replies."""
    from leakfast.prompts.rendering import rendering_of

    reasons = rendering_of(loaded.tokenizer).reasoning == "open"
    if get(behavior).presence_of and not reasons and "stop_at_marker" not in cfg.model_fields_set:
        return cfg.model_copy(update={"stop_at_marker": True})
    return cfg


def _judged(run: Run, plan: Plan, done: Measured, questions: Any, progress: Progress) -> pl.DataFrame:
    """Schema `rates` of mean aligned scores."""
    cfg = plan.cfg.judge
    spec = judging.parse_spec(cfg.judge or "")
    judging.judge(
        run,
        plan.behavior,
        spec,
        questions,
        asking=judging.asking(cfg),
        prices=cfg.prices,
        free=cfg.free,
        max_cost=cfg.max_cost,
        progress=progress,
    )
    folders = [(plan.behavior, t.name) for t in done.targets]
    found = judged.read(run, folders, {plan.behavior: (spec.name, cfg.coherent_min)})
    for sentence in found.missing:
        log.warning("sweep: %s", sentence)
    return rate_tables.table(found.totals, done.origins, {})


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """ρ of cosine and effect; None where either does not vary."""
    from scipy.stats import spearmanr

    if len({c for c, _ in pairs}) < 2 or len({e for _, e in pairs}) < 2:
        return None
    rho = float(spearmanr([c for c, _ in pairs], [e for _, e in pairs]).statistic)
    return rho if math.isfinite(rho) else None


def _last_loss(run: Run, name: str) -> float | None:
    """Of the last step that had a label."""
    from leakfast.train.saving import LOG

    steps = map(json.loads, (run.path / layout.adapter(name) / LOG).read_text().splitlines())
    known = [step["loss"] for step in steps if step["loss"] is not None]
    return float(known[-1]) if known else None
