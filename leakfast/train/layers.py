"""The frozen layers with LoRA beside them, as a training step runs them: y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ, plus x·A₁ᵀ·s₁B₁ᵀ
of a frozen adapter below (stacked.py), layers that are given one tensor together, nothing stored that the backward pass can make
again. Demands peft's plain LoRA layers, which
hold A and B (float32); leaves optimizers and rows to others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from leakfast.forward import fused
from leakfast.models.beside import groups
from leakfast.storage.seeds import derive_seed
from leakfast.train import masks, quantized, stacked


@dataclass
class Company:
    """The adapters that are trained in one pass, and where each one's rows lie now.

    names: peft's, one an adapter; rates: their dropout; seeds: of their masks. bounds: packed rows → K+1 places between
    which the rows of each adapter lie, for every number of rows that a layer is given; step, part: whose masks are drawn,
    one a step (part) of each adapter; off: the layers run without adapters."""

    names: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    bounds: dict[int, list[int]] = field(default_factory=dict)
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    off: bool = False

    def spans(self, rows: int) -> list[tuple[int, int, int]]:
        """(adapter, first row, row after its last) of those that have rows among `rows`."""
        pairs = enumerate(pairwise(self.bounds[rows]))
        return [(k, low, high) for k, (low, high) in pairs if high > low]

    def mask(self, k: int, group: str, rows: int, like: torch.Tensor) -> torch.Tensor | None:
        """The mask of adapter k's rows at the layers `group`; None without dropout."""
        if not self.rates[k]:
            return None
        key = derive_seed("dropout", self.seeds[k], *self.steps[k], group, rows)
        return masks.mask(key, rows, like.shape[-1], self.rates[k], like)


