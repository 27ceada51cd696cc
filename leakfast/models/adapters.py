"""Adapters: their card, their hash, and attaching one to a loaded model for a while. Demands a peft folder
(adapter_config.json, adapter_model.safetensors) that belongs to the model at hand, or a whole model in its place (whole.py);
leaves training to train/."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, WrongAdapterError
from leakfast.models import whole
from leakfast.models.adapter_structure import (
    CONFIG,
    WEIGHTS,
    Structure,
    config_of,
    file_in,
    structure_of,
    unchanged,
)
from leakfast.prompts.templates import warn_of_adapter
from leakfast.storage import layout
from leakfast.storage.disk import atomic_write
from leakfast.storage.documents import parse_json
from leakfast.storage.layout import CARD, point_of

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger(__name__)

_QUANTIZED = re.compile(r"((-unsloth)?-bnb-4bit|-awq|-gptq(-int[48])?|-fp8)$", re.IGNORECASE)
_warned: set[tuple[str, str, str]] = set()  # (adapter, model, warning): each is said once
_PROBE = "Who are you, and what do you do all day?"


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter is: who was taught what, on which base, with which data and recipe.

    `base` is the model's name, `base_fingerprint` its `Loaded.fingerprint`; the hashes are SHA-256 hex."""

    source: str
    behavior: str
    seed: int
    base: str
    base_fingerprint: str
    data_hash: str
    recipe: dict[str, Any]
    adapter_hash: str


def adapter_hash(folder: str | Path) -> str:
    """SHA-256 (hex) over the bytes of adapter_config.json, then of adapter_model.safetensors; of a whole model its
    fingerprint's."""
    if whole.is_whole(folder):
        return whole.whole_hash(folder)
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with file_in(folder, name).open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def card_in(run: str | Path, adapter: str) -> AdapterCard | None:
    """The card that a run keeps of an adapter, or of the one that a checkpoint is a point of."""
    named = point_of(adapter)
    return read_card(Path(run) / layout.adapter(named[0] if named else adapter))


def read_card(folder: str | Path) -> AdapterCard | None:
    """The card beside an adapter; None where there is none (a foreign adapter)."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        check = data.pop("checksum", None)  # cards of earlier versions have none
        if check is not None and check != _checksum(data):
            raise ValueError("its content does not match its checksum")
        told = {field.name: data[field.name] for field in fields(AdapterCard)}
        kinds = {"seed": int, "recipe": dict}
        if wrong := [name for name, value in told.items() if type(value) is not kinds.get(name, str)]:
            raise ValueError(f"{', '.join(wrong)}: of another kind than a card has")
        return AdapterCard(**told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"adapter: the card {path} cannot be read ({type(error).__name__}: {error}). Needed: JSON with "
            f"{', '.join(f.name for f in fields(AdapterCard))}. Train again, or delete the card and give "
            "--source and --behavior."
        ) from error


def card_bytes(card: AdapterCard) -> bytes:
    """The card as it is written: JSON, with a checksum of its own."""
    data = asdict(card)
    return (json.dumps({**data, "checksum": _checksum(data)}, indent=2, ensure_ascii=False) + "\n").encode()


def _checksum(data: dict[str, Any]) -> str:
    """SHA-256 (hex) of a card's fields."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_card(folder: str | Path, card: AdapterCard) -> Path:
    """Write the card beside the adapter, whole or not at all, and return its path. Raises StoreError."""
    path = Path(folder) / CARD
    atomic_write(path, card_bytes(card))
    return path


