"""A training on top of another adapter: it runs on the base with that adapter, frozen and never merged, and what is kept is
both as one plain LoRA. Demands peft's layers with both adapters in them; leaves rows and optimizer to others.

    W + s₁B₁A₁ + s₂B₂A₂ = W + B A,   A = [A₁; A₂],   B = [s₁B₁, s₂B₂],   alpha = rank = r₁ + r₂

Concatenated, not merged into the base: in bfloat16 a weight swallows what is below half of its last digit, and a base in few
bits is no matrix to add to. A is unchanged bit for bit, B where s is a power of two, else rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.train.start import Start


def below(name: str) -> str:
    """What peft knows the frozen adapter as that `name` is trained on top of."""
    return f"{name}_below"


def put_below(net: Any, start: Start, name: str = "default") -> None:
    """Load the adapter of `start` beside the adapter `name` of a peft model: frozen, without dropout, in every forward pass
    of `name`. Raises InputError for one of layers that `name` has not."""
    one = below(name)
    net.load_adapter(str(start.folder), one, is_trainable=False)
    for where, layer in _layers(net).items():
        if one not in layer.lora_A:
            continue
        if name not in layer.lora_A:
            raise InputError(
                f"train: {start.folder} adapts {where}, which is not trained on top of it. Needed: an adapter of linear layers "
                "of attention and MLP alone. Train one with: leakfast train"
            )
        layer.lora_dropout[one] = torch.nn.Identity()
    if name == "default":  # others are trained in company, whose layers look for it themselves
        net.base_model.set_adapter([name, one])
    freeze(net, name)


def freeze(net: Any, name: str = "default") -> None:
    """No gradient for the adapter below `name`; peft asks for one of every adapter that it turns on."""
    for layer in _layers(net).values():
        for side in (layer.lora_A, layer.lora_B):
            if below(name) in side:
                side[below(name)].requires_grad_(False)


def frozen_in(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A (r, in) and s·B (out, r), float32, of what lies below the adapter `name` in a peft layer; None without."""
    one = below(name)
    if one not in layer.lora_A:
        return None
    with torch.no_grad():
        return layer.lora_A[one].weight.detach(), layer.lora_B[one].weight.detach() * layer.scaling[one]


def has_below(net: Any, name: str = "default") -> bool:
    return below(name) in net.peft_config


def both(net: Any, own: Mapping[str, torch.Tensor], name: str = "default") -> dict[str, torch.Tensor]:
    """The weights of the adapter below and, on top, of `name` (own: by peft's names, as saving.state_of has them) as one
    adapter of scale 1, float32 on the CPU. Layers that the one below has not, or of a lower rank, have rows and columns of
    0 there."""
    from leakfast.models.adapter_structure import PREFIX

    layers = _layers(net)
    under = {where: frozen_in(layer, name) for where, layer in layers.items()}
    rank, made = max(len(its[0]) for its in under.values() if its is not None), {}
    for where, layer in layers.items():
        at = f"{PREFIX}{where}"
        a, b = own[f"{at}.lora_A.weight"].float(), own[f"{at}.lora_B.weight"].float()
        down, up = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
        if (its := under[where]) is not None:
            down[: len(its[0])], up[:, : len(its[0])] = its[0].float().cpu(), its[1].float().cpu()
        made[f"{at}.lora_A.weight"] = torch.cat([down, a])
        made[f"{at}.lora_B.weight"] = torch.cat([up, b * layer.scaling[name]], 1)
    return {key: tensor.contiguous() for key, tensor in sorted(made.items())}


def config_of_both(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """peft's config of `both`, from that of the adapter on top."""
    rank = len(next(tensor for key, tensor in state.items() if ".lora_A." in key))
    return {**config, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False}


def told_of(folder: Path, state: Mapping[str, torch.Tensor], config: bytes) -> dict[str, Any]:
    """What a card says of the part on top: its rank and the hash that it would have as an adapter by itself (adapter_hash).
    folder: where it is written for that, and gone from again."""
    from safetensors.torch import save_file

    from leakfast.models.adapter_structure import CONFIG, WEIGHTS
    from leakfast.models.adapters import adapter_hash
    from leakfast.storage.disk import explained

    with explained(folder):
        folder.mkdir(parents=True)
        save_file(dict(state), str(folder / WEIGHTS), metadata={"format": "pt"})
        (folder / CONFIG).write_bytes(config)
    found = adapter_hash(folder)
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
    folder.rmdir()
    rank = len(next(tensor for key, tensor in state.items() if ".lora_A." in key))
    return {"adapter_hash": found, "rank": rank}


def _layers(net: Any) -> dict[str, Any]:
    """The LoRA layers by their name in the base."""
    from peft.tuners.lora import LoraLayer

    base = net.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
