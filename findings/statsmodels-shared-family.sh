#!/usr/bin/env bash
# statsmodels 0.15.0: one `Binomial()` handed to the GLMs of several behaviors. A fit of (hits, misses) leaves its numbers of
# replies in the family, and what a result computes when it is asked, computes it with those of the last fit.
# Guess beforehand: a family is a distribution and a link, so results do not depend on each other. Seen: coefficients and
# standard errors do not; log-likelihood, deviance, AIC, BIC and pseudo R² do, without a word.
#   10 replies a persona, asked after another behavior was fitted with 200: log-likelihood -328.9 where its own family gives -48.3,
#   AIC 661.8 (100.6), pseudo R² 0.96 (0.14); rows of 0 and 1 fitted after it: 200 times their log-likelihood
# Asked before the second fit they are right, and stay so. What it needs: a family for each model.
# Version: statsmodels 0.15.0; where: statsmodels/genmod/families/family.py, Binomial.initialize.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q statsmodels==0.15.0
venv/bin/python - <<'PY'
import warnings

import numpy as np
import statsmodels.api as sm

warnings.simplefilter("error")
PERSONAS, FEW, MANY = 30, 10, 200
rng = np.random.default_rng(0)
cosine = rng.normal(size=PERSONAS)
design = sm.add_constant(cosine)


def counts(replies, slope):
    hits = rng.binomial(replies, 1 / (1 + np.exp(1 - slope * cosine)))
    return np.column_stack([hits, replies - hits])


few, many = counts(FEW, 0.5), counts(MANY, 0.2)
once = (rng.random(PERSONAS) < 0.4).astype(float)


def numbers(result):
    return {
        "llf": float(result.llf), "deviance": float(result.deviance), "aic": float(result.aic),
        "bic": float(result.bic_llf), "pseudo_r2": float(result.pseudo_rsquared()),
    }


def fitted(data, family):
    return sm.GLM(data, design, family=family).fit()


own, own_once = fitted(few, sm.families.Binomial()), fitted(once, sm.families.Binomial())
family = sm.families.Binomial()
early, late = fitted(few, family), fitted(few, family)
before = numbers(early)
fitted(many, family)
after, shared_once = numbers(late), fitted(once, family)
for name, right in numbers(own).items():
    print(f"{name}: own family {right:.2f}, shared {after[name]:.2f}, shared and asked before the other fit {before[name]:.2f}")
ratio = shared_once.llf / own_once.llf
print(f"rows of 0 and 1 after it: log-likelihood {shared_once.llf:.1f} where {own_once.llf:.1f} is meant, {ratio:.1f} times")
assert np.allclose(own.params, late.params) and np.allclose(own.bse, late.bse)
assert all(np.isclose(before[name], right) for name, right in numbers(own).items())
assert abs(after["llf"] - own.llf) > 100 and after["pseudo_r2"] > 0.8 > 0.3 > own.pseudo_rsquared()
assert abs(ratio - MANY) < 1e-6, "a family no longer keeps what it was fitted to"
PY
echo "as stated"
