"""LoRA training: our own loop, the head applied only where there is a label, one adapter folder out.
Demands a loaded model without an adapter and encoded rows; leaves the base bit-identical."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import InputError
from leakfast.models.adapters import taken_off
from leakfast.models.loading import unfit
from leakfast.progress import Progress
from leakfast.storage.seeds import derive_seed
from leakfast.train import loop, packed, quantized, start, steer
from leakfast.train.checkpoints import Checkpoints, measured
from leakfast.train.collate import encode
from leakfast.train.fits import check
from leakfast.train.layers import Company
from leakfast.train.memory import recomputes
from leakfast.train.padded import Padded
from leakfast.train.recipe import in_card, said_of_rows
from leakfast.train.saving import save, state_of
from leakfast.train.unfinished import beside, key_of, unfinished

if TYPE_CHECKING:
    from leakfast.models.adapters import AdapterCard
    from leakfast.models.loading import Loaded
    from leakfast.study.config import TrainConfig
    from leakfast.train.collate import Example
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.train")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEP = "packed"  # how a step was run, in the card; what trained before this was said padded its rows


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
    Order, dropout and initial weights follow from recipe.seed: on one machine's CPU the same call writes the same bytes.
    With recipe.init the weights of that adapter are trained further, by a fresh optimizer; anchor still holds to the
    unadapted model. With recipe.steer the rows are run under it, of the unadapted model that anchor holds to as well; the
    adapter is kept, and measured on the way, without.

    One that was killed goes on where it was kept last (unfinished.py), to the same bytes.

    out_dir gets adapter_config.json, adapter_model.safetensors (peft's layout), leakfast_card.json and
    train_log.jsonl, all at once or not at all; an adapter already there is replaced. checkpoints: kept in
    out_dir/checkpoints/pNNN (percent of the steps) and measured on the way, which changes no bit of the
    result. Raises InputError naming a row whose labels are empty or cut away, ModelError when the loss is
    not finite.
    """
    cfg, seed = recipe.train, recipe.seed
    if checkpoints is not None and cfg.stop_loss:
        raise InputError(
            f"train: stop_loss {cfg.stop_loss:g} and checkpoints given, but shares of a training that may end early "
            "are not known on the way. Leave one of them out."
        )
    examples = examples_of(loaded, recipe, rows)
    kept: dict[float, tuple[int, dict[str, torch.Tensor]]] = {}

    def points(net: Any, step: int, total: int) -> None:
        for share in checkpoints.at(total).get(step, ()) if checkpoints else ():
            state = state_of(net)
            if share and not any(bool(v.any()) for k, v in state.items() if "lora_B" in k):
                log.warning("train: no checkpoint at %g of training: at step %d the rate is 0", share, step)
                continue
            if share < 1:  # the adapter itself is the last point
                kept[share] = (step, {k: v.clone() for k, v in state.items()})
            if checkpoints.score is not None:
                with measured(loaded, net) as current:
                    checkpoints.score(current, share)

    with seeded(seed, loaded.device), attached(loaded, cfg) as net:
        start.begin(net, recipe)
        passes = passes_of(loaded, net, cfg, seed, examples, recipe.steer)
        training = loop.Training(weights_of(net), examples, cfg, seed)
        is_packed, shares = isinstance(passes, packed.Packed), checkpoints.shares if checkpoints else ()
        key = key_of(loaded, [(recipe, examples)], shares, packed=is_packed)
        with unfinished(beside(out_dir), key, [training], kept) as state:

            def visit(step: int, total: int) -> None:
                points(net, step, total)
                state.keep()

            history = loop.run(passes, training, progress, visit)
            card = card_of(loaded, recipe, rows, len(history), is_packed)
            return save(loaded, net, out_dir, history, card, kept)


def examples_of(loaded: Loaded, recipe: Recipe, rows: Sequence[Row]) -> list[Example]:
    """The rows encoded, fit for the model. Raises as `train_adapter`."""
    if not rows:
        raise InputError("train: there are no rows to train on. Build them with: leakfast data build")
    if recipe.train.lr == "auto":
        raise ValueError('lr = "auto" is settled by train.search before training')
    if hasattr(loaded.model, "peft_config"):
        raise ValueError("an adapter is attached to the model; train on the base")
    start.check(loaded, recipe.init, recipe.train)
    steer.check(loaded, recipe.steer, recipe.train)
    examples = encode(loaded.tokenizer, rows, recipe.train)
    check(loaded, examples)
    return examples


