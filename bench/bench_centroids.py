"""Last-prompt-token states of personas × questions: the packed engine beside (i) one prompt at a time with
forward hooks and full logits, as published, and (ii) batched, padded, sorted by length, no head at all.
Random weights of the real shape, random ids at the real lengths; no download."""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
from _common import (
    PEAK_TFLOPS,
    SHAPES,
    card,
    ending_with_json,
    engine_flops,
    failed,
    interleaved,
    lengths,
    loaded,
    make_model,
    parser,
    peak_memory_gb,
    rate,
    ratio,
    shown,
    spread,
    surroundings,
    sync_of,
    where,
)
from _rows import Lost

from leakfast.forward import forest, fp8, passes
from leakfast.forward import fp8 as engine_fp8


def prompts_of(personas: int, questions: int, vocab: int, seed: int) -> list[list[int]]:
    """Personas × questions prompts of about 50 tokens: a persona's part of 20–26 that begins like every
    other (3 tokens), a question's of 22–32. About 28 a prompt remain when shared parts count once."""
    rng = np.random.default_rng(seed)
    root = rng.integers(0, vocab, 3).tolist()
    heads = [root + rng.integers(0, vocab, n).tolist() for n in lengths(17, 23, personas, rng)]
    tails = [rng.integers(0, vocab, n).tolist() for n in lengths(22, 32, questions, rng)]
    return [head + tail for head in heads for tail in tails]


class Hooks:
    """Outputs of chosen blocks, caught by forward hooks while the context lasts."""

    def __init__(self, net, layers):
        self.net, self.layers, self.seen = net, layers, {}

    def __enter__(self):
        def keep(layer):
            return lambda _module, _args, out: self.seen.__setitem__(layer, out)

        self.handles = [self.net.model.layers[i].register_forward_hook(keep(i)) for i in self.layers]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def one_at_a_time(net, sequences, layers, device):
    """(N, L, D) float32, as published: hooks, full logits, no sharing, no padding."""
    rows = []
    with torch.inference_mode(), Hooks(net, layers) as hooks:
        for sequence in sequences:
            net(input_ids=torch.tensor([sequence], device=device))
            rows.append(torch.stack([hooks.seen[i][0, -1] for i in layers]).float().cpu())
    return torch.stack(rows).numpy()


