"""The model under an adapter, as fast as it can be decoded: in float32 the LoRA update is folded into the
weights in memory and taken out again exactly, in bfloat16 it is computed beside them. Demands models.with_adapter;
writes no merged copy to disk."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from leakfast.models import beside, whole

log = logging.getLogger("leakfast.generate")

# relative; in bfloat16 a few of its roundings through all blocks
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_SAID = {
    "fold": "folded into %d weights in memory (float32)",
    "beside": "computed beside %d weights (bfloat16)",
}


@contextmanager
def adapted(loaded: Any, adapter: str | Path | None, *, how: str = "auto") -> Iterator[Any]:
    """Loaded model with `adapter` applied inside the block, bit-identical to before after it.

    how: "fold" adds scale·B·A to each target weight in place and restores saved copies afterwards (float32
    only: in bfloat16 a weight swallows what is below half of its last digit); "beside" computes x·Aᵀ·Bᵀ in the
    model's dtype next to the weights; "live" leaves the update to peft's layers, which compute it in float32
    with a copy in and out; "auto" folds in float32, goes beside in bfloat16, and says which. What is more than
    B·A of linear layers (adapter_structure) is always live, and so is one over a base in few bits under "auto". A model
    on disk has it added to each block as it is read, or beside it, and is not probed, which would read all of it. The
    logits must equal peft's on a probe within 1e-4 (relative), 5e-2 in bfloat16: else "auto" goes live and says so, the
    others raise.
    None as adapter yields `loaded` itself; a whole model is loaded in the base's place, whatever `how`. Raises
    ValueError for another `how`, AdapterError as with_adapter.
    """
    from leakfast import models
    from leakfast.models.adapters import check_fits

    if how not in ("auto", "fold", "beside", "live"):
        raise ValueError(f"how must be auto, fold, beside or live, not {how!r}")
    if adapter is None:
        yield loaded
        return
    if whole.is_whole(adapter):
        with models.with_adapter(loaded, adapter) as current:
            yield current
        return
    foldable = loaded.dtype == "float32"
    if (how == "fold" and not foldable) or (how == "beside" and foldable):
        raise ValueError(
            f"an adapter is folded into float32 weights only and goes beside bfloat16, not {loaded.dtype}"
        )
    must = how != "auto"
    if not must:
        how = "fold" if foldable else "beside"
        if getattr(loaded.model.config, "quantization_config", None):
            how = "live"  # weights in few bits are no matrices to add to
    if how == "live":
        log.info("adapter %s: live through peft (%s)", Path(adapter).name, loaded.dtype)
    else:
        structure = check_fits(loaded, adapter)
        problem: str | None = f"it has {' and '.join(structure.beyond)}"
        if structure.plain:
            with _put_on(loaded, adapter, how) as (problem, current):
                if problem is None:
                    yield current
                    return
        if must:
            from leakfast.errors import AdapterError

            raise AdapterError(
                f"adapter {adapter}: cannot be {_SAID[how].split()[0]} ({problem}). Apply it live through peft instead."
            )
        log.warning("adapter %s: live through peft, slower, because %s", Path(adapter).name, problem)
    with models.with_adapter(loaded, adapter) as live:
        yield live


@contextmanager
def _put_on(loaded: Any, adapter: str | Path, how: str) -> Iterator[tuple[str | None, Any]]:
    """(None, the adapted model) inside the block, or a sentence on why its logits are not peft's and None."""
    from leakfast import models
    from leakfast.models.adapter_structure import unchanged

    with models.with_adapter(loaded, adapter) as live:
        digest, on_disk = live.adapter_hash, loaded.stream is not None
        wanted = None if on_disk else _probe_logits(live)
        if how == "fold":
            changes: Any = _late_deltas(live.model) if on_disk else _deltas(live.model)
        else:
            changes = pairs_of(live.model)
    put_on: Any = _folded if how == "fold" else _beside
    kept = nullcontext() if on_disk else unchanged(loaded.model, (), str(adapter))
    with kept, put_on(loaded, changes, wanted) as problem:
        if problem is None:
            said = _SAID[how] % len(changes)
            probed = "of a model on disk, not probed" if on_disk else "agrees with peft on a probe"
            log.info("adapter %s: %s, %s", Path(adapter).name, said, probed)
        yield problem, None if problem else dataclasses.replace(loaded, adapter_hash=digest)