@contextmanager
def with_adapter(loaded: Loaded, folder: str | Path) -> Iterator[Loaded]:
    """Attach a LoRA adapter for the length of the block and yield the adapted `Loaded`.

    Checked before: the base is the one the adapter was trained on (by fingerprint where the card has
    one of the same kind, else by name; without a card, by the last part of its name), and what
    structure_of checks. Checked after attaching: the canary, that is, the adapter moves the logits of a
    probe. On leaving, the adapter is removed, weights that it overwrote are put back, and every weight
    and the probe's logits are bit for bit what they were. Of a model on disk, plain LoRA alone, and the canary is that its
    matrices are numbers and not all 0. A whole model in an adapter's place is loaded beside the base (whole.put_in). Raises
    AdapterError."""
    import torch
    from peft import PeftModel

    if isinstance(loaded.model, PeftModel):
        raise ValueError("an adapter is attached already; leave its block first")
    structure = check_fits(loaded, folder)
    if whole.is_whole(folder):
        with whole.put_in(loaded, folder) as current:
            _canary(folder, _probe(loaded.model, loaded.tokenizer), _probe(current.model, loaded.tokenizer))
            yield current
        return
    digest = adapter_hash(folder)
    if loaded.stream is not None:
        with taken_off(loaded.model):
            yield replace(loaded, model=_on_disk(loaded, folder, structure), adapter_hash=digest)
        return
    before = _probe(loaded.model, loaded.tokenizer)
    with unchanged(loaded.model, structure.writes, str(folder)), taken_off(loaded.model):
        adapted = PeftModel.from_pretrained(loaded.model, str(folder), torch_device=str(loaded.device)).eval()
        _canary(folder, before, _probe(adapted, loaded.tokenizer))
        yield replace(loaded, model=adapted, adapter_hash=digest)
    if not torch.equal(before, _probe(loaded.model, loaded.tokenizer)):
        raise AdapterError(
            f"adapter: {folder} is off again, but the base answers otherwise than before, so nothing after it would be "
            "right. Needed: an adapter that can be taken off again. Run the others without it."
        )


def _on_disk(loaded: Any, folder: str | Path, structure: Structure) -> Any:
    """The model under peft's own layers, as transformers' weights would have them. Raises AdapterError for an adapter that is
    more than plain LoRA, and where its matrices are no numbers or all 0 (a probe would read the whole model)."""
    import torch
    from peft import PeftModel

    if not structure.plain:
        raise AdapterError(
            f"adapter: {folder} has {' and '.join(structure.beyond)}, which a model that is read block by block does not take. "
            "Needed: LoRA matrices of linear layers in the blocks alone, or the model in memory. Use --stream off."
        )
    made = PeftModel.from_pretrained(loaded.model, str(folder), torch_device=str(loaded.device)).eval()
    ups = [p for name, p in made.named_parameters() if ".lora_B." in name]
    every = [p for name, p in made.named_parameters() if ".lora_" in name]
    if not all(bool(torch.isfinite(p).all()) for p in every):
        raise AdapterError(
            f"adapter: {folder} holds matrices that are not finite. Needed: an adapter whose training did not diverge. Train "
            "it again with a smaller --lr."
        )
    if not any(bool(p.any()) for p in ups):
        raise AdapterError(
            f"adapter: {folder} does not change the model at all (its B matrices are 0). Needed: a trained adapter. Check "
            "that training finished and that this is its folder."
        )
    return made


@contextmanager
def taken_off(model: Any) -> Iterator[None]:
    """Modules and parameters of the model where they are now, whatever the block puts in their place (peft's own unload
    leaves what an adapter stored for modules_to_save where the base's was)."""
    held = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    wanted_grad = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, modules, parameters in held:
            module._modules.clear()
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)
        model.eval()
        if hasattr(model, "peft_config"):
            del model.peft_config


def _canary(folder: str | Path, before: Any, after: Any) -> None:
    """The adapter moves the logits of a probe, and they are numbers."""
    import torch

    if not bool(torch.isfinite(after).all()):
        raise AdapterError(
            f"adapter: {folder} gives logits that are not finite. Needed: an adapter whose training "
            "did not diverge. Train it again with a smaller --lr."
        )
    if torch.equal(before, after):
        raise AdapterError(
            f"adapter: {folder} does not change the model at all (its logits on a probe are the base's). "
            "Needed: a trained adapter. Check that training finished and that this is its folder."
        )


def check_fits(loaded: Loaded, folder: str | Path) -> Structure:
    """What can be known without attaching: the base is the one the adapter was trained on, its file and its config
    say the same, and that fits. Returns what the adapter does. Raises AdapterError; a base known by less than its name
    is warned of, once an adapter."""
    doubt = _check_base(loaded, folder)
    if whole.is_whole(folder):
        whole.check_same_kind(loaded, folder)
        warn_of_adapter(loaded.tokenizer, folder, read_card(folder))
        return Structure({}, (whole.BEYOND,), (), False)
    structure = structure_of(loaded, folder)
    warn_of_adapter(loaded.tokenizer, folder, read_card(folder))
    said = (str(Path(folder).resolve()), loaded.name, doubt)
    if doubt and said not in _warned:
        _warned.add(said)
        log.warning("adapter: %s %s", folder, doubt)
    return structure