def padded(net, sequences, layers, device, size):
    """(N, L, D) float32: right-padded batches of `size`, sorted by length; the decoder without its head."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    out = np.empty((len(sequences), len(layers), net.config.hidden_size), np.float32)
    with torch.inference_mode(), Hooks(net, layers) as hooks:
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            longest = max(len(sequences[i]) for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros(len(rows), longest, dtype=torch.long)
            for at, i in enumerate(rows):
                ids[at, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[at, : len(sequences[i])] = 1
            ends = mask.sum(1) - 1
            if mask.all():
                net.model(input_ids=ids.to(device), use_cache=False)
            else:
                net.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            at = torch.arange(len(rows))
            out[rows] = torch.stack([hooks.seen[i][at, ends] for i in layers], 1).float().cpu().numpy()
    return out


def error(got, truth):
    """Largest ‖got − truth‖ / ‖truth‖ over prompts and layers."""
    return float((np.linalg.norm(got - truth, axis=-1) / np.linalg.norm(truth, axis=-1)).max())


def overall(got, truth):
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


def in_fp8(options, ready, sequences, layers, of, budget, sync) -> dict | None:
    """Seconds of the sums with FP8 linear layers and their agreement; None where the device has none."""
    if engine_fp8.why_not(ready.device, torch.bfloat16):
        return None
    with fp8.running(ready, "fp8", sequences, layers) as agreement:
        runs = {"fp8": lambda: passes.last_token_sums(ready, sequences, layers, of, budget_tokens=budget)}
        wall, _, _ = interleaved(runs, options.repeats + 1, sync, lambda _: None)
    return {"seconds": spread(wall["fp8"][1:]), "agreement": str(agreement)}


def bench(options, dtype: str) -> bool:
    """One dtype: sweep, interleave, check, card. False when the results differ."""
    device, layers = options.device, options.layers
    sync = sync_of(device)
    vocab = min(151_000, SHAPES[options.shape]["vocab_size"])
    sequences = prompts_of(options.personas, options.questions, vocab, options.seed)
    some = sequences[:: max(1, len(sequences) // options.sample)]  # what (i) is run on
    of = np.repeat(np.arange(options.personas), options.questions)
    net = make_model(options.shape, dtype, device, options.seed)
    ready = loaded(net, dtype)
    budget = options.budget or passes.budget_tokens(ready)
    plan = forest.plan(sequences, budget)
    tokens = len(plan.tokens)

    def say(text):
        print(f"{dtype}: {text}", file=sys.stderr, flush=True)

    def ours():
        return passes.last_token_states(ready, sequences, layers, budget_tokens=budget)

    def sums():
        return passes.last_token_sums(ready, sequences, layers, of, budget_tokens=budget)

    one_at_a_time(net, sequences[:2], layers, device)  # warm
    ours(), sums()
    sizes = options.sizes
    if len(sizes) > 1:
        swept = sequences[:: max(1, len(sequences) // options.sweep)]
        padded(net, swept[: max(sizes)], layers, device, max(sizes))
        sweep = {n: lambda n=n: padded(net, swept, layers, device, n) for n in sizes}
        took, _, _ = interleaved(sweep, 2, sync, lambda _: None)
        best = min(sizes, key=lambda n: min(took[n]))
        say("padded batch sizes: " + ", ".join(f"{n}: {min(took[n]):.2f} s" for n in sizes))
    else:
        best = sizes[0]
    runs = {
        "one": lambda: one_at_a_time(net, some, layers, device),
        "padded": lambda: padded(net, sequences, layers, device, best),
        "engine": ours,
        "sums": sums,
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # unscaled seconds while it runs: how many prompts each way had
    on = {"prompts_of": {**dict.fromkeys(runs, len(sequences)), "one": len(some)}, "dtype": dtype}
    wall, busy, first = interleaved(runs, options.repeats, sync, say, "centroids", on)
    scale = len(sequences) / len(some)
    wall["one"], busy["one"] = ([t * scale for t in times["one"]] for times in (wall, busy))
    peak = peak_memory_gb(device)
    added = np.stack([first["engine"][of == p].sum(0, dtype=np.float64) for p in range(options.personas)], 1)
    off = overall(first.pop("sums")[0], added)
    fp8 = None
    with Lost() as lost:
        fp8 = in_fp8(options, ready, sequences, layers, of, budget, sync) if dtype == "bfloat16" else None
    if lost.why:  # the others' times stay
        say(f"fp8 {lost.why}")

    at = list(range(0, len(sequences), max(1, len(sequences) // options.sample)))
    if dtype == "float32":
        errors = {name: error(first[name][at], first["one"]) for name in ("padded", "engine")}
        good = errors["engine"] <= 1e-5
        agreement = (
            f"engine {errors['engine']:.1e}, padded {errors['padded']:.1e} from one at a time (bar 1e-5)"
        )
    else:
        few = list(range(0, len(some), max(1, len(some) // 24)))
        truth = one_at_a_time(net.float(), [some[i] for i in few], layers, device)
        got = {name: states if name == "one" else states[at] for name, states in first.items()}
        errors = {name: overall(states[few], truth) for name, states in got.items()}
        good = errors["engine"] <= 1.05 * errors["one"]
        agreement = ", ".join(f"{name} {value:.2e}" for name, value in errors.items()) + " from fp32"
    if not good or off > 1e-5:
        failed("centroids", f"results differ ({agreement}; sums {off:.1e} from the states')", device)
        return False

    seconds = {name: spread(values) for name, values in wall.items()}
    # the job is the sums: what `leakfast centroids` runs
    over = {name: ratio(wall[name], wall["sums"]) for name in ("one", "padded")}
    over_cpu = {name: ratio(busy[name], busy["sums"]) for name in ("one", "padded")}
    over_states = {name: ratio(wall[name], wall["engine"]) for name in ("one", "padded")}
    flops = engine_flops(options.shape, tokens, plan.n_segments, max(layers) + 1)
    tflops = flops / seconds["sums"]["median"] / 1e12
    record = {
        "bench": "centroids",
        "shape": options.shape,
        "dtype": dtype,
        "layers": layers,
        "prompts": len(sequences),
        "prompts_of_one_at_a_time": len(some),
        "fp8": fp8,
        "fp8_failed": lost.why,
        "tokens_a_prompt": plan.n_input_tokens / len(sequences),
        "tokens_a_prompt_shared": tokens / len(sequences),
        "padded_batch": best,
        "budget_tokens": budget,
        "seconds": seconds,
        "ratio_over_one_at_a_time": over["one"],
        "ratio_over_padded": over["padded"],
        "ratio_of_states_over_one_at_a_time": over_states["one"],
        "ratio_of_states_over_padded": over_states["padded"],
        "cpu_seconds_ratio_over_one_at_a_time": over_cpu["one"],
        "cpu_seconds_ratio_over_padded": over_cpu["padded"],
        "errors": errors,
        "tflop": flops / 1e12,
        "tflops": tflops,
        "fraction_of_peak": tflops / PEAK_TFLOPS if device == "cuda" else None,
        "peak_memory_gb": peak,
        **surroundings(device),
    }

    lines = [
        ("prompts", f"{len(sequences)} ({options.personas} personas × {options.questions} questions)"),
        (
            "tokens a prompt",
            f"{record['tokens_a_prompt']:.1f}, {record['tokens_a_prompt_shared']:.1f} computed",
        ),
        ("blocks", f"{', '.join(map(str, layers))} of {net.config.num_hidden_layers}"),
        ("(i) one at a time", shown(seconds["one"], " s")),
        (f"(ii) padded, {best} a batch", shown(seconds["padded"], " s")),
        ("engine, summed by persona", shown(seconds["sums"], " s")),
        (
            "engine, every state on the host",
            f"{shown(seconds['engine'], ' s')}; {over_states['one']['median']:.2f}× (i), "
            f"{over_states['padded']['median']:.2f}× (ii)",
        ),
        ("over (i)", shown(over["one"], "×") + f"; in CPU seconds {over_cpu['one']['median']:.2f}×"),
        ("over (ii)", shown(over["padded"], "×") + f"; in CPU seconds {over_cpu['padded']['median']:.2f}×"),
        ("agreement", agreement),
        ("peak memory", f"{record['peak_memory_gb']:.1f} GB"),
        where(record),
    ]
    if fp8:
        lines.insert(-2, ("fp8, summed", f"{shown(fp8['seconds'], ' s')}; {fp8['agreement']}"))
    if device == "cuda":
        lines.insert(-2, rate(tflops))
    card(f"centroids, {options.shape}, {dtype}", lines, record)
    return True


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    made.add_argument("--personas", type=int, help="default: 6 on cpu, 111 on cuda")
    made.add_argument("--questions", type=int, default=20)
    made.add_argument("--layers", help="default: 10,15,20 on cpu, 10,15,20,25 on cuda")
    made.add_argument("--budget", type=int, help="packed tokens a batch (default: the engine's own)")
    made.add_argument("--sizes", help="batch sizes of (ii) to try; default 4,8,16,32,64, on cuda up to 512")
    made.add_argument("--sample", type=int, help="prompts (i) is run on (default: all, on cuda 444)")
    made.add_argument("--sweep", type=int, help="prompts the sizes are tried on (default: 64, on cuda all)")
    made.add_argument("--verbose", action="store_true", help="print what the engine logs")
    options = made.parse_args()
    cuda = options.device == "cuda"
    options.shape = options.shape or ("qwen2.5-7b" if cuda else "qwen2.5-0.5b")
    options.personas = options.personas or (111 if cuda else 6)
    options.layers = [int(n) for n in (options.layers or ("10,15,20,25" if cuda else "10,15,20")).split(",")]
    options.sample = options.sample or (444 if cuda else 1 << 30)
    options.sweep = options.sweep or (1 << 30 if cuda else 64)
    default = "16,32,64,128,256,512" if cuda else "4,8,16,32,64"
    options.sizes = [int(n) for n in (options.sizes or default).split(",")]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.verbose:
        logging.basicConfig(level=logging.INFO)
    dtypes = options.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    with ending_with_json("centroids", options.device):
        good = [bench(options, dtype) for dtype in dtypes]  # every one, even after a failure
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
