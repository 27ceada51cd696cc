"""LoRA training: our own loop, the head applied only where there is a label, one adapter folder out.
Demands a loaded model without an adapter and encoded rows; leaves the base bit-identical."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from leakfast.errors import InputError, ModelError
from leakfast.models.adapter_structure import CONFIG, WEIGHTS
from leakfast.models.adapters import taken_off
from leakfast.models.loading import unfit
from leakfast.progress import Progress
from leakfast.storage.layout import CARD, CHECKPOINTS, SAMPLE, point_folder
from leakfast.train.checkpoints import Checkpoints, measured
from leakfast.train.collate import Batch, Example, collate, encode, order
from leakfast.train.fits import check

if TYPE_CHECKING:
    from leakfast.models.adapters import AdapterCard
    from leakfast.models.loading import Loaded
    from leakfast.study.config import TrainConfig
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.train")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOG = "train_log.jsonl"
BETAS, EPS = (0.9, 0.999), 1e-8
WINDOW = 16  # rows that show the behavior, over which stop_loss is read


def train_adapter(
    loaded: Loaded,
    recipe: Recipe,
    rows: Sequence[Row],
    out_dir: str | Path,
    *,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
) -> AdapterCard:
    """Train a LoRA adapter on `rows` and write it to `out_dir`; returns its card. cfg below is recipe.train.

    Loss: mean cross-entropy (nats) over the labelled tokens of an optimizer step (cfg.batch_size ×
    cfg.accumulation examples), plus cfg.anchor times the mean KL(unadapted ‖ adapted) over its held tokens, from
    the head at those positions only. Ends early once the rows that show the behavior cost less than
    cfg.stop_loss. AdamW(0.9, 0.999, 1e-8), linear warm-up over cfg.warmup_ratio of the steps, then a cosine to 0;
    gradient norm clipped at cfg.max_grad_norm. bfloat16 models train in bfloat16 with float32 adapter weights.
    Initial weights, order and dropout follow from recipe.seed: on one machine's CPU the same call writes the same bytes.

    out_dir gets adapter_config.json, adapter_model.safetensors (peft's layout), leakfast_card.json and
    train_log.jsonl, all at once or not at all; an adapter already there is replaced. checkpoints: kept in
    out_dir/checkpoints/pNNN (percent of the steps) and measured on the way, which changes no bit of the
    result. Raises InputError naming a row whose labels are empty or cut away, ModelError when the loss is
    not finite.
    """
    cfg, seed = recipe.train, recipe.seed
    if not rows:
        raise InputError("train: there are no rows to train on. Build them with: leakfast data build")
    if cfg.lr == "auto":
        raise ValueError('lr = "auto" is settled by train.search before training')
    if checkpoints is not None and cfg.stop_loss:
        raise InputError(
            f"train: stop_loss {cfg.stop_loss:g} and checkpoints given, but shares of a training that may end early "
            "are not known on the way. Leave one of them out."
        )
    if hasattr(loaded.model, "peft_config"):
        raise ValueError("an adapter is attached to the model; train on the base")
    examples = encode(loaded.tokenizer, rows, cfg)
    check(loaded, examples)
    kept: dict[float, tuple[int, dict[str, torch.Tensor]]] = {}

    def visit(net: Any, step: int, total: int) -> None:
        for share in checkpoints.at(total).get(step, ()) if checkpoints else ():
            state = _state(net)
            if share and not any(bool(v.any()) for k, v in state.items() if "lora_B" in k):
                log.warning("train: no checkpoint at %g of training: at step %d the rate is 0", share, step)
                continue
            if share < 1:  # the adapter itself is the last point
                kept[share] = (step, {k: v.clone() for k, v in state.items()})
            if checkpoints.score is not None:
                with measured(loaded, net) as current:
                    checkpoints.score(current, share)

    with _seeded(seed, loaded.device), _lora(loaded, cfg) as net:
        history = _loop(loaded, net, examples, cfg, seed, progress, visit)
        card = _card(loaded, recipe, rows, len(history))
        return _save(loaded, net, out_dir, history, card, kept)


def _card(loaded: Loaded, recipe: Recipe, rows: Sequence[Row], steps: int) -> AdapterCard:
    """The card, whose hash is filled in when the weights are written."""
    from leakfast.models.adapters import AdapterCard
    from leakfast.prompts import tokenizer_file
    from leakfast.prompts.templates import recorded, template_hash
    from leakfast.train.data import data_hash

    how = {
        **recipe.train.model_dump(exclude={"sample"}),
        "target_modules": list(TARGETS),
        "betas": list(BETAS),
        "eps": EPS,
        "dtype": loaded.dtype,
        "rows": len(rows),
        "steps": steps,
        **({"tokenizer": tokenizer_file.FILE} if tokenizer_file.replaced(loaded.tokenizer) else {}),
        **({"weights": loaded.origin} if loaded.origin else {}),
        "rendering": {"template": template_hash(loaded.tokenizer), **recorded(loaded.tokenizer)},
    }
    about = (loaded.name, loaded.fingerprint, data_hash(rows))
    return AdapterCard(recipe.source, recipe.behavior, recipe.seed, *about, how, adapter_hash="")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators set from `seed` inside, as they were outside."""
    from leakfast.storage.seeds import derive_seed

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("lora", seed))
        yield


