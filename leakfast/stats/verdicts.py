"""Rules for confirming and falsifying a claim, read from a file, and the numbers that decide them. Demands
the rates and correlations tables; a number that is not there leaves its test, and the verdict, open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import scipy  # loads its parts when they are used
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from leakfast.errors import InputError
from leakfast.stats.correlations import POOLED
from leakfast.stats.summary import unit
from leakfast.storage.documents import find_shipped, read_document
from leakfast.storage.validation import explain

RULES = "verdicts.toml"  # shipped: the published study's own
Quantity = Literal["source_drop", "mean_bystander_drop", "spearman_drop"]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


_COLUMNS: dict[str, Any] = {
    "claim": pl.String,
    "behavior": pl.String,
    "seed": pl.Int64,
    "source": pl.String,
    "adapter": pl.String,
    "layer": pl.Int32,
    "quantity": pl.String,
    "n": pl.Int64,
    "value": pl.Float64,
    "p": pl.Float64,
    "p_from": pl.String,
    "p_source": pl.Float64,
    "bar": pl.Float64,
    "reached_is_enough": pl.Boolean,
    "p_below": pl.Float64,
    "p_source_below": pl.Float64,
    "unit": pl.String,
    "met": pl.Boolean,
    "verdict": pl.String,
    "reason": pl.String,
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Table):
    """One inequality: `quantity` (of drop = −Δ) must exceed `above`, or reach `at_least`; with `p_below`
    its p must lie below that too, with `p_source_below` its p_source (`stats.specificity`)."""

    quantity: Quantity
    above: _Finite | None = None
    at_least: _Finite | None = None
    p_below: Annotated[float, Field(gt=0, le=1)] | None = None
    p_source_below: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_bar(self) -> Test:
        if (self.above is None) == (self.at_least is None):
            raise ValueError("a test needs one of above and at_least")
        if self.quantity == "source_drop" and self.p_below is not None:
            raise ValueError("the drop of the source is one number and has no p; leave p_below out")
        if self.quantity != "spearman_drop" and self.p_source_below is not None:
            raise ValueError("p_source is of a correlation with cosine; leave p_source_below out")
        return self

    @property
    def bar(self) -> float:
        return self.above if self.at_least is None else self.at_least

    def met(self, value: float | None, p: float | None, p_source: float | None = None) -> bool | None:
        """True or False; None where the value, or a p that is asked for, is not known."""
        asked = [
            (bar, one) for bar, one in ((self.p_below, p), (self.p_source_below, p_source)) if bar is not None
        ]
        if value is None or any(one is None for _, one in asked):
            return None
        over = value > self.bar if self.at_least is None else value >= self.bar
        return bool(over and all(one < bar for bar, one in asked))


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
    specificity: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """One row a rule, adapter and test: quantity, value, n, p, where p is from, p_source, bar, met, and the verdict
    over all its tests (confirmed, falsified, open); then, where all its traits were
    measured, one row a trait of the stop rule (stop, go on).

    `layers`: behavior → layer of the centered cosine. `picked`: it was picked after looking at all layers,
    so the p of ρ is the family-wise one; else that of the layer alone. p of a bystander drop: t over
    bystanders against 0, two-sided, as the study did."""
    rules = load_rules() if rules is None else rules
    rows: list[dict] = []
    for rule in rules.rule:
        mine = rates.filter(pl.col("behavior").is_in(rule.behaviors))
        keys = ["behavior", "seed", "source", "adapter"]
        trained = mine.filter(pl.col("source").is_not_null()).select(keys).unique(maintain_order=True)
        for key in trained.rows(named=True):
            layer, adapter = layers.get(key["behavior"]), key["adapter"]
            numbers = _numbers(mine, correlations, adapter, key["behavior"], layer, picked)
            of_source = _p_source(specificity, adapter, key["behavior"], layer, picked)
            measured = unit(mine, key["behavior"])
            why = None
            if measured != rule.unit:
                why = f"the rates are in {measured.rstrip('s')}s, the rule's bars in {rule.unit.rstrip('s')}s"
            told = {"claim": rule.claim, **key, "layer": layer, "unit": rule.unit}
            rows += [told | row for row in _tested(rule, numbers, of_source, why)]
    rows += _stop(rules.stop, rates, correlations, layers) if rules.stop else []
    return pl.DataFrame(rows, schema=_COLUMNS)


def _tested(
    rule: Rule, numbers: dict[str, tuple], p_source: float | None, why: str | None
) -> Iterator[dict[str, Any]]:
    """A row a test of the rule, and the verdict over all of them in each. why: what keeps it open."""
    tests = [(test, *numbers[test.quantity]) for test in rule.test]
    met = [None if why else test.met(value, p, p_source) for test, value, p, *_ in tests]
    verdict = "falsified" if False in met else "open" if None in met else "confirmed"
    for (test, value, p, p_from, n), one in zip(tests, met, strict=True):
        yield {
            "quantity": test.quantity,
            "n": n,
            "value": value,
            "p": p,
            "p_from": p_from,
            "p_source": p_source if test.quantity == "spearman_drop" else None,
            "bar": test.bar,
            "reached_is_enough": test.at_least is not None,
            "p_below": test.p_below,
            "p_source_below": test.p_source_below,
            "met": one,
            "verdict": verdict,
            "reason": None if one is not None else why or "not measured, or not defined",
        }


def _p_source(
    specificity: pl.DataFrame | None, adapter: str, behavior: str, layer: int | None, picked: bool
) -> float | None:
    """p_source of the change against the centered cosine, None where it is not known."""
    if specificity is None or layer is None:
        return None
    rows = specificity.filter(behavior=behavior, adapter=adapter, layer=layer, cosine="centered", y="delta")
    return rows["p_source_max" if picked else "p_source"][0] if rows.height else None


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
    p = float(scipy.stats.ttest_1samp(drops, 0.0).pvalue) if len(drops) > 1 and np.ptp(drops) > 0 else None
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
