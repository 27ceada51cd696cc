#!/usr/bin/env bash
# MAPIE 1.6.0: is a judge as sure as it is right? Two of the package's answers.
# Spiegelhalter's test. Guess beforehand: a small p for a judge who says 0.71 and is right in 85 % of its replies, as for one who is
# right in 57 %. Seen: `spiegelhalter_p_value` is 1 for the first, as if no judge could be calibrated better.
#   right in 57 %: p 0.000000, in 71 %: 0.632, in 85 %: 1.000000; two-sided 0.000000, 0.735, 0.000000
# The package's Kolmogorov-Smirnov test finds both.
# Calibration error (ECE) with the bins "array split". Guess beforehand: about that of the bins "uniform" and "quantile", in any
# order of rows. Seen: 0.012 in the order drawn and 0.117 with rows sorted by score, where the others give 0.116 in both.
# Cause: p is that of one side, a Brier score worse than that of a calibrated judge; rows are cut into bins as they lie, and the
# largest score of each cut is an edge, so that of rows in no order nearly all fall below the first.
# Versions: mapie 1.6.0, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1; where: mapie/metrics/calibration.py, spiegelhalter_p_value and
# _get_binning_groups.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile mapie==1.6.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
venv/bin/python - <<'PY'
import numpy as np
from mapie.metrics.calibration import expected_calibration_error, kolmogorov_smirnov_p_value, spiegelhalter_p_value
from scipy.stats import norm

REPLIES, BINS, SETS = 500, 10, 2000
rng = np.random.default_rng(0)


def two_sided(right, says):
    z = ((right - says) * (1 - 2 * says)).sum() / np.sqrt(((1 - 2 * says) ** 2 * says * (1 - says)).sum())
    return 2 * norm.sf(abs(z))


says = rng.uniform(0.6, 0.8, REPLIES)
for name, rate in (("too sure", says - 0.15), ("as sure as right", says), ("not sure enough", says + 0.15)):
    right = (rng.random(REPLIES) < rate).astype(int)
    found, by_hand = spiegelhalter_p_value(right, says), two_sided(right, says)
    others = kolmogorov_smirnov_p_value(right, says)
    print(f"{name}: says {says.mean():.2f}, right in {right.mean():.2f}: p {found:.6f}, two-sided {by_hand:.6f}, Kolmogorov-Smirnov {others:.6f}")
assert found > 0.999999 and by_hand < 1e-6, "a judge who is not sure enough is told from a calibrated one now"

says = rng.uniform(size=5000)
right = (rng.random(5000) < 0.25 + says / 2).astype(int)
order = np.argsort(says)
ece = {}
for strategy in ("uniform", "quantile", "array split"):
    ece[strategy] = [float(expected_calibration_error(right[rows], says[rows], BINS, strategy)) for rows in (np.arange(5000), order)]
    print(f"{strategy}: {ece[strategy][0]:.3f}, rows sorted by score {ece[strategy][1]:.3f}")
assert ece["uniform"][0] > 0.1 and ece["quantile"][0] > 0.1 and ece["array split"][1] > 0.1
assert ece["array split"][0] < 0.05, "the order of rows does not matter now"
PY
echo "as stated"
