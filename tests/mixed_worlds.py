"""Made-up counts of the logistic mixed model, whose coefficients and deviations are known. Holds no tests."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from leakfast.stats.logistic_mixed import Counts

SD = {"pair": 0.7, "question": 0.5, "persona": 0.6, "source": 0.5, "slope": 0.8}


def world(
    rng,
    sources: int = 5,
    people: int = 40,
    asked: int = 8,
    drawn: int = 5,
    beta: tuple[float, ...] = (-1.8, 2.0, 0.3, 0.0),
    question_slope: float = 0.5,
) -> tuple[Counts, np.ndarray, np.ndarray]:
    """(counts, β, slope of each source): log-odds; cosines of standard deviation 0.4, about their mean within a source,
    and two more terms of standard deviation 1."""
    n = sources * people
    persona, source = np.tile(np.arange(people), sources), np.repeat(np.arange(sources), people)
    cosine = 0.4 * rng.normal(size=n) + 0.1 * rng.normal(size=people)[persona]
    cosine -= (np.bincount(source, cosine) / people)[source]
    fixed = np.column_stack([np.ones(n), cosine, *(rng.normal(size=n) for _ in beta[2:])])
    slope = SD["slope"] * rng.normal(size=sources)
    eta = fixed @ np.array(beta) + cosine * slope[source]
    for kind, which in (("persona", persona), ("source", source), ("pair", np.arange(n))):
        eta = eta + SD[kind] * rng.normal(size=which.max() + 1)[which]
    eta = eta[:, None] + SD["question"] * rng.normal(size=asked)[None]
    eta = eta + cosine[:, None] * question_slope * rng.normal(size=asked)[None]
    hits = rng.binomial(drawn, expit(eta))
    return Counts(hits, np.full(hits.shape, drawn), fixed, persona, source), np.array(beta), beta[1] + slope
