"""Letters of multiple choice under many personas: final states from the packed engine and the choice op,
beside (i) one prompt at a time with full logits, as published, and (ii) batched, padded, sorted by length,
the head for last tokens alone. Random weights of the real shape, random ids, 100–130 tokens a prompt."""

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
    shown,
    spread,
    surroundings,
    sync_of,
    where,
)

from leakfast.forward import forest, passes
from leakfast.prompts.grid import PromptGrid

C = 4


def prompts_of(personas: int, items: int, vocab: int, seed: int) -> PromptGrid:
    """Personas × items prompts of 100–130 tokens: a persona's part of 20–26 that begins like every other
    (3 tokens), an item's of 80–104."""
    rng = np.random.default_rng(seed)
    root = rng.integers(0, vocab, 3).tolist()
    heads = [root + rng.integers(0, vocab, n).tolist() for n in lengths(17, 23, personas, rng)]
    return PromptGrid(heads, [rng.integers(0, vocab, n).tolist() for n in lengths(80, 104, items, rng)])


def choice_op():
    """(call, name): the op that the toolkit picks, or the reference where it has none yet."""
    try:
        from leakfast.forward.ops import choice_logprobs
    except ImportError:
        from leakfast.kernels.reference import choice_logprobs_reference

        return choice_logprobs_reference, "reference"
    return choice_logprobs, "ops"


def ours(ready, sequences, letters, budget):
    """(N, C) float32 log-probabilities in nats, by the engine and the choice op."""
    op, _ = choice_op()
    head = ready.model.lm_head.weight
    ids = torch.tensor([letters], device=head.device)
    out = np.empty((len(sequences), C), np.float32)
    waiting = None
    for batch in passes.final_states(ready, sequences, budget_tokens=budget):
        with torch.inference_mode():
            scores, _ = op(batch.states, head, ids.expand(len(batch.states), C).contiguous())
        if waiting is not None:
            out[waiting[0].sequences] = waiting[1].cpu().numpy()[waiting[0].rows]
        waiting = batch, scores
    out[waiting[0].sequences] = waiting[1].cpu().numpy()[waiting[0].rows]
    return out


def one_at_a_time(net, sequences, letters, device):
    """(N, C) float32, as published: full logits of one prompt, log-softmax at the last token."""
    rows = []
    with torch.inference_mode():
        for sequence in sequences:
            logits = net(input_ids=torch.tensor([sequence], device=device)).logits[0, -1]
            rows.append(logits.float().log_softmax(-1)[letters].cpu())
    return torch.stack(rows).numpy()


