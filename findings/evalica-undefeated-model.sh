#!/usr/bin/env bash
# evalica 0.4.2: Bradley-Terry scores of models from pairwise comparisons where one model won all of its comparisons, or lost all of
# them, as the best and the worst of a small comparison often do. The scores of all models are then the same number.
# Guess beforehand: that model is first (or last), and the others stand to each other as they do without it, as its comparisons say
# nothing about them. Seen, four models, 20 comparisons a pair, the order a, b, c, d:
#   as drawn 2.996, 1.400, 0.552, 0.431; without a 1.912, 0.805, 0.649
#   a won all 60: 0.000001 for each, after 2 steps, as if they had converged; so that b beats c with probability 0.5, 0.704 is right
#   d lost all 60: 0.000001 for each after 100 steps (limit=100), and the largest number there is for a, b and c after 101
# `newman` gives 0.000001 to each too where a won all; where d lost all it is right. Both solvers, "pyo3" and "naive", do the same.
# Cause: the score of a model that never lost is infinite, and that of one that never won zero; all are divided by their geometric
# mean, and what is not a number after it becomes `tolerance`.
# Versions: evalica 0.4.2, numpy 2.4.6, pandas 3.0.3; where: src/bradley_terry.rs and python/evalica/_pairwise.py, bradley_terry.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile evalica==0.4.2 numpy==2.4.6 pandas==3.0.3
venv/bin/python - <<'PY'
import numpy as np
from evalica import Winner, bradley_terry, newman

GAMES, TOLERANCE = 20, 1e-6
WINS = {("a", "b"): 13, ("a", "c"): 17, ("a", "d"): 18, ("b", "c"): 15, ("b", "d"): 14, ("c", "d"): 12}
TABLES = {
    "as drawn": WINS,
    "a won all": {pair: GAMES if "a" in pair else won for pair, won in WINS.items()},
    "d lost all": {pair: GAMES if "d" in pair else won for pair, won in WINS.items()},
    "without a": {pair: won for pair, won in WINS.items() if "a" not in pair},
    "without d": {pair: won for pair, won in WINS.items() if "d" not in pair},
}


def fitted(table, fit=bradley_terry, **how):
    """Scores by name of model, and the number of steps: the first of a pair won `WINS` of its GAMES comparisons."""
    rows = [(*pair, Winner.X if game < won else Winner.Y) for pair, won in TABLES[table].items() for game in range(GAMES)]
    result = fit(*(list(column) for column in zip(*rows)), tolerance=TOLERANCE, **how)
    return {name: float(result.scores[name]) for name in sorted(result.scores.index)}, result.iterations


def share(scores, one, two):
    return scores[one] / (scores[one] + scores[two])


for solver in ("pyo3", "naive"):
    seen = {table: fitted(table, solver=solver)[0] for table in TABLES}
    for table, scores in seen.items():
        steps = fitted(table, solver=solver)[1]
        print(f"{solver}, {table}: " + ", ".join(f"{name} {score:.6f}" for name, score in scores.items()) + f"; {steps} steps")
    beside, alone = share(seen["a won all"], "b", "c"), share(seen["without a"], "b", "c")
    print(f"b beats c: {beside:.3f} beside a who won all, {alone:.3f} without a")
    for table in ("a won all", "d lost all"):
        assert all(score == TOLERANCE for score in seen[table].values()), "scores tell models apart now"
    assert fitted("a won all", solver=solver)[1] < 5
    late = fitted("d lost all", solver=solver, limit=101)[0]
    print(f"d lost all, 101 steps: {late}")
    assert late["a"] == late["b"] == late["c"] == np.finfo(float).max
    assert all(score == TOLERANCE for score in fitted("a won all", newman, solver=solver)[0].values())
    last = fitted("d lost all", newman, solver=solver)[0]
    rest = fitted("without d", newman, solver=solver)[0]
    assert np.isclose(share(last, "a", "b"), share(rest, "a", "b"), atol=1e-3)
PY
echo "as stated"