class _Group:
    """Layers that are given the same tensor one after the other: computed together when the first one is."""

    def __init__(self, name: str, layers: Sequence[Any], company: Company) -> None:
        self.name, self.layers, self.company = name, layers, company
        self.bases = [layer.base_layer for layer in layers]
        self.scales = [[float(layer.scaling[one]) for layer in layers] for one in company.names]
        self.matrices = [
            side[one].weight
            for one in company.names
            for layer in layers
            for side in (layer.lora_A, layer.lora_B)
        ]
        self.below = [[stacked.frozen_in(layer, one) for layer in layers] for one in company.names]
        self.last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def of(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        if self.company.off:
            return quantized.forward(self.bases[slot], x)
        if self.last is None or self.last[0] is not x:
            self.last = (x, _Adapted.apply(x, self, *self.matrices))
        out = self.last[1][slot]
        if slot + 1 == len(self.layers):
            self.last = None  # keeps nothing alive once all have had theirs
        return out


class _Adapted(torch.autograd.Function):
    """(T, in) → one (T, out) a layer of the group; gradients for x, and for every A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: _Group, *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        n, flat = len(group.layers), x.reshape(-1, x.shape[-1])
        outs = [quantized.forward(base, flat) for base in group.bases]
        ctx.spans, lows = group.company.spans(len(flat)), []
        for k, first, last in ctx.spans:
            own = [m.to(flat.dtype) for m in matrices[2 * n * k : 2 * n * (k + 1)]]
            dropped, kept = _dropped(group, k, flat[first:last])
            low = dropped @ torch.cat(own[::2]).t()
            lows.append(low)
            parts = low.split([len(a) for a in own[::2]], 1)
            for out, part, b, scale in zip(outs, parts, own[1::2], group.scales[k], strict=True):
                out[first:last].addmm_(part, b.t() * (scale / kept))
            for out, under in zip(outs, group.below[k], strict=True):
                if under is not None:
                    a, b = (matrix.to(flat.dtype) for matrix in under)
                    out[first:last].addmm_(flat[first:last] @ a.t(), b.t())
        ctx.save_for_backward(flat, *lows, *matrices)
        ctx.group, ctx.shape = group, x.shape[:-1]
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        group, n = ctx.group, len(ctx.group.layers)
        flat, *saved = ctx.saved_tensors  # asked for once: made again there when blocks are recomputed
        lows, matrices = saved[: len(ctx.spans)], saved[len(ctx.spans) :]
        grads = [None if g is None else g.reshape(-1, g.shape[-1]) for g in given]
        dx = None
        if ctx.needs_input_grad[0]:
            for grad, base in zip(grads, group.bases, strict=True):
                if grad is not None:
                    weight = quantized.matrix(base, grad)
                    dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        found: list[torch.Tensor | None] = [None] * len(matrices)
        for (k, first, last), low in zip(ctx.spans, lows, strict=True):
            place = slice(2 * n * k, 2 * n * (k + 1))
            piece = None if dx is None else dx[first:last]
            own = [None if g is None else g[first:last] for g in grads]
            found[place] = _backward_of(group, k, flat[first:last], low, matrices[place], own, piece)
            for grad, under in zip(own, group.below[k], strict=True):
                if piece is not None and grad is not None and under is not None:
                    a, b = (matrix.to(grad.dtype) for matrix in under)
                    piece.addmm_(grad @ b, a)
        return None if dx is None else dx.view(*ctx.shape, -1), None, *found


def _dropped(group: _Group, k: int, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """x with elements dropped, not scaled up, and the share that is kept on average."""
    drawn = group.company.mask(k, group.name, len(x), x)
    return (x, 1.0) if drawn is None else (x * drawn, masks.kept_share(group.company.rates[k]))


def _backward_of(
    group: _Group,
    k: int,
    x: torch.Tensor,
    low: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    dx: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """Gradients of adapter k's A and B, in their order and dtype; what its layers add to the gradient of x is added to
    `dx` in place. The mask is drawn again."""
    drawn = group.company.mask(k, group.name, len(x), x)
    kept = 1.0 if drawn is None else masks.kept_share(group.company.rates[k])
    here = [slot for slot, grad in enumerate(grads) if grad is not None]
    ranks = [len(a) for a in matrices[::2]]
    parts = low.split(ranks, 1)
    found: list[torch.Tensor | None] = [None] * len(matrices)
    down, ups = [], []
    for slot in here:
        grad, b, scale = grads[slot], matrices[2 * slot + 1], group.scales[k][slot] / kept
        ups.append(grad @ (b.to(x.dtype) * scale))
        down.append(matrices[2 * slot].to(x.dtype))
        found[2 * slot + 1] = (parts[slot].t() @ grad).t().to(b.dtype) * scale
    if not here:
        return found
    joined, down_all = torch.cat(ups, 1), torch.cat(down)
    da = joined.t() @ (x if drawn is None else x * drawn)
    for slot, piece in zip(here, da.split([ranks[slot] for slot in here]), strict=True):
        found[2 * slot] = piece.to(matrices[2 * slot].dtype)
    if dx is not None and drawn is None:
        dx.addmm_(joined, down_all)
    elif dx is not None:
        dx.addcmul_(joined @ down_all, drawn)
    return found


class _Norm(torch.autograd.Function):
    """RMSNorm with a frozen weight: w·x/√(mean x² + ε), in float32 inside as transformers has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        wide = (grad * weight).float()
        wide = (wide - unit * (wide * unit).mean(-1, keepdim=True)) * inverse
        return wide.to(x.dtype), None, None


class _Gated(torch.autograd.Function):
    """silu(gate)·up; silu is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


class Layers:
    """A decoder's LoRA layers (peft's), norms and MLPs, as a training step runs them."""

    def __init__(self, decoder: Any, company: Company) -> None:
        from peft.tuners.lora import LoraLayer

        layers = {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLayer)}
        self._forwards: list[tuple[Any, Any]] = []
        for names in groups(layers):
            group = _Group(names[0], [layers[name] for name in names], company)
            self._forwards += [(layers[name], partial(group.of, slot)) for slot, name in enumerate(names)]
        ways = {"norm": _norm, "mlp": _mlp}
        parts = ((module, fused.part_of(module)) for module in decoder.modules())
        self._forwards += [
            (module, partial(ways[part], module)) for module, part in parts if part is not None
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The decoder runs them so for the length of the block; then exactly as before."""
        own = [(module, vars(module).get("forward")) for module, _ in self._forwards]
        try:
            for module, forward in self._forwards:
                module.forward = forward
            yield
        finally:
            for module, forward in own:
                vars(module).pop("forward", None)  # the class's own is found again
                if forward is not None:
                    module.forward = forward
