#!/usr/bin/env bash
# polars_statistics 0.8.0: how well two judges of the same replies agree. Cohen's kappa is right; its standard error, of which its
# p is made, is two to forty times too large.
# Guess beforehand: the standard error of every other package. Seen: judges who agree on all of 40 replies, 20 of each kind, have
# kappa 1 with p = 0.068; 42 of 50 replies 0.68 with p = 0.097, where 0.000001 is right; 91 of 100, where the behavior is rare,
# 0.13 with a standard error of 7.3.
# Kappa of 50 replies, drawn 2,000 times: its standard deviation is 0.10, the standard error reported 0.42 on average.
# `icc` of scores: "icc2" and "icc2k" (agreement in the score itself) have the interval and p of "icc3" and "icc3k" (agreement up
# to a constant), which miss them where one judge scores higher than the others.
# Guess beforehand: the interval holds its estimate. Seen, three judges of 40 replies, one of them higher by 2:
#   icc2 0.420, interval 0.745 to 0.904; 0.009 to 0.723 is right
# Three judges whose severity differs by 0.5 (standard deviation): of 400 intervals 157 hold the true value, of the right ones 346.
# Cause: 1 stands where the formula has 1 minus the agreement by chance, and the sum over replies on which the judges differ is
# missing; the interval is made from the same F in both kinds.
# Versions: polars_statistics 0.8.0, polars 2.1.0; where: the crate anofox-statistics, kappa_se in categorical/association.rs, and
# correlation/icc.rs.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile polars_statistics==0.8.0 polars==2.1.0 numpy==2.4.6 scipy==1.17.1
venv/bin/python - <<'PY'
import warnings

import numpy as np
import polars as pl
import polars_statistics as ps
from scipy.stats import f, norm

warnings.simplefilter("error")
rng = np.random.default_rng(0)


def kappa(table):
    """kappa, its standard error and p, as polars_statistics has them."""
    counts = pl.DataFrame({"counts": np.ravel(table)})
    row = counts.select(ps.cohen_kappa("counts", n_categories=len(table)).alias("k")).unnest("k").row(0, named=True)
    return row["estimate"], row["statistic"], row["p_value"]


def by_hand(table):
    """kappa, its standard error, that under no agreement, p by the latter; and the standard error by the formula in "Cause"."""
    n = np.sum(table)
    share = np.asarray(table) / n
    one, two, same = share.sum(1), share.sum(0), np.diag(share)
    agree, chance = same.sum(), one @ two
    value = (agree - chance) / (1 - chance)
    margins = two[:, None] + one[None, :]
    apart = share * np.square(margins)
    last = np.square(agree * chance - 2 * chance + agree)
    first = same @ np.square((1 - chance) - (one + two) * (1 - agree))
    error = np.sqrt(first + np.square(1 - agree) * (apart.sum() - np.trace(apart)) - last) / (np.sqrt(n) * (1 - chance) ** 2)
    none = np.sqrt(chance + chance**2 - one * two @ (one + two)) / (np.sqrt(n) * (1 - chance))
    wrong = same @ np.square(1 - (one + two) * (1 - agree))
    return value, error, none, 2 * norm.sf(value / none), np.sqrt(wrong - last) / (np.sqrt(n) * (1 - chance) ** 2)


tables = [[[20, 0], [0, 20]], [[20, 5], [3, 22]], [[90, 4], [5, 1]], [[30, 5, 2], [3, 28, 4], [1, 3, 24]]]
for table in tables:
    (value, error, p), right = kappa(table), by_hand(table)
    print(f"{table}: kappa {value:.2f}, standard error {error:.3f} (right: {right[1]:.3f}, without agreement {right[2]:.3f}), "
          f"p {p:.2g} (right: {right[3]:.1g})")
    assert abs(value - right[0]) < 1e-9
    assert error > 1.7 * max(right[1:3]), "kappa's standard error is right now"
    assert abs(error - right[4]) < 1e-9, "kappa's standard error is another wrong one now"
assert kappa(tables[0])[2] > 0.05 and kappa(tables[1])[2] > 0.05

drawn = rng.multinomial(50, np.ravel(tables[1]) / 50, size=2000).reshape(-1, 2, 2)
found = np.array([kappa(table)[:2] for table in drawn])
print(f"2,000 draws: standard deviation of kappa {found[:, 0].std():.2f}, mean standard error {found[:, 1].mean():.2f}")
assert found[:, 0].std() < 0.12 and found[:, 1].mean() > 0.35

REPLIES, JUDGES = 40, 3


def icc(scores, kind):
    row = pl.DataFrame(scores, schema=["a", "b", "c"]).select(ps.icc("a", "b", "c", icc_type=kind).alias("i"))
    return [row.unnest("i")[name][0] for name in ("icc", "ci_lower", "ci_upper")]


def icc_by_hand(scores):
    """ICC(2,1) and its 95 % interval after McGraw and Wong (1996)."""
    n, k = scores.shape
    mean, rows, columns = scores.mean(), scores.mean(1), scores.mean(0)
    between, judges = k * np.square(rows - mean).sum() / (n - 1), n * np.square(columns - mean).sum() / (k - 1)
    error = np.square(scores - rows[:, None] - columns + mean).sum() / ((n - 1) * (k - 1))
    value = (between - error) / (between + (k - 1) * error + k * (judges - error) / n)
    a, b = k * value / (n * (1 - value)), 1 + k * value * (n - 1) / (n * (1 - value))
    df = (a * judges + b * error) ** 2 / ((a * judges) ** 2 / (k - 1) + (b * error) ** 2 / ((n - 1) * (k - 1)))
    low, high = f.ppf(0.975, n - 1, df), f.ppf(0.975, df, n - 1)
    rest = k * judges + (k * n - k - n) * error
    ends = n * (between - low * error) / (low * rest + n * between), n * (high * between - error) / (rest + n * high * between)
    return [value, *ends]


held = np.zeros(2)
for _ in range(400):
    scores = rng.normal(size=(REPLIES, 1)) + 0.5 * rng.normal(size=JUDGES) + 0.5 * rng.normal(size=(REPLIES, JUDGES))
    held += [low <= 1 / 1.5 <= high for _, low, high in (icc(scores, "icc2"), icc_by_hand(scores))]
scores = rng.normal(size=(REPLIES, 1)) + 0.5 * rng.normal(size=(REPLIES, JUDGES)) + [0, 0, 2]
two, three, right = icc(scores, "icc2"), icc(scores, "icc3"), icc_by_hand(scores)
print("icc2", np.round(two, 3).tolist(), "icc3", np.round(three, 3).tolist(), "icc2 by hand", np.round(right, 3).tolist())
print(f"judges whose severity differs by 0.5: intervals that hold icc2, of 400: {held[0]:.0f}, by hand {held[1]:.0f}")
assert abs(two[0] - right[0]) < 1e-9 and held[1] > 340
assert two[1:] == three[1:] and two[0] < two[1], "icc2 has an interval of its own now"
assert held[0] < held[1] - 100, "intervals of icc2 hold it now"
PY
echo "as stated"
