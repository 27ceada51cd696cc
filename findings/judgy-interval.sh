#!/usr/bin/env bash
# judgy 0.1.0: the rate of a behavior by a judge, corrected for the judge's errors on replies that a person labeled, with a 95 %
# interval. The interval knows how many replies were labeled, and not how many were judged.
# Guess beforehand: fewer replies, wider interval. Seen: a judge who agrees with all of 100 labels finds the behavior in 10 of 20
# replies of a persona, and the rate is 0.5, from 0.5 to 0.5; for 3 of 20 that of 0.15 is as certain.
#   a judge who errs in a tenth, 200 labels, 50 replies of a persona whose rate is 0.3: of 200 intervals 78 hold 0.3, and 186 with
#   the judged replies resampled as well
# Cause: labeled replies are resampled, the judged ones are not.
# Versions: judgy 0.1.0, numpy 2.4.6; where: judgy/core.py, estimate_success_rate.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile judgy==0.1.0 numpy==2.4.6
venv/bin/python - <<'PY'
import warnings

import numpy as np
from judgy import estimate_success_rate

warnings.simplefilter("error")
LABELS, REPLIES, RATE, ERRS, RESAMPLES, TRIALS = 200, 50, 0.3, 0.1, 300, 200
np.random.seed(0)
rng = np.random.default_rng(0)


def judged(shown):
    return np.where(rng.random(len(shown)) < ERRS, 1 - shown, shown)


def by_hand(labels, verdicts, replies):
    """95 % percentile interval of the corrected rate; labeled and judged replies are both resampled."""
    drawn = rng.integers(0, LABELS, (RESAMPLES, LABELS))
    label, verdict = labels[drawn], verdicts[drawn]
    hit = (label * verdict).sum(1) / label.sum(1)
    right_no = ((1 - label) * (1 - verdict)).sum(1) / (1 - label).sum(1)
    seen = replies[rng.integers(0, len(replies), (RESAMPLES, len(replies)))].mean(1)
    return np.quantile(((seen + right_no - 1) / (hit + right_no - 1)).clip(0, 1), [0.025, 0.975])


perfect = [1] * 50 + [0] * 50
for hits in (10, 3):
    rate, low, high = estimate_success_rate(perfect, perfect, [1] * hits + [0] * (20 - hits), 500)
    print(f"a judge without errors, {hits} of 20 replies: {rate:.2f}, interval {low:.2f} to {high:.2f}")
    assert abs(rate - hits / 20) < 1e-9 and high - low < 1e-9, "the interval looks at the judged replies now"

held = np.zeros(2, int)
for _ in range(TRIALS):
    labels, shown = (rng.random(LABELS) < 0.5).astype(int), (rng.random(REPLIES) < RATE).astype(int)
    verdicts, replies = judged(labels), judged(shown)
    _, low, high = estimate_success_rate(labels, verdicts, replies, RESAMPLES)
    below, above = by_hand(labels, verdicts, replies)
    held += [low <= RATE <= high, below <= RATE <= above]
print(f"of {TRIALS} intervals {held[0]} hold the rate; with the judged replies resampled {held[1]}")
assert held[0] < 0.7 * TRIALS < 0.9 * TRIALS < held[1], "intervals hold the rate now"
PY
echo "as stated"
