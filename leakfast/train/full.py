"""Full fine-tuning: every weight of a copy of the base is trained, and a whole model comes out, in an adapter's place, as
transformers loads it. Demands a loaded model whose weights are numbers of its dtype; leaves the base bit-identical."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import ModelError
from leakfast.models.adapters import adapter_hash, write_card
from leakfast.models.formats import quiet_bars
from leakfast.models.whole import check_same_kind
from leakfast.progress import Progress
from leakfast.storage.disk import explained
from leakfast.train import loop, quantized
from leakfast.train.lora import card_of, examples_of, seeded
from leakfast.train.memory import free_bytes, recomputes
from leakfast.train.padded import Padded
from leakfast.train.saving import placed
from leakfast.train.unfinished import beside, key_of, unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leakfast.models.adapters import AdapterCard
    from leakfast.models.loading import Loaded
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.train")

BYTES_A_WEIGHT = 16  # float32: the weight, its gradient, AdamW's two moments


def train_full(
    loaded: Loaded,
    recipe: Recipe,
    rows: Sequence[Row],
    out_dir: str | Path,
    *,
    progress: Progress | None = None,
) -> AdapterCard:
    """Train all weights on `rows` and write the model to `out_dir`; returns its card.

    Loss, order of the rows, AdamW, schedule, clipping and the end are `train_adapter`'s; embeddings and head are trained
    too, tied ones once. The copy is float32 (a bfloat16 base's forward pass under autocast), written in the base's dtype.
    anchor holds replies to the base. Memory beside the base: 16 bytes a weight and the activations. Nothing is drawn
    in training, so that the bytes follow from base, rows and recipe, and one that was killed goes on to the same.

    out_dir gets config.json, generation_config.json, safetensors, the tokenizer's files, leakfast_card.json (adapter_hash:
    of the model's fingerprint) and train_log.jsonl, all at once or not at all. Raises InputError for what a whole model has
    not (init), ModelError for a base in few bits or a loss that is not finite."""
    cfg = recipe.train
    examples = examples_of(loaded, recipe, rows)
    with seeded(recipe.seed, loaded.device), _copied(loaded) as net:
        log.warning("train: rows are padded, slower, because all weights are trained")
        spare = recomputes(loaded, cfg, examples, None)
        passes = Padded(loaded, net, cfg.batch_size, recompute=spare, steer=recipe.steer)
        training = loop.Training(list(net.parameters()), examples, cfg, recipe.seed)
        key = key_of(loaded, [(recipe, examples)], packed=False)
        with unfinished(beside(out_dir), key, [training]) as state:
            history = loop.run(passes, training, progress, lambda step, total: state.keep())
            card = card_of(loaded, recipe, rows, len(history), False)
            return _save(loaded, net, out_dir, history, card)


@contextmanager
def _copied(loaded: Loaded) -> Iterator[Any]:
    """A float32 copy of the model in training mode, its weights trained. Raises ModelError where there can be none."""
    kind = quantized.kind_of(loaded.model.config)
    if kind is not None:
        raise ModelError(
            f"train: the weights of {loaded.name} are held in few bits ({kind}), which are no numbers to train. Needed: "
            "weights in bfloat16 or float32. Give --model the weights that they were made of, or use method lora."
        )
    n_weights = sum(p.numel() for p in loaded.model.parameters())
    free = free_bytes(loaded.device)
    told = "" if free is None else f", {free / 1e9:.1f} GB are free"
    log.info("train: all %d weights: about %.1f GB%s", n_weights, n_weights * BYTES_A_WEIGHT / 1e9, told)
    net = copy.deepcopy(loaded.model).float().requires_grad_(True)
    yield net.train()


def _save(
    loaded: Loaded, net: Any, out_dir: str | Path, history: Sequence[loop.Step], card: AdapterCard
) -> AdapterCard:
    """The model's folder, in the base's dtype, looked at before it counts; the card's hash filled in."""
    with placed(out_dir, history) as folder:
        net.eval().to(getattr(torch, loaded.dtype))
        with quiet_bars(True), explained(folder):
            net.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
        check_same_kind(loaded, folder)
        card = replace(card, adapter_hash=adapter_hash(folder))
        write_card(folder, card)
        return card
