#!/usr/bin/env bash
# krippendorff 0.9.0: two judges' scores of 0 to 100, kept as unsigned integers (polars UInt8 is what they need), come out as if
# the judges hardly agreed. Guess beforehand: the same as with the same scores as floats. Seen, with level "interval":
#   as float64 0.976, as int8 0.976, as uint8 0.298, as uint16 0.431; with level "ratio" 0.913 and 0.248
# Cause: scores are subtracted before they are made floats, and 40 - 50 is 246 in eight bits without a sign. With levels
# "nominal" and "ordinal" nothing is subtracted.
# Versions: krippendorff 0.9.0, numpy 2.4.6, polars 2.1.0 (only to show the dtype that a score column has); where:
# krippendorff/krippendorff.py, _interval_metric and _ratio_metric.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q krippendorff==0.9.0 numpy==2.4.6 polars==2.1.0
venv/bin/python - <<'PY'
import warnings

import krippendorff
import numpy as np
import polars as pl

rng = np.random.default_rng(1)
one = rng.integers(0, 11, 60) * 10
two = np.clip(one + rng.integers(-1, 2, 60) * 10, 0, 100)
scores = pl.DataFrame({"one": one, "two": two}, schema={"one": pl.UInt8, "two": pl.UInt8}).to_numpy().T
assert scores.dtype == np.uint8


def by_hand(values):
    """1 - observed / expected mean squared difference, in floats."""
    values = values.astype(float)
    pooled = values.ravel()
    expected = np.square(pooled[:, None] - pooled).sum() / (len(pooled) * (len(pooled) - 1))
    return 1 - np.square(values[0] - values[1]).mean() / expected


def alpha(dtype, level):
    return float(krippendorff.alpha(scores.astype(dtype), level_of_measurement=level))


with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = {
        level: {dtype: alpha(dtype, level) for dtype in ("float64", "int8", "uint8", "uint16")}
        for level in ("nominal", "ordinal", "interval", "ratio")
    }
print("by hand, interval:", round(by_hand(scores), 3))
for level, row in found.items():
    print(level, {dtype: round(value, 3) for dtype, value in row.items()})
assert abs(found["interval"]["float64"] - by_hand(scores)) < 1e-9
assert all(np.ptp(list(found[level].values())) < 1e-9 for level in ("nominal", "ordinal"))
for level in ("interval", "ratio"):
    assert found[level]["float64"] - found[level]["uint8"] > 0.5, f"{level}: unsigned scores are read right now"
PY
echo "as stated"
