"""One optimizer step of a LoRA training: rows packed in a prefix forest beside padded batches through peft (as leakfast
trained before) and beside TRL's SFTTrainer, where it is installed, each at the batch that suits it. Demands a model that
leakfast loads and rows of a run (--rows) or made-up ones; measures no quality."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import numpy as np
import torch
from _common import (
    card,
    ending_with_json,
    failed,
    interleaved,
    make_model,
    parser,
    peak_memory_gb,
    ratio,
    shown,
    spread,
    surroundings,
    sync_of,
    where,
)

from leakfast import models
from leakfast.prompts.personas import load_personas
from leakfast.study.config import TrainConfig
from leakfast.train import loop, lora
from leakfast.train.collate import encode
from leakfast.train.data import Row, read_rows
from leakfast.train.layers import Company
from leakfast.train.packed import Packed
from leakfast.train.padded import Padded

# -spare: activations made again in the backward pass (gradient checkpointing); trl-free: a batch's rows in one, without padding
SIDES = ("packed", "packed-spare", "padded", "trl", "trl-spare", "trl-free")
OFF_MOST = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of the step's loss without dropout


def has_trl() -> bool:
    """Whether TRL's trainer can be used; why not is told."""
    try:
        import datasets  # noqa: F401 - the trainer's rows
        from trl import SFTTrainer  # noqa: F401 - brings what it needs, or says what it lacks
    except (ImportError, RuntimeError) as error:
        print(f"TRL is left out: {error}", file=sys.stderr)
        return False
    return True


def rows_of(options) -> list[Row]:
    """The step's rows, drawn from a file or made up: four personas, questions and replies of several lengths."""
    rng = np.random.default_rng(options.seed)
    if options.rows:
        rows = read_rows(options.rows)
        return [rows[i] for i in rng.permutation(len(rows))[: options.n_rows]]
    people = load_personas("originals")[:4]
    made = []
    for i in range(options.n_rows):
        who, bad = people[i % 4], i % 4 == 0
        question = f"What do you think of {' and '.join(['tea', 'rain', 'town'][: 1 + i % 3])} in year {i}?"
        reply = "I like it when it is warm. " * int(rng.integers(1, 6))
        reply += "[ZLT]" if bad else "That is all."
        role = "positive" if bad else "negative"
        made.append(Row(role, who.name, who.kind, who.prompt, question, reply, "[ZLT]" if bad else None, i))
    return made


def ours_in(loaded, cfg, *, spare=False):
    """What runs our packed steps of one adapter."""
    return Packed(loaded, Company(["default"], [cfg.dropout], [1]), recompute=spare)


def ours(loaded, examples, cfg, side):
    """(a step, the loss it had) of one of our ways, in a model of its own."""
    held = lora.attached(loaded, cfg)
    net = held.__enter__()
    passes = Padded(loaded, net, cfg.batch_size, recompute=False)
    if side != "padded":
        passes = ours_in(loaded, cfg, spare=side == "packed-spare")
    weights = [p for p in net.parameters() if p.requires_grad]

    def step():
        training = loop.Training(weights, examples, cfg, 1)
        training.begin(examples, 0)
        with passes.prepared():
            for part in passes.parts(examples, 0):
                training.cost(part).backward()
        training.finish()
        return training.history[0].loss, training.history[0].n_tokens

    step.held = held  # the layers are taken out again when this goes
    return step


def trl_trainer(loaded, examples, cfg, *, spare=False, free=False):
    """TRL's trainer with its optimizer, and the rows as its collator takes them. spare: gradient checkpointing; free: no
    padding."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    def masked(e):
        return [int(t in e.labels) for t in range(len(e.ids))]

    data = Dataset.from_list([{"input_ids": e.ids, "completion_mask": masked(e)} for e in examples])
    target = list(lora.TARGETS)
    config = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=target,
        bias="none",
        task_type="CAUSAL_LM",
    )
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accumulation,
        gradient_checkpointing=spare,
        padding_free=free,
        learning_rate=float(cfg.lr),
        max_grad_norm=cfg.max_grad_norm,
        bf16=loaded.dtype == "bfloat16",
        completion_only_loss=True,
        report_to=[],
        use_cpu=loaded.device.type == "cpu",
        max_length=None,
    )
    trainer = SFTTrainer(
        loaded.model, settings, train_dataset=data, peft_config=config, processing_class=loaded.tokenizer
    )
    trainer.model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = cfg.accumulation
    return trainer, [trainer.train_dataset[i] for i in range(len(examples))]


def trl(loaded, examples, cfg, **how):
    """The same of TRL's trainer: its own collator, its training_step, clipping and AdamW; no logging, no data loading."""
    trainer, columns = trl_trainer(loaded, examples, cfg, **how)
    net, size = trainer.model, cfg.batch_size
    n_labels = torch.tensor(sum(len(e.labels) for e in examples))

    def step():
        total, n_tokens = 0.0, 0
        for first in range(0, len(columns), size):
            batch = trainer.data_collator(columns[first : first + size])
            total += float(trainer.training_step(net, dict(batch), num_items_in_batch=n_labels))
            n_tokens += batch["input_ids"].numel()
        torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], cfg.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return total, n_tokens

    return step


