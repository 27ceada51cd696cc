"""The shape of a gradient: how a rate rises with the cosine to the source. A (beta-)binomial logistic
curve with a floor and a ceiling, its midpoint and 10–90 % width, whether widths differ between sources,
and an isotonic curve for display. Demands counts; refuses means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # loads its parts when they are used
from scipy.special import chdtrc, chdtri, expit, gammaln, logit, psi

WIDTH = 2 * np.log(9.0)  # of the unit logistic, from 10 % to 90 % of the way
MIN_POINTS = 12
MIN_HITS = 3
_LOW, _MID, _HIGH, _WIDTH, _NOISE = range(5)
# far from anything that data in the span of the cosines could tell apart
_BOUND = {
    _LOW: (-9.0, 9.0),
    _HIGH: (-9.0, 9.0),
    _MID: (-1.0, 2.0),
    _WIDTH: (np.log(0.01), np.log(20.0)),
    _NOISE: (-9.0, 2.5),
}
CRITICAL = float(chdtri(1, 0.05))  # of a χ² with one degree of freedom


@dataclass(frozen=True)
class Fit:
    """A fitted curve: rate at cosine c = far + (near − far)·expit(2 ln 9·(c − midpoint)/width).

    far, near: rates far below and above the midpoint (the floor and the ceiling of a rising curve).
    overdispersion: intraclass correlation of the beta-binomial. `intervals`: name → (low, high), None where
    the likelihood does not bound that side. `theta` is the point on the inner scale."""

    far: float
    near: float
    midpoint: float
    width: float
    overdispersion: float
    log_likelihood: float
    intervals: dict[str, tuple[float | None, float | None]]
    theta: np.ndarray
    n: int


class Curve:
    """The likelihood of one source's counts. cosine (n,) float64; hits, total (n,) integers, total ≥ 1.

    Raises ValueError for shapes, counts or cosines that cannot be meant."""

    def __init__(self, cosine, hits, total):
        self.cosine = np.asarray(cosine, np.float64)
        self.hits, self.total = np.asarray(hits, np.float64), np.asarray(total, np.float64)
        if not self.cosine.shape == self.hits.shape == self.total.shape or self.cosine.ndim != 1:
            raise ValueError("a gradient needs as many cosines as counts")
        if not np.isfinite(self.cosine).all() or (self.hits < 0).any() or (self.hits > self.total).any():
            raise ValueError("a gradient needs finite cosines and 0 ≤ hits ≤ total")
        if (self.total < 1).any():
            raise ValueError("a gradient needs totals of at least 1")
        self.start, self.span = float(self.cosine.min()), float(np.ptp(self.cosine))
        self.at = (self.cosine - self.start) / self.span if self.span > 0 else self.cosine * 0
        self.totals, self.whose = np.unique(self.total, return_inverse=True)
        self.constant = float(
            (gammaln(self.total + 1) - gammaln(self.hits + 1) - gammaln(self.total - self.hits + 1)).sum()
        )

    def unusable(self) -> str | None:
        """Why no curve can be fitted, or None."""
        hits, misses = self.hits.sum(), (self.total - self.hits).sum()
        if len(self.cosine) < MIN_POINTS:
            return f"{len(self.cosine)} bystanders; a gradient needs at least {MIN_POINTS}"
        if self.span == 0:
            return "the cosine is the same for all bystanders"
        if min(hits, misses) < MIN_HITS:
            return f"{int(hits)} hits and {int(misses)} misses in all; at least {MIN_HITS} of each are needed"
        return None

    def loss(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log-likelihood and its gradient at (logit far, midpoint, logit near, ln width, logit icc),
        midpoint and width in units of the cosines' span."""
        low, mid, high, log_width, noise = theta
        far, near, width = expit(low), expit(high), np.exp(log_width)
        slope = WIDTH / width
        u = slope * (self.at - mid)
        s = expit(u)
        p = np.clip(far + (near - far) * s, 1e-12, 1 - 1e-12)
        size = np.exp(-noise)  # a + b = (1 − icc) / icc
        a, b, m, h = p * size, (1 - p) * size, self.total, self.hits
        terms = np.array([h + a, a, m - h + b, b])
        whole = self.totals + size  # few different ones
        logs, slopes = gammaln(terms), psi(terms)
        value = logs[0] - logs[1] + logs[2] - logs[3] - gammaln(whole)[self.whose] + gammaln(size)
        da, db = slopes[0] - slopes[1], slopes[2] - slopes[3]
        dp = size * (da - db)
        dsize = p * da + (1 - p) * db - psi(whole)[self.whose] + psi(size)
        ds = (near - far) * s * (1 - s)
        gradient = np.array(
            [
                (dp * (1 - s)).sum() * far * (1 - far),
                -(dp * ds).sum() * slope,
                (dp * s).sum() * near * (1 - near),
                -(dp * ds * u).sum(),
                -dsize.sum() * size,
            ]
        )
        return -float(value.sum()) - self.constant, -gradient

    def best(self, start: np.ndarray, fixed: dict[int, float] | None = None) -> tuple[float, np.ndarray]:
        """Lowest loss with some entries held, from `start`: (loss, theta)."""
        fixed = fixed or {}
        free = [i for i in range(5) if i not in fixed]
        theta = start.copy()
        for i, value in fixed.items():
            theta[i] = value
        bounds = [_BOUND[i] for i in free]
        theta[free] = np.clip(theta[free], *np.array(bounds).T)

        def at(inner: np.ndarray) -> tuple[float, np.ndarray]:
            theta[free] = inner
            value, gradient = self.loss(theta)
            return value, gradient[free]

        found = scipy.optimize.minimize(
            at,
            theta[free],
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"maxiter": 300, "ftol": 1e-10, "gtol": 1e-6},
        )
        theta[free] = found.x
        return float(found.fun), theta.copy()

    def starts(self) -> list[np.ndarray]:
        """Points to start from: rising and falling, steep and shallow, at three places."""
        rate = (self.hits + 0.5) / (self.total + 1)
        low, high = logit(np.quantile(rate, [0.1, 0.9]))
        points = []
        for mid in (0.3, 0.6, 0.9):
            for width in (0.2, 0.8):
                points.append(np.array([low, mid, high, np.log(width), -3.0]))
        rising = np.corrcoef(self.at, rate)[0, 1] >= 0 if np.ptp(rate) > 0 else True
        return points if rising else [p[[_HIGH, _MID, _LOW, _WIDTH, _NOISE]] for p in points]

    @cached_property
    def found(self) -> tuple[float, np.ndarray]:
        """(loss, theta) of the best of all starts."""
        return min((self.best(start) for start in self.starts()), key=lambda pair: pair[0])


