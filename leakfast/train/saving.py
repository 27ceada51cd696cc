"""An adapter on disk: peft's two files, the card and the training log, written all at once or not at all. Demands a
finished training; leaves what is in the card to lora.py."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import InputError
from leakfast.models.adapter_structure import CONFIG, WEIGHTS
from leakfast.storage.layout import CARD, CHECKPOINTS, SAMPLE, point_folder
from leakfast.train import stacked

if TYPE_CHECKING:
    from leakfast.models.adapters import AdapterCard
    from leakfast.models.loading import Loaded
    from leakfast.train.loop import Step

log = logging.getLogger("leakfast.train")

LOG = "train_log.jsonl"


def state_of(net: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's weights by peft's names, sorted, on the CPU."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers: peft's "auto" would ask the hub for the base's config
    state = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
    return {k: v.detach().cpu().contiguous() for k, v in sorted(state.items())}


def save(
    loaded: Loaded,
    net: Any,
    out_dir: str | Path,
    history: Sequence[Step],
    card: AdapterCard,
    kept: dict[float, tuple[int, dict[str, torch.Tensor]]],
    name: str = "default",
) -> AdapterCard:
    """Write the folder of the adapter that peft knows as `name` beside `out_dir` under a temporary name, then rename it
    into place. The card's hash is filled in; a checkpoint's recipe also says its step and share. One that was trained on top
    of another is written with that one (train.stacked), and the card's recipe says of which two it is made (`stacked`)."""
    given = _plain(net.peft_config[name], loaded.name)

    def write(folder: Path, state: dict[str, torch.Tensor], card: AdapterCard) -> AdapterCard:
        if not stacked.has_below(net, name):
            return _write(folder, state, _bytes(given), card)
        top = stacked.told_of(folder / "top", state, _bytes(given))
        whole = stacked.both(net, state, name)
        config = stacked.config_of_both(given, whole)
        told = {"below": card.recipe["init"]["adapter_hash"], "top": top, "rank": config["r"]}
        card = replace(card, recipe={**card.recipe, "stacked": told})
        return _write(folder, whole, _bytes(config), card)

    with placed(out_dir, history) as temporary:
        for share, (step, state) in kept.items():
            recipe = {**card.recipe, "checkpoint_step": step, "checkpoint_share": share}
            write(temporary / CHECKPOINTS / point_folder(share), state, replace(card, recipe=recipe))
        return write(temporary, state_of(net, name), card)


@contextmanager
def placed(out_dir: str | Path, history: Sequence[Step]) -> Iterator[Path]:
    """A temporary folder to be filled in the block; then it is given the training's log and renamed to `out_dir`."""
    from leakfast.storage.disk import atomic_write, explained

    out = Path(out_dir)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        lines = (json.dumps(vars(step)) + "\n" for step in history)
        atomic_write(temporary / LOG, "".join(lines).encode())
        with explained(out):
            _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    known = [step.loss for step in history if step.loss is not None] or [math.nan]
    log.info("train: %s, loss %.3f after %d steps (first: %.3f)", out, known[-1], len(history), known[0])


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


def _plain(config: Any, base: str) -> dict[str, Any]:
    """peft's config of an adapter as it writes it, as plain data."""
    given = config.to_dict()
    given["base_model_name_or_path"] = base
    given["inference_mode"] = True

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return getattr(value, "value", value)

    found: dict[str, Any] = plain(given)
    return found


def _bytes(config: dict[str, Any]) -> bytes:
    """adapter_config.json, in an order that does not change from process to process."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an older one there is moved aside first and removed after, whole or with parts
    lost to damage."""
    if not target.exists():
        folder.rename(target)
        return
    strangers = {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS, CARD, LOG, CHECKPOINTS, SAMPLE}
    # a whole model of ours has its card or log; one of the user's is not replaced
    ours = any((target / name).is_file() for name in (CONFIG, CARD, LOG))
    if strangers and not ours:
        raise InputError(f"train: {target} is there already and holds no adapter. Give another --out.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    folder.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
