#!/usr/bin/env bash
# deepsig 1.2.8 (deep-significance): is a model better than a baseline, by almost stochastic order, corrected for the number of
# comparisons (`aso(..., num_comparisons=)`, and `multi_aso` by default). The more comparisons, the less is corrected.
# Guess beforehand: Bonferroni, as the README says: ten comparisons at 0.95 are ten at 0.995, and eps_min, which is to stay below a
# threshold, grows with their number. Seen, 20 runs of each of two models, the same resamples:
#   comparisons  1      2      3      10     100
#   eps_min      0.503  0.581  0.550  0.516  0.505
#   Bonferroni   0.503  0.581  0.623  0.734  0.911
#   multi_aso, five models, ten pairs: 0.583, 0.130, 0.141, 0.050 for the first against the others; 0.567, 0.126, 0.136, 0.048 without
#   a correction and 0.856, 0.197, 0.214, 0.075 by Bonferroni
# Cause: to the level is added what it lacks to 1, divided by the number of comparisons: 0.955 for ten. Only for two is that right.
# What it needs: confidence_level = 1 - 0.05 / comparisons, without num_comparisons, and use_bonferroni=False.
# Versions: deepsig 1.2.8, numpy 2.4.6, scipy 1.17.1, pandas 3.0.3, joblib 1.5.3; where: deepsig/aso.py, aso and multi_aso.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile deepsig==1.2.8 numpy==2.4.6 scipy==1.17.1 pandas==3.0.3 joblib==1.5.3
venv/bin/python - <<'PY'
import numpy as np
from deepsig import aso, multi_aso

RUNS, RESAMPLES, LEVEL = 20, 200, 0.95
rng = np.random.default_rng(0)
how = {"num_bootstrap_iterations": RESAMPLES, "dt": 0.02, "seed": 1, "show_progress": False}
model, baseline = rng.normal(0.55, 0.1, RUNS), rng.normal(0.5, 0.1, RUNS)
seen, right = {}, {}
for comparisons in (1, 2, 3, 10, 100):
    seen[comparisons] = float(aso(model, baseline, confidence_level=LEVEL, num_comparisons=comparisons, **how))
    right[comparisons] = float(aso(model, baseline, confidence_level=1 - (1 - LEVEL) / comparisons, **how))
    print(f"{comparisons} comparisons: eps_min {seen[comparisons]:.3f}, {right[comparisons]:.3f} by Bonferroni")
assert np.isclose(seen[2], right[2])
assert seen[2] > seen[3] > seen[10] > seen[100] > seen[1], "more comparisons, stronger correction now"
assert right[100] > right[10] > right[3] > right[2]

models = {f"model {number}": rng.normal(0.55 - 0.015 * number, 0.1, RUNS) for number in range(5)}
pairs = len(models) * (len(models) - 1) // 2
table = {
    "as it is called": multi_aso(models, confidence_level=LEVEL, **how),
    "without a correction": multi_aso(models, confidence_level=LEVEL, use_bonferroni=False, **how),
    "Bonferroni": multi_aso(models, confidence_level=1 - (1 - LEVEL) / pairs, use_bonferroni=False, **how),
}
for name, eps in table.items():
    print(f"multi_aso, {pairs} pairs, {name}: the first model against the others {np.round(eps[0, 1:], 3)}")
called, plain, corrected = (eps[0, 1:] for eps in table.values())
assert np.all(called - plain < 0.3 * (corrected - plain)), "ten pairs are corrected for as ten now"
PY
echo "as stated"
