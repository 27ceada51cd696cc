#!/usr/bin/env bash
# girth 0.8.0: ability of models by item response theory, `ability_mle`, where not every model was asked every item. A model that
# answered all of its items wrong gets the ability of one that answered all of them right.
# Guess beforehand: with no_estimate=4 a model with nothing right has ability -4 and one with everything right 4, as the docstring
# says, whichever items were asked. Seen, ten items:
#   all asked: nothing right -4, everything right 4; one item not asked: nothing right 4, everything right 4
#   200 models, nine of ten hard items each: 42 have ability 4, 41 of them with nothing right; the correlation with the abilities that
#   the replies were drawn from is -0.17, and 0.69 with the 41 at -4
# `ability_eap` is right (-1.78 and -1.63 for nothing right), and so is `ability_mle` without no_estimate, which gives NaN.
# Cause: nothing right is where the smallest reply is 0, and a reply that is missing is -99999.
# Versions: girth 0.8.0, numpy 2.4.6, scipy 1.17.1; where: girth/unidimensional/dichotomous/ability_estimation.py, mask2.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile girth==0.8.0 numpy==2.4.6 scipy==1.17.1
venv/bin/python - <<'PY'
import numpy as np
from girth import INVALID_RESPONSE, ability_eap, ability_mle

ITEMS, MODELS, LIMIT = 10, 200, 4
difficulty = np.linspace(-1, 1, ITEMS)
rng = np.random.default_rng(0)


def replies(right, missing=0):
    """A model with `right` items right, the last ones, and its first `missing` items not asked."""
    row = np.where(np.arange(ITEMS) >= ITEMS - right, 1, 0)
    row[:missing] = INVALID_RESPONSE
    return row


rows = {
    "nothing right": replies(0), "nothing right, one missing": replies(0, 1),
    "everything right": replies(ITEMS), "everything right, one missing": replies(ITEMS - 1, 1),
}
table = np.array(list(rows.values())).T
found = {
    "ability_mle": ability_mle(table, difficulty, 1.0, no_estimate=LIMIT),
    "ability_eap": ability_eap(table, difficulty, 1.0),
}
for name, abilities in found.items():
    print(f"{name}: " + ", ".join(f"{row} {ability:.2f}" for row, ability in zip(rows, abilities)))
assert np.array_equal(found["ability_mle"], [-LIMIT, LIMIT, LIMIT, LIMIT]), "nothing right is low now"
assert np.all(found["ability_eap"][:2] < -1) and np.all(np.isnan(ability_mle(table, difficulty, 1.0)))

hard = difficulty + 1.5
truth = rng.normal(size=MODELS)
table = (rng.random((ITEMS, MODELS)) < 1 / (1 + np.exp(hard[:, None] - truth))).astype(int)
table[rng.integers(0, ITEMS, MODELS), np.arange(MODELS)] = INVALID_RESPONSE
ability = ability_mle(table, hard, 1.0, no_estimate=LIMIT)
right = (table == 1).sum(0)
best, meant = ability == LIMIT, np.where(right == 0, -LIMIT, ability)
seen, fixed = (float(np.corrcoef(values, truth)[0, 1]) for values in (ability, meant))
print(f"{MODELS} models: {best.sum()} at {LIMIT}, of them {(best & (right == 0)).sum()} with nothing right")
print(f"correlation with the true ability: {seen:.2f}, {fixed:.2f} with the others at -{LIMIT}")
assert np.all(best[right == 0]) and (right == 0).sum() > 10 and seen < fixed - 0.3
PY
echo "as stated"