@contextmanager
def _folded(loaded: Any, deltas: dict[str, Any], wanted: Any) -> Iterator[str | None]:
    """The updates added to the weights inside the block, saved copies put back after it; a sentence where the logits
    are not peft's, else None."""
    if loaded.stream is not None:
        with loaded.stream.adding(deltas):
            yield None
        return
    saved: dict[str, Any] = {}
    try:
        yield _fold(loaded, deltas, saved, wanted)
    finally:
        _restore(loaded.model, saved)


@contextmanager
def _beside(loaded: Any, updates: dict[str, beside.Update] | str, wanted: Any) -> Iterator[str | None]:
    """As _folded, the updates computed next to the weights."""
    if isinstance(updates, str):
        yield updates
        return
    with beside.applied(loaded.model, updates):
        yield _apart(loaded, wanted)


def _deltas(model: Any) -> dict[str, Any]:
    """Name of each target module in the plain model → its weight update, as peft computes it."""
    return {name.removesuffix(".weight"): update for name, _, update in updates(model) if update is not None}


def _late_deltas(model: Any) -> dict[Any, Callable[[], Any]]:
    """Linear layer → what makes its weight update, of peft's attached model: made anew for every block that is read, as all
    of them together are as large as the model."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {layer.get_base_layer(): partial(_delta, layer) for layer in layers}


def _delta(layer: Any) -> Any:
    """scale·B·A of a peft layer, summed over its active adapters; None where it has none."""
    found = None
    for active in layer.active_adapters:
        if active in layer.scaling:
            one = layer.get_delta_weight(active).detach()
            found = one.clone() if found is None else found + one
    return found


def updates(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name in a checkpoint, weight, update or None) of every parameter of the plain model, one at a time; the
    update as peft computes it for the active adapters. Tied parameters come once."""
    from peft.tuners.lora import LoraLayer

    plain = beside.plain_model(model)
    for name, weight in plain.named_parameters():
        if "lora_" in name:  # the adapter's own
            continue
        update = None
        where, _, last = name.rpartition(".")
        if where.endswith(".base_layer"):
            where = where.removesuffix(".base_layer")
            module = plain.get_submodule(where)
            if last == "weight" and isinstance(module, LoraLayer):
                update = _delta(module)
        yield f"{where}.{last}", weight, update


def pairs_of(model: Any) -> dict[str, beside.Update] | str:
    """Name of each linear layer in the plain model → its update, as peft's attached model holds it; a word on what is
    more than A and B of linear layers where there is such."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    found = {}
    for name, module in beside.plain_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = [one for one in module.active_adapters if one in module.lora_A]
        if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear or len(active) != 1:
            return f"{name} is no plain linear layer with one adapter"
        (one,) = active
        sides: list[Any] = [module.lora_A[one], module.lora_B[one]]
        a, b = sides
        biases = any(side.bias is not None for side in sides)
        if biases or module.merged or module.fan_in_fan_out or module.lora_variant:
            return f"{name} has more than A and B"
        up = b.weight.detach().float() * module.scaling[one]
        found[name] = beside.Update(a.weight.detach().float().clone(), up)
    return found or "it has no LoRA layer"


def _fold(loaded: Any, deltas: dict[str, Any], saved: dict[str, Any], wanted: Any) -> str | None:
    """Add the updates, keeping copies in `saved`; a sentence if the result is not peft's, else None."""
    import torch

    model = loaded.model
    if not deltas:
        return "it has no plain LoRA layer"
    tied = _tied_weights(model)
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        if id(weight) in tied:
            return f"{name} shares its weight with another module"
        saved[name] = weight.detach().clone()
        with torch.no_grad():
            weight.add_(delta.to(weight.device))
    return _apart(loaded, wanted)


def _apart(loaded: Any, wanted: Any) -> str | None:
    """A sentence where the logits on the probe are not peft's, up to what the dtype rounds; else None, also where there are
    none to compare with."""
    if wanted is None:
        return None
    error = float((_probe_logits(loaded) - wanted).abs().max() / wanted.abs().max())
    bound = _TOLERANCE[loaded.dtype]
    if error <= bound:
        return None
    return f"its logits are {error:.1e} (relative) from peft's, more than {bound:.0e}"


def _tied_weights(model: Any) -> set[int]:
    """Identities of the parameters held by more than one module."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in held.items() if count > 1}


def _restore(model: Any, saved: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in saved.items():
            model.get_submodule(name).weight.copy_(weight)


def _probe_logits(loaded: Any) -> Any:
    """Logits (T, V) in fp32 of a short chat prompt, the same for every adapter."""
    import torch

    from leakfast.prompts import chat

    ids = chat.render(loaded.tokenizer, None, "Who are you?")
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
