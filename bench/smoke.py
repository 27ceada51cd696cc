"""A minute of correctness before anything is timed: every kernel against float64 beside eager torch of the same dtype,
the attention that is taken, the engine against transformers one prompt at a time, FP8 where the device has it. A line of
JSON a check as it comes; one that fails or breaks says so and leaves the others. Times nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import _between
import numpy as np
import torch
from _common import SHAPES, ending_with_json, loaded, make_model, parser, surroundings, tell
from _rows import Lost
from bench_centroids import one_at_a_time, overall
from bench_divergences import eager as divergences_eager
from bench_divergences import exact as divergences_exact

from leakfast.forward import attention, fp8, ops, passes

SHAPES["smoke"] = {  # heads of 64, grouped, four blocks: small enough for float32 one prompt at a time
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
LAYERS = [1, 3]
# (N, V, D): few rows, the 7B head, many rows and a tile and a bit, nothing aligned
VOCABULARIES = [(5, 152_064, 3584), (64, 152_064, 3584), (300, 4097, 896), (70, 1001, 77)]
STATES = [(20, 3584), (90, 3584), (20, 77)]  # (Q, D) of 111 personas: the study's, many rows, an odd width
NATS = 2e-4  # what float32 sums over V leave, whatever the way


def choices(device: str, n: int, v: int, d: int) -> dict[str, Any]:
    """Log-probabilities and log-sum-exp, nats: root mean square errors of ours and of eager torch."""
    hidden, head = made((n, d), device, 4 * d**-0.5), made((v, d), device)
    ids = torch.randint(0, v, (n, 4), device=device)
    poison(device)
    got, lse = ops.choice_logprobs(hidden, head, ids, impl=impl_of(device))
    again = ops.choice_logprobs(hidden, head, ids, impl=impl_of(device))
    logits = hidden.double() @ head.double().T
    truth, total = logits.log_softmax(-1).gather(1, ids), logits.logsumexp(-1)
    plain = (hidden @ head.T).float().log_softmax(-1).gather(1, ids)
    ours = max(rms(got, truth), rms(lse, total))
    return judged(ours, rms(plain, truth), NATS, torch.equal(got, again[0]) and torch.equal(lse, again[1]))


def divergences(device: str, n: int, v: int, d: int) -> dict[str, Any]:
    """KL both ways and JS, nats: root mean square errors of ours and of eager torch."""
    given = made((n, d), device, d**-0.5), made((n, d), device, d**-0.5), made((v, d), device)
    poison(device)
    got = torch.stack(ops.divergences(*given, impl=impl_of(device)))
    again = torch.stack(ops.divergences(*given, impl=impl_of(device)))
    truth = divergences_exact(*given)
    return judged(rms(got, truth), rms(divergences_eager(*given), truth), NATS, torch.equal(got, again))


def centroid_sums(device: str, personas: int, questions: int, d: int) -> dict[str, Any]:
    """Sums of leaf rows: relative errors of ours and of eager torch."""
    n = personas * questions
    states = made((3 * n, d), device)
    rows = torch.randperm(3 * n, device=device)[:n]
    offsets = torch.arange(personas + 1, device=device) * questions
    poison(device)
    got = ops.centroid_sums(states, rows, offsets, impl=impl_of(device))
    again = ops.centroid_sums(states, rows, offsets, impl=impl_of(device))
    chosen = states[rows].view(personas, questions, d)
    truth = [chosen.double().sum(1), chosen.double().square().sum(1)]
    plain = [chosen.float().sum(1), chosen.float().square().sum(1)]
    ours, eager = (max(map(relative, found, truth)) for found in (got, plain))
    return judged(ours, eager, 1e-6, all(map(torch.equal, got, again)))


def attending(device: str) -> dict[str, Any]:
    """Which attention the engine takes; on a GPU there must be one of variable length."""
    taken = attention.variable_length(device, 0 if device == "cuda" else None, torch.bfloat16, 128)
    return {"taken": str(taken), "ok": device == "cpu" or taken is not None}


def between(device: str, op: str, sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Root mean square errors of a kernel between the block's products and of eager torch."""
    poison(device)
    first, again = (_between.cases(device, *sizes)[op] for _ in range(2))
    ours, eager = _between.errors(first)
    same = all(map(torch.equal, _between.cases(device, *sizes)[op].ours(), again.ours()))
    return judged(ours, eager, max(1e-6, 1.02 * eager), same)


