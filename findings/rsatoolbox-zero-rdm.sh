#!/usr/bin/env bash
# rsatoolbox 0.3.2: geometry at several layers compared with leakage of several behaviors, both as dissimilarity matrices of the
# personas, in one call of `compare`. One behavior leaks nowhere, so that its matrix is zero.
# Guess beforehand: its similarities are zero or no numbers, the others' what they are without it. Seen: its own are 0, and most of
# the others are those of other layers and other behaviors, without a word.
#   "spearman", by row layers, by column behaviors, the second of them zero:
#     in one call  0.14  0 -0.09  0.68    one pair at a time  0.14  0  0.05 -0.09
#                  0.61  0  0.81  0.58                        0.68  0  0.61 -0.11
#                 -0.12  0  0.05 -0.09                        0.81  0  0.58 -0.12
# So too with "cosine", "corr", "cosine_cov" and "corr_cov"; "rho-a" and "tau-a" are right. With a zero layer in place of a behavior
# (states of a token that is the same for all personas, before the first block) every layer has the similarity of the next.
# Cause: similarities of the matrices that are not zero are laid in place by `numpy.putmask`, which takes the value at a place's
# own number, where `numpy.place` takes one after the other.
# Versions: rsatoolbox 0.3.2, numpy 2.4.6; where: rsatoolbox/rdm/compare.py, _cosine.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile rsatoolbox==0.3.2 numpy==2.4.6
venv/bin/python - <<'PY'
import warnings

import numpy as np
from rsatoolbox.rdm import RDMs, compare
from scipy.spatial.distance import pdist

PERSONAS, LAYERS, WIDTH = 20, 3, 16
rng = np.random.default_rng(0)
place = rng.normal(size=(PERSONAS, 2))
noise = (4.0, 1.0, 0.3)
states = [place @ rng.normal(size=(2, WIDTH)) + rng.normal(size=(PERSONAS, WIDTH)) * size for size in noise]
layers = RDMs(np.array([pdist(state) for state in states]))
rates = [
    np.clip(0.5 + 0.3 * place[:, 0], 0, 1), np.zeros(PERSONAS), np.clip(0.5 + 0.3 * place[:, 1], 0, 1), rng.random(PERSONAS),
]
behaviors = RDMs(np.array([pdist(rate[:, None]) for rate in rates]))
zero = np.array([False, True, False, False])


def one_by_one(left, right, method):
    return np.array([
        [float(compare(left.subset("index", [i]), right.subset("index", [j]), method=method)[0, 0]) for j in range(right.n_rdm)]
        for i in range(left.n_rdm)
    ])


def apart(left, right, method):
    """Largest difference between one call for all and a call for each pair."""
    return float(np.abs(compare(left, right, method=method) - one_by_one(left, right, method)).max())


with warnings.catch_warnings():
    warnings.simplefilter("error")
    together, alone = compare(layers, behaviors, method="spearman"), one_by_one(layers, behaviors, "spearman")
    print("in one call", together.round(2).tolist())
    print("one pair at a time", alone.round(2).tolist())
    shown = RDMs(behaviors.dissimilarities[~zero])
    for method in ("cosine", "corr", "spearman", "cosine_cov", "corr_cov", "rho-a", "tau-a"):
        found, without = apart(layers, behaviors, method), apart(layers, shown, method)
        print(f"{method}: one call and pairs differ by {found:.2f}, without the zero matrix by {without:.0e}")
        assert without < 1e-6
        assert found < 1e-9 if method in ("rho-a", "tau-a") else found > 0.2, f"{method} has changed"
    same = RDMs(np.vstack([np.zeros((1, layers.dissimilarities.shape[1])), layers.dissimilarities]))
    one = RDMs(behaviors.dissimilarities[:1])
    moved, meant = compare(same, one, method="spearman")[:, 0], one_by_one(same, one, "spearman")[:, 0]
print("a zero layer before them, in one call", moved.round(2).tolist(), "; one at a time", meant.round(2).tolist())
own = alone[:, ~zero].ravel()
places = np.flatnonzero(np.tile(~zero, LAYERS))
assert np.allclose(together[:, zero], 0) and np.allclose(together[:, ~zero].ravel(), own[places % len(own)])
assert np.allclose(moved, [0, meant[2], meant[3], meant[1]]) and not np.allclose(moved, meant), "each layer has its own now"
PY
echo "as stated"