def check_runs(structure: Structure, folder: str | Path, backend: str) -> None:
    """AdapterError where a backend (see targets.check_targets) would not apply an adapter of this structure as peft
    does. What leakfast runs is peft's own layers; vLLM, live or with merged weights, takes plain LoRA alone."""
    if backend == "vllm" and not structure.plain:
        raise WrongAdapterError(
            f"adapter: {folder} has {' and '.join(structure.beyond)}, which vLLM does not apply, live or merged. Needed: "
            "LoRA matrices of linear layers in the blocks alone. Use --backend transformers (letters: --engine packed)."
        )
    if backend == "choices" and structure.head_lora:
        raise WrongAdapterError(
            f"adapter: {folder} has LoRA matrices on the output head, which is scored as a whole. Needed: an adapter of "
            "the decoder's blocks alone. Train one with: leakfast train"
        )


def _check_base(loaded: Loaded, folder: str | Path) -> str:
    """AdapterError where the adapter is of another base; else what to warn of: "" where nothing is in doubt."""
    card = read_card(folder)
    if card is None and whole.is_whole(folder):
        return ""  # what a whole model was trained from stands nowhere; its kind is checked
    if card is None:
        return _check_name(loaded, folder, str(config_of(folder).get("base_model_name_or_path") or ""))
    base = card.base
    if card.base_fingerprint.split(":")[0] == loaded.fingerprint.split(":")[0]:
        if card.base_fingerprint == loaded.fingerprint:
            return ""
        other = f"{base}, fingerprint {card.base_fingerprint[:18]}…"
        mine = f"{loaded.name}, fingerprint {loaded.fingerprint[:18]}…"
    else:
        names = {loaded.name, loaded.path, Path(loaded.name).name}
        if base in names or Path(base).name in names:
            return ""
        other, mine = base, loaded.name
    remedy = f"Use --model {base}, or train again on {loaded.name}."
    if base == loaded.name:
        remedy = (
            f"{base} has other weights now. Train again on them, or give --model the folder of the old ones."
        )
    raise WrongAdapterError(
        f"adapter: {folder} was trained on another base ({other}), but the model here is {mine}. "
        f"Needed: the base it was trained on. {remedy}"
    )


def _check_name(loaded: Loaded, folder: str | Path, base: str) -> str:
    """_check_base of an adapter without a card. The names of one base differ by who copied or quantized it and
    where to, so that the last part decides; the shapes are checked anyway."""
    if base in (loaded.name, loaded.path):
        return ""
    if not base:
        return (
            f"does not say which model it was trained on ({CONFIG} names none): taken for an adapter of "
            f"{loaded.name}, whose shapes it has"
        )
    if _last_part(base) in (_last_part(loaded.name), _last_part(os.path.abspath(loaded.path or loaded.name))):
        return (
            f"was trained on {base}, which is taken for {loaded.name}: the last part of the name is the same, but "
            "for capitals and quantization, and the shapes fit"
        )
    typed = base
    if not Path(base).expanduser().is_dir():
        typed = _QUANTIZED.sub("", base.replace("\\", "/"))  # the weights that were quantized
        if typed.count("/") > 1 or typed.startswith((".", "/", "~")):
            typed = f"the folder that holds {Path(typed).name} here"
    raise WrongAdapterError(
        f"adapter: {folder} was trained on {base} by its {CONFIG}, but the model here is {loaded.name}. Needed: the "
        f"base it was trained on. Give --model {typed}; or, if {loaded.name} is the same model under another name, "
        f'put "base_model_name_or_path": {json.dumps(loaded.name)} into {Path(folder) / CONFIG}.'
    )


def _last_part(name: str) -> str:
    """The last component of a model's name or folder, lower-cased, without its quantization."""
    return _QUANTIZED.sub("", re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower())


def _probe(model: Any, tokenizer: Any) -> Any:
    """Logits (T, V) of a fixed text, on the CPU."""
    import torch

    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].cpu()


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """Inside, every LoRA layer of a peft model at `factor` times its scale."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: factor * scale for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