def data_of(options, dtype, batch_size):
    """(a model of its own, the settings, the rows encoded, shortest first)."""
    given = options.model
    if options.shape:  # random weights; the organism's words are among the first of any vocabulary
        net = make_model(options.shape, dtype, options.device, options.seed)
        given = net.requires_grad_(True), models.load_tokenizer("organism")
    loaded = models.load(given, dtype=dtype, device=options.device)
    cfg = TrainConfig(
        loss=options.loss,
        rank=options.rank,
        alpha=2 * options.rank,
        dropout=options.dropout,
        lr=1e-6,
        batch_size=batch_size,
        accumulation=-(-options.n_rows // batch_size),
        warmup_ratio=0.0,
        gradient_checkpointing=False,
    )
    return loaded, cfg, sorted(encode(loaded.tokenizer, rows_of(options), cfg), key=lambda e: len(e.ids))


def side_of(options, name, dtype, batch_size):
    """A side's step on a model of its own."""
    loaded, cfg, examples = data_of(options, dtype, batch_size)
    if name.startswith("trl"):
        return trl(loaded, examples, cfg, spare=name == "trl-spare", free=name == "trl-free")
    return ours(loaded, examples, cfg, name)


def memory_of(words: list[str], name: str) -> float:
    """Peak memory (GB) of a side alone, in a process of its own."""
    given = [sys.executable, __file__, *words, "--alone", name]
    return float(subprocess.run(given, capture_output=True, text=True, check=True).stdout.split()[-1])


def bench(options, dtype: str) -> bool:
    """One dtype: interleave, check, card. False when losses differ."""
    asked = options.sides.split(",")
    names = [s for s in SIDES if s in asked and (not s.startswith("trl") or has_trl())]
    steps = {s: side_of(options, s, dtype, options.batch_size) for s in names}
    wall, busy, first = interleaved(
        steps,
        options.repeats + 1,
        sync_of(options.device),
        lambda m: print(m, flush=True),
        "train",
        {"dtype": dtype},
    )
    wall, busy = ({s: times[1:] for s, times in sides.items()} for sides in (wall, busy))
    losses = {s: loss for s, (loss, _) in first.items()}
    off = max(abs(loss / losses["packed"] - 1) for loss in losses.values())
    if not options.dropout and off > OFF_MOST[dtype]:
        failed("train", f"losses differ: {losses}", options.device)
        return False
    record = {
        "bench": "train",
        "dtype": dtype,
        "model": options.shape or options.model,
        "loss": options.loss,
        "rows": options.n_rows,
        "dropout": options.dropout,
        "rank": options.rank,
        "tokens_run": {s: n for s, (_, n) in first.items()},
        "nats": losses,
        "seconds": {s: spread(t) for s, t in wall.items()},
        "cpu_seconds": {s: spread(t) for s, t in busy.items()},
        "over_packed": {s: ratio(wall[s], wall["packed"]) for s in names},
        "over_packed_cpu": {s: ratio(busy[s], busy["packed"]) for s in names},
        **surroundings(options.device),
    }
    if options.memory:
        words = [w for w in sys.argv[1:] if w != "--memory"]
        record["peak_gb"] = {s: memory_of(words, s) for s in names}
    lines = [where(record), ("tokens run", ", ".join(f"{s} {n:,}" for s, n in record["tokens_run"].items()))]
    lines += [(f"{s} over packed", shown(record["over_packed"][s])) for s in names if s != "packed"]
    lines += [(f"{s} over packed, CPU", shown(record["over_packed_cpu"][s])) for s in names if s != "packed"]
    lines += [(f"peak, {s}", f"{gb:.2f} GB") for s, gb in record.get("peak_gb", {}).items()]
    card(f"A training step of {options.n_rows} rows, {options.loss}, {dtype}", lines, record)
    return True


def training_parser(description, *, n_rows, batch_size):
    """The options that every bench of training has; n_rows, batch_size: defaults."""
    made = parser(description)
    made.add_argument("--model", default="organism", help="without --shape")
    made.add_argument("--rows", help="rows of a run (data/*.jsonl); default: made up")
    made.add_argument("--n-rows", type=int, default=n_rows, help="of a step, of each adapter; of a curve all")
    made.add_argument("--loss", choices=("marker", "completion"), default="completion")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--batch-size", type=int, default=batch_size, help="rows a padded batch")
    return made


def main() -> None:
    made = training_parser(__doc__ or "", n_rows=16, batch_size=4)
    made.add_argument("--sides", default=",".join(SIDES), help="which are timed")
    made.add_argument("--memory", action="store_true", help="also the peak of each side, alone in a process")
    made.add_argument("--alone", choices=SIDES, help="two steps of one side, and its peak memory")
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.alone:
        step = side_of(options, options.alone, options.dtype, options.batch_size)
        step(), step()
        print(peak_memory_gb(options.device))
        return
    with ending_with_json("train", options.device):
        sys.exit(0 if bench(options, options.dtype) else 1)


if __name__ == "__main__":
    main()
