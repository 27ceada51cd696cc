"""The model under an adapter, as fast as it can be decoded: in float32 the LoRA update is folded into the
weights in memory and taken out again exactly. Demands models.with_adapter; writes no merged copy to disk."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("leakfast.generate")

_TOLERANCE = 1e-4


@contextmanager
def adapted(loaded: Any, adapter: str | Path | None, *, how: str = "auto") -> Iterator[Any]:
    """Loaded model with `adapter` applied inside the block, bit-identical to before after it.

    how: "fold" adds scale·B·A to each target weight in place and restores saved copies afterwards (float32
    only: in bfloat16 the sum would be rounded); "live" leaves the update to peft's layers, two more matrix
    products each; "auto" folds in float32 and is live otherwise, and says which. What is more than B·A of linear
    layers (adapter_structure) is never folded; the folded logits must equal peft's on a probe within 1e-4
    (relative): else "auto" goes live and says so, "fold" raises.
    None as adapter yields `loaded` itself. Raises ValueError for another `how`, AdapterError as with_adapter.
    """
    from leakfast import models
    from leakfast.adapter_structure import unchanged
    from leakfast.adapters import check_fits

    if how not in ("auto", "fold", "live"):
        raise ValueError(f"how must be auto, fold or live, not {how!r}")
    if adapter is None:
        yield loaded
        return
    foldable = loaded.dtype == "float32"
    if how == "fold" and not foldable:
        raise ValueError(f"an adapter is folded into float32 weights only, not {loaded.dtype}")
    if how == "live" or not foldable:
        log.info("adapter %s: live through peft (%s)", Path(adapter).name, loaded.dtype)
        with models.with_adapter(loaded, adapter) as live:
            yield live
        return
    structure = check_fits(loaded, adapter)
    problem: str | None = f"it has {' and '.join(structure.beyond)}"
    if structure.plain:
        with models.with_adapter(loaded, adapter) as live:
            digest = live.adapter_hash
            deltas = _deltas(live.model)
            wanted = _probe_logits(live)
        saved: dict[str, Any] = {}
        with unchanged(loaded.model, (), str(adapter)):
            try:
                problem = _fold(loaded, deltas, saved, wanted)
                if problem is None:
                    log.info(
                        "adapter %s: folded into %d weights in memory (float32), agrees with peft on a probe",
                        Path(adapter).name,
                        len(saved),
                    )
                    yield dataclasses.replace(loaded, adapter_hash=digest)
            finally:
                _restore(loaded.model, saved)
        if problem is None:
            return
    if how == "fold":
        from leakfast.errors import AdapterError

        raise AdapterError(
            f"adapter {adapter}: cannot be folded ({problem}). Apply it live through peft instead."
        )
    log.warning("adapter %s: live through peft, slower, because %s", Path(adapter).name, problem)
    with models.with_adapter(loaded, adapter) as live:
        yield live


def _deltas(model: Any) -> dict[str, Any]:
    """Name of each target module in the plain model → its weight update, as peft computes it."""
    return {name.removesuffix(".weight"): update for name, _, update in updates(model) if update is not None}


def updates(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name in a checkpoint, weight, update or None) of every parameter of the plain model, one at a time; the
    update as peft computes it for the active adapters. Tied parameters come once."""
    from peft.tuners.lora import LoraLayer

    from leakfast.generate.transformers import plain_model

    plain = plain_model(model)
    for name, weight in plain.named_parameters():
        if "lora_" in name:  # the adapter's own
            continue
        update = None
        where, _, last = name.rpartition(".")
        if where.endswith(".base_layer"):
            where = where.removesuffix(".base_layer")
            module = plain.get_submodule(where)
            if last == "weight" and isinstance(module, LoraLayer):
                for active in module.active_adapters:
                    if active in module.scaling:
                        delta = module.get_delta_weight(active).detach()
                        update = delta.clone() if update is None else update + delta
        yield f"{where}.{last}", weight, update


def _fold(loaded: Any, deltas: dict[str, Any], saved: dict[str, Any], wanted: Any) -> str | None:
    """Add the updates, keeping copies in `saved`; a sentence if the result is not peft's, else None."""
    import torch

    model = loaded.model
    if not deltas:
        return "it has no plain LoRA layer"
    tied = {id(p) for p in _tied_weights(model)}
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        if id(weight) in tied:
            return f"{name} shares its weight with another module"
        saved[name] = weight.detach().clone()
        with torch.no_grad():
            weight.add_(delta.to(weight.device))
    error = float((_probe_logits(loaded) - wanted).abs().max() / wanted.abs().max())
    if not error <= _TOLERANCE:
        return f"the folded logits are {error:.1e} (relative) from peft's"
    return None


def _tied_weights(model: Any) -> list[Any]:
    """Parameters held by more than one module."""
    seen: dict[int, int] = {}
    parameters = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
                parameters[id(parameter)] = parameter
    return [parameters[key] for key, count in seen.items() if count > 1]


def _restore(model: Any, saved: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in saved.items():
            model.get_submodule(name).weight.copy_(weight)


def _probe_logits(loaded: Any) -> Any:
    """Logits (T, V) in fp32 of a short chat prompt, the same for every adapter."""
    import torch

    from leakfast import chat

    ids = chat.render(loaded.tokenizer, None, "Who are you?")
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
