"""What follows from many powers: the smallest ρ a study can count on, how power grows with each of its sizes, and what
more completions buy most. Demands a design and assumptions of `power`; draws the same persons throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from leakfast.errors import InputError
from leakfast.progress import Progress
from leakfast.stats import power as model
from leakfast.stats.correlations import POWER
from leakfast.stats.intervals import CONFIDENCE
from leakfast.stats.power import Assumed, Design, Power

SIZES = ("personas", "questions", "samples", "sources", "seeds")
FACTORS = (0.5, 1, 2, 4)
HALVINGS = 9
LARGEST = 0.99


@dataclass(frozen=True)
class Point:
    """The power of the design in which `size` is `value`. generations: what all of it then asks for."""

    size: str
    value: int
    generations: int
    power: float
    power_low: float
    power_high: float
    observed: float | None


@dataclass(frozen=True)
class Bought:
    """What an hour's completions buy, spent on one size. value: of the size then; spent: completions, of those given, that
    whole units take; gain: of power, with its 95 % interval over paired trials; reason: why nothing is bought."""

    size: str
    value: int
    spent: int
    power: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    reason: str | None


def smallest_rho(
    design: Design,
    assumed: Assumed,
    trials: int,
    seed: int = 0,
    *,
    power: float = POWER,
    progress: Progress | None = None,
) -> float | None:
    """The smallest ρ > 0 that is found with this power, to 0.002: bisection between 0 and 0.99, every step over
    the same persons, questions and uniform numbers, so that power rises with ρ but for a few trials.

    None where 0.99 is not found so often. Its own uncertainty: power at it has the interval of `trials` trials."""
    low, high = 0.0, LARGEST
    for step in range(HALVINGS + 1):
        at = high if step == 0 else (low + high) / 2
        share = float(model.simulate(at, design, assumed, trials, seed).found.mean())
        if step == 0 and share < power:
            return None
        if step:
            low, high = (low, at) if share >= power else (at, high)
        if progress:
            progress(step + 1, HALVINGS + 1, "smallest rho")
    return high


def curves(
    rho: float,
    design: Design,
    assumed: Assumed,
    trials: int,
    seed: int = 0,
    *,
    here: Power | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Power with one size at half, once, twice and four times what it is, the others as they are. here: the power
    of the design itself, where it is known."""
    here = here or model.power(rho, design, assumed, trials, seed)
    points = []
    for number, size in enumerate(SIZES):
        now = getattr(design, size)
        least = model.FEWEST if size == "personas" else 1
        for value in sorted({max(least, round(now * factor)) for factor in FACTORS}):
            other = replace(design, **{size: value})
            found = here if value == now else model.power(rho, other, assumed, trials, seed)
            told = found.power, found.power_low, found.power_high, found.observed
            points.append(Point(size, value, other.generations(), *told))
        if progress:
            progress(number + 1, len(SIZES), "curves")
    return points


def spend(
    rho: float,
    design: Design,
    assumed: Assumed,
    extra: int,
    trials: int,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> list[Bought]:
    """What `extra` completions more buy, each size in turn, the largest gain of power first.

    A unit of a size costs the completions of all the others (a question more: one of every persona, sample, source and
    seed); whole units alone are bought. The gain is over paired trials: the larger study holds the smaller one's persons,
    questions and sources. Not counted: the training of further sources and seeds, the sources' own and the
    unadapted model's completions. Raises InputError for extra < 1."""
    if extra < 1:
        raise InputError(f"power: {extra} generations an hour; at least 1 is needed. Give --per-hour 20000.")
    before = model.simulate(rho, design, assumed, trials, seed).found
    rows = []
    for number, size in enumerate(SIZES):
        now = getattr(design, size)
        each = design.generations() // now
        more = extra // each
        if not more:
            why = f"one more costs {each:,} generations"
            rows.append(Bought(size, now, 0, None, None, None, None, why))
        else:
            other = replace(design, **{size: now + more})
            after = model.simulate(rho, other, assumed, trials, seed).found
            gains = after.astype(float) - before
            half = float(ndtri(0.5 + CONFIDENCE / 2) * gains.std(ddof=1) / np.sqrt(trials))
            gain = float(gains.mean())
            rows.append(
                Bought(
                    size, now + more, more * each, float(after.mean()), gain, gain - half, gain + half, None
                )
            )
        if progress:
            progress(number + 1, len(SIZES), "next hour")
    return sorted(rows, key=lambda row: -np.inf if row.gain is None else row.gain, reverse=True)
