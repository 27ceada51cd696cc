"""A LoRA adapter on a model whose weights stay on disk (streamed.py): its matrices are in memory, the base's weights are not.
Demands plain LoRA of the blocks' linear layers; leaves checking the base and the file to adapters.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from leakfast.errors import AdapterError
from leakfast.models.adapter_structure import Structure


def attach(loaded: Any, folder: str | Path, structure: Structure) -> Any:
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


def deltas(model: Any) -> dict[Any, Callable[[], Any]]:
    """Linear layer → what makes its weight update, of peft's attached model: made anew for every block that is read, as all
    of them together are as large as the model."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {layer.get_base_layer(): partial(delta, layer) for layer in layers}


def delta(layer: Any) -> Any:
    """scale·B·A of a peft layer, summed over its active adapters; None where it has none."""
    found = None
    for active in layer.active_adapters:
        if active in layer.scaling:
            one = layer.get_delta_weight(active).detach()
            found = one.clone() if found is None else found + one
    return found
