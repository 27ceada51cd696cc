"""Fused norms and MLPs for the blocks on a GPU: torch's own rms_norm, and Liger's ops where they are installed.
By default a block runs as transformers has it; LEAKFAST_AUTOTUNE=1 times the ways on the device and takes the
best. Demands modules of transformers' shape (weight, variance_epsilon; gate_proj, up_proj, down_proj)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from leakfast import tuning

log = logging.getLogger(__name__)

# (part, device name) → way, as measured; whatever is not here is "plain". Empty: no GPU has been measured.
MEASURED: dict[tuple[str, str], str] = {}
_TRIAL_ROWS = 4096


def ways(part: str) -> dict[str, Callable[[Any, torch.Tensor], torch.Tensor] | None]:
    """Way → forward(module, x) for the part "norm" or "mlp", of those that are installed; None: the module's."""
    found: dict[str, Any] = {"plain": None, "torch": _torch_norm} if part == "norm" else {"plain": None}
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = _liger_norm if part == "norm" else _liger_mlp
    return found


def chosen(model: Any) -> dict[str, str]:
    """Part → way for the blocks of a decoder: measured here under LEAKFAST_AUTOTUNE, else from MEASURED."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return {"norm": "plain", "mlp": "plain"}
    if not tuning.asked():
        name = torch.cuda.get_device_name(weight.device)
        return {part: MEASURED.get((part, name), "plain") for part in ("norm", "mlp")}
    return {part: _tuned(model, part, weight) for part in ("norm", "mlp")}


@contextmanager
def applied(model: Any, plan: Mapping[str, str]) -> Iterator[None]:
    """The decoder's norms and MLPs run their part's way for the length of the block; then exactly as before.
    A module that something else has already given a forward of its own is left to it."""
    changed = []
    try:
        for module in model.modules():
            part = _part(module)
            forward = ways(part)[plan[part]] if part and plan[part] != "plain" else None
            if forward is not None and "forward" not in vars(module):
                module.forward = partial(forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _part(module: Any) -> str | None:
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "norm"
    gated = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    return "mlp" if gated and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") else None


def _tuned(model: Any, part: str, weight: torch.Tensor) -> str:
    config = model.config
    block = model.layers[0]
    module = block.input_layernorm if part == "norm" else block.mlp
    if _part(module) != part:
        return "plain"
    shape = (config.model_type, config.hidden_size, config.intermediate_size, weight.dtype)

    def run(way: str) -> None:
        x = weight.new_zeros(1, _TRIAL_ROWS, config.hidden_size)
        with applied(block, {"norm": "plain", "mlp": "plain", part: way}), torch.inference_mode():
            module(x)

    return tuning.best(f"engine {part}", shape, weight.device, {way: partial(run, way) for way in ways(part)})


def _torch_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _liger_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, module.weight, module.variance_epsilon)


def _liger_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return module.down_proj(liger_swiglu(module.gate_proj(x), module.up_proj(x)))