def fit(cosine, hits, total, *, with_intervals: bool = True) -> Fit | str:
    """`fit_curve` of these counts: cosine (n,) float64; hits, total (n,) integers."""
    return fit_curve(Curve(cosine, hits, total), with_intervals=with_intervals)


def fit_curve(curve: Curve, *, with_intervals: bool = True) -> Fit | str:
    """The curve of one source by maximum likelihood, or why there is none.

    Model: hits ~ beta-binomial(total, rate(cosine), overdispersion), bystanders independent. Intervals
    are 95 % profile likelihood, for midpoint and width in units of the cosine: where the likelihood stays
    within the bar up to the edge of what is searched (midpoint: one span beyond the data on either side;
    width: 1 % to 20 spans), that side is None."""
    if why := curve.unusable():
        return why
    loss, theta = curve.found
    told: dict[str, tuple[float | None, float | None]] = {}
    if with_intervals:
        for name, index in (("midpoint", _MID), ("width", _WIDTH), ("far", _LOW), ("near", _HIGH)):
            low, high = (_edge(curve, loss, theta, index, side) for side in (-1, 1))
            told[name] = (_outer(curve, name, low), _outer(curve, name, high))
    return Fit(
        far=float(expit(theta[_LOW])),
        near=float(expit(theta[_HIGH])),
        midpoint=curve.start + curve.span * float(theta[_MID]),
        width=curve.span * float(np.exp(theta[_WIDTH])),
        overdispersion=float(expit(theta[_NOISE])),
        log_likelihood=-loss,
        intervals=told,
        theta=theta,
        n=len(curve.cosine),
    )


