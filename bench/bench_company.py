"""An optimizer step of K adapters in common packed passes over one base, beside a step of each one after the other, packed,
and padded through peft: LoRA of one rank, every adapter with its rows. Demands a model that leakfast loads and rows of a run
(--rows) or made-up ones; attaching, saving and a search of learning rates are left out."""

from __future__ import annotations

import argparse
import sys

import torch
from _common import (
    card,
    ending_with_json,
    failed,
    interleaved,
    ratio,
    shown,
    spread,
    surroundings,
    sync_of,
    where,
)
from bench_train import data_of, training_parser

from leakfast.train import loop, lora
from leakfast.train.layers import Company
from leakfast.train.packed import Packed
from leakfast.train.padded import Padded

SIDES = ("together", "apart", "padded")
OFF_MOST = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of an adapter's loss alone and in company


def side_of(options, side):
    """A step of all adapters in a model of their own; it returns every adapter's loss (nats) and the tokens that were run."""
    n, each = options.adapters, options.n_rows
    everything = argparse.Namespace(**vars(options) | {"n_rows": n * each})
    loaded, cfg, examples = data_of(everything, options.dtype, options.batch_size)
    shares = [examples[k::n] for k in range(n)]  # like lengths for each
    cfg = cfg.model_copy(update={"accumulation": -(-each // cfg.batch_size)})
    held = lora.attached(loaded, cfg)
    net = held.__enter__()
    names = ["default", *(f"adapter{k}" for k in range(1, n))]
    for name in names[1:]:
        net.add_adapter(name, lora.config_of(cfg))
    weights = [lora.weights_of(net, name) for name in names]
    groups = [list(range(n))] if side == "together" else [[k] for k in range(n)]

    def costs_of(group):
        """Pass by pass, what each adapter of the group pays for."""
        if side == "padded":
            net.set_adapter(names[group[0]])
            passes = Padded(loaded, net, cfg.batch_size, recompute=False)
            with passes.prepared():
                yield from ({group[0]: part} for part in passes.parts(shares[group[0]], 0))
            return
        company = Company([names[k] for k in group], [cfg.dropout] * len(group), group)
        passes = Packed(loaded, company, recompute=False)
        with passes.prepared():
            for parts in passes.together({i: (shares[k], 0) for i, k in enumerate(group)}):
                yield {group[i]: part for i, part in parts.items()}

    def step():
        for weight in (w for some in weights for w in some):
            weight.requires_grad_(True)
        made = [loop.Training(some, rows, cfg, 0) for some, rows in zip(weights, shares, strict=True)]
        for training, rows in zip(made, shares, strict=True):
            training.begin(rows, 0)
        for group in groups:
            for parts in costs_of(group):
                torch.stack([made[k].cost(part) for k, part in parts.items()]).sum().backward()
            for k in group:
                made[k].finish()
        return [t.history[0].loss for t in made], sum(t.history[0].n_tokens for t in made)

    step.held = held  # the layers are taken out again when this goes
    return step


def bench(options) -> bool:
    """Interleave, check, card. False when an adapter's loss depends on its company."""
    steps = {side: side_of(options, side) for side in options.sides.split(",")}
    wall, busy, first = interleaved(
        steps, options.repeats + 1, sync_of(options.device), lambda m: print(m, flush=True), "company"
    )
    wall, busy = ({s: times[1:] for s, times in sides.items()} for sides in (wall, busy))
    losses = {side: found for side, (found, _) in first.items()}
    off = max(
        abs(a / b - 1) for some in losses.values() for a, b in zip(some, losses["together"], strict=True)
    )
    if not options.dropout and off > OFF_MOST[options.dtype]:
        failed("company", f"losses differ: {losses}", options.device)
        return False
    others = [side for side in steps if side != "together"]
    record = {
        "bench": "company",
        "dtype": options.dtype,
        "model": options.shape or options.model,
        "loss": options.loss,
        "adapters": options.adapters,
        "rows": options.n_rows,
        "rank": options.rank,
        "tokens_run": {side: n for side, (_, n) in first.items()},
        "seconds": {side: spread(times) for side, times in wall.items()},
        "cpu_seconds": {side: spread(times) for side, times in busy.items()},
        "over_together": {side: ratio(wall[side], wall["together"]) for side in others},
        "over_together_cpu": {side: ratio(busy[side], busy["together"]) for side in others},
        "loss_off": off,
        **surroundings(options.device),
    }
    lines = [where(record), ("tokens run", ", ".join(f"{s} {n:,}" for s, n in record["tokens_run"].items()))]
    lines += [(f"{s} over together", shown(record["over_together"][s])) for s in others]
    lines += [(f"{s} over together, CPU", shown(record["over_together_cpu"][s])) for s in others]
    what = f"{options.adapters} adapters, {options.n_rows} rows each, {options.loss}, {options.dtype}"
    card(f"A training step of {what}", lines, record)
    return True


def main() -> None:
    made = training_parser(__doc__ or "", n_rows=4, batch_size=4)
    made.add_argument("--adapters", type=int, default=6)
    made.add_argument("--sides", default=",".join(SIDES), help="which are timed; together is one of them")
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with ending_with_json("company", options.device):
        sys.exit(0 if bench(options) else 1)


if __name__ == "__main__":
    main()
