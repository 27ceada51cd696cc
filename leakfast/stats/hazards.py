"""How often a behavior shows where replies differ in length: per token, per reply of one common length, and per reply
of one common mix of lengths. Demands counts and token lengths as arrays; knows nothing of tables and draws nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtri, stdtrit

from leakfast.stats import intervals

BINS = 5  # of reply length, equally full over all personas of an adapter
_TRIES, _CLOSE = 100, 1e-10
_STEEP = 50.0  # a logistic slope beyond it is a separation, not a slope


class Estimate(NamedTuple):
    """Values with their 95 % interval, arrays of one shape; NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def per_tokens(hits: np.ndarray, tokens: np.ndarray) -> Estimate:
    """Hits per token of personas P over questions Q: R = Σ_q hits / Σ_q tokens. hits, tokens: (P, Q), 0 where a persona
    was not asked.

    Estimand: the ratio of expected hits to expected tokens, over questions of this kind. The resampling unit is the
    question. Interval: the ratio estimator's variance with questions as clusters (Cochran 1977, section 6.3),

        var R = Q/(Q−1) · Σ_q (hits_q − R·tokens_q)² / (Σ_q tokens_q)²

    on the scale of log R, with t of Q − 1 degrees of freedom. None below two questions, and none without hits: there
    is then no spread to judge by."""
    hits, tokens = np.asarray(hits, np.float64), np.asarray(tokens, np.float64)
    asked = (tokens > 0).sum(1)
    whole = tokens.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = hits.sum(1) / whole
        rest = np.square(hits - ratio[:, None] * tokens).sum(1)
        relative = np.sqrt(asked / (asked - 1) * rest) / whole / ratio
        half = stdtrit(np.maximum(asked - 1, 1), 0.5 + intervals.CONFIDENCE / 2) * relative
        known = (asked > 1) & (hits.sum(1) > 0)
        low, high = (np.where(known, ratio * np.exp(sign * half), np.nan) for sign in (-1, 1))
    return Estimate(ratio, low, high)


def design_effect(hits: np.ndarray, tokens: np.ndarray) -> float | None:
    """How much more the hits of a persona vary over questions than single tokens would: 1 or more; None where no
    persona with hits has two questions.

    The ratio of variances (Kish 1965), both summed over the personas: with questions as clusters, and as many
    independent tokens. Assumes one design effect for all personas of an adapter. hits, tokens: (P, Q)."""
    hits, tokens = np.asarray(hits, np.float64), np.asarray(tokens, np.float64)
    asked, whole = (tokens > 0).sum(1), tokens.sum(1)
    usable = (asked > 1) & (hits.sum(1) > 0)
    if not usable.any():
        return None
    hits, tokens, asked, whole = hits[usable], tokens[usable], asked[usable], whole[usable]
    hazard = hits.sum(1) / whole
    clustered = asked / (asked - 1) * np.square(hits - hazard[:, None] * tokens).sum(1)
    alone = whole * hazard * (1 - hazard)
    return float(max(1.0, clustered.sum() / alone.sum())) if alone.sum() > 0 else None


def hazard(hits: np.ndarray, at_risk: np.ndarray, effect: float | None) -> Estimate:
    """The probability that the behavior first shows at a token, given that it has not before: hits / tokens at risk.

    The maximum-likelihood estimate of the discrete-time model with a constant hazard (geometric; Kalbfleisch and
    Prentice 2002, section 2.4): a reply is at risk up to the token of its first hit, else (censored) to its end.
    Interval: Wilson's on tokens at risk / `effect`; NaN where that is None. hits, at_risk: (P,)."""
    hits, at_risk = np.asarray(hits, np.float64), np.asarray(at_risk, np.float64)
    value, nothing = np.full(len(hits), np.nan), np.full(len(hits), np.nan)
    some = at_risk > 0
    value[some] = hits[some] / at_risk[some]
    if effect is None:
        return Estimate(value, nothing, nothing.copy())
    low, high = nothing.copy(), nothing.copy()
    low[some], high[some] = intervals.wilson_share(value[some], at_risk[some] / effect)
    return Estimate(value, low, high)


def within(found: Estimate, tokens: float) -> Estimate:
    """Probability that the behavior shows within a reply of so many tokens: 1 − (1 − h)^tokens, interval likewise."""
    with np.errstate(divide="ignore"):  # a hazard of 1 shows within any length
        return Estimate(*(-np.expm1(tokens * np.log1p(-side)) for side in found))


