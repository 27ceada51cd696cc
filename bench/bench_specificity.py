"""Every persona in the source's place, and intervals over personas and questions: leakfast against loops over
`scipy.stats.spearmanr`, in one process. Demands no device.

672 cells each, 10,000 resamples. Specificity (24 adapters × 14 layers × both cosines, 111 candidates): ρ of every candidate,
places and p_source, and the interval of the difference to the best other. It needs no permutations: the candidates are
the reference distribution, all of them. Two-way (24 adapters × 28 layers, 110 bystanders, 20 questions × 10 samples):
leakfast bootstraps personas and gets the questions' share from a jackknife (`stats.two_way`), and does the pooled rows too;
the loop draws both, as one would without. scipy is timed on a few cells and resamples, and scaled.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import polars as pl
import scipy
from _common import ending_with_json
from scipy.stats import spearmanr

from leakfast.geometry import Centroids
from leakfast.prompts import personas
from leakfast.stats import pairs, rates, specificity, two_way
from leakfast.stats.correlations import correlate

BEHAVIORS, QUESTIONS, SAMPLES, R, LAYERS = 4, 20, 10, 10_000, 28
SOURCES = ("villain", "comedian", "assistant", "software_engineer", "kindergarten_teacher", "librarian")
CELLS, TRIED, WORKERS = BEHAVIORS * len(SOURCES) * LAYERS, 20, 2


def run(layers: int) -> tuple[pl.DataFrame, pl.DataFrame, Centroids]:
    """pairs, counts per question, centroids of 24 adapters: random directions, hits that follow the cosine."""
    rng = np.random.default_rng(1)
    names = [p.name for p in personas.load_personas("all")]
    base = rng.normal(size=(len(names), 64))
    means = {n: (base + 0.5 * rng.normal(size=base.shape)).astype(np.float32) for n in range(layers)}
    told = {"personas": names, "layers": list(range(layers)), "centered_on": names}
    made = Centroids(names, list(range(layers)), told, means)
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    counts, adapters = [], {}
    for b in range(BEHAVIORS):
        for source in SOURCES:
            at = unit @ unit[names.index(source)] + 0.1 * rng.normal(size=len(names))
            hits = rng.binomial(SAMPLES, 1 / (1 + np.exp(2 - 4 * at))[:, None], (len(names), QUESTIONS))
            adapter = f"b{b}-{source}"
            adapters[adapter] = (source, 42)
            frame = {
                "behavior": f"b{b}",
                "adapter": adapter,
                "persona": np.repeat(names, QUESTIONS),
                "question": np.tile(np.arange(QUESTIONS), len(names)),
                "hits": hits.ravel(),
                "total": SAMPLES,
            }
            counts.append(pl.DataFrame(frame))
    questions = pl.concat(counts)
    whole = questions.group_by("behavior", "adapter", "persona", maintain_order=True)
    table = rates.table(whole.agg(pl.col("hits", "total").sum()), adapters, {})
    return pairs.table(table, made), questions, made


def _timed(work) -> tuple[float, float, object]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def two_ways(made: tuple) -> pl.DataFrame:
    found, questions, _ = made
    # the centered cosine and the rate alone: 672 cells, beside 112 pooled ones
    found = found.with_columns(cosine_raw=pl.lit(None, pl.Float64))
    table = correlate(found, 0, bootstraps=R, workers=WORKERS)
    return two_way.with_questions(table, found, questions)


def one_cell(made: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cosines (P, P), rates (P, Q) of one adapter at one layer, and who is not its source."""
    found, questions, centroids = made
    adapter = found["adapter"][0]
    mine = questions.filter(adapter=adapter).sort("persona", "question")
    order = np.argsort(centroids.personas)
    near = centroids.cosine(0, "centered")[np.ix_(order, order)]
    values = mine["hits"].to_numpy().reshape(len(order), -1) / SAMPLES
    source = sorted(centroids.personas).index(found["source"][0])
    return near, values, np.array([source])


def candidates_by_scipy(near: np.ndarray, y: np.ndarray, source: int) -> tuple[float, float]:
    """(seconds for every candidate's ρ, seconds for one resample of the difference of two)."""
    people = np.arange(len(y))
    started = time.process_time()
    rho = [
        spearmanr(near[c, keep], y[keep]).statistic
        for c in people
        for keep in [(people != c) & (people != source)]
    ]
    assert np.allclose(rho, specificity.candidate_rhos(near, y, source), atol=1e-12)
    first = time.process_time() - started
    rng, started = np.random.default_rng(0), time.process_time()
    keep = np.delete(people, [source, (source + 1) % len(people)])
    for _ in range(TRIED):
        drawn = rng.choice(keep, len(keep))
        _ = [spearmanr(near[c, drawn], y[drawn]).statistic for c in (source, (source + 1) % len(people))]
    return first, (time.process_time() - started) / TRIED


def two_ways_by_scipy(near: np.ndarray, values: np.ndarray, source: int) -> float:
    """Seconds for one resample of personas and questions of one cell."""
    rng, started = np.random.default_rng(0), time.process_time()
    keep = np.delete(np.arange(len(values)), source)
    for _ in range(TRIED):
        people = rng.choice(keep, len(keep))
        asked = rng.integers(values.shape[1], size=values.shape[1])
        _ = spearmanr(near[source, people], values[np.ix_(people, asked)].mean(1)).statistic
    return (time.process_time() - started) / TRIED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="accepted for `make bench-gpu`; nothing here uses a device")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    narrow, wide = run(LAYERS // 2), run(LAYERS)
    near, values, (source,) = one_cell(wide)
    specificity.table(narrow[0], narrow[2], {}, 32, workers=WORKERS)  # compiles, or reads what was compiled
    times: dict[str, list[float]] = {}
    for _ in range(asked.repeats):
        wall, cpu, found = _timed(lambda: specificity.table(narrow[0], narrow[2], {}, R, workers=WORKERS))
        cells = found.filter(pl.col("p_source").is_not_null() & (pl.col("source") != "pooled")).height
        every, resample = candidates_by_scipy(near, values.mean(1), source)
        theirs = CELLS * (every + R * resample)
        wall_2, cpu_2, both = _timed(lambda: two_ways(wide))
        known = both.filter(
            pl.col("spearman_both_low").is_not_null() & pl.col("adapter").is_not_null()
        ).height
        assert cells == known == CELLS, (cells, known)
        theirs_2 = CELLS * R * two_ways_by_scipy(near, values, source)
        told = (("specificity", wall, cpu, theirs), ("two_way", wall_2, cpu_2, theirs_2))
        for name, one, other, loop in told:
            for kind, value in (
                ("s", one),
                ("cpu_s", other),
                ("scipy_cpu_s", loop),
                ("ratio_cpu", loop / other),
            ):
                times.setdefault(f"{name}_{kind}", []).append(value)
    median = {name: float(np.median(v)) for name, v in times.items()}
    quartiles = {name: [float(q) for q in np.quantile(v, [0.25, 0.75])] for name, v in times.items()}
    print(
        f"{CELLS} cells, {R} resamples, {WORKERS} threads; scipy scaled from one cell and {TRIED} resamples"
    )
    for name, value in median.items():
        print(f"  {name:24s} {value:10.2f}  (quartiles {quartiles[name][0]:.2f}–{quartiles[name][1]:.2f})")
    card = {"bench": "specificity", "cells": CELLS, "resamples": R, "median": median, "quartiles": quartiles}
    print(json.dumps(card | {"repeats": asked.repeats, "scipy": scipy.__version__, "numpy": np.__version__}))


if __name__ == "__main__":
    with ending_with_json("specificity", "cpu"):
        main()
