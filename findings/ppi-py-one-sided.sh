#!/usr/bin/env bash
# ppi_py 0.2.3: a mean of scores, from 100 replies that a person scored and 1,000 that a judge did (prediction-powered inference).
# One-sided intervals. Guess beforehand: alternative="larger" gives a lower limit and infinity, as the package's `ppi_ols_ci` and
# statsmodels do. Seen: `ppi_mean_ci` gives the two-sided interval, whatever is asked, unless `lam` is given; `ppboot` gives minus
# infinity and the largest of its resamples, so that no limit is at the level asked for.
#   asked for "larger": ppi_mean_ci 78.94 to 81.10, the two-sided one; with lam=1 78.66 to infinity; ppboot -infinity to 81.71
# Weighted intervals (w, w_unlabeled). Guess beforehand: with 80 taken from every score the interval moves by 80. Seen: so does its
# middle; its width grows with the scores.
#   80 added again: scores near 80 give 75.86 to 84.29, the same less 80 give 78.65 to 81.50; `ppi_ols_ci` with a constant alone gives
#   78.67 to 81.52 for both. Of the person's scores alone (lam=0) 67.50 to 96.98, 79.52 to 84.96, and 79.55 to 84.93
# Cause: `ppi_mean_ci` calls itself without `alternative`; the variance is that of weight times score, where the weights are made to
# add up to n and the mean's variance is that of weight times distance from it.
# Versions: ppi_python 0.2.3, numpy 2.3.5, statsmodels 0.15.0, scikit-learn 1.9.1; where: ppi_py/ppi.py, ppi_mean_ci and ppboot.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile ppi_python==0.2.3 numpy==2.3.5 statsmodels==0.15.0 scikit-learn==1.9.1
venv/bin/python - <<'PY'
import numpy as np
from ppi_py import ppboot, ppi_mean_ci, ppi_ols_ci

PERSON, JUDGE, ALPHA = 100, 1000, 0.05
rng = np.random.default_rng(0)
quality = rng.normal(size=PERSON + JUDGE)
person = (80 + 10 * quality + 3 * rng.normal(size=len(quality)))[:PERSON]
judge = 78 + 10 * quality + 4 * rng.normal(size=len(quality))
scored, alone = judge[:PERSON], judge[PERSON:]


def ends(found):
    return [float(np.squeeze(end)) for end in found]


def asked(side, **how):
    return ends(ppi_mean_ci(person, scored, alone, alpha=ALPHA, alternative=side, **how))


both, larger, smaller = (asked(side) for side in ("two-sided", "larger", "smaller"))
with_lam = asked("larger", lam=1)
np.random.seed(0)
resampled = ends(ppboot(np.mean, person, scored, alone, alpha=ALPHA, alternative="larger"))
np.random.seed(0)
whole = ends(ppboot(np.mean, person, scored, alone, alpha=1e-9))
constant = np.ones((PERSON, 1)), np.ones((JUDGE, 1))
print("two-sided", np.round(both, 2), "larger", np.round(larger, 2), "smaller", np.round(smaller, 2), "larger, lam=1", np.round(with_lam, 2))
print("ppboot, larger:", np.round(resampled, 2), "least and largest of its resamples:", np.round(whole, 2))
assert both == larger == smaller, "ppi_mean_ci looks at the side asked for now"
assert with_lam[1] == np.inf
assert resampled[0] == -np.inf and np.isclose(resampled[1], whole[1], rtol=0, atol=1e-6), "ppboot gives a lower limit now"

weights, others = rng.choice([0.2, 1.8], PERSON), rng.choice([0.2, 1.8], JUDGE)
for lam in (0, None):
    width = {}
    for moved in (0, -80):
        data = person + moved, scored + moved, alone + moved
        how = {"alpha": ALPHA, "lam": lam, "w": weights, "w_unlabeled": others}
        mean = ends(ppi_mean_ci(*data, **how))
        ols = ends(ppi_ols_ci(constant[0], *data[:2], constant[1], data[2], **how))
        width[moved] = [mean[1] - mean[0], ols[1] - ols[0]]
        print(f"lam {lam}, scores {moved:+d}: ppi_mean_ci {mean[0] - moved:.2f} to {mean[1] - moved:.2f}, "
              f"ppi_ols_ci {ols[0] - moved:.2f} to {ols[1] - moved:.2f}")
    assert np.isclose(width[0][1], width[-80][1]) and abs(width[-80][0] / width[0][1] - 1) < 0.1
    assert width[0][0] > 1.5 * width[-80][0], "weighted intervals move with the scores now"
PY
echo "as stated"