def engine(device: str, dtype: str, tiny: bool) -> dict[str, Any]:
    """Last-token states beside transformers one prompt at a time: float32 within 1e-5 of it, bfloat16 no further from
    float32 than transformers' own (and a tenth, as both are random)."""
    rng = np.random.default_rng(0)
    heads, tails = (
        [rng.integers(0, 500, int(n)).tolist() for n in rng.integers(low, high, count)]
        for low, high, count in ((3, 40, 3 if tiny else 12), (1, 30, 2 if tiny else 6))
    )
    prompts = [head + tail for head in heads for tail in tails]
    net, layers = make_model("tiny" if tiny else "smoke", dtype, device), [0, 2] if tiny else LAYERS
    got = passes.last_token_states(loaded(net, dtype), prompts, layers, budget_tokens=400)
    theirs = one_at_a_time(net, prompts, layers, device)
    truth = theirs if dtype == "float32" else one_at_a_time(net.float(), prompts, layers, device)
    ours, same = overall(got, truth), overall(theirs, truth)
    good = ours <= (1e-5 if dtype == "float32" else 1.1 * same)
    return {"error": ours, "error_transformers": same, "ok": bool(good), "prompts": len(prompts)}


def in_fp8(device: str) -> dict[str, Any]:
    """States with FP8 products beside the bfloat16 ones."""
    net = make_model("smoke", "bfloat16", device)
    ready = loaded(net, "bfloat16")
    if reason := fp8.why_not(ready.device, torch.bfloat16):
        return {"skipped": reason, "ok": True}
    prompts = [np.random.default_rng(i).integers(0, 4000, 40).tolist() for i in range(40)]
    with fp8.running(ready, "fp8", prompts, LAYERS) as agreement:
        pass
    return {"agreement": str(agreement), "ok": all(0 < off < 0.2 for off in agreement.rms.values())}


def made(shape: tuple[int, ...], device: str, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers: bfloat16 on a GPU, float32 on a CPU, whose op takes no other without a copy."""
    x = torch.randn(*shape, device=device) * scale
    return x.bfloat16() if device == "cuda" else x


def impl_of(device: str) -> str:
    return "triton" if device == "cuda" else "auto"


def poison(device: str) -> None:
    """Fills memory that is freed again with NaN: what a kernel leaves unwritten shows."""
    torch.full((1 << (26 if device == "cuda" else 16),), float("nan"), device=device)


def rms(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).square().mean().sqrt())


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def judged(ours: float, eager: float, floor: float, same_bits: bool) -> dict[str, Any]:
    """Right when no further from float64 than eager torch (or than float32 sums are), and equal to the bit again. A
    NaN is not."""
    good = ours <= max(eager, floor) and same_bits
    return {"error": ours, "error_eager": eager, "same_bits_again": same_bits, "ok": bool(good)}


def checks_of(device: str, tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name → check, the cheapest of each kind first."""
    heads = [(5, 512, 64), (7, 101, 23)] if tiny else VOCABULARIES
    states = [(3, 4, 64)] if tiny else [(111, *sizes) for sizes in STATES]
    found: dict[str, Callable[[], dict[str, Any]]] = {"attention": lambda: attending(device)}
    for n, v, d in heads:
        found[f"choice_logprobs N={n} V={v} D={d}"] = lambda n=n, v=v, d=d: choices(device, n, v, d)
    for p, q, d in states:
        found[f"centroid_sums P={p} Q={q} D={d}"] = lambda p=p, q=q, d=d: centroid_sums(device, p, q, d)
    for n, v, d in heads:
        found[f"divergences N={n} V={v} D={d}"] = lambda n=n, v=v, d=d: divergences(device, n, v, d)
    sizes = (5, 4, 2, 16, 128) if tiny else (300, 28, 4, 128, 18_944)
    for op in ("rope", "gated", "add_norm", "fp8_rows"):
        found[op] = lambda op=op: between(device, op, sizes)
    for dtype in ("float32", "bfloat16"):
        found[f"engine {dtype}"] = lambda dtype=dtype: engine(device, dtype, tiny)
    return {**found, "fp8": lambda: in_fp8(device)}


def main() -> None:
    asked_for = parser(__doc__ or "")
    asked_for.add_argument("--rehearse", action="store_true", help="tiny sizes: does it run through?")
    asked = asked_for.parse_args()
    failed = []
    with ending_with_json("smoke", asked.device):
        torch.manual_seed(asked.seed)
        checks = checks_of(asked.device, asked.rehearse)
        for name, check in checks.items():
            began, found = time.perf_counter(), {}
            with Lost() as lost, torch.inference_mode():
                found = check()
            if lost.why:
                found = {"ok": False, "failed": lost.why}
            failed += [] if found["ok"] else [name]
            seconds = round(time.perf_counter() - began, 1)
            tell({"bench": "smoke", "partial": 1, "check": name, "s": seconds, **found})
        tell({"bench": "smoke", "checks": len(checks), "wrong": failed, **surroundings(asked.device)})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