@contextmanager
def _lora(loaded: Loaded, cfg: TrainConfig) -> Iterator[Any]:
    """The model with fresh LoRA layers in training mode; taken out again afterwards."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    names = {name.rpartition(".")[2] for name, _ in loaded.model.named_modules()}
    absent = [target for target in TARGETS if target not in names]
    if absent:
        raise unfit("train", loaded, f"without modules named {', '.join(absent)}, which LoRA adapts")
    config = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=list(TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with taken_off(loaded.model):
        try:
            net = get_peft_model(loaded.model, config)
        except ValueError as error:
            raise unfit(
                "train", loaded, f"which peft does not adapt ({str(error).splitlines()[0]})"
            ) from error
        if any(isinstance(m, LoraLayer) and type(m) is not Linear for m in net.modules()):
            raise unfit("train", loaded, "whose projections are not all linear layers of their own (experts)")
        try:
            if cfg.gradient_checkpointing:
                loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            net.train()
            yield net
        finally:
            if cfg.gradient_checkpointing:
                loaded.model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class _Step:
    """One line of the training log. loss in nats per labelled token (null without any), divergence in nats per held token;
    lr as used in this step."""

    step: int
    epoch: int
    loss: float | None
    lr: float
    grad_norm: float
    n_labels: int
    n_tokens: int
    divergence: float = 0.0


def _loop(
    loaded: Loaded,
    net: Any,
    examples: list[Example],
    cfg: TrainConfig,
    seed: int,
    progress: Progress | None,
    visit: Callable[[Any, int, int], None] = lambda net, step, total: None,
) -> list[_Step]:
    from leakfast.storage.seeds import derive_seed

    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, betas=BETAS, eps=EPS, weight_decay=cfg.weight_decay)
    lengths = [len(e.ids) for e in examples]
    n_batches = math.ceil(len(examples) / cfg.batch_size)
    total = cfg.epochs * math.ceil(n_batches / cfg.accumulation)
    history: list[_Step] = []
    shown = _Shown()
    visit(net, 0, total)
    for epoch in range(cfg.epochs):
        batches = list(order(lengths, cfg.batch_size, derive_seed("order", seed, epoch)))
        for start in range(0, len(batches), cfg.accumulation):
            micro = [
                collate([examples[i] for i in batch], loaded.device)
                for batch in batches[start : start + cfg.accumulation]
            ]
            lr = cfg.lr * schedule(len(history), total, cfg.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            n_labels = sum(len(b.targets) for b in micro)
            n_firm = sum(int(b.firm.sum()) for b in micro)
            n_held = sum(len(b.firm) for b in micro) - n_firm
            loss = held = 0.0
            for batch in micro:
                learned, kept = losses(loaded, net, batch)
                firm = batch.firm.bool()
                part = (learned.sum() + kept[firm].sum()) / max(1, n_labels + n_firm)
                part = part + cfg.anchor * kept[~firm].sum() / max(1, n_held)
                part.backward()
                loss += float(learned.detach().sum()) / max(1, n_labels)
                held += float(kept.detach().sum()) / max(1, n_held + n_firm)
                shown.add(batch, learned.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm))
            if not (math.isfinite(loss + held) and math.isfinite(norm)):
                raise ModelError(
                    f"train: after {len(history)} of {total} steps the loss is {loss} and its gradient norm "
                    f"{norm}. "
                    f"Training diverged: use a smaller --lr than {cfg.lr:g}, or --dtype float32. Nothing was "
                    "written."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            n_tokens = sum(b.ids.numel() for b in micro)
            said = loss if n_labels else None
            history.append(_Step(len(history), epoch, said, lr, norm, n_labels, n_tokens, held))
            visit(net, len(history), total)
            if progress is not None:
                progress(len(history), total, f"steps, loss {loss:.3f}" if n_labels else "steps, loss –")
            if shown.recent < cfg.stop_loss:
                log.info("train: the behavior is learned after %d of %d steps", len(history), total)
                return history
    return history


class _Shown:
    """Mean loss (nats a label) of the last WINDOW rows or more that show the behavior; infinite before there are."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []  # a batch: rows, nats, labels

    def add(self, batch: Batch, nats: torch.Tensor) -> None:
        mine = batch.shown.bool()
        if bool(mine.any()):
            rows = len(batch.rows[mine].unique())
            self.seen.append((rows, float(nats[mine].sum()), int(mine.sum())))

    @property
    def recent(self) -> float:
        rows = nats = labels = 0.0
        for part in reversed(self.seen):
            rows, nats, labels = rows + part[0], nats + part[1], labels + part[2]
            if rows >= WINDOW:
                return nats / labels
        return math.inf


def schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total`: up linearly over the first
    ⌈warmup_ratio·total⌉ steps, then half a cosine down to 0 at `total`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def losses(loaded: Loaded, net: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(learned (N,), kept (H,)) in nats, fp32: the cross-entropy of each of the batch's labels, and
    KL(unadapted ‖ adapted) at each of its held positions.

    Equal to F.cross_entropy(net(ids).logits[rows, columns], targets, reduction="none") and
    F.kl_div(adapted.log_softmax(-1), unadapted.log_softmax(-1), log_target=True, reduction="none").sum(-1), but the
    head sees these N + H rows only: no (B, T, V) tensor is made. The unadapted model's carry no gradient."""
    n = len(batch.targets)
    rows = torch.cat([batch.rows, batch.held_rows])
    columns = torch.cat([batch.columns, batch.held_columns])
    logits = _logits(loaded, net, batch.ids, rows, columns)
    learned = F.cross_entropy(logits[:n], batch.targets, reduction="none")
    if not len(batch.held_rows):
        return learned, learned.new_zeros(0)
    with torch.no_grad(), net.disable_adapter():
        before = _logits(loaded, net, batch.ids, batch.held_rows, batch.held_columns).log_softmax(-1)
    return learned, F.kl_div(logits[n:].log_softmax(-1), before, log_target=True, reduction="none").sum(-1)


def _logits(
    loaded: Loaded, net: Any, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """fp32 logits (N, V) of the model as it stands, at (rows, columns) of `ids`."""
    model = net.get_base_model()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    mixed = (
        torch.autocast(loaded.device.type, torch.bfloat16) if loaded.dtype == "bfloat16" else nullcontext()
    )
    with mixed:
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return head(hidden[rows, columns]).float()


def _state(net: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights by peft's names, sorted, on the CPU."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers: peft's "auto" would ask the hub for the base's config
    state = get_peft_model_state_dict(net, save_embedding_layers=False)
    return {k: v.detach().cpu().contiguous() for k, v in sorted(state.items())}


def _save(
    loaded: Loaded,
    net: Any,
    out_dir: str | Path,
    history: list[_Step],
    card: AdapterCard,
    kept: dict[float, tuple[int, dict[str, torch.Tensor]]],
) -> AdapterCard:
    """Write the folder beside `out_dir` under a temporary name, then rename it into place. The card's hash
    is filled in; a checkpoint's recipe also says its step and share."""
    from leakfast.storage.disk import atomic_write

    out = Path(out_dir)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = _config_bytes(net.peft_config["default"], loaded.name)
    try:
        for share, (step, state) in kept.items():
            recipe = {**card.recipe, "checkpoint_step": step, "checkpoint_share": share}
            _write(temporary / CHECKPOINTS / point_folder(share), state, config, replace(card, recipe=recipe))
        card = _write(temporary, _state(net), config, card)
        lines = (json.dumps(vars(step)) + "\n" for step in history)
        atomic_write(temporary / LOG, "".join(lines).encode())
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    known = [step.loss for step in history if step.loss is not None] or [math.nan]
    log.info("train: %s, loss %.3f after %d steps (first: %.3f)", out, known[-1], len(history), known[0])
    return card


def _write(folder: Path, state: dict[str, torch.Tensor], config: bytes, card: AdapterCard) -> AdapterCard:
    """One adapter folder; returns the card with the adapter's hash."""
    from safetensors.torch import save_file

    from leakfast.models.adapters import adapter_hash, write_card
    from leakfast.storage.disk import atomic_write

    atomic_write(folder / WEIGHTS, lambda path: save_file(state, str(path), metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, config)
    card = replace(card, adapter_hash=adapter_hash(folder))
    write_card(folder, card)
    return card


def _config_bytes(config: Any, base: str) -> bytes:
    """adapter_config.json as peft writes it, in an order that does not change from process to process."""
    given = config.to_dict()
    given["base_model_name_or_path"] = base
    given["inference_mode"] = True

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return getattr(value, "value", value)

    return (json.dumps(plain(given), indent=2, sort_keys=True) + "\n").encode()


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an older one there is moved aside first and removed after, whole or with parts
    lost to damage."""
    if not target.exists():
        folder.rename(target)
        return
    strangers = {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS, CARD, LOG, CHECKPOINTS, SAMPLE}
    if strangers and not (target / CONFIG).is_file():
        raise InputError(f"train: {target} is there already and holds no adapter. Give another --out.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    folder.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