def length_bins(tokens: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """(bin of each reply (n,), share of the replies in each bin): quantile bins of their lengths. Replies of one length
    share a bin, so there may be fewer."""
    edges = np.unique(np.quantile(tokens, np.arange(1, bins) / bins))
    found, place = np.unique(np.searchsorted(edges, tokens, side="left"), return_inverse=True)
    return place, np.bincount(place, minlength=len(found)) / len(tokens)


def standardized(
    hit: np.ndarray, place: np.ndarray, share: np.ndarray, persona: np.ndarray, worth: np.ndarray
) -> Estimate:
    """Rate of each persona had its replies the lengths of all: Σ_k share_k · (its rate in bin k). Direct
    standardization (Breslow and Day 1987, section 2.1).

    Estimand: the rate over a draw of length bin from the adapter's pooled replies; takes replies of one bin as alike in
    length, and length as nothing the behavior itself changes. NaN for a persona without a reply in some bin. Interval:
    Wilson's at 1 / Σ_k share_k²/n_k replies (Kish 1965) times `worth` (P,), what a reply is worth in independent ones.
    hit, place, persona: (n,) of replies, persona's codes 0 … P−1; share: (K,)."""
    people, kinds = len(worth), len(share)
    cell = persona * kinds + place
    n = np.bincount(cell, minlength=people * kinds).reshape(people, kinds)
    shown = np.bincount(cell, hit.astype(np.float64), people * kinds).reshape(people, kinds)
    whole = (n > 0).all(1)
    value, low, high = (np.full(people, np.nan) for _ in range(3))
    value[whole] = np.clip((share * shown[whole] / n[whole]).sum(1), 0.0, 1.0)
    size = 1 / (share**2 / n[whole]).sum(1)
    low[whole], high[whole] = _wilson(value[whole], size * worth[whole])
    return Estimate(value, low, high)


def _wilson(share: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval, NaN where the size is."""
    low, high = intervals.wilson_share(share, size)
    return np.where(np.isnan(size), np.nan, low), np.where(np.isnan(size), np.nan, high)


class Logistic(NamedTuple):
    """slope: of log tokens, with its 95 % Wald interval; rate: adjusted rates, (P,) each."""

    slope: float
    low: float
    high: float
    rate: Estimate


def logistic(hit: np.ndarray, tokens: np.ndarray, persona: np.ndarray, worth: np.ndarray) -> Logistic | str:
    """Logistic regression of hit on log(tokens), an intercept for each persona and one slope, and each persona's rate
    over the lengths of all replies; or why there is none.

        logit P(hit) = a_persona + b · log(tokens),   rate_p = mean over all replies i of σ(a_p + b · log(tokens_i))

    By maximum likelihood (Newton). The slope rests on the replies of one persona against each other, so what else tells
    personas apart is no part of it; a question that draws both longer replies and the behavior is. Assumes one slope,
    straight in log tokens, and replies independent. With few replies a persona it is too steep (by about n/(n − 1);
    Andersen 1970). A persona that hits in no reply, or in all, has no finite intercept and tells nothing about the
    slope: its rate is 0, or 1.

    Interval of a rate: Wilson's at as many replies as its variance is worth, rate·(1 − rate)/variance by the delta
    method (for a rate of 0 or 1 all of them), times `worth` (P,), what a reply is worth in independent ones. hit,
    tokens, persona: (n,), persona's codes 0 … P−1."""
    n = np.bincount(persona, minlength=len(worth)).astype(np.float64)
    shown = np.bincount(persona, hit.astype(np.float64), len(worth))
    inner = (shown > 0) & (shown < n)
    used = inner[persona]
    if not inner.any():
        return "no persona shows the behavior in some replies and not in others"
    _, who = np.unique(persona[used], return_inverse=True)
    x, y = np.log(np.maximum(tokens[used], 1)), hit[used].astype(np.float64)
    if not np.ptp(x - (np.bincount(who, x) / np.bincount(who))[who]) > 1e-9:
        return "no persona has replies of different lengths"
    found = _newton(x, y, who, logit(shown[inner] / n[inner]))
    if found is None:
        return "length tells replies with the behavior from those without apart: no finite slope"
    length, count = np.unique(np.maximum(tokens, 1), return_counts=True)
    at, share = np.log(length), count / count.sum()
    fitted = expit(found.level[:, None] + found.slope * at)
    bend = fitted * (1 - fitted) * share
    by_level, by_slope = bend.sum(1), bend @ at
    se, tilt = found.se, found.tilt  # var a = 1/own + (tilt·se)², cov(a, b) = −tilt·se²
    variance = by_level**2 / found.own + np.square(by_slope - by_level * tilt) * se**2
    rate, size = np.where(shown > 0, 1.0, 0.0), n.copy()
    rate[inner] = fitted @ share
    size[inner] = rate[inner] * (1 - rate[inner]) / variance
    half = float(ndtri(0.5 + intervals.CONFIDENCE / 2)) * se
    adjusted = Estimate(rate, *_wilson(rate, size * worth))
    return Logistic(found.slope, found.slope - half, found.slope + half, adjusted)


class _Fit(NamedTuple):
    """level: (P,) intercepts; own: (P,) Σ w and tilt: (P,) Σ w·x / Σ w of each persona, w = p·(1 − p)."""

    level: np.ndarray
    slope: float
    se: float
    own: np.ndarray
    tilt: np.ndarray


def _newton(x: np.ndarray, y: np.ndarray, who: np.ndarray, level: np.ndarray) -> _Fit | None:
    """The fit, or None where the likelihood has no maximum."""

    def likelihood(level: np.ndarray, slope: float) -> float:
        eta = level[who] + slope * x
        return float((y * eta - np.logaddexp(0.0, eta)).sum())

    slope, at = 0.0, likelihood(level, 0.0)
    for _ in range(_TRIES):
        p = expit(level[who] + slope * x)
        w = p * (1 - p)
        own, mixed = np.bincount(who, w), np.bincount(who, w * x)
        if not (own > 0).all():
            return None
        score = np.bincount(who, y - p)
        left = float((w * x * x).sum() - (mixed**2 / own).sum())
        if not left > 0:
            return None
        step = float(((y - p) * x).sum() - (mixed * score / own).sum()) / left
        move, size = (score - mixed * step) / own, 1.0
        while (new := likelihood(level + size * move, slope + size * step)) < at - 1e-9 and size > 1e-6:
            size /= 2
        level, slope, at = level + size * move, slope + size * step, new
        if abs(slope) > _STEEP:
            return None
        if max(abs(step), np.abs(move).max()) < _CLOSE:
            return _Fit(level, slope, float(1 / np.sqrt(left)), own, mixed / own)
    return None
