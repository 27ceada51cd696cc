"""Invented and real geometries with leakage of known cause, and how often each permutation test rejects at 0.05. Demands
numpy and the tests of `leakfast.stats`; asserts nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leakfast.geometry import Centroids
from leakfast.stats import matrices, resample, restricted

SHUFFLES = 199


@dataclass(frozen=True)
class World:
    """P personas: centroids less their mean (P, D), centered cosines (P, P), strata (P,), words and length (P, P)."""

    center: np.ndarray
    cosine: np.ndarray
    category: np.ndarray
    cluster: np.ndarray
    words: np.ndarray
    length: np.ndarray


def synthetic(people: int = 111, dimensions: int = 8, groups: int = 11, seed: int = 0) -> World:
    """Centroids in `dimensions` equal dimensions, drawn about the means of `groups` categories; shared words are half
    the cosine's doing."""
    rng = np.random.default_rng(seed)
    category = np.arange(people) % groups
    center = rng.normal(size=(groups, dimensions))[category] + rng.normal(size=(people, dimensions))
    named = [f"p{i}" for i in range(people)]
    made = Centroids(named, [0], {"centered_on": named}, {0: center.astype(np.float32)})
    cosine, noise = made.cosine(0), rng.normal(size=(people, people))
    grouped = restricted.clusters(made)
    words = z(cosine) + (noise + noise.T) / np.sqrt(2)
    length = np.tile(rng.integers(5, 30, people).astype(float), (people, 1))
    own = np.array([grouped[name] for name in named])
    return World(center - center.mean(0), cosine, category, own, words, length)


def z(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1; 0 where nothing varies."""
    return (values - values.mean()) / (values.std() or 1.0)


def leakage(world: World, rows: np.ndarray, cause: str, noise: float, rng: np.random.Generator) -> np.ndarray:
    """(S, P): a signal of variance 1 under each source, and `noise` (its standard deviation) of each pair's own.

    cause: `category`, `cluster`: the strata's mean cosine to the source; `susceptible`: a persona leaks alike under all
    sources, and sources differ; `words`: the ranks of the words shared with the source; `words, not ranks`: their share
    itself, of which leakage's ranks are no straight line; `direction`: the same random direction of the
    centroids' space for all sources; `persona`: the cosine to one other persona; `source`: the cosine to the source."""
    people = len(world.cosine)
    own = noise * rng.normal(size=(len(rows), people))
    if cause == "susceptible":
        return z(rng.normal(size=people)) + rng.normal(size=(len(rows), 1)) + own
    if cause == "direction":
        return z(world.center @ rng.normal(size=world.center.shape[1])) + own
    if cause == "persona":
        other = rng.choice(np.setdiff1d(np.arange(people), rows))
        return z(world.cosine[other]) + own
    if cause in ("category", "cluster"):
        strata = getattr(world, cause)
        same = strata[:, None] == strata[None, :]
        signal = []
        for row in rows:
            there = same & (np.arange(people) != row)  # the source itself is no bystander
            counts = np.maximum(there.sum(1), 1)
            signal.append(z((there @ world.cosine[row]) / counts))
        return np.array(signal) + own
    signal = (world.words if "words" in cause else world.cosine)[rows]
    if cause == "words":
        signal = matrices.row_ranks(signal, rows)
    out = np.zeros(signal.shape)
    for k, row in enumerate(rows):
        others = np.arange(people) != row
        out[k, others] = z(signal[k, others])
    return out + own


TESTS = ("free", *restricted.WITHIN, "qap", "mrqap")


def p_values(world: World, rows: np.ndarray, y: np.ndarray, seed: int, tests=TESTS) -> dict[str, float]:
    """p of some tests, two-sided, of one simulated study."""
    people = len(world.cosine)
    block, person = np.nonzero(np.arange(people)[None, :] != rows[:, None])
    x, flat = world.cosine[rows[block], person][None], y[block, person]
    shared = {"person": person, "block": block, "workers": 1}
    found = {}
    if "free" in tests:
        found["free"] = resample.permute_spearman(x, flat, SHUFFLES, seed, **shared).p[0]
    for name in set(restricted.WITHIN) & set(tests):
        strata = getattr(world, name)[person]
        found[name] = resample.permute_within(x, flat, SHUFFLES, seed, stratum=strata, **shared).p[0]
    near, others = world.cosine[None], [world.words[None], world.length[None]]
    if "qap" in tests:
        found["qap"] = matrices.qap(y, near, rows, SHUFFLES, seed, 1).p[0]
    if "mrqap" in tests:
        found["mrqap"] = matrices.mrqap(y, near, others, rows, SHUFFLES, seed, 1).p[0]
    return found


def rejected(
    world: World, cause: str, sources: int, noise: float, trials: int, tests=TESTS
) -> dict[str, float]:
    """Share of trials with p ≤ 0.05 of each test; sources are drawn uniformly among the personas in each."""
    rng = np.random.default_rng([0, sources, sum(cause.encode())])
    found: dict[str, list[float]] = {name: [] for name in tests}
    for trial in range(trials):
        rows = rng.choice(len(world.cosine), sources, replace=False)
        y = leakage(world, rows, cause, noise, rng)
        for name, p in p_values(world, rows, y, trial, tests).items():
            found[name].append(p)
    return {name: float(np.mean(np.array(p) <= 0.05)) for name, p in found.items()}
