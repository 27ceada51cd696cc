"""The study's own rules for confirming and falsifying a claim, as data, and the numbers that decide them.
Demands the rates and correlations tables; a number that is not there leaves its test, and the verdict, open."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from scipy.stats import ttest_1samp

from leakfast.stats.correlations import POOLED


@dataclass(frozen=True)
class Test:
    """One inequality: `quantity` must exceed (or reach) `bar`; `p_below`: and its p lie below this."""

    quantity: str  # source_drop | mean_bystander_drop | spearman_drop, of drop = −Δ; *_rise of Δ
    bar: float
    p_below: float | None = None
    reached_is_enough: bool = False

    def met(self, value: float | None, p: float | None) -> bool | None:
        """True or False; None where the value, or a p that is asked for, is not known."""
        if value is None or (self.p_below is not None and p is None):
            return None
        over = value >= self.bar if self.reached_is_enough else value > self.bar
        return bool(over and (self.p_below is None or p < self.p_below))


@dataclass(frozen=True)
class Rule:
    """A claim about behaviors: confirmed when every test is met, falsified when one is not."""

    claim: str
    behaviors: tuple[str, ...]
    unit: str  # of the bars on drops
    tests: tuple[Test, ...]
    origin: str


_PP = 0.01
RULES = (
    Rule(
        "capability leaks along the geometry", ("capability",), "share",
        (
            Test("source_drop", 5 * _PP, reached_is_enough=True),
            Test("mean_bystander_drop", 1 * _PP, 0.05),
            Test("spearman_drop", 0.2, 0.05),
        ),
        "the study's rule for capability: ≥ 5 pp, > 1 pp (p < 0.05), ρ(cosine, drop) > 0.2 (p < 0.05)",
    ),
    Rule(
        "misalignment leaks along the geometry",
        ("misalignment", "misalignment-code", "misalignment-advice"), "points",
        (
            Test("source_drop", 10.0, reached_is_enough=True),
            Test("mean_bystander_drop", 2.0),
            Test("spearman_drop", 0.2, 0.05),
        ),
        "the study's rule for misalignment: ≥ 10 points, > 2 points, ρ(cosine, drop) > 0.2 (p < 0.05)",
    ),
)  # fmt: skip
STOP = Test("spearman_drop", 0.2, reached_is_enough=True)  # for both traits, at 11-persona scale
STOP_BEHAVIORS = (RULES[0].behaviors, RULES[1].behaviors)


def judge(rates: pl.DataFrame, correlations: pl.DataFrame, layers: dict[str, int | None]) -> pl.DataFrame:
    """One row a rule, adapter and test: quantity, value, p, bar, met, and the verdict over all its tests
    (confirmed, falsified, open). p of a bystander drop: t over bystanders against 0, two-sided, as the
    study did; p of ρ: by shuffling personas. `layers`: behavior → layer of the centered cosine."""
    rows = []
    for rule in RULES:
        mine = rates.filter(pl.col("behavior").is_in(list(rule.behaviors)))
        keys = ["behavior", "seed", "source", "adapter"]
        for key in (
            mine.filter(pl.col("source").is_not_null()).select(keys).unique(maintain_order=True).rows()
        ):
            behavior, seed, source, adapter = key
            numbers = _numbers(mine, correlations, adapter, behavior, layers.get(behavior))
            tests = [(test, *numbers[test.quantity]) for test in rule.tests]
            met = [test.met(value, p) for test, value, p in tests]
            verdict = "falsified" if False in met else "open" if None in met else "confirmed"
            for (test, value, p), one in zip(tests, met, strict=True):
                rows.append({
                    "claim": rule.claim, "behavior": behavior, "seed": seed, "source": source,
                    "adapter": adapter, "layer": layers.get(behavior), "quantity": test.quantity,
                    "value": value, "p": p, "bar": test.bar, "p_below": test.p_below, "unit": rule.unit,
                    "met": one, "verdict": verdict, "rule": rule.origin,
                    "reason": None if one is not None else "not measured, or not defined",
                })  # fmt: skip
    text = dict.fromkeys(("claim", "behavior"), pl.String)
    columns = text | {"seed": pl.Int64, "source": pl.String, "adapter": pl.String, "layer": pl.Int32}
    columns |= {"quantity": pl.String, **dict.fromkeys(("value", "p", "bar", "p_below"), pl.Float64)}
    columns |= {
        "unit": pl.String,
        "met": pl.Boolean,
        "verdict": pl.String,
        "rule": pl.String,
        "reason": pl.String,
    }
    return pl.DataFrame(rows, schema=columns)


def should_stop(verdicts: pl.DataFrame) -> bool | None:
    """The study's stop rule after a sweep: ρ(cosine, drop) below 0.2 for capability *and* misalignment.

    With several sources the largest ρ of a trait counts. None where a trait has no ρ."""
    found = []
    for behaviors in STOP_BEHAVIORS:
        rho = verdicts.filter(
            pl.col("behavior").is_in(list(behaviors)) & (pl.col("quantity") == STOP.quantity)
        )["value"].drop_nulls()
        found.append(None if rho.is_empty() else STOP.met(float(rho.max()), None))
    return None if None in found else not any(found)


def _numbers(
    rates: pl.DataFrame, correlations: pl.DataFrame, adapter: str, behavior: str, layer: int | None
) -> dict[str, tuple[float | None, float | None]]:
    """quantity → (value, p)."""
    mine = rates.filter((pl.col("adapter") == adapter) & (pl.col("behavior") == behavior))
    own = mine.filter(pl.col("role") == "source")["delta"].drop_nulls()
    drops = -mine.filter(pl.col("role") == "bystander")["delta"].drop_nulls().to_numpy()
    rows = correlations.filter(
        (pl.col("behavior") == behavior) & (pl.col("adapter") == adapter) & (pl.col("source") != POOLED)
        & pl.col("category").is_null() & (pl.col("cosine") == "centered") & (pl.col("y") == "delta")
        & (pl.col("layer") == (-1 if layer is None else layer))
    )  # fmt: skip
    rho = rows["spearman"][0] if rows.height else None
    p_rho = rows.select(pl.coalesce("spearman_p_perm", "spearman_p_t")).item() if rows.height else None
    p = float(ttest_1samp(drops, 0.0).pvalue) if len(drops) > 1 and drops.std() > 0 else None
    return {
        "source_drop": (-float(own[0]) if len(own) else None, None),
        "mean_bystander_drop": (float(drops.mean()) if len(drops) else None, p),
        "spearman_drop": (None if rho is None else -rho, p_rho),
    }
