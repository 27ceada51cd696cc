"""The difference of two correlations over the same personas, with the interval that pairs them. Demands arrays; leaves
choosing the two sides to whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import intervals, resample
from leakfast.stats.association import spearman_and_pearson, within
from leakfast.stats.correlations import MIN_BOOTSTRAP


def rho(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's ρ of float64 (n,) and (n,); None where a side does not vary."""
    return float(spearman_and_pearson(x[:, None], y)[0][0]) if np.ptp(x) and np.ptp(y) else None


def rho_difference(
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
    persona: pl.Series,
    adapter: pl.Series,
    bootstraps: int,
    seed: int,
    workers: int | None = None,
) -> dict[str, Any]:
    """difference (ρ of the first side − ρ of the second) with its 95 % interval, and difference_reason where there is none.

    sides: two of (x, y), float64 (n,) each, row i of both the same persona and adapter. Where there are several adapters,
    all are ranked within each. Estimand: the difference over further personas; percentile bootstrap, personas resampled
    on both sides at once, each with all its rows."""
    people = np.unique(persona.to_numpy(), return_inverse=True)[1] if len(persona) else np.zeros(0)
    if len(persona) < MIN_BOOTSTRAP or people.max() + 1 < MIN_BOOTSTRAP:
        return {"difference_reason": f"{len(persona)} bystanders on both sides; {MIN_BOOTSTRAP} are needed"}
    block = np.unique(adapter.to_numpy(), return_inverse=True)[1]
    if block.max() > 0:  # pooled: ranked within each source, as in the correlations
        sides = [(within(x[:, None], block)[:, 0], within(y[:, None], block)[:, 0]) for x, y in sides]
    if any(np.ptp(values) == 0 for side in sides for values in side):
        return {"difference_reason": "the cosine, or the rate on one of the sides, is the same for all"}
    ours, theirs = (rho(x, y) for x, y in sides)
    assert ours is not None and theirs is not None, "sides that vary have a ρ"
    found: dict[str, Any] = {"difference": ours - theirs}
    if bootstraps < 2:
        return found | {"difference_reason": "no bootstrap was asked for"}
    one, other = (
        resample.bootstrap_spearman(x[None], y, bootstraps, seed, person=people, workers=workers)
        for x, y in sides
    )
    apart = one - other
    if np.isnan(apart).mean() > intervals.TOO_FEW_DRAWS:
        return found | {"difference_reason": "over 5 % of the resamples have no ρ on one of the sides"}
    low, high = intervals.percentiles(apart)
    return found | {"difference_low": float(low[0]), "difference_high": float(high[0])}
