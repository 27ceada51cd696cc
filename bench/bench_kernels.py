"""The Triton kernels beside eager torch, torch.compile, F.linear_cross_entropy, Liger, cut-cross-entropy and QuACK,
whichever are there: fractions of the copy bandwidth and of the matrix rate measured in the same run; and each way
the engine knows for a block's norm and MLP. Needs a CUDA device: `--device cuda`. Inputs are larger than the L2."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
from functools import partial
from itertools import pairwise

import _between
import torch
import torch.nn.functional as F
from _common import card, ending_with_json, make_model, parser, ratio, skipped, spread, surroundings, tell
from _rows import Lost
from bench_divergences import eager as divergences_eager
from bench_divergences import exact as divergences_exact

from leakfast.forward import ops

# (N, D) of the choice op: the 7B head before the 0.5B one, many rows (by matrix rate) before few (by bandwidth)
SIZES = [(2048, 3584), (64, 3584), (2048, 896), (64, 896)]
VOCABULARY = 152_064
_HEAD_START = 2_000_000  # cycles, about a millisecond


def timed(runs, repeats, device):
    """Name → milliseconds of each repeat, interleaved, after two warm-ups; by events on a GPU."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            ms = timed_once(lambda run=run, repeat=repeat: run(repeat), device)
            if repeat >= 2:
                times[name].append(ms)
    return times


