#!/usr/bin/env bash
# autorank 1.3.0: which of several models is better over many data sets. Three of its numbers.
# Two models whose scores are not normal. Guess beforehand: at alpha = 0.05 Wilcoxon's signed rank test tells two models of one
# distribution apart in 5 % of the sets. Seen: in 10.5 % of 400 sets of 30 data sets, the two-sided test in 5.2 %; of normal scores
# the paired t-test in 5.3 %.
# Interval of a median. Guess beforehand: it holds the median in 97.5 % (alpha shared by two models). Seen: in 99.9 %, and is twice
# as wide as the one by the binomial distribution (2.40 for 1.25), which holds it in 98.0 %.
# Tukey's intervals of three and more models. Guess beforehand: wider at alpha = 0.001 than at 0.05. Seen: plus or minus 0.338 at
# both, where 0.528 is right at 0.001.
# Cause: the test is one-sided, towards the model whose median is larger in these very scores; the ends of a median's interval lie
# sqrt(n / 2) places from the middle, times the quantile, where sqrt(n) / 2 is meant; tukeyhsd() is called without alpha.
# Versions: autorank 1.3.0, numpy 2.4.6, scipy 1.17.1, pandas 3.0.3, statsmodels 0.15.0; where: autorank/_util.py, rank_two,
# _confidence_interval and rank_multiple_normal_homoscedastic.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile autorank==1.3.0 numpy==2.4.6 scipy==1.17.1 pandas==3.0.3 statsmodels==0.15.0
venv/bin/python - <<'PY'
import contextlib
import io

import numpy as np
import pandas as pd
from autorank import autorank
from scipy import stats
from statsmodels.stats.multicomp import pairwise_tukeyhsd

SETS, DATASETS, ALPHA = 400, 30, 0.05
rng = np.random.default_rng(0)


def frame(scores):
    return pd.DataFrame(scores, columns=[f"model {number}" for number in range(scores.shape[1])])


def ranked(data, **how):
    """The result; what the package prints at each call is left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        return autorank(data, **how)


def median_by_hand(scores, alpha):
    """Order statistics that hold the median with probability 1 - alpha, by the binomial distribution."""
    low = int(stats.binom.ppf(alpha / 2, len(scores), 0.5))
    ordered = np.sort(scores)
    return ordered[low - 1], ordered[len(scores) - low]


found, held, width, tested = np.zeros(2), np.zeros(2), np.zeros(2), 0
for _ in range(SETS):
    data = frame(rng.lognormal(size=(DATASETS, 2)))
    result = ranked(data, alpha=ALPHA)
    if result.omnibus != "wilcoxon":
        continue
    tested += 1
    two_sided = stats.wilcoxon(data["model 0"], data["model 1"]).pvalue
    found += [result.pvalue < ALPHA, two_sided < ALPHA]
    for name, row in result.rankdf.iterrows():
        for way, (low, high) in enumerate([(row["ci_lower"], row["ci_upper"]), median_by_hand(data[name], ALPHA / 2)]):
            held[way] += (low <= 1 <= high) / 2
            width[way] += (high - low) / 2
(seen, right), (hold, fit), (wide, narrow) = found / tested, held / tested, width / tested
print(f"two models of one distribution, {tested} sets: a difference in {seen:.1%}, by the two-sided test in {right:.1%}")
print(f"intervals of a median: {hold:.1%} hold it, by hand {fit:.1%}; widths {wide:.2f}, {narrow:.2f}")
assert seen > 0.08 and right < 0.07, "the test of two models is two-sided now"
assert hold > 0.99 and wide > 1.3 * narrow, "intervals of a median are as wide as they should be now"

normal = [ranked(frame(rng.normal(size=(DATASETS, 2))), alpha=ALPHA) for _ in range(SETS)]
rejected = [result.pvalue < ALPHA for result in normal if result.omnibus == "ttest"]
print(f"normal scores, paired t-test, {len(rejected)} sets: a difference in {np.mean(rejected):.1%}")
assert np.mean(rejected) < 0.075

data = frame(rng.normal(size=(DATASETS, 3)))
long, half = data.melt(), {}
for alpha in (0.05, 0.001):
    result = ranked(data, alpha=alpha, force_mode="parametric")
    tukey = pairwise_tukeyhsd(long["value"], long["variable"], alpha=alpha)
    tukey.plot_simultaneous()
    half[alpha] = float((result.rankdf["ci_upper"] - result.rankdf["mean"]).iloc[0])
    print(f"{result.posthoc}, alpha {alpha}: mean plus or minus {half[alpha]:.4f}, by statsmodels {tukey.halfwidths[0]:.4f}")
assert half[0.05] == half[0.001] < 0.8 * tukey.halfwidths[0], "Tukey's intervals follow alpha now"
PY
echo "as stated"
