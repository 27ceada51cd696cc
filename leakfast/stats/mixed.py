"""The table of mixed models: what each term does to the log-odds of a reply that shows the behavior, the cosine's slope of
each source, and how much sources, personas and questions differ. Demands pairs with `confounds.covariates`, counts per
question and the table `exposure`; leaves the fit to `logistic_mixed`.

statsmodels' variational fit and GPBoost's were tried in its place; bench/LOG.md says what they gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import logit

from leakfast.stats import logistic_mixed, ties
from leakfast.stats.correlations import MIN_PAIRS, POOLED
from leakfast.stats.rates import BASE
from leakfast.storage import schema

TERMS = ("cosine", "length", "baseline", "words")
MIN_KIND = 10  # replies of either kind, with the behavior and without it
METHOD = (
    "logistic mixed model, restricted likelihood by Laplace's approximation; t interval, degrees of freedom of the fewest "
    "of sources, questions, personas"
)
# term → (unit of its coefficient, size of that unit)
_UNITS = {
    "intercept": ("log-odds", 1.0),
    "cosine": ("log-odds per 0.1 of cosine", 0.1),
    "length": ("log-odds per doubling of mean reply tokens", 1.0),
    "baseline": ("log-odds per log-odds of the baseline", 1.0),
    "words": ("log-odds per 0.1 of the share of words in common", 0.1),
}
# kind of effect → (term, unit)
_SPREADS = {
    "persona": ("persona", "log-odds"),
    "question": ("question", "log-odds"),
    "source": ("source", "log-odds"),
    "pair": ("pair", "log-odds"),
    "slope": ("cosine of source", _UNITS["cosine"][0]),
    "question_slope": ("cosine of question", _UNITS["cosine"][0]),
}
_LACKING = {
    "length": "mean reply tokens are not known: no replies were drawn, or they end at the marker",
    "baseline": "the unadapted model was not counted on the same prompts",
    "words": "the personas' words are not known",
}


def table(
    pairs: pl.DataFrame,
    questions: pl.DataFrame,
    exposure: pl.DataFrame,
    correlations: pl.DataFrame,
    at: Mapping[str, tuple[str, int | None]],
) -> pl.DataFrame:
    """Schema `mixed`: one model for each behavior and training seed, at its cosine and layer `at`.

    Hits among the replies of each source, bystander and question; terms: the cosine, log2 of the mean reply tokens of the
    bystander under the adapter, log-odds of its baseline ((hits + ½) / (misses + ½)) and the share of words that it has in
    common with the source (jaccard), each about its mean over the source's bystanders, so that a coefficient is of
    differences within a source, as pooled ρ is. Effects that are drawn: persona, question, source, pair (a persona under a
    source), and the cosine's slope by source and by question.

    part `fixed`: coefficients, of the cosine the mean over sources and questions like these. part `source`: the slope of
    each source, drawn towards the common one as far as its own replies leave it open. part `spread`: standard deviations.
    `spearman`: plain ρ of cosine and rate, beside the slope. Null with a reason where nothing can be fitted."""
    rows: list[dict] = []
    for group in pairs.partition_by("behavior", "seed", maintain_order=True):
        behavior = group["behavior"][0]
        cosine, layer = at.get(behavior, ("centered", None))
        told = {"behavior": behavior, "seed": group["seed"][0], "layer": layer, "cosine": cosine}
        told["method"] = METHOD
        plain = correlations.filter(
            pl.col("category").is_null(),
            pl.col("seed").eq_missing(pl.lit(group["seed"][0], pl.Int64)),
            behavior=behavior,
            layer=-1 if layer is None else layer,
            cosine=cosine,
            y="rate",
        )
        rho = {(source, adapter): value for source, adapter, value in plain.select(*_WHO, "spearman").rows()}
        found = _design(group, questions.filter(behavior=behavior), exposure, cosine, layer)
        rows += [told | row for row in _rows(found, rho)]
    return schema.check(pl.DataFrame(rows, schema=schema.columns("mixed")), "mixed")


_WHO = ["source", "adapter"]


@dataclass(frozen=True)
class _Design:
    """What is fitted. `scale`: of the columns of `counts.fixed`, whose standard deviations are 1; `names`: their terms;
    `lacking`: term → why it is not among them; `who`: (source, adapter) of each source's number."""

    counts: logistic_mixed.Counts
    names: list[str]
    scale: np.ndarray
    lacking: dict[str, str]
    who: list[tuple[str, str]]
    without: int
    words_of: str | None