def _outer(curve: Curve, name: str, inner: float | None) -> float | None:
    if inner is None:
        return None
    if name == "midpoint":
        return curve.start + curve.span * inner
    return curve.span * float(np.exp(inner)) if name == "width" else float(expit(inner))


def _edge(curve: Curve, loss: float, theta: np.ndarray, index: int, side: int) -> float | None:
    """Where the profile crosses the bar on one side of the estimate; None if it never does.

    Works on the signed root √(2·Δloss), which is nearly straight, so few fits are needed."""
    bar, limit = float(np.sqrt(CRITICAL)), _BOUND[index][0 if side < 0 else 1]
    inside, point = float(theta[index]), theta
    if abs(inside - limit) < 1e-9:
        return None
    step = 0.1 if index == _MID else 0.4
    while True:
        outside = float(np.clip(inside + side * step, *_BOUND[index]))
        value, there = curve.best(point, {index: outside})
        root = float(np.sqrt(max(0.0, 2 * (value - loss))))
        if root >= bar:
            break
        if outside == limit:
            return None
        gone = abs(outside - float(theta[index]))
        step = gone * float(np.clip(1.15 * bar / max(root, 1e-3) - 1, 0.2, 3.0))
        inside, point = outside, there

    told = {outside: root - bar}  # brentq asks for both ends again

    def above(at: float) -> float:
        if at not in told:
            value, _ = curve.best(point, {index: at})
            told[at] = float(np.sqrt(max(0.0, 2 * (value - loss)))) - bar
        return told[at]

    return (
        float(scipy.optimize.brentq(above, inside, outside, xtol=1e-3, rtol=1e-4))
        if above(inside) < 0
        else inside
    )


def width_test(curves: Sequence[Curve]) -> dict[str, float | int | None]:
    """Likelihood-ratio test that all sources share one 10–90 width (in units of cosine): statistic,
    degrees of freedom (sources − 1), p by χ², and the common width. Every other parameter is each source's
    own. Raises ValueError for fewer than two curves."""
    if len(curves) < 2:
        raise ValueError("widths of at least two sources are needed to differ")
    singles = [curve.found for curve in curves]
    points = [theta for _, theta in singles]

    def together(log_width: float) -> float:
        total = 0.0
        for k, curve in enumerate(curves):
            inner = float(np.clip(log_width - np.log(curve.span), *_BOUND[_WIDTH]))
            total += curve.best(points[k], {_WIDTH: inner})[0]
        return total

    widths = [theta[_WIDTH] + np.log(curve.span) for curve, (_, theta) in zip(curves, singles, strict=True)]
    low, high = min(widths), max(widths)
    found = scipy.optimize.minimize_scalar(
        together, bounds=(low - 0.1, high + 0.1), method="bounded", options={"xatol": 1e-3}
    )
    statistic = max(0.0, 2 * (float(found.fun) - sum(loss for loss, _ in singles)))
    free = len(curves) - 1
    return {
        "statistic": statistic,
        "degrees": free,
        "p": float(chdtrc(free, statistic)),
        "common_width": float(np.exp(found.x)),
    }


def isotonic(cosine, rate, weight) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression of rate on cosine, rising or falling as the data do: (cosine sorted, fitted)."""
    order = np.argsort(cosine, kind="stable")
    x, y = np.asarray(cosine, np.float64)[order], np.asarray(rate, np.float64)[order]
    w = np.asarray(weight, np.float64)[order]
    ways = [scipy.optimize.isotonic_regression(y, weights=w, increasing=way).x for way in (True, False)]
    return x, min(ways, key=lambda fitted: float((w * (y - fitted) ** 2).sum()))
