"""Fused norms and MLPs for the blocks on a GPU: torch's own rms_norm, and Liger's ops where they are installed.
By default norms are torch's where a trial agrees, MLPs as transformers has them; LEAKFAST_AUTOTUNE=1 times the ways
on the device and takes the best. Demands modules of transformers' shape (weight, variance_epsilon; gate_proj, up_proj,
down_proj)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from leakfast.forward import autotune as tuning

log = logging.getLogger(__name__)

PLAIN = {"norm": "plain", "mlp": "plain"}
# (part, device name) → way, as measured. Empty: no GPU has been measured.
MEASURED: dict[tuple[str, str], str] = {}
# Whatever is not in MEASURED. By bytes: transformers' norm moves 36 an element of bfloat16 in seven kernels, one takes 4.
UNMEASURED = {"norm": "torch", "mlp": "plain"}
_TIMED_ROWS, _TRIAL_ROWS = 4096, 16
_tried: dict[tuple[Any, ...], bool] = {}


def ways(part: str) -> dict[str, Callable[[Any, torch.Tensor], torch.Tensor] | None]:
    """Way → forward(module, x) for the part "norm" or "mlp", of those that are installed; None: the module's."""
    found: dict[str, Any] = {"plain": None, "torch": _torch_norm} if part == "norm" else {"plain": None}
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = _liger_norm if part == "norm" else _liger_mlp
    return found


def chosen(model: Any) -> dict[str, str]:
    """Part → way for the blocks of a decoder: measured here under LEAKFAST_AUTOTUNE, else from MEASURED or UNMEASURED
    where a trial of it agrees with the module."""
    weight = next(model.parameters())
    if weight.device.type != "cuda" or not hasattr(model, "layers"):
        return PLAIN
    if tuning.asked():
        return {part: _tuned(model, part, weight) for part in PLAIN}
    name = torch.cuda.get_device_name(weight.device)
    wanted = {part: MEASURED.get((part, name), UNMEASURED[part]) for part in PLAIN}
    return {part: way if agrees(model, part, way) else "plain" for part, way in wanted.items()}


def agrees(model: Any, part: str, way: str) -> bool:
    """Whether a way computes what the part of the model's first block does, to two roundings of its dtype, on random
    rows of its device; tried once, and said where it does not."""
    weight, config = next(model.parameters()), model.config
    wide = getattr(config, "intermediate_size", None)
    key = (part, way, weight.device, weight.dtype, config.model_type, config.hidden_size, str(wide))
    if way == "plain" or key in _tried:
        return way == "plain" or _tried[key]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TRIAL_ROWS, config.hidden_size, generator=draw).to(weight.device, weight.dtype)
    try:
        module = _module(model, part)  # blocks name their parts as they like
        if part_of(module) != part:
            raise ValueError(f"a {type(module).__name__} is none")
        with torch.inference_mode():
            expected = module(x).float()
            with applied(module, PLAIN | {part: way}):
                off = float((module(x).float() - expected).norm() / expected.norm())
        trouble = None if off <= 2 * torch.finfo(weight.dtype).eps else f"it differs by {off:.1e}"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if trouble:
        log.warning("engine: the %s runs as transformers has it, not as %s (%s)", part, way, trouble)
    else:
        log.info("engine: the %s runs as %s", part, way)
    _tried[key] = trouble is None
    return _tried[key]


def _module(model: Any, part: str) -> Any:
    block = model.layers[0]
    return block.input_layernorm if part == "norm" else block.mlp


@contextmanager
def applied(model: Any, plan: Mapping[str, str]) -> Iterator[None]:
    """The decoder's norms and MLPs run their part's way for the length of the block; then exactly as before.
    A module that something else has already given a forward of its own is left to it."""
    changed = []
    forwards = {part: ways(part)[way] for part, way in plan.items() if way != "plain"}
    try:
        for module in model.modules() if forwards else ():
            forward = forwards.get(part_of(module))
            if forward is not None and "forward" not in vars(module):
                module.forward = partial(forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def part_of(module: Any) -> str | None:
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "norm"
    gated = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    return "mlp" if gated and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") else None


def _tuned(model: Any, part: str, weight: torch.Tensor) -> str:
    config = model.config
    try:
        module = _module(model, part)
    except AttributeError:
        return "plain"
    if part_of(module) != part:
        return "plain"
    shape = (config.model_type, config.hidden_size, config.intermediate_size, weight.dtype)
    x = torch.randn(1, _TIMED_ROWS, config.hidden_size, device=weight.device, dtype=weight.dtype)

    def run(way: str) -> None:
        with applied(module, PLAIN | {part: way}), torch.inference_mode():
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
