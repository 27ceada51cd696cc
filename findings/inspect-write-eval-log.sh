#!/usr/bin/env bash
# inspect_ai 0.3.285: the time of `write_eval_log` grows with the square of the number of samples of a log, though nothing in
# a sample refers to another. A log of 111,000 short samples, written in one call, takes hours; 4,000 take seconds.
# Guess beforehand: twice the samples, twice the time. Seen (CPU seconds of one run, samples with one message and one score):
#   1,000 samples 2.3 s, 2,000 samples 5.2 s, 4,000 samples 18.5 s
# What does not grow so: `write_eval_log` with header_only=True, and samples put into the archive by oneself.
# Version: inspect_ai 0.3.285 (the .eval format); where: inspect_ai/log/_recorders/eval.py.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q inspect_ai==0.3.285
venv/bin/python - <<'PY'
import time

from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSample, EvalSpec, write_eval_log
from inspect_ai.model import ChatMessageUser, ModelOutput
from inspect_ai.scorer import Score


def log(n):
    samples = [
        EvalSample(
            id=i, epoch=1, input="Is it raining?", target="",
            messages=[ChatMessageUser(content="Is it raining?")],
            output=ModelOutput.from_content("none", "No."), scores={"one": Score(value=1)},
        )
        for i in range(n)
    ]
    spec = EvalSpec(
        created="2026-01-01T00:00:00+00:00", task="weather", dataset=EvalDataset(name="weather", samples=n),
        model="none/none", config=EvalConfig(),
    )
    return EvalLog(eval=spec, samples=samples, status="success")


def seconds(n):
    made = log(n)
    began = time.process_time()
    write_eval_log(made, f"{n}.eval", format="eval")
    return time.process_time() - began


seconds(50)
took = {n: seconds(n) for n in (1000, 2000, 4000)}
print({n: round(t, 2) for n, t in took.items()})
growth = took[4000] / took[2000]
print("twice the samples, times the time:", round(growth, 2))
assert growth > 2.8, "it no longer grows with the square"
PY
echo "as stated"