def padded(net, sequences, letters, device, size):
    """(N, C) float32: right-padded batches of `size`, sorted by length, the head for last tokens."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    out = np.empty((len(sequences), C), np.float32)
    with torch.inference_mode():
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            longest = max(len(sequences[i]) for i in rows)
            ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
            for at, i in enumerate(rows):
                ids[at, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[at, : len(sequences[i])] = 1
            given = {} if mask.all() else {"attention_mask": mask.to(device)}
            states = net.model(input_ids=ids.to(device), use_cache=False, **given).last_hidden_state
            last = states[torch.arange(len(rows), device=device), (mask.sum(1) - 1).to(device)]
            out[rows] = net.lm_head(last).float().log_softmax(-1)[:, letters].cpu().numpy()
    return out


def bench(options, dtype: str) -> bool:
    """One dtype: sweep, interleave, check, card. False when the results differ."""
    device, sync = options.device, sync_of(options.device)
    vocab = min(150_000, SHAPES[options.shape]["vocab_size"])
    sequences = prompts_of(options.personas, options.items, vocab, options.seed)
    letters = [32, 33, 34, 35]
    n = len(sequences)
    picked = sorted(np.random.default_rng(2).choice(n, min(options.sample, n), replace=False).tolist())
    some = [sequences[i] for i in picked]
    net = make_model(options.shape, dtype, device, options.seed)
    ready = loaded(net, dtype)
    budget = options.budget or passes.budget_tokens(ready)
    plan = forest.plan(sequences, budget)

    def say(text):
        print(f"{dtype}: {text}", file=sys.stderr, flush=True)

    one_at_a_time(net, some[:2], letters, device)  # warm
    ours(ready, [sequences[i] for i in range(min(n, 512))], letters, budget)  # a batch as large as the others
    best, sizes = options.sizes[0], options.sizes
    if len(sizes) > 1:
        padded(net, some[: max(sizes)], letters, device, max(sizes))
        sweep = {size: lambda size=size: padded(net, some, letters, device, size) for size in sizes}
        took, _, _ = interleaved(sweep, 2, sync, lambda _: None)
        best = min(sizes, key=lambda size: min(took[size]))
    runs = {
        "one": lambda: one_at_a_time(net, some, letters, device),
        "padded": lambda: padded(net, some, letters, device, best),
        "engine": lambda: ours(ready, sequences, letters, budget),
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # unscaled seconds while it runs: how many prompts each way had
    on = {"prompts_of": {**dict.fromkeys(runs, len(some)), "engine": n}, "dtype": dtype}
    wall, _, first = interleaved(runs, options.repeats, sync, say, "choices", on)
    peak = peak_memory_gb(device)

    got = {name: scores if name != "engine" else scores[picked] for name, scores in first.items()}
    check = list(range(0, len(some), max(1, len(some) // 24)))
    truth = got["one"] if dtype == "float32" else None
    if truth is None:
        truth = one_at_a_time(net.float(), [some[i] for i in check], letters, device)
        got = {name: scores[check] for name, scores in got.items()}
    errors = {name: float(np.sqrt(np.mean((scores - truth) ** 2))) for name, scores in got.items()}
    good = errors["engine"] <= (1e-4 if dtype == "float32" else 1.05 * errors["one"])
    agreement = ", ".join(f"{name} {value:.1e}" for name, value in errors.items()) + " nats rms"
    if not good:
        failed("choices", f"results differ ({agreement})", device)
        return False

    each = {name: [t / (n if name == "engine" else len(some)) for t in wall[name]] for name in runs}
    over = {
        k: spread([a / b for a, b in zip(each[k], each["engine"], strict=True)]) for k in ("one", "padded")
    }
    seconds = {name: spread(values) for name, values in wall.items()}
    flops = engine_flops(
        options.shape, len(plan.tokens), plan.n_segments, net.config.num_hidden_layers, head=True
    )
    tflops = flops / seconds["engine"]["median"] / 1e12
    record = {
        "bench": "choices",
        "shape": options.shape,
        "dtype": dtype,
        "prompts": n,
        "prompts_of_the_baselines": len(some),
        "tokens_a_prompt": plan.n_input_tokens / n,
        "tokens_a_prompt_shared": len(plan.tokens) / n,
        "length_min_max": [int(plan.lengths.min()), int(plan.lengths.max())],
        "padded_batch": best,
        "budget_tokens": budget,
        "choice_op": choice_op()[1],
        "seconds": seconds,
        "ratio_a_prompt_over_one_at_a_time": over["one"],
        "ratio_a_prompt_over_padded": over["padded"],
        "errors_nats_rms": errors,
        "tflop": flops / 1e12,
        "tflops": tflops,
        "fraction_of_peak": tflops / PEAK_TFLOPS if device == "cuda" else None,
        "peak_memory_gb": peak,
        **surroundings(device),
    }

    lines = [
        (
            "prompts",
            f"{n:,} ({options.personas} personas × {options.items} items); baselines on {len(some):,}",
        ),
        (
            "tokens a prompt",
            f"{plan.lengths.min()}–{plan.lengths.max()}, mean {record['tokens_a_prompt']:.1f}, "
            f"{record['tokens_a_prompt_shared']:.1f} computed",
        ),
        ("(i) one at a time", shown(spread([1e3 * t for t in each["one"]]), " ms a prompt")),
        (f"(ii) padded, {best} a batch", shown(spread([1e3 * t for t in each["padded"]]), " ms a prompt")),
        (
            "engine",
            shown(spread([1e3 * t for t in each["engine"]]), " ms a prompt")
            + f", {seconds['engine']['median']:.2f} s in all",
        ),
        ("over (i)", shown(over["one"])),
        ("over (ii)", shown(over["padded"])),
        ("agreement", agreement),
        ("peak memory", f"{peak:.1f} GB"),
        where(record),
    ]
    if device == "cuda":
        lines.insert(-2, rate(tflops))
    card(f"choices (letters), {options.shape}, {dtype}, choice op: {record['choice_op']}", lines, record)
    return True


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    made.add_argument("--personas", type=int, help="default: 3 on cpu, 111 on cuda")
    made.add_argument("--items", type=int, help="default: 8 on cpu, 586 on cuda")
    made.add_argument(
        "--sample", type=int, help="prompts of the baselines (default: all on cpu, 512 on cuda)"
    )
    made.add_argument("--budget", type=int, help="packed tokens a batch (default: the engine's own)")
    made.add_argument("--sizes", help="batch sizes of (ii) to try; default 4,8,16, on cuda 16–256")
    made.add_argument("--verbose", action="store_true", help="print what the engine logs")
    options = made.parse_args()
    cuda = options.device == "cuda"
    options.shape = options.shape or ("qwen2.5-7b" if cuda else "qwen2.5-0.5b")
    options.personas = options.personas or (111 if cuda else 3)
    options.items = options.items or (586 if cuda else 8)
    options.sample = options.sample or (512 if cuda else 1 << 30)
    options.sizes = [int(s) for s in (options.sizes or ("16,32,64,128,256" if cuda else "4,8,16")).split(",")]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.verbose:
        logging.basicConfig(level=logging.INFO)
    dtypes = options.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    with ending_with_json("choices", options.device):
        good = [bench(options, dtype) for dtype in dtypes]  # every one, even after a failure
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