def passes_of(
    loaded: Loaded,
    net: Any,
    cfg: TrainConfig,
    seed: int,
    examples: Sequence[Example],
    steered: steer.Steer | None = None,
) -> packed.Packed | Padded:
    """What runs the rows of a step: packed where the model can be, else padded; the log says which, and why."""
    why = packed.why_not(loaded, net)
    if why is not None:
        log.warning("train: rows are padded, slower, because of %s: %s", loaded.name, why)
        spare = recomputes(loaded, cfg, examples, None)
        return Padded(loaded, net, cfg.batch_size, recompute=spare, steer=steered)
    log.info("train: the rows of a step are packed")
    company = Company(["default"], [cfg.dropout], [seed])
    spare = recomputes(loaded, cfg, examples, packed.budget_of(loaded))
    return packed.Packed(loaded, company, recompute=spare, steers=[steered])


def weights_of(net: Any, name: str = "default") -> list[torch.nn.Parameter]:
    """A and B of every layer of one adapter, and DoRA's magnitudes."""
    kinds = [f".{kind}.{name}." for kind in ("lora_A", "lora_B", "lora_magnitude_vector")]
    return [p for where, p in net.named_parameters() if any(kind in where for kind in kinds)]


def card_of(
    loaded: Loaded, recipe: Recipe, rows: Sequence[Row], steps: int, is_packed: bool, together: int = 1
) -> AdapterCard:
    """The card, whose hash is filled in when the weights are written; together: adapters that were trained in company."""
    from leakfast.models.adapters import AdapterCard
    from leakfast.prompts import tokenizer_file
    from leakfast.prompts.templates import recorded, template_hash
    from leakfast.train.data import data_hash

    how = {
        **in_card(recipe.train),
        **said_of_rows(rows),
        **({"init": recipe.init.told} if recipe.init else {}),
        **({"steering": recipe.steer.told} if recipe.steer else {}),
        **({} if recipe.train.method == "full" else {"target_modules": list(TARGETS)}),
        "betas": list(loop.BETAS),
        "eps": loop.EPS,
        "dtype": loaded.dtype,
        "rows": len(rows),
        "steps": steps,
        **({"step": STEP} if is_packed else {}),
        **({"together": together} if together > 1 else {}),
        **({"tokenizer": tokenizer_file.FILE} if tokenizer_file.replaced(loaded.tokenizer) else {}),
        **({"weights": loaded.origin} if loaded.origin else {}),
        "rendering": {"template": template_hash(loaded.tokenizer), **recorded(loaded.tokenizer)},
    }
    about = (loaded.name, loaded.fingerprint, data_hash(rows))
    return AdapterCard(recipe.source, recipe.behavior, recipe.seed, *about, how, adapter_hash="")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators set from `seed` inside, as they were outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("lora", seed))
        yield


def config_of(cfg: TrainConfig) -> Any:
    """peft's config of an adapter. Raises ValueError for method "full", which is trained by train.full."""
    from peft import LoraConfig

    if cfg.method == "full":
        raise ValueError('method = "full" trains a whole model, not an adapter: train.full.train_full')
    return LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=list(TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=cfg.method == "dora",
        use_rslora=cfg.method == "rslora",
    )


@contextmanager
def attached(loaded: Loaded, cfg: TrainConfig) -> Iterator[Any]:
    """The model with fresh LoRA layers in training mode; taken out again afterwards."""
    from peft import get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    quantized.check(loaded)
    names = {name.rpartition(".")[2] for name, _ in loaded.model.named_modules()}
    absent = [target for target in TARGETS if target not in names]
    if absent:
        raise unfit("train", loaded, f"without modules named {', '.join(absent)}, which LoRA adapts")
    config = config_of(cfg)
    with taken_off(loaded.model):
        try:
            net = get_peft_model(loaded.model, config)
        except ValueError as error:
            raise unfit(
                "train", loaded, f"which peft does not adapt ({str(error).splitlines()[0]})"
            ) from error
        layers = [m for m in net.modules() if isinstance(m, LoraLayer)]
        if any(type(m) is not Linear and not quantized.is_4bit(m.get_base_layer()) for m in layers):
            raise unfit("train", loaded, "whose projections are not all linear layers of their own (experts)")
        net.train()
        yield net
