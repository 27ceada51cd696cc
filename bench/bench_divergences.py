"""KL both ways and JS on this machine's CPU beside what a user would write: two log-softmaxes with every logit in
memory, their mixture, F.kl_div. N=512 pairs under the heads of SmolLM2-135M and Qwen2.5-0.5B. Reports ratios alone."""

from __future__ import annotations

import argparse
import math
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import ending_with_json, failed, interleaved, ratio, shown, skipped, surroundings, tell

from leakfast.forward import ops

SIZES = [(512, 576, 49_152), (512, 896, 151_936)]  # N, D, V


def eager(p, q, head):
    """(3, N) float32."""
    lp, lq = (torch.log_softmax((states @ head.T).float(), -1) for states in (p, q))
    lm = torch.logaddexp(lp, lq) - math.log(2)

    def kl(of, under):
        return F.kl_div(under, of, reduction="none", log_target=True).sum(-1)

    return torch.stack([kl(lp, lq), kl(lq, lp), (kl(lp, lm) + kl(lq, lm)) / 2])


def exact(p, q, head):
    """(3, N) float64, a few rows at a time."""
    found = []
    for row in range(0, len(p), 8):
        some = [states[row : row + 8].double() for states in (p, q)]
        logits = [torch.cat([x @ w.double().T for w in head.split(16_384)], 1) for x in some]
        lp, lq = (x.log_softmax(-1) for x in logits)
        lm = torch.logaddexp(lp, lq) - math.log(2)
        a, b = lp.exp(), lq.exp()
        js = ((a * (lp - lm)).sum(-1) + (b * (lq - lm)).sum(-1)) / 2
        found.append(torch.stack([(a * (lp - lq)).sum(-1), (b * (lq - lp)).sum(-1), js]))
    return torch.cat(found, 1)


def inputs(n, d, v):
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(n, d, generator=draw), torch.randn(n, d, generator=draw)
    return p, q, torch.empty(v, d).normal_(std=0.05, generator=draw)


def peak_bytes(n, d, v, threads):
    """Resident memory beyond what there was before, at its highest during a call; None where /proc has no peaks. To
    be run in a process of its own: memory that was freed before would hide it."""
    torch.set_num_threads(threads)
    p, q, head = inputs(n, d, v)
    ops.divergences(p[:1], q[:1], head[:100])
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ops.divergences(p, q, head)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")) - before


def measure(n, d, v, repeats, rows):
    """One row of the table: interleaved times of eager and ours, the ratio, errors, peak memory of ours."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(peak_bytes, n, d, v, torch.get_num_threads()).result()
    p, q, head = inputs(n, d, v)
    runs = {"eager": lambda: eager(p, q, head), "ours": lambda: torch.stack(ops.divergences(p, q, head))}
    wall, busy, first = interleaved(runs, repeats, lambda: None, lambda line: print(line, file=sys.stderr))
    groups = torch.arange(n).div(110, rounding_mode="floor")  # a persona's state beside those of 110 others
    apart, of = p[groups], groups.numpy()
    sharing = {
        "copies": lambda: ops.divergences(apart, q, head),
        "shared": lambda: ops.divergences(p, q, head, of=of),
    }
    _, shared, equal = interleaved(sharing, repeats, lambda: None, lambda line: print(line, file=sys.stderr))
    if not all(map(torch.equal, equal["copies"], equal["shared"])):
        raise RuntimeError("a row that several are compared with gives other bits than its copies")
    truth = exact(p[:rows], q[:rows], head)
    off = {name: (x[:, :rows].double() - truth).square().mean(1).sqrt().tolist() for name, x in first.items()}
    return {
        "N": n,
        "D": d,
        "V": v,
        "ratio_wall": ratio(wall["eager"], wall["ours"]),
        "ratio_cpu": ratio(busy["eager"], busy["ours"]),
        "copies_over_shared_cpu": ratio(shared["copies"], shared["shared"]),
        "error_rms_ours": off["ours"],
        "error_rms_eager_float32": off["eager"],
        "errs_no_more": all(a <= b for a, b in zip(off["ours"], off["eager"], strict=True)),
        "peak_bytes_ours": peak,
        "path": ops.explained_paths("cpu")["divergences"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--truth-rows", type=int, default=64, help="pairs that are compared with float64")
    parser.add_argument("--pairs", type=int, help="N (default: 512)")
    parser.add_argument("--threads", type=int, help="torch's own choice otherwise")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        return skipped("divergences", "this is about the CPU op", "cpu")
    with ending_with_json("divergences", "cpu"):
        run(arguments)
    return None


def run(arguments):
    if arguments.repeats < 5:
        sys.exit("a median needs --repeats 5 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [measure(arguments.pairs or n, d, v, arguments.repeats, arguments.truth_rows) for n, d, v in SIZES]
    print(f"divergences, {torch.get_num_threads()} threads: times as fast as eager torch")
    for row in rows:
        speed = f"wall {shown(row['ratio_wall'])}, CPU {shown(row['ratio_cpu'])}"
        print(f"    110 beside one: {shown(row['copies_over_shared_cpu'])} the CPU time of pairs, equal bits")
        errors = [" ".join(f"{x:.1e}" for x in row[f"error_rms_{k}"]) for k in ("ours", "eager_float32")]
        print(f"  N={row['N']} D={row['D']} V={row['V']}: {speed if row['errs_no_more'] else 'no ratio'}")
        print(f"    rms error of KL, KL, JS: {errors[0]} nats, eager float32 {errors[1]}")
        if row["peak_bytes_ours"] is not None:
            print(f"    peak beyond the inputs {row['peak_bytes_ours'] / 1e6:.1f} MB")
    if not all(row["errs_no_more"] for row in rows):
        failed("divergences", "the results differ from float64 by more than eager float32", "cpu")
        sys.exit(1)
    tell({"bench": "divergences", "rows": rows, **surroundings("cpu")})


if __name__ == "__main__":
    main()
