#!/usr/bin/env bash
# confidenceinterval 1.0.5: intervals of a judge's macro recall, precision and F1, with the method it takes by default ("takahashi").
# Guess beforehand: 95 % of them hold the value, and a judge without errors has no error bar. Seen, 300 replies of three kinds:
#   a judge without errors, macro F1: 1.000, from 0.935 to 1.065
#   a judge who agrees in 35 %: 76 of 100 intervals of recall and of precision hold it, little more than half as wide as they should be (0.061 for
#   0.108), and 99 of F1, too wide by half (0.170 for 0.107); 93 of each by the delta method
#   a judge who agrees in 90 %: F1 twice too wide (0.139 for 0.067)
# Cause: the derivative by a reply that is judged right lacks the size of its kind; p times itself, cell by cell, stands for its
# outer product; the variance of F1 takes counts for shares, and adds where it should multiply.
# Versions: confidenceinterval 1.0.5, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1, statsmodels 0.15.0; where:
# confidenceinterval/takahashi_methods.py.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile confidenceinterval==1.0.5 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 statsmodels==0.15.0
venv/bin/python - <<'PY'
import numpy as np
from confidenceinterval import f1_score, precision_score, recall_score

REPLIES, KINDS, SETS = 300, 3, 100
rng = np.random.default_rng(0)
METRICS = {"recall": recall_score, "precision": precision_score, "F1": f1_score}


def by_hand(truth, found, name):
    """Value and standard error by the delta method, the counts being multinomial; derivatives by the complex step."""
    share = np.zeros((KINDS, KINDS))
    np.add.at(share, (truth, found), 1 / len(truth))

    def value(p):
        hit, asked, said = np.diagonal(p), p.sum(1), p.sum(0)
        return {"recall": hit / asked, "precision": hit / said, "F1": 2 * hit / (asked + said)}[name].mean()

    slope = np.array([value(share + 1e-20j * np.eye(share.size)[cell].reshape(share.shape)).imag * 1e20 for cell in range(share.size)])
    p = share.ravel()
    return value(share), np.sqrt(max(slope**2 @ p - (slope @ p) ** 2, 0) / len(truth))


truth = np.arange(REPLIES) % KINDS
for name, metric in METRICS.items():
    value, (low, high) = metric(truth, truth, average="macro")
    print(f"a judge without errors, macro {name}: {value:.3f}, {low:.3f} to {high:.3f}")
assert high > 1.05, "no error bar where nothing is wrong, now"

for agrees in (0.35, 0.9):
    held = {name: np.zeros(2) for name in METRICS}
    width = {name: np.zeros(2) for name in METRICS}
    for _ in range(SETS):
        truth = rng.integers(0, KINDS, REPLIES)
        found = np.where(rng.random(REPLIES) < agrees, truth, (truth + rng.integers(1, KINDS, REPLIES)) % KINDS)
        for name, metric in METRICS.items():
            _, (low, high) = metric(truth, found, average="macro")
            value, error = by_hand(truth, found, name)
            held[name] += [low <= agrees <= high, abs(value - agrees) <= 1.96 * error]
            width[name] += [high - low, 2 * 1.96 * error]
    for name in METRICS:
        (seen, right), (wide, fit) = held[name] / SETS, width[name] / SETS
        print(f"agrees in {agrees:.0%}, macro {name}: {seen:.0%} hold the value, by hand {right:.0%}; widths {wide:.3f}, {fit:.3f}")
        assert right > 0.9
        if name == "F1":
            assert wide > 1.4 * fit, "intervals of F1 are as wide as they should be now"
        elif agrees == 0.35:
            assert seen < 0.85 and wide < 0.7 * fit, "intervals hold the value now"
PY
echo "as stated"