def _design(
    group: pl.DataFrame, questions: pl.DataFrame, exposure: pl.DataFrame, cosine: str, layer: int | None
) -> _Design | str:
    """The counts and terms of one behavior and training seed, or why there are none."""
    if layer is None:
        return "ρ is defined at no layer, so there is none to look at"
    if questions.is_empty():
        return "there are no counts per question"
    here = group.filter(pl.col("layer") == layer, pl.col(f"cosine_{cosine}").is_not_null())
    adapters = here.select(*_WHO).unique(maintain_order=True)
    if adapters["source"].is_duplicated().any():
        twice = adapters.filter(adapters["source"].is_duplicated())["source"][0]
        return f"{twice} has more than one adapter: a model takes one for each source"
    here = here.join(questions.select("adapter", "persona").unique(), on=["adapter", "persona"], how="semi")
    if here.is_empty():
        return f"no pair has a {cosine} cosine at layer {layer} and counts per question"
    whole = here.with_columns(_measured(here, questions, exposure, cosine))
    lacking = {t: why for t, why in _LACKING.items() if whole[t].null_count() == whole.height}
    known = whole.drop_nulls([t for t in TERMS if t not in lacking])
    if known.height < MIN_PAIRS + len(TERMS):
        return f"{known.height} pairs have all terms; {MIN_PAIRS + len(TERMS)} are needed"
    who = known.select(*_WHO).unique(maintain_order=True).rows()
    source = _numbers(known["adapter"])
    columns, names, scale = [np.ones(known.height)], ["intercept"], [1.0]
    for term in TERMS:
        if term in lacking:
            continue
        values = ties.floats(known[term])
        values = values - (np.bincount(source, values) / np.bincount(source))[source]
        size, design = float(values.std()), np.column_stack(columns)
        rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        if size <= 1e-9 or float(rest.std()) <= 1e-6 * size:
            if term == "cosine":
                return "the cosine does not vary between the bystanders of any source"
            why = "does not vary" if size <= 1e-9 else "follows from the other terms"
            lacking[term] = f"{term} {why} between the bystanders of a source"
            continue
        columns.append(values / size)
        names.append(term)
        scale.append(size)
    hits, total = _counts(known, questions)
    counts = logistic_mixed.Counts(hits, total, np.column_stack(columns), _numbers(known["persona"]), source)
    words = known["words_of"][0] if "words_of" in known.columns else None
    return _Design(counts, names, np.array(scale), lacking, who, here.height - known.height, words)


def _measured(
    here: pl.DataFrame, questions: pl.DataFrame, exposure: pl.DataFrame, cosine: str
) -> list[pl.Series]:
    """The columns TERMS of `here`: null where one is not known."""
    tokens = pl.lit(None, pl.Float64)
    if exposure.height:
        at_marker = (pl.col("n_at_marker") > 0).any().over("behavior", "adapter")
        tokens = pl.when(~at_marker & (pl.col("mean_tokens") > 0)).then(pl.col("mean_tokens").log(2))
    lengths = exposure.select("behavior", "adapter", "persona", length=tokens)
    base = (
        questions.filter(adapter=BASE)
        .group_by("persona", maintain_order=True)
        .agg(pl.col("hits", "total").sum())
    )
    base = base.filter(pl.col("total") > 0).select(
        "persona", _odds=((pl.col("hits") + 0.5) / (pl.col("total") + 1))
    )
    told = here.select("behavior", "adapter", "persona", "baseline", f"cosine_{cosine}", "jaccard")
    told = told.join(lengths, on=["behavior", "adapter", "persona"], how="left", maintain_order="left")
    told = told.join(base, on="persona", how="left", maintain_order="left")
    odds = pl.Series("_odds", logit(ties.floats(told["_odds"]))).fill_nan(None)
    told = told.with_columns(odds)
    comparable = pl.when(pl.col("baseline").is_not_null()).then("_odds")
    return told.select(
        "length", cosine=f"cosine_{cosine}", baseline=comparable, words="jaccard"
    ).get_columns()


def _numbers(names: pl.Series) -> np.ndarray:
    """(N,) each name's number in order of appearance."""
    place = {name: i for i, name in enumerate(names.unique(maintain_order=True))}
    return np.array([place[name] for name in names])


