"""The choice op on this machine's CPU beside what a user would write: logits in the model's dtype, then a
float32 log-softmax and a gather. The 0.5B head: N=64, D=896, V=152,064. Reports ratios alone."""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from _common import ending_with_json, failed, skipped, surroundings, tell

from leakfast.forward import ops


def eager(hidden, head, ids):
    """(N, C) float32: every logit in memory, once in the model's dtype and once in float32."""
    return torch.log_softmax((hidden @ head.T).float(), -1).gather(1, ids)


def errors(hidden, head, ids, got):
    """Root mean square and largest error in nats against float64, of ours and of eager float32."""
    truth = torch.empty(ids.shape, dtype=torch.float64)
    for row in range(0, len(hidden), 8):  # float64 logits of all rows would be 78 MB, a float64 head 1 GB
        part = slice(row, row + 8)
        logits = torch.cat([hidden[part].double() @ w.double().T for w in head.split(16_384)], 1)
        truth[part] = torch.log_softmax(logits, -1).gather(1, ids[part])
    float32 = eager(hidden.float(), head.float(), ids)
    return [
        [float(e.square().mean().sqrt()), float(e.abs().max())]
        for e in (got.double() - truth, float32.double() - truth)
    ]


def measure(dtype, n, d, v, c, repeats):
    """One row of the table: interleaved times of eager and ours, their ratio, and the errors of both."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=draw).to(dtype)
    head = torch.empty(v, d, dtype=dtype).normal_(std=0.05, generator=draw)
    ids = torch.randint(0, v, (n, c), generator=draw)
    runs = {
        "eager": lambda: eager(hidden, head, ids),
        "ours": lambda: ops.choice_logprobs(hidden, head, ids)[0],
    }
    times_ms = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if repeat:
                times_ms[name].append(1e3 * (time.perf_counter() - begin))
    ours, float32 = errors(hidden, head, ids, runs["ours"]())
    ratios = [a / b for a, b in zip(times_ms["eager"], times_ms["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "N": n,
        "D": d,
        "V": v,
        "C": c,
        "repeats": repeats,
        "ratio_median": middle,
        "ratio_iqr": [low, high],
        "error_rms_max_ours": ours,
        "error_rms_max_eager_float32": float32,
        "errs_no_more": ours[0] <= float32[0],
        "path": ops.explained_paths("cpu", (str(dtype).removeprefix("torch."),))["choice_logprobs"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64, help="N, prompts")
    parser.add_argument("--width", type=int, default=896, help="D")
    parser.add_argument("--vocabulary", type=int, default=152_064, help="V")
    parser.add_argument("--threads", type=int, default=None, help="torch's own choice otherwise")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        why = "this is about the CPU op; bench_kernels.py --device cuda measures the GPU's"
        return skipped("choice_op", why, "cpu")
    with ending_with_json("choice_op", "cpu"):
        run(arguments)
    return None


def run(arguments):
    if arguments.repeats < 5:
        sys.exit("a median needs --repeats 5 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [
        measure(dtype, arguments.rows, arguments.width, arguments.vocabulary, 4, arguments.repeats)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"choice op, {torch.get_num_threads()} threads: times faster than eager torch (median, quartiles)")
    wrong = [row for row in rows if not row["errs_no_more"]]
    for row in rows:
        low, high = row["ratio_iqr"]
        speed = f"{row['ratio_median']:.2f}× ({low:.2f}–{high:.2f})"
        speed = "no ratio: it errs more than eager float32" if row in wrong else speed
        ours, float32 = row["error_rms_max_ours"], row["error_rms_max_eager_float32"]
        print(f"  {row['dtype']:9} {speed}   rms error {ours[0]:.2e} nats, eager float32 {float32[0]:.2e}")
    if wrong:
        failed("choice_op", "the results differ from float64 by more than eager float32", "cpu")
        sys.exit(1)
    tell({"bench": "choice_op", "rows": rows, **surroundings("cpu")})


if __name__ == "__main__":
    main()
