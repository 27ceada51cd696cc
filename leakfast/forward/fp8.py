"""`--precision fp8`: the linear layers of the blocks in FP8 (e4m3) on GPUs that multiply it, their agreement with
bfloat16 measured on a sample before anything runs. Demands a bfloat16 model; leaves embeddings, norms,
attention, LoRA matrices and the head as they are, and the model's own weights untouched."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from leakfast.errors import InputError, ModelError
from leakfast.forward import ops, packs, passes

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger(__name__)

PRECISIONS = ("fp8",)
_LEAST_CAPABILITY = (8, 9)
_SAMPLE = 32  # prompts the agreement is measured on


@dataclass(frozen=True)
class Agreement:
    """How far FP8 states of a sample of prompts lie from the bfloat16 ones, by layer.

    rms: ‖fp8 − bf16‖ / ‖bf16‖ over the sample; cosine: the least of the prompts' cosines."""

    prompts: int
    rms: dict[int, float]
    cosine: dict[int, float]

    def __str__(self) -> str:
        each = (f"layer {n}: {self.rms[n]:.2%} rms, cosine ≥ {self.cosine[n]:.5f}" for n in self.rms)
        return f"against bfloat16 on {self.prompts} prompts, {'; '.join(each)}"


@contextmanager
def running(
    loaded: Loaded, precision: str | None, sequences: Sequence[Sequence[int]], layers: Sequence[int]
) -> Iterator[Agreement | None]:
    """What the engine computes inside runs in `precision`: None as the model is, "fp8" with the linear
    layers of blocks 0…max(layers) in FP8. Yields the agreement on a sample of `sequences`, also logged.

    A product is (x/sx)·(w/sw)ᵀ · sx·sw + bias with one scale a row of x and a row of w (its largest
    magnitude / 448), accumulated in float32, rounded to bfloat16: `torch._scaled_mm`.
    Raises InputError for another precision, ModelError where the device or the dtype cannot."""
    if precision is None:
        yield None
        return

    check_precision(precision, loaded.device, next(loaded.model.parameters()).dtype)
    if loaded.stream is not None:
        raise ModelError(
            f"precision: {precision} asked, but the weights of {loaded.name} stay on disk. Needed: the blocks in memory, where "
            "their FP8 copies are made once. Use --stream off, or leave --precision out."
        )
    some = [sequences[i] for i in np.unique(np.linspace(0, len(sequences) - 1, _SAMPLE).astype(int))]
    asked = list(dict.fromkeys(layers))
    exact = passes.last_token_states(loaded, some, asked)
    products = Products(packs.stack(passes.decoder(loaded))[1][: max(asked) + 1])
    with products:
        found = compare(passes.last_token_states(loaded, some, asked), exact, asked)
        log.info("fp8: %d linear layers; %s", len(products), found)
        yield found


def check_precision(precision: str | None, device: Any, dtype: Any) -> None:
    """Raises InputError for a precision there is none of, ModelError where a model of this dtype (torch's,
    or its name) on this device cannot have it."""
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise InputError(f"precision: {precision!r} asked, but there is fp8. Use --precision fp8 or none.")
    if isinstance(dtype, str):  # auto is bfloat16 on a GPU
        dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    if reason := why_not(torch.device(device), dtype):
        raise ModelError(
            f"precision: fp8 asked, but {reason}. Needed: a bfloat16 model on an NVIDIA GPU of compute "
            "capability 8.9 or more (Ada, Hopper or newer). Leave --precision out."
        )


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FP8 products cannot run there, or None."""
    if device.type != "cuda":
        return f"the model is on {device}"
    if torch.version.hip is not None:
        return "this is a ROCm device, where nobody has tried it"
    have = torch.cuda.get_device_capability(device)
    if have < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {have[0]}.{have[1]}"
    if dtype != torch.bfloat16:
        return f"the model is in {str(dtype).removeprefix('torch.')}"
    return None


def compare(got: np.ndarray, exact: np.ndarray, layers: Sequence[int]) -> Agreement:
    """Agreement of two (N, len(layers), D) arrays of states."""
    lengths = np.linalg.norm(got, axis=2) * np.linalg.norm(exact, axis=2)
    cosines = (got.astype(np.float64) * exact).sum(2) / lengths
    rms = np.linalg.norm(got - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
    return Agreement(
        len(got),
        {layer: float(rms[at]) for at, layer in enumerate(layers)},
        {layer: float(cosines[:, at].min()) for at, layer in enumerate(layers)},
    )


class Products(TorchFunctionMode):
    """While entered, the linear layers among `modules` multiply in FP8; all others as ever. Keeps an FP8
    copy of their weights (one byte an element). Layers that LoRA added, and widths that are no
    multiples of 16, which the hardware's products do not take, are left alone."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        self.weights: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = {}
        self.last: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        for module in modules:
            for name, part in module.named_modules():
                if isinstance(part, torch.nn.Linear) and "lora_" not in name:
                    self._take(part.weight)

    def __len__(self) -> int:
        return len(self.weights)

    def _take(self, weight: torch.Tensor) -> None:
        if any(width % 16 for width in weight.shape):
            return
        with torch.inference_mode():
            quantized, scale = ops.fp8_rows(weight.detach())
            self.weights[id(weight)] = weight, quantized.t(), scale.t()

    def __exit__(self, *error: Any) -> None:
        self.last = None
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2 and id(args[1]) in self.weights:
            x, weight, bias = (*args, None)[:3]
            if x.numel():
                _, w, scale = self.weights[id(weight)]
                made = torch._scaled_mm(
                    *(self._rows(x)[0], w, self._rows(x)[1], scale),
                    bias=bias,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=x.is_cuda,
                )
                return made.view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x in FP8 with its scales; made once for the layers that take the same x (q, k, v; gate, up)."""
        if self.last is None or self.last[0]() is not x:
            self.last = weakref.ref(x), *ops.fp8_rows(x.reshape(-1, x.shape[-1]))
        return self.last[1:]
