"""Rules for confirming and falsifying a claim, read from a file, and the numbers that decide them. Demands
the rates and correlations tables; a number that is not there leaves its test, and the verdict, open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.stats import ttest_1samp

from leakfast.errors import InputError
from leakfast.stats.correlations import POOLED
from leakfast.stats.summary import unit
from leakfast.storage.documents import explain, find_shipped, read_document

RULES = "verdicts.toml"  # shipped: the published study's own
Quantity = Literal["source_drop", "mean_bystander_drop", "spearman_drop"]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Table):
    """One inequality: `quantity` (of drop = −Δ) must exceed `above`, or reach `at_least`; with `p_below`
    its p must lie below that too."""

    quantity: Quantity
    above: _Finite | None = None
    at_least: _Finite | None = None
    p_below: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_bar(self) -> Test:
        if (self.above is None) == (self.at_least is None):
            raise ValueError("a test needs one of above and at_least")
        if self.quantity == "source_drop" and self.p_below is not None:
            raise ValueError("the drop of the source is one number and has no p; leave p_below out")
        return self

    @property
    def bar(self) -> float:
        return self.above if self.at_least is None else self.at_least

    def met(self, value: float | None, p: float | None) -> bool | None:
        """True or False; None where the value, or a p that is asked for, is not known."""
        if value is None or (self.p_below is not None and p is None):
            return None
        over = value > self.bar if self.at_least is None else value >= self.bar
        return bool(over and (self.p_below is None or p < self.p_below))


class Rule(_Table):
    """A claim about behaviors: confirmed when every test is met, falsified when one is not. `unit`: of the
    bars on drops, share (0–1) or points (0–100)."""

    claim: str
    behaviors: Annotated[list[str], Field(min_length=1)]
    unit: Literal["share", "points"]
    test: Annotated[list[Test], Field(min_length=1)]


class Stop(_Table):
    """Stop after the sweep if the largest ρ(cosine, drop) of every trait is below `spearman_drop`."""

    traits: Annotated[list[list[str]], Field(min_length=1)]
    spearman_drop: _Finite


class Rules(_Table):
    """What a file of rules holds."""

    rule: list[Rule] = []
    stop: Stop | None = None


def load_rules(path: str | Path = RULES) -> Rules:
    """The rules of a TOML file; `verdicts.toml` is the shipped one.

    Raises InputError naming file, line, what is wrong and the nearest valid word."""
    document = read_document(find_shipped(path))
    try:
        return Rules.model_validate(document.data)
    except ValidationError as error:
        raise InputError(explain(error, document, Rules)) from None


def judge(
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    layers: dict[str, int | None],
    rules: Rules | None = None,
    *,
    picked: bool = True,
) -> pl.DataFrame:
    """One row a rule, adapter and test: quantity, value, n, p, where p is from, bar, met, and the verdict
    over all its tests (confirmed, falsified, open); then, where all its traits were
    measured, one row a trait of the stop rule (stop, go on).

    `layers`: behavior → layer of the centered cosine. `picked`: it was picked after looking at all layers,
    so the p of ρ is the family-wise one; else that of the layer alone. p of a bystander drop: t over
    bystanders against 0, two-sided, as the study did."""
    rules = load_rules() if rules is None else rules
    rows = []
    for rule in rules.rule:
        mine = rates.filter(pl.col("behavior").is_in(rule.behaviors))
        keys = ["behavior", "seed", "source", "adapter"]
        trained = mine.filter(pl.col("source").is_not_null()).select(keys).unique(maintain_order=True)
        for behavior, seed, source, adapter in trained.rows():
            numbers = _numbers(mine, correlations, adapter, behavior, layers.get(behavior), picked)
            why = (
                None
                if unit(mine, behavior) == rule.unit
                else (
                    f"the rates are in {unit(mine, behavior)}s, the rule's bars in {rule.unit}s".replace(
                        "ss", "s"
                    )
                )
            )
            tests = [(test, *numbers[test.quantity]) for test in rule.test]
            met = [None if why else test.met(value, p) for test, value, p, *_ in tests]
            verdict = "falsified" if False in met else "open" if None in met else "confirmed"
            for (test, value, p, p_from, n), one in zip(tests, met, strict=True):
                rows.append(
                    {
                        "claim": rule.claim,
                        "behavior": behavior,
                        "seed": seed,
                        "source": source,
                        "adapter": adapter,
                        "layer": layers.get(behavior),
                        "quantity": test.quantity,
                        "n": n,
                        "value": value,
                        "p": p,
                        "p_from": p_from,
                        "bar": test.bar,
                        "reached_is_enough": test.at_least is not None,
                        "p_below": test.p_below,
                        "unit": rule.unit,
                        "met": one,
                        "verdict": verdict,
                        "reason": None if one is not None else why or "not measured, or not defined",
                    }
                )
    rows += _stop(rules.stop, rates, correlations, layers) if rules.stop else []
    text = dict.fromkeys(("claim", "behavior"), pl.String)
    columns = text | {"seed": pl.Int64, "source": pl.String, "adapter": pl.String, "layer": pl.Int32}
    columns |= {"quantity": pl.String, "n": pl.Int64, "value": pl.Float64, "p": pl.Float64}
    columns |= {"p_from": pl.String, "bar": pl.Float64, "reached_is_enough": pl.Boolean}
    columns |= {"p_below": pl.Float64, "unit": pl.String, "met": pl.Boolean, "verdict": pl.String}
    return pl.DataFrame(rows, schema=columns | {"reason": pl.String})


def _stop(
    stop: Stop, rates: pl.DataFrame, correlations: pl.DataFrame, layers: dict[str, int | None]
) -> list[dict]:
    """One row a trait, the same verdict in each, where all were measured. With several sources the largest ρ
    of a trait counts."""
    measured = set(rates["behavior"].unique())
    if not all(measured & set(trait) for trait in stop.traits):
        return []
    rows = []
    for trait in stop.traits:
        best: tuple = (None, None, None, None)
        adapters = rates.filter(pl.col("behavior").is_in(trait) & pl.col("source").is_not_null())
        for behavior, source, adapter in (
            adapters.select("behavior", "source", "adapter").unique(maintain_order=True).rows()
        ):
            value, *_, n = _numbers(rates, correlations, adapter, behavior, layers.get(behavior), True)[
                "spearman_drop"
            ]
            if value is not None and (best[0] is None or value > best[0]):
                best = (value, n, source, adapter)
        value, n, source, adapter = best
        rows.append(
            {
                "claim": "worth going on after the sweep",
                "behavior": " or ".join(trait),
                "source": source,
                "adapter": adapter,
                "quantity": "spearman_drop",
                "n": n,
                "value": value,
                "bar": stop.spearman_drop,
                "reached_is_enough": True,
                "unit": "correlation",
                "met": None if value is None else value >= stop.spearman_drop,
                "reason": None if value is not None else "not measured, or not defined",
            }
        )
    met = [row["met"] for row in rows]
    verdict = "go on" if True in met else "open" if None in met else "stop"
    return [row | {"verdict": verdict} for row in rows]


def _numbers(
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    adapter: str,
    behavior: str,
    layer: int | None,
    picked: bool,
) -> dict[str, tuple[float | None, float | None, str | None, int | None]]:
    """quantity → (value, p, where p is from, n)."""
    mine = rates.filter(adapter=adapter, behavior=behavior)
    own = mine.filter(role="source")["delta"].drop_nulls()
    drops = -mine.filter(role="bystander")["delta"].drop_nulls().to_numpy()
    rows = correlations.filter(
        pl.col("source") != POOLED,
        pl.col("category").is_null(),
        pl.col("spearman").is_not_null(),
        behavior=behavior,
        adapter=adapter,
        cosine="centered",
        y="delta",
        layer=-1 if layer is None else layer,
    )
    by_t = "t over bystanders against 0, two-sided"
    p = float(ttest_1samp(drops, 0.0).pvalue) if len(drops) > 1 and drops.std() > 0 else None
    out = {
        "source_drop": (-float(own[0]) if len(own) else None, None, None, len(own) or None),
        "mean_bystander_drop": (
            float(drops.mean()) if len(drops) else None,
            p,
            None if p is None else by_t,
            len(drops) or None,
        ),
        "spearman_drop": (None, None, None, None),
    }
    if rows.height:
        row = rows.row(0, named=True)
        choices = {
            "spearman_p_max": f"shuffled personas, the largest of {row['layers_tested']} layers",
            "spearman_p_perm": "shuffled personas, this layer alone",
            "spearman_p_t": "t approximation, this layer alone",
        }
        names = list(choices)[0 if picked else 1 :]
        name = next((name for name in names if row[name] is not None), None)
        out["spearman_drop"] = (
            -row["spearman"],
            None if name is None else row[name],
            choices.get(name or ""),
            row["n"],
        )
    return out
