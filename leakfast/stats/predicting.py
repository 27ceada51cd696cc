"""How much a source that nobody trained yet will leak to each bystander: expected rate and an interval, from lines that were
fitted to other sources. Demands values of one predictor beside counts; leaves reading runs to `predicting_runs`.

Of source s and bystander b with value x (oriented, so that more is closer), hits are binomial with

    log-odds = a_s + b_s·x + e_sb,    e_sb normal with deviation σ_s,    (a_s, b_s) of a new source drawn as those of the others.

Each source has its own fit (`logistic_mixed`, Laplace). At any x the k lines a_s + b_s·x are k draws of what a new source's line
is one more of, so that its own lies within f̄ ± t(k − 1)·S·√(1 + 1/k), exact for normal ones; around it bystanders scatter by the
mean σ². The quantile of the sum is the geometric mean of the two t quantiles, weighted by the variances, as in `means`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import bdtr, expit, stdtrit

from leakfast.stats import logistic_mixed

NODES = 100  # quantiles that a mean over the predictive distribution is taken of; even, so that none is the median
FEWEST = 3  # sources below which an interval says next to nothing
LEVEL = 0.9
MIN_PAIRS = 10


@dataclass(frozen=True)
class Line:
    """A source's fit: log-odds = intercept + slope·x, bystanders around it with deviation `spread`; n: its pairs."""

    source: str
    intercept: float
    slope: float
    spread: float
    n: int


def line(source: str, x: np.ndarray, hits: np.ndarray, total: np.ndarray) -> Line | str:
    """The fit of one source's bystanders, all (n,), or why there is none. Raises ValueError for values that are not finite."""
    if not (np.isfinite(x).all() and np.isfinite(hits).all() and np.isfinite(total).all()):
        raise ValueError("x, hits and total must be finite")
    if len(x) < MIN_PAIRS:
        return f"{source}: {len(x)} bystanders with values; {MIN_PAIRS} are needed"
    middle, scale = float(x.mean()), float(x.std())
    if scale <= 1e-12 * max(1.0, abs(middle)):
        return f"{source}: the predictor is the same for all bystanders"
    fixed = np.column_stack([np.ones(len(x)), (x - middle) / scale])
    nobody = np.zeros(len(x), dtype=np.int64)
    counts = logistic_mixed.Counts(hits[:, None], total[:, None], fixed, np.arange(len(x)), nobody)
    try:
        found = logistic_mixed.fit(counts)
    except (ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
        return f"{source}: {error}"
    slope = float(found.beta[1]) / scale
    return Line(source, float(found.beta[0]) - slope * middle, slope, found.sd["pair"], len(x))


@dataclass(frozen=True)
class Predicted:
    """Of P bystanders of a new source, each (P,): expected rate, and the ends of the interval of its rate over unlimited
    completions, NaN with one source; measured_*: of the share of so many completions."""

    expected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    measured_low: np.ndarray
    measured_high: np.ndarray


def predict(lines: Sequence[Line], x: np.ndarray, completions: int, level: float = LEVEL) -> Predicted:
    """What bystanders with values x (P,) of a new source will show, from `lines`; several of one source count as one (their
    mean). Estimand: the rate of one bystander of one further source like these, asked as many questions of the same kind.
    Assumes sources exchangeable, lines and scatter normal in log-odds. Raises ValueError without lines, for a level outside
    0 to 1 and for no completions."""
    if not lines or not 0 < level < 1 or completions < 1:
        raise ValueError("at least one line, a level between 0 and 1 and one completion are needed")
    names = list(dict.fromkeys(one.source for one in lines))
    each = np.array(
        [np.mean([o.intercept + o.slope * x for o in lines if o.source == name], axis=0) for name in names]
    )
    k, middle = len(names), each.mean(0)
    scatter = float(np.mean([one.spread**2 for one in lines]))
    if k == 1:
        nothing = np.full(len(x), np.nan)
        return Predicted(expit(middle), nothing, nothing, nothing, nothing)
    between = each.var(0, ddof=1) * (1 + 1 / k)
    whole = between + scatter
    df = (k - 1, max(1, sum(one.n for one in lines) - 2 * len(lines)))

    def quantile(q: np.ndarray | float) -> np.ndarray:
        size = (
            between * np.log(np.abs(stdtrit(df[0], q))) + scatter * np.log(np.abs(stdtrit(df[1], q)))
        ) / whole
        return middle + np.sign(np.asarray(q) - 0.5) * np.exp(size) * np.sqrt(whole)

    tail = (1 - level) / 2
    nodes = expit(quantile(((np.arange(NODES) + 0.5) / NODES)[:, None]))
    ends = [_share(nodes, completions, q) for q in (tail, 1 - tail)]
    return Predicted(nodes.mean(0), expit(quantile(tail)), expit(quantile(1 - tail)), *ends)


def _share(nodes: np.ndarray, completions: int, q: float) -> np.ndarray:
    """(P,) smallest share of hits whose probability to be no larger is q or more, under the mixture of binomials with
    nodes (NODES, P)."""
    low = np.full(nodes.shape[1], -1)
    high = np.full(nodes.shape[1], completions)
    while (high - low > 1).any():  # below `low` it is less than q, at `high` it is not
        middle = (low + high) // 2
        enough = bdtr(np.maximum(middle, 0).astype(float), completions, nodes).mean(0) >= q
        enough &= middle >= 0
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    return high / completions


def held(found: Predicted, hits: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Share of bystanders whose measured share (P,) lies in the interval of shares, and in that of rates."""
    share = hits / total
    inside = [
        (low - 1e-12 <= share) & (share <= high + 1e-12)
        for low, high in ((found.measured_low, found.measured_high), (found.low, found.high))
    ]
    return float(inside[0].mean()), float(inside[1].mean())


def as_columns(found: Predicted) -> list[pl.Series]:
    """The fields as columns, null where there is no interval."""
    return [pl.Series(name, value).fill_nan(None) for name, value in vars(found).items()]
