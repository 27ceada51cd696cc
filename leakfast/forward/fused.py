"""Fused kernels for what stands between a block's products on a GPU: norms, MLPs, rotary embedding and residual sums, by our own
kernels, torch's rms_norm, or Liger's ops where they are installed. A way is taken where a trial of it on the device agrees with
the model's own; LEAKFAST_AUTOTUNE=1 times those of norms and MLPs. Demands modules of transformers' shape (weight,
variance_epsilon; gate_proj, up_proj, down_proj); what is otherwise shaped runs as it is."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from leakfast.forward import autotune as tuning
from leakfast.forward import blocks

log = logging.getLogger(__name__)

PLAIN = {"norm": "plain", "mlp": "plain", "rope": "plain", "block": "plain"}
_WHAT = {"rope": "rotary embedding", "block": "residual sums with their norms"}
_TUNED = ("norm", "mlp")
# (part, device name) → way, as measured. Empty: no GPU has been measured.
MEASURED: dict[tuple[str, str], str] = {}
# Whatever is not in MEASURED, by the bytes that it moves (bench/bench_traffic.py).
UNMEASURED = {"norm": "torch", "mlp": "triton", "rope": "triton", "block": "triton"}
_TIMED_ROWS, _TRIAL_ROWS = 4096, 16
_tried: dict[tuple[Any, ...], bool] = {}


def ways(part: str) -> dict[str, Callable[..., Any] | None]:
    """Way → what runs the part so, of those that are installed; None: as the model has it. For "norm" and "mlp" it is
    forward(module, x)."""
    found: dict[str, Any] = {"plain": None}
    if part == "norm":
        found["torch"] = _torch_norm
    if part != "norm" and importlib.util.find_spec("triton") is not None:
        found["triton"] = {"mlp": _triton_mlp, "rope": blocks.rotated, "block": blocks.forward}[part]
    if part in _TUNED and importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = _liger_norm if part == "norm" else _liger_mlp
    return found


def chosen(model: Any) -> dict[str, str]:
    """Part → way for the blocks of a decoder: measured here under LEAKFAST_AUTOTUNE, else from MEASURED or UNMEASURED
    where a trial of it agrees with the model's own."""
    weight = next(model.parameters())
    if weight.device.type != "cuda" or not hasattr(model, "layers"):
        return PLAIN
    name = torch.cuda.get_device_name(weight.device)
    wanted = {part: MEASURED.get((part, name), UNMEASURED[part]) for part in PLAIN}
    found = {part: way if agrees(model, part, way) else "plain" for part, way in wanted.items()}
    return found | ({part: _tuned(model, part, weight) for part in _TUNED} if tuning.asked() else {})


def agrees(model: Any, part: str, way: str) -> bool:
    """Whether a way computes what the part of the model's first blocks does, to two roundings of its dtype, on random
    rows of its device; tried once, and said where it does not."""
    weight, config = next(model.parameters()), model.config
    wide = getattr(config, "intermediate_size", None)
    key = (part, way, weight.device, weight.dtype, config.model_type, config.hidden_size, str(wide))
    if way == "plain" or key in _tried:
        return way == "plain" or _tried[key]
    try:
        if way not in ways(part):
            raise ValueError("it is not installed")
        run = _trial(model, part, weight)
        with torch.inference_mode():
            expected = run().float()
            with applied(model, PLAIN | {part: way}):
                off = float((run().float() - expected).norm() / expected.norm())
        trouble = None if off <= 2 * torch.finfo(weight.dtype).eps else f"it differs by {off:.1e}"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    what = _WHAT.get(part, part)
    if trouble:
        log.warning("engine: the %s runs as transformers has it, not as %s (%s)", what, way, trouble)
    else:
        log.info("engine: the %s runs as %s", what, way)
    _tried[key] = trouble is None
    return _tried[key]


def _trial(model: Any, part: str, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What runs a part of the model's first blocks on the same random rows at every call."""
    if part == "rope":
        return blocks.trial_of_rotation(model, weight.dtype, weight.device)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TRIAL_ROWS, model.config.hidden_size, generator=draw).to(weight.device, weight.dtype)
    if part == "block":
        if part_of(model.layers[0].input_layernorm) != "norm":
            raise ValueError(f"a {type(model.layers[0].input_layernorm).__name__} is no such norm")
        return blocks.trial_of_block(model, x)
    module = _module(model, part)  # blocks name their parts as they like
    if part_of(module) != part:
        raise ValueError(f"a {type(module).__name__} is none")
    return lambda: module(x)


def _module(model: Any, part: str) -> Any:
    block = model.layers[0]
    return block.input_layernorm if part == "norm" else block.mlp


@contextmanager
def applied(model: Any, plan: Mapping[str, str]) -> Iterator[None]:
    """The decoder's parts run their way for the length of the block; then exactly as before. plan: part → way, parts left
    out as they are. A module that something else has already given a forward of its own is left to it; a rotation is a
    function of its Python module, and so changed for every model of that family."""
    changed: list[Any] = []
    rotations = blocks.places(model.modules()) if plan.get("rope", "plain") != "plain" else {}
    try:
        for module, forward in _forwards(model, plan):
            if "forward" not in vars(module):
                module.forward = forward
                changed.append(module)
        for name, own in rotations.items():
            setattr(sys.modules[name], blocks.ROTATE, partial(blocks.rotated, own))
        yield
    finally:
        for name, own in rotations.items():
            setattr(sys.modules[name], blocks.ROTATE, own)
        for module in changed:
            del module.forward


def _forwards(model: Any, plan: Mapping[str, str]) -> list[tuple[Any, Callable[..., Any]]]:
    """(module, its forward) of all modules that a plan changes, blocks before the norms that stand in them."""
    found: list[tuple[Any, Callable[..., Any]]] = []
    if plan.get("block", "plain") != "plain":
        found += blocks.installed(blocks.Chain(list(model.layers), lambda m: part_of(m) == "norm"))
    ours = {part: ways(part)[plan[part]] for part in _TUNED if plan.get(part, "plain") != "plain"}
    for module in model.modules() if ours else ():
        forward = ours.get(part_of(module) or "")
        if forward is not None:
            found.append((module, partial(forward, module)))
    return found


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
        with applied(module, {part: way}), torch.inference_mode():
            module(x)

    return tuning.best(f"engine {part}", shape, weight.device, {way: partial(run, way) for way in ways(part)})


def _torch_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _triton_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    from leakfast.kernels.gated import gated

    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.requires_grad:
        return module.down_proj(module.act_fn(gate) * up)
    with torch.cuda.device_of(gate):  # Triton launches on the current device, which may be another
        made = gated(gate, up)
    return module.down_proj(made)


def _liger_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    with torch.cuda.device_of(x):  # Liger's ops are Triton's too
        return liger_rms_norm(x, module.weight, module.variance_epsilon)


def _liger_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    with torch.cuda.device_of(x):
        made = liger_swiglu(module.gate_proj(x), module.up_proj(x))
    return module.down_proj(made)