def _counts(known: pl.DataFrame, questions: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(N, Q) hits and totals, 0 where a cell was not asked; questions that nobody was asked are left out."""
    pair = known.select("adapter", "persona").with_row_index("pair")
    cells = questions.filter(pl.col("total") > 0).join(pair, on=["adapter", "persona"])
    asked = cells["question"].unique().sort()
    column = np.searchsorted(asked.to_numpy(), cells["question"].to_numpy())
    out = np.zeros((2, known.height, len(asked)))
    for values, name in zip(out, ("hits", "total"), strict=True):
        values[cells["pair"].to_numpy(), column] = cells[name].to_numpy()
    return out[0], out[1]


def _rows(found: _Design | str, rho: Mapping[tuple[str, str | None], float | None]) -> Iterator[dict]:
    """The rows of one model."""
    pooled = rho.get((POOLED, None))
    if isinstance(found, str):
        yield {"part": "fixed", "term": "cosine", "spearman": pooled, "reason": found}
        return
    told = _of(found)
    fitted = _fitted(found.counts)
    if isinstance(fitted, str):
        yield told | {"part": "fixed", "term": "cosine", "spearman": pooled, "reason": fitted}
        return
    low, high = logistic_mixed.interval(fitted.beta, fitted.beta_se, fitted.beta_df)
    for term in _UNITS:
        row = told | {"part": "fixed", "term": term, "unit": _UNITS[term][0]}
        row |= {"spearman": pooled} if term == "cosine" else {}
        if term in found.lacking:
            yield row | {"reason": found.lacking[term]}
            continue
        i = found.names.index(term)
        values = (fitted.beta[i], fitted.beta_se[i], low[i], high[i])
        yield row | _scaled(values, _UNITS[term][1] / found.scale[i]) | {"df": float(fitted.beta_df[i])}
    per = _UNITS["cosine"][1] / found.scale[1]
    df = logistic_mixed.slope_df(found.counts, fitted)
    low, high = logistic_mixed.interval(fitted.slope, fitted.slope_se, df)
    for i, (source, adapter) in enumerate(found.who):
        row = told | {"part": "source", "term": "cosine", "source": source, "adapter": adapter}
        row |= {"unit": _UNITS["cosine"][0], "spearman": rho.get((source, adapter)), "df": df}
        row["n"] = int((found.counts.source == i).sum())
        yield row | _scaled((fitted.slope[i], fitted.slope_se[i], low[i], high[i]), per)
    yield from _spreads(found, fitted, told, per)


def _scaled(values: tuple, per: float) -> dict:
    return {
        name: float(value) * per
        for name, value in zip(("coefficient", "se", "low", "high"), values, strict=True)
    }


def _of(found: _Design) -> dict:
    """What a model rests on."""
    counts = found.counts
    return {
        "n": len(counts.fixed),
        "n_without": found.without,
        "questions": counts.total.shape[1],
        "personas": len(np.unique(counts.persona)),
        "sources": len(found.who),
        "replies": int(counts.total.sum()),
        "words_of": found.words_of,
    }


def _fitted(counts: logistic_mixed.Counts) -> logistic_mixed.Fitted | str:
    hits, total = int(counts.hits.sum()), int(counts.total.sum())
    if min(hits, total - hits) < MIN_KIND:
        return f"{hits} of {total} replies show the behavior; {MIN_KIND} with it and without it are needed"
    try:
        return logistic_mixed.fit(counts)
    except (FloatingPointError, np.linalg.LinAlgError) as error:
        return f"the model could not be fitted: {error}"


def _spreads(found: _Design, fitted: logistic_mixed.Fitted, told: dict, per: float) -> Iterator[dict]:
    """A row for each kind of effect, with a reason for one that is not in the model, or not there."""
    for kind, (term, unit) in _SPREADS.items():
        row = told | {"part": "spread", "term": term, "unit": unit}
        if kind not in fitted.sd:
            yield row | {"reason": _absent(kind, found.counts)}
            continue
        sd = fitted.sd[kind]
        why = "no more than the smallest that is tried" if sd <= 1.01 * logistic_mixed.FEWEST else None
        yield row | {"sd": sd * (per if "slope" in kind else 1.0), "reason": why}


def _absent(kind: str, counts: logistic_mixed.Counts) -> str:
    if kind.startswith("question"):
        asked = counts.total.shape[1]
        return "one question" if asked == 1 else f"{asked} questions: their slopes average out"
    several = len(np.unique(counts.source)) > 1
    return "each persona meets one source: it is its pair" if several else "one source"
