#!/usr/bin/env bash
# crowd-kit 1.4.2: scores of models from pairwise comparisons. `BradleyTerry` makes two steps towards them, whatever `n_iter` and
# `tol` are.
# Guess beforehand: with n_iter=10_000 the scores of maximum likelihood, as of any other package. Seen: the first model won 9 of 10
# comparisons with the second, and the second 9 of 10 with the third; by the scores the first beats the second with probability
# 0.75, where 0.90 was seen, and the third with 0.955 (0.988): the scores lie too close together.
#   scores 0.724, 0.241, 0.034; of maximum likelihood 0.890, 0.099, 0.011; the same with n_iter=2
# Cause: a step's change is measured between an array and itself, so it is zero at the second one, which counts as arrived.
# Versions: crowd-kit 1.4.2, choix 0.4.1, numpy 2.4.6; where: crowdkit/aggregation/pairwise/bradley_terry.py, fit (p_old).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile crowd-kit==1.4.2 choix==0.4.1 numpy==2.4.6
venv/bin/python - <<'PY'
import choix
import numpy as np
import pandas as pd
from crowdkit.aggregation.pairwise import BradleyTerry

WINS, GAMES = 9, 10


def scores(games, steps):
    frame = pd.DataFrame([(f"m{a}", f"m{b}", f"m{a}") for a, b in games], columns=["left", "right", "label"])
    return BradleyTerry(n_iter=steps, tol=1e-12).fit_predict(frame).to_numpy()


def beats(score, a, b):
    return score[a] / (score[a] + score[b])


games = [pair for a in (0, 1) for pair in [(a, a + 1)] * WINS + [(a + 1, a)] * (GAMES - WINS)]
two, many = scores(games, 2), scores(games, 10_000)
best = np.exp(choix.ilsr_pairwise(3, games, alpha=0))
best /= best.sum()
for name, score in (("2 steps", two), ("10,000 steps", many), ("maximum likelihood", best)):
    print(f"{name}: scores {np.round(score, 3)}, first beats second {beats(score, 0, 1):.3f}, third {beats(score, 0, 2):.3f}")
assert abs(beats(best, 0, 1) - WINS / GAMES) < 1e-4
assert np.array_equal(two, many) and abs(beats(many, 0, 1) - WINS / GAMES) > 0.1, "steps go on until the scores stand still now"
PY
echo "as stated"
