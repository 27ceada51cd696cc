"""Permutations and bootstraps of Spearman's ρ: leakfast against `scipy.stats.permutation_test` and
`scipy.stats.bootstrap`, and `leakfast stats` on a run of five behaviors. Demands no device.

24 correlations (sources × behaviors) × 28 layers, N = 110, 10,000 permutations and 10,000 resamples each.
scipy is timed on 4 of the 672 cells, vectorised, and scaled. Data are random numbers with ties as rates have.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import scipy
import scipy.stats
from _common import ending_with_json, peak_rss
from scipy.stats import rankdata

from leakfast import stats
from leakfast.geometry import Centroids
from leakfast.prompts import personas
from leakfast.stats import rates as rate_tables
from leakfast.stats import resample
from leakfast.storage import layout
from leakfast.storage.run import Run

GROUPS, LAYERS, N, R, CELLS = 24, 28, 110, 10_000, 4
BEHAVIORS = ("marker", "capability", "refusal", "sycophancy", "misalignment")
SOURCES = ("villain", "comedian", "assistant", "software_engineer", "kindergarten_teacher")


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (GROUPS, LAYERS, N) and y (GROUPS, N): shares of 200, so with ties."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(GROUPS, N))
    x = 0.5 * latent[:, None] + rng.normal(size=(GROUPS, LAYERS, N))
    return x, rng.binomial(200, 1 / (1 + np.exp(2 - latent))) / 200


def ours(x: np.ndarray, y: np.ndarray, workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
    out = []
    for g in range(GROUPS):
        drawn = resample.bootstrap_spearman(x[g], y[g], R, g, workers=workers)
        out.append(
            (
                resample.permute_spearman(x[g], y[g], R, g, workers=workers).p,
                np.quantile(drawn, [0.025, 0.975], axis=0),
            )
        )
    return out


def _rho(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    a, b = rankdata(x, axis=axis), rankdata(y, axis=axis)
    a, b = a - a.mean(axis=axis, keepdims=True), b - b.mean(axis=axis, keepdims=True)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def theirs(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    permuted = scipy.stats.permutation_test(
        (x,),
        lambda moved, axis: _rho(moved, np.broadcast_to(y, moved.shape), axis),
        vectorized=True,
        permutation_type="pairings",
        n_resamples=R,
        batch=2_000,
        rng=np.random.default_rng(seed),
    )
    drawn = scipy.stats.bootstrap(
        (x, y),
        _rho,
        paired=True,
        vectorized=True,
        n_resamples=R,
        batch=2_000,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(permuted.pvalue), np.array(drawn.confidence_interval)


def full_run(folder: Path) -> Path:
    """A run of five behaviors × five sources and the base: counts, and centroids at 28 layers."""
    rng = np.random.default_rng(1)
    people = personas.load_personas("all")
    names = [p.name for p in people]
    base = rng.normal(size=(len(names), 64))
    means = {n: (base + 0.5 * rng.normal(size=base.shape)).astype(np.float32) for n in range(LAYERS)}
    run = Run(folder).create()
    metadata = {"personas": names, "layers": list(range(LAYERS)), "centered_on": names}
    run.add_file(layout.centroids(), Centroids(names, list(range(LAYERS)), metadata, means).save)
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    frames, adapters = [], {}
    for behavior in BEHAVIORS:
        for source in (*SOURCES, None):
            at = unit @ unit[names.index(source)] if source else np.full(len(names), -1.0)
            adapter = f"{behavior}-{source}-s42" if source else "base"
            if source:
                adapters[adapter] = (source, 42)
            hits = rng.binomial(200, 1 / (1 + np.exp(3 - 4 * at)))
            told = {"persona": names, "hits": hits, "total": [200] * len(names)}
            frames.append(pl.DataFrame(told).with_columns(behavior=pl.lit(behavior), adapter=pl.lit(adapter)))
    table = rate_tables.table(pl.concat(frames), adapters, {p.name: p.category for p in people})
    run.add_shard("imported/rates.parquet", table)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="accepted for `make bench-gpu`; nothing here uses a device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-run", action="store_true", help="leave out the whole `leakfast stats`")
    asked = parser.parse_args()
    x, y = data()
    ours(x[:, :, :], y, 2)  # compiles, or reads what was compiled
    same = all(
        np.array_equal(a, b)
        for one, two in zip(ours(x, y, 1), ours(x, y, 2), strict=True)
        for a, b in zip(one, two, strict=True)
    )
    times: dict[str, list[float]] = {
        "ours_2": [],
        "ours_1": [],
        "ours_1_cpu": [],
        "scipy": [],
        "scipy_cpu": [],
    }
    worst_p, worst_ci = 0.0, 0.0
    for repeat in range(asked.repeats):
        for name, workers in (("ours_2", 2), ("ours_1", 1)):
            wall, cpu = time.perf_counter(), time.process_time()
            found = ours(x, y, workers)
            times[name].append(time.perf_counter() - wall)
            if workers == 1:
                times["ours_1_cpu"].append(time.process_time() - cpu)
        wall, cpu = time.perf_counter(), time.process_time()
        checked = [theirs(x[g, 0], y[g], repeat) for g in range(CELLS)]
        scale = GROUPS * LAYERS / CELLS
        times["scipy"].append((time.perf_counter() - wall) * scale)
        times["scipy_cpu"].append((time.process_time() - cpu) * scale)
        for g, (p, ci) in enumerate(checked):
            mine_p, mine_ci = found[g][0][0], found[g][1][:, 0]
            spread = 5 * np.sqrt(2 * max(p * (1 - p), 1 / R) / R)
            worst_p, worst_ci = (
                max(worst_p, abs(mine_p - p) / spread),
                max(worst_ci, np.abs(mine_ci - ci).max()),
            )
    if not same or worst_p > 1 or worst_ci > 0.02:
        raise SystemExit(
            f"results differ: threads {same}, p {worst_p:.2f} of 5 sigma, interval {worst_ci:.3f}"
        )
    median = {name: float(np.median(v)) for name, v in times.items()}
    spread = {name: [float(q) for q in np.quantile(v, [0.25, 0.75])] for name, v in times.items()}
    card = {
        "bench": "stats",
        "cells": GROUPS * LAYERS,
        "n": N,
        "permutations": R,
        "bootstraps": R,
        "seconds": median,
        "quartiles": spread,
        "repeats": asked.repeats,
        "ratio_wall": median["scipy"] / median["ours_2"],
        "ratio_cpu": median["scipy_cpu"] / median["ours_1_cpu"],
        "same_bits_for_1_and_2_threads": same,
        "peak_mib_resampling": _peak(),
    }
    if not asked.skip_run:
        with tempfile.TemporaryDirectory() as folder:
            run = full_run(Path(folder) / "run")
            wall, cpu = time.perf_counter(), time.process_time()
            tables = stats.stats(run)
            card["full_run_s"], card["full_run_cpu_s"] = time.perf_counter() - wall, time.process_time() - cpu
            card["full_run_rows"] = sum(table.height for table in tables.all_tables().values())
        card["peak_mib"] = _peak()
    card |= {
        "versions": {
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.processor() or platform.machine(),
        "commit": _commit(),
    }
    print(f"{GROUPS * LAYERS} cells, N = {N}, {R} permutations + {R} resamples each")
    for name in times:
        print(f"  {name:12s} {median[name]:9.3f} s  (quartiles {spread[name][0]:.3f}–{spread[name][1]:.3f})")
    print(
        f"  scipy / ours: {card['ratio_wall']:.0f}x wall (2 threads), {card['ratio_cpu']:.0f}x CPU (1 thread)"
    )
    if "full_run_s" in card:
        print(
            f"  leakfast stats, 5 behaviors × 5 sources × 28 layers: {card['full_run_s']:.1f} s, peak {_peak()} MiB"
        )
    print(json.dumps(card))


def _peak() -> int:
    return peak_rss() >> 20


def _commit() -> str | None:
    root = Path(__file__).parent
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return told.stdout.strip() or None


if __name__ == "__main__":
    with ending_with_json("stats", "cpu"):
        main()
