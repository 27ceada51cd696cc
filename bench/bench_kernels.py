"""The Triton kernels beside eager torch, torch.compile, F.linear_cross_entropy, Liger and cut-cross-entropy,
whichever are there: fractions of the copy bandwidth and of the matrix rate measured in the same run. Needs a
CUDA device: `--device cuda`. Inputs are drawn anew and rotated past the L2."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from leakfast import ops

SHAPES = [(64, 896), (64, 3584), (2048, 896), (2048, 3584)]  # (N, D): the 0.5B and the 7B head
VOCABULARY = 152_064


def commit():
    """The checkout's commit, with + where files differ from it."""
    where = Path(__file__).resolve().parent
    tell = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(tell, cwd=where, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def last_line(name, rows, hardware, at):
    """The one line of JSON a bench ends with."""
    packages = ("leakfast", "torch", "triton", "liger-kernel", "cut-cross-entropy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(json.dumps({"bench": name, "rows": rows, "versions": versions, "hardware": hardware, "commit": at}))


def timed(runs, repeats):
    """Name → milliseconds of each repeat, interleaved, by device events after two warm-ups."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run(repeat)
            end.record()
            torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(begin.elapsed_time(end))
    return times


def spread(times_ms):
    low, middle, high = statistics.quantiles(times_ms, n=4)
    return {"median_ms": middle, "iqr_ms": [low, high]}


def ceilings(repeats):
    """Copy bandwidth (bytes read and written a second) and bf16 matrix rate (FLOP/s) of this device."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = timed({"copy": lambda _: target.copy_(source), "matrix": lambda _: a @ b}, repeats)
    copy_ms, matrix_ms = (statistics.median(times[name]) for name in ("copy", "matrix"))
    return 4 * source.numel() / copy_ms * 1e3, 2 * 8192**3 / matrix_ms * 1e3


def eager(hidden, head, ids):
    return torch.log_softmax((hidden @ head.T).float(), -1).gather(1, ids)


def libraries(hidden, head, ids):
    """Name → log-probability of the first choice alone, (N,): what each library's loss gives."""
    found = {}
    first = ids[:, 0].contiguous()
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda: (
            -F.linear_cross_entropy(hidden, head, first, reduction="none")
        )
    if importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        liger = module.LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["Liger"] = lambda: -liger(head, hidden, first)
    if importlib.util.find_spec("cut_cross_entropy"):
        cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut-cross-entropy"] = lambda: -cce(hidden, head, first, reduction="none")
    return found


def bench_choices(n, d, rate, bandwidth, repeats, n_choices):
    """One row: ours with all choices and the others, with the fraction of each ceiling."""
    hidden = (torch.randn(n, d, device="cuda") * d**-0.5 * 4).bfloat16()
    head = torch.randn(VOCABULARY, d, device="cuda").bfloat16()
    ids = torch.randint(0, VOCABULARY, (n, n_choices), device="cuda")
    compiled = torch.compile(eager)
    runs = {
        "ours": lambda: ops.choice_logprobs(hidden, head, ids, impl="triton")[0],
        "eager": lambda: eager(hidden, head, ids),
        "torch.compile": lambda: compiled(hidden, head, ids),
        **libraries(hidden, head, ids),
    }
    truth = eager(hidden[:64].double(), head.double(), ids[:64])
    same = (eager(hidden, head, ids)[:64].double() - truth).square().mean().sqrt()
    ours = (runs["ours"]()[:64].double() - truth).square().mean().sqrt()
    left_out = {}
    for name in list(runs)[
        2:
    ]:  # a library that does not run here, or computes something else, is left out aloud
        try:
            off = (
                (runs[name]()[:64].reshape(min(n, 64), -1)[:, 0].double() - truth[:, 0])
                .square()
                .mean()
                .sqrt()
            )
        except (RuntimeError, TypeError, ValueError) as error:
            left_out[name] = str(error).splitlines()[0]
        else:
            if not off <= 4 * same:
                left_out[name] = f"rms error {float(off):.1e} nats, eager {float(same):.1e}"
        if name in left_out:
            del runs[name]
    with torch.no_grad():
        times = timed({name: lambda _, run=run: run() for name, run in runs.items()}, repeats)
    ms = statistics.median(times["ours"])
    flops, moved = 2 * n * d * VOCABULARY, 2 * d * (VOCABULARY + n)
    return {
        "op": "choice_logprobs", "N": n, "D": d, "V": VOCABULARY, "C": n_choices,
        "times": {name: spread(t) for name, t in times.items()}, "left_out": left_out,
        "ratio": {name: statistics.median(t) / ms for name, t in times.items() if name != "ours"},
        "flops": flops, "bytes": moved, "of_matrix_rate": flops / ms * 1e3 / rate,
        "of_copy_bandwidth": moved / ms * 1e3 / bandwidth,
        "rms_error_nats": [float(ours), float(same)], "right": bool(ours <= same),
    }  # fmt: skip


def bench_centroids(n_personas, n_questions, d, bandwidth, repeats):
    """One row: leaf rows of packed states, 28 tokens apart, against index_select and a sum a persona."""
    n = n_personas * n_questions
    copies = 1 + (512 << 20) // (2 * n * d)  # several times the L2
    states = (
        torch.randn(copies, 28 * n, d, device="cuda", dtype=torch.bfloat16)
        if 28 * n * d * copies < 1 << 34
        else None
    )
    if states is None:
        copies, states = 1, torch.randn(1, 28 * n, d, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(n, device="cuda") * 28 + 27
    offsets = torch.arange(n_personas + 1, device="cuda") * n_questions

    def torchs(x):
        chosen = x[rows].view(n_personas, n_questions, d).float()
        return chosen.sum(1), chosen.square().sum(1)

    compiled = torch.compile(torchs)
    runs = {
        "ours": lambda i: ops.centroid_sums(states[i % copies], rows, offsets, impl="triton"),
        "eager": lambda i: torchs(states[i % copies]),
        "torch.compile": lambda i: compiled(states[i % copies]),
    }
    truth = torch.stack([states[0, rows[a:b]].double().sum(0) for a, b in pairwise(offsets.tolist())])
    ours, same = ((runs[name](0)[0].double() - truth).square().mean().sqrt() for name in ("ours", "eager"))
    floor = 2.0**-24 * truth.abs().max()
    times = timed(runs, repeats)
    ms = statistics.median(times["ours"])
    moved = 2 * n * d + 8 * n_personas * d + 8 * n
    return {
        "op": "centroid_sums", "N": n, "P": n_personas, "D": d,
        "times": {name: spread(t) for name, t in times.items()},
        "ratio": {name: statistics.median(t) / ms for name, t in times.items() if name != "ours"},
        "bytes": moved, "of_copy_bandwidth": moved / ms * 1e3 / bandwidth,
        "rms_error": [float(ours), float(same)], "right": bool(ours <= max(same, floor)),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        return print(
            "bench_kernels measures GPU kernels: give --device cuda. bench_choice_op.py measures the CPU op."
        )
    if not torch.cuda.is_available():
        sys.exit(
            "bench_kernels: --device cuda asked, but torch sees no CUDA device. Run it on a machine with a GPU."
        )
    if arguments.repeats < 5:
        sys.exit("a median needs --repeats 5 or more")
    bandwidth, rate = ceilings(arguments.repeats)
    print(
        f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, bf16 matrix {rate / 1e12:.0f} TFLOP/s"
    )
    rows = [bench_centroids(111, q, 3584, bandwidth, arguments.repeats) for q in (20, 586)]
    for n_choices in (4, 1):
        rows += [bench_choices(n, d, rate, bandwidth, arguments.repeats, n_choices) for n, d in SHAPES]
    for row in rows:
        sizes = " ".join(f"{key}={row[key]}" for key in ("P", "N", "D", "C") if key in row)
        if not row["right"]:
            print(
                f"  {row['op']} {sizes}: WRONG by {row.get('rms_error_nats', row.get('rms_error'))}: no ratio"
            )
            continue
        share = [f"{row[key]:.0%} {key}" for key in ("of_matrix_rate", "of_copy_bandwidth") if key in row]
        ratios = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in row["ratio"].items())
        print(
            f"  {row['op']} {sizes}: {row['times']['ours']['median_ms']:.3f} ms, {', '.join(share)}; {ratios}"
        )
        for name, why in row.get("left_out", {}).items():
            print(f"    {name} left out: {why}")
    if not all(row["right"] for row in rows):
        sys.exit("a result is wrong: no speed-up is reported")
    last_line(
        "kernels",
        rows,
        {"gpu": torch.cuda.get_device_name(), "copy_bytes_s": bandwidth, "flops": rate},
        commit(),
    )


if __name__ == "__main__":
    main()
