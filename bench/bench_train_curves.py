"""A training by leakfast and the same by TRL's SFTTrainer from the same weights, the same batches in the same order, schedule
and clipping by the same rule: their losses step by step laid over each other. Demands TRL; times nothing. What is left between
the curves is rounding, and how it grows."""

from __future__ import annotations

import sys

import torch
from _common import card, ending_with_json, failed, skipped, surroundings, where
from bench_train import data_of, has_trl, ours_in, training_parser, trl_trainer

from leakfast.train import loop, lora

CLOSE = {"float32": 1e-3, "bfloat16": 0.1}  # nats, the largest difference of a step's losses


def by_us(loaded, examples, cfg) -> tuple[list[loop.Step], dict[str, torch.Tensor], list[list]]:
    """(the log, the weights before the first step, the examples of each step)."""
    with lora.seeded(0, loaded.device), lora.attached(loaded, cfg) as net:
        names = {id(p): name for name, p in net.named_parameters()}
        weights = lora.weights_of(net)
        before = {names[id(w)]: w.detach().clone() for w in weights}
        training = loop.Training(weights, examples, cfg, 0)
        chunks = list(training.chunks())
        return loop.run(ours_in(loaded, cfg), training), before, chunks


def by_trl(loaded, examples, cfg, before, chunks) -> list[float]:
    """TRL's loss of each step, nats a label: its collator, training_step and AdamW, at our rates and batches."""
    trainer, columns = trl_trainer(loaded, examples, cfg)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if weights.keys() != before.keys():
        raise RuntimeError(f"TRL trains other weights: {sorted(weights.keys() ^ before.keys())[:4]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(before[name])
    place, losses = {id(e): i for i, e in enumerate(examples)}, []
    for step, chunk in enumerate(chunks):
        n_labels, total = torch.tensor(sum(len(e.labels) for e in chunk)), 0.0
        trainer.current_gradient_accumulation_steps = -(-len(chunk) // cfg.batch_size)
        for first in range(0, len(chunk), cfg.batch_size):
            some = [columns[place[id(e)]] for e in chunk[first : first + cfg.batch_size]]
            batch = trainer.data_collator(some)
            total += float(trainer.training_step(trainer.model, dict(batch), num_items_in_batch=n_labels))
        torch.nn.utils.clip_grad_norm_(list(weights.values()), cfg.max_grad_norm)
        for group in trainer.optimizer.param_groups:
            group["lr"] = float(cfg.lr) * loop.schedule(step, len(chunks), cfg.warmup_ratio)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(total)
    return losses


def picture(path: str, sides: dict[str, list[float]], words: str) -> None:
    """Both curves over each other, and below them what is between them."""
    import matplotlib
    from matplotlib.figure import Figure

    from leakfast.figures import style

    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(style.COLUMN_IN, 2.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        looks = zip(sides.items(), ("-", (0, (2, 2))), (1.6, 1.2), style.SOURCE_COLOURS, strict=False)
        for (name, losses), dashes, width, colour in looks:
            above.plot(losses, linestyle=dashes, linewidth=width, color=colour, label=name)
        above.set_ylabel("loss (nats a label)")
        above.legend(frameon=False)
        first, second = sides.values()
        below.plot([a - b for a, b in zip(first, second, strict=True)], color=style.INK, linewidth=0.8)
        below.axhline(0, color=style.FAINT, linewidth=0.6)
        below.set_ylabel("difference")
        below.set_xlabel("optimizer step")
        figure.suptitle(words, fontsize=8)
        figure.savefig(path, dpi=200)


def bench(options) -> bool:
    """Train twice; False where the curves part."""
    loaded, cfg, examples = data_of(options, options.dtype, options.batch_size)
    cfg = cfg.model_copy(
        update={"lr": options.lr, "epochs": options.epochs, "accumulation": 1, "warmup_ratio": 0.05}
    )
    history, before, chunks = by_us(loaded, examples, cfg)
    ours = [step.loss for step in history]
    loaded, _, _ = data_of(options, options.dtype, options.batch_size)
    theirs = by_trl(loaded, examples, cfg, before, chunks)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(apart)
    record = {
        "bench": "train_curves",
        "dtype": options.dtype,
        "model": options.shape or options.model,
        "loss": options.loss,
        "lr": options.lr,
        "steps": len(ours),
        "nats": {"leakfast": ours, "TRL": theirs},
        "apart": worst,
        **surroundings(options.device),
    }
    if options.picture:
        picture(options.picture, record["nats"], f"{record['model']}, {options.loss}, {options.dtype}")
    if worst > CLOSE[options.dtype]:
        failed(
            "train_curves", f"losses part by {worst:.3g} nats at step {apart.index(worst)}", options.device
        )
        return False
    lines = [
        where(record),
        ("steps", f"{len(ours)} of {options.batch_size} rows, peak rate {options.lr:g}"),
        ("loss, leakfast", f"{ours[0]:.4f} at first, {ours[-1]:.4f} at last"),
        ("loss, TRL", f"{theirs[0]:.4f} at first, {theirs[-1]:.4f} at last"),
        ("apart", f"{sum(apart) / len(apart):.2g} nats on average, {worst:.2g} at most"),
    ]
    card(f"A training's losses, {options.loss}, {options.dtype}", lines, record)
    return True


def main() -> None:
    made = training_parser(__doc__ or "", n_rows=64, batch_size=8)
    made.add_argument("--lr", type=float, default=2e-4)
    made.add_argument("--epochs", type=int, default=6)
    made.add_argument("--picture", help="a file for both curves (.png, .svg, .pdf)")
    options = made.parse_args()
    if options.dropout:
        made.error("--dropout given, but the two sides draw it each their own way")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not has_trl():
        skipped("train_curves", "TRL is not installed", options.device)
        return
    with ending_with_json("train_curves", options.device):
        sys.exit(0 if bench(options) else 1)


if __name__ == "__main__":
    main()