def timed_once(run, device):
    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)  # the host queues the run meanwhile: its launches are nobody's kernel time
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def ceilings(repeats, device, small):
    """Copy bandwidth (bytes read and written a second) and bf16 matrix rate (FLOP/s) of this device."""
    source = torch.randn(1 << (16 if small else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    side = 128 if small else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = timed({"copy": lambda _: target.copy_(source), "matrix": lambda _: a @ b}, repeats, device)
    copy_ms, matrix_ms = (statistics.median(times[name]) for name in ("copy", "matrix"))
    return 4 * source.numel() / copy_ms * 1e3, 2 * side**3 / matrix_ms * 1e3


def exact(hidden, head, ids):
    """float64 throughout, (N, C)."""
    return torch.log_softmax(hidden.double() @ head.double().T, -1).gather(1, ids)


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
    if importlib.util.find_spec("quack"):  # log-sum-exp and the target's logit as the product's epilogue
        epilogue = importlib.import_module("quack.epilogue.library").lse_target_epi

        def quack():
            made = epilogue(hidden, head.mT, store_d=False, target=first, tuned=False)
            return made["target_logit"] - made["lse"]

        found["QuACK"] = quack
    return found


def bench_choices(n, d, v, n_choices, options, rate, bandwidth):
    """One row: ours with all choices and the others, with the fraction of each ceiling."""
    device = options.device
    hidden = (torch.randn(n, d, device=device) * d**-0.5 * 4).bfloat16()
    head = torch.randn(v, d, device=device).bfloat16()
    ids = torch.randint(0, v, (n, n_choices), device=device)
    runs = {
        "ours": lambda: ops.choice_logprobs(hidden, head, ids, impl=options.impl)[0],
        "eager": lambda: eager(hidden, head, ids),
    }
    runs["tiles by torch"] = lambda: ops.choice_logprobs(hidden, head, ids, impl="tiled")[0]
    if may_compile(options):
        torch._dynamo.reset()  # a shape of its own, not one code for all
        compiled = torch.compile(eager, dynamic=False)
        runs["torch.compile"] = lambda: compiled(hidden, head, ids)
    runs |= libraries(hidden, head, ids)
    truth = exact(hidden[:64], head, ids[:64])

    def off(run):
        """Root mean square error in nats of the first choice of the first rows."""
        got = run()[:64].reshape(len(truth), -1)[:, 0].double()
        return float((got - truth[:, 0]).square().mean().sqrt())

    ours, same = (float((runs[k]()[:64].double() - truth).square().mean().sqrt()) for k in ("ours", "eager"))
    left_out = {}
    for name in [name for name in runs if name not in ("ours", "eager")]:
        # a library that does not run here, or computes something else, is left out aloud
        try:
            error = off(runs[name])
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as trouble:
            left_out[name] = f"{type(trouble).__name__}: {(str(trouble).splitlines() or [''])[0]}"
        else:
            if not error <= 4 * same:
                left_out[name] = f"rms error {error:.1e} nats, eager {same:.1e}"
        if name in left_out:
            del runs[name]
    with torch.no_grad():
        times = timed({k: lambda _, run=run: run() for k, run in runs.items()}, options.repeats, device)
    ms = statistics.median(times["ours"])
    flops, moved = 2 * n * d * v, 2 * d * (v + n)
    return {
        "op": "choice_logprobs",
        "N": n,
        "D": d,
        "V": v,
        "C": n_choices,
        "times_ms": {name: spread(t) for name, t in times.items()},
        "left_out": left_out,
        "ratio": {name: ratio(t, times["ours"]) for name, t in times.items() if name != "ours"},
        "flops": flops,
        "bytes": moved,
        "of_matrix_rate": flops / ms * 1e3 / rate,
        "of_copy_bandwidth": moved / ms * 1e3 / bandwidth,
        "rms_error_nats": [ours, same],
        "right": ours <= same,
    }


def bench_centroids(n_personas, n_questions, d, options, bandwidth):
    """One row: leaf rows of packed states, 28 tokens apart, against index_select and a sum a persona."""
    device, n = options.device, n_personas * n_questions
    packed = 28 * n * d
    # several copies, more than the L2 holds, where they fit in 32 GB
    copies = max(1, min(1 + (512 << 20) // (2 * n * d), (16 << 30) // packed)) if not options.rehearse else 2
    states = torch.randn(copies, 28 * n, d, device=device, dtype=torch.bfloat16)
    rows = torch.arange(n, device=device) * 28 + 27
    offsets = torch.arange(n_personas + 1, device=device) * n_questions

    def torchs(x):
        chosen = x[rows].view(n_personas, n_questions, d).float()
        return chosen.sum(1), chosen.square().sum(1)

    runs = {
        "ours": lambda i: ops.centroid_sums(states[i % copies], rows, offsets, impl=options.impl),
        "eager": lambda i: torchs(states[i % copies]),
    }
    if may_compile(options):
        torch._dynamo.reset()
        compiled = torch.compile(torchs, dynamic=False)
        runs["torch.compile"] = lambda i: compiled(states[i % copies])
    truth = torch.stack([states[0, rows[a:b]].double().sum(0) for a, b in pairwise(offsets.tolist())])
    ours, same = (
        float((runs[name](0)[0].double() - truth).square().mean().sqrt()) for name in ("ours", "eager")
    )
    floor = 2.0**-24 * float(truth.abs().max())
    times = timed(runs, options.repeats, device)
    ms = statistics.median(times["ours"])
    moved = 2 * n * d + 8 * n_personas * d + 8 * n
    return {
        "op": "centroid_sums",
        "N": n,
        "P": n_personas,
        "D": d,
        "times_ms": {name: spread(t) for name, t in times.items()},
        "ratio": {name: ratio(t, times["ours"]) for name, t in times.items() if name != "ours"},
        "bytes": moved,
        "of_copy_bandwidth": moved / ms * 1e3 / bandwidth,
        "rms_error": [ours, same],
        "right": ours <= max(same, floor),
    }


def bench_part(part, options):
    """One row: a norm or an MLP of the shape's block over a pack's rows, each way the engine knows."""
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    from leakfast.forward import fused

    net = make_model("tiny" if options.rehearse else options.shape, "bfloat16", "meta")
    kind = qwen2.Qwen2RMSNorm if part == "norm" else qwen2.Qwen2MLP
    config, t = net.config, 64 if options.rehearse else 16_384
    made = kind(config.hidden_size) if part == "norm" else kind(config)
    module = made.to(options.device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, t, config.hidden_size, device=options.device, dtype=torch.bfloat16)
    left_out, runs = {}, {}
    truth = module(x)
    for way in fused.ways(part):

        def run(_, way=way):
            with fused.applied(module, fused.PLAIN | {part: way}), torch.inference_mode():
                return module(x)

        try:
            error = float((run(0).float() - truth.float()).norm() / truth.float().norm())
        except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as trouble:
            left_out[way] = f"{type(trouble).__name__}: {(str(trouble).splitlines() or [''])[0]}"
        else:
            if error <= 1e-2:
                runs[way] = run
            else:
                left_out[way] = f"differs by {error:.1e}"
    times = timed(runs, options.repeats, options.device)
    return {
        "op": f"engine {part}",
        "N": t,
        "D": config.hidden_size,
        "left_out": left_out,
        "right": "plain" in runs,
        "times_ms": {name: spread(ms) for name, ms in times.items()},
        "ratio": {f"{name} over plain": ratio(times["plain"], ms) for name, ms in times.items()},
    }


def bench_divergences(n, d, v, options, rate):
    """One row: KL both ways and JS of n pairs of states against eager torch."""
    p, q = ((torch.randn(n, d, device=options.device) * d**-0.5).bfloat16() for _ in range(2))
    head = torch.randn(v, d, device=options.device).bfloat16()
    runs = {
        "ours": lambda _: torch.stack(ops.divergences(p, q, head, impl=options.impl)),
        "eager": lambda _: divergences_eager(p, q, head),
    }
    with torch.inference_mode():
        truth = divergences_exact(p[:64], q[:64], head)
        off = [float((runs[k](0)[:, :64] - truth).square().mean().sqrt()) for k in ("ours", "eager")]
        times = timed(runs, options.repeats, options.device)
    flops = 4 * n * d * v
    return {
        "op": "divergences",
        "N": n,
        "D": d,
        "V": v,
        "times_ms": {name: spread(t) for name, t in times.items()},
        "ratio": {"eager": ratio(times["eager"], times["ours"])},
        "flops": flops,
        "of_matrix_rate": flops / statistics.median(times["ours"]) * 1e3 / rate,
        "rms_error_nats": off,
        "right": off[0] <= max(off[1], 2e-4),
    }


def bench_between(op, options, bandwidth):
    """One row: what stands between the products of the 7B's block, over a pack's tokens, against eager torch."""
    sizes = (64, 4, 2, 16, 128) if options.rehearse else (16_384, 28, 4, 128, 18_944)
    case = _between.cases(options.device, *sizes)[op]
    with torch.inference_mode():
        ours, eager = _between.errors(case)
        runs = {"ours": lambda _: case.ours(), "eager": lambda _: case.eager()}
        times = timed(runs, options.repeats, options.device)
    return {
        "op": op,
        "N": sizes[0],
        "D": sizes[4] if op in ("gated", "fp8_rows") else sizes[1] * sizes[3],
        "times_ms": {name: spread(t) for name, t in times.items()},
        "ratio": {"eager": ratio(times["eager"], times["ours"])},
        "of_copy_bandwidth": case.moved / statistics.median(times["ours"]) * 1e3 / bandwidth,
        "rms_error": [ours, eager],
        "right": ours <= max(1.02 * eager, 1e-6),
    }


def may_compile(options):
    """Whether this row is among the first --compiled, which alone are measured beside torch.compile: it takes seconds."""
    options.compiled -= 1
    return not options.rehearse and options.compiled >= 0


def jobs(options, bandwidth, rate):
    """(what, what makes its row), those first that a bar is about: the choice op at the 7B head, the sums of many
    rows, the block's norm and MLP."""
    v = 512 if options.rehearse else VOCABULARY
    sizes = [(5, 64), (70, 64)] if options.rehearse else SIZES
    choices = [
        (f"choice_logprobs N={n} D={d} C={c}", partial(bench_choices, n, d, v, c, options, rate, bandwidth))
        for c in (4, 1)
        for n, d in sizes
    ]
    people, questions, width = (3, (4,), 64) if options.rehearse else (111, (586, 20), 3584)
    sums = [
        (f"centroid_sums P={people} Q={q}", partial(bench_centroids, people, q, width, options, bandwidth))
        for q in questions
    ]
    block = [(f"engine {part}", partial(bench_part, part, options)) for part in ("norm", "mlp")]
    names = ("rope", "gated", "add_norm", "fp8_rows")
    block += [(name, partial(bench_between, name, options, bandwidth)) for name in names]
    n, d = (5, 64) if options.rehearse else (512, 3584)
    pairs = [(f"divergences N={n} D={d}", partial(bench_divergences, n, d, v, options, rate))]
    return [*choices[:2], *sums, *block, *pairs, *choices[2:]]


def measure(options):
    """Every row, told as it comes; one that breaks says with what and leaves the others."""
    bandwidth, rate = ceilings(options.repeats, options.device, options.rehearse)
    ceiling, rows = {"copy_bytes_s": bandwidth, "matrix_flop_s": rate}, []
    for what, make in jobs(options, bandwidth, rate):
        with Lost() as lost:
            rows.append(make())
        if lost.why:
            rows.append({"op": what, "failed": lost.why, "right": False})
        tell({"bench": "kernels", "partial": len(rows), "rows": rows[-1:], **ceiling})
    return rows, bandwidth, rate


def line(row):
    sizes = " ".join(f"{key}={row[key]}" for key in ("P", "N", "D", "C") if key in row)
    if "failed" in row:
        return row["op"], f"not measured: {row['failed']}"
    if not row["right"]:
        return f"{row['op']} {sizes}", f"WRONG by {row.get('rms_error_nats', row.get('rms_error'))}: no ratio"
    mine = row["times_ms"].get("ours", row["times_ms"].get("plain"))["median"]
    share = [f"{row[key]:.0%} {key}" for key in ("of_matrix_rate", "of_copy_bandwidth") if key in row]
    ratios = [f"{value['median']:.2f}× {name}" for name, value in row["ratio"].items()]
    out = [f"{name} left out: {why}" for name, why in row.get("left_out", {}).items()]
    return f"{row['op']} {sizes}", "; ".join([f"{mine:.3f} ms", *share, *ratios, *out])


def main():
    made = parser(__doc__)
    made.set_defaults(repeats=11)
    made.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on any device: does it run through?"
    )
    made.add_argument("--compiled", type=int, default=99, help="rows that torch.compile is measured beside")
    options = made.parse_args()
    options.shape = options.shape or "qwen2.5-7b"
    options.impl = "triton" if options.device == "cuda" else "auto"
    if options.device == "cpu" and not options.rehearse:
        why = "GPU kernels are measured with --device cuda; bench_choice_op.py measures the CPU op"
        return skipped("kernels", why, "cpu")
    with ending_with_json("kernels", options.device):
        if options.repeats < 5 and not options.rehearse:
            sys.exit("a median needs --repeats 5 or more")
        torch.manual_seed(options.seed)
        rows, bandwidth, rate = measure(options)
        record = {
            "bench": "kernels",
            "rows": rows,
            "copy_bytes_s": bandwidth,
            "matrix_flop_s": rate,
            "rehearsal": options.rehearse,
            **surroundings(options.device),
        }
        ceiling = f"copy {bandwidth / 1e12:.2f} TB/s, bf16 matrix {rate / 1e12:.0f} TFLOP/s"
        card("kernels", [("measured here", ceiling), *map(line, rows)], record)
    sys.exit(0 if all(row["right"] for row in rows) else 1)


if __name__ == "__main__":
    main()
