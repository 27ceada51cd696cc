"""The kernels for what stands between a block's products, beside eager torch, for smoke.py and bench_kernels.py. On a CPU their
reference twins stand in, so that a rehearsal runs through; measures nothing by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from leakfast.forward import ops
from leakfast.kernels import reference

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One op on stated inputs: ours and eager torch, each a call that gives its outputs; what float64 gives; the bytes that
    ours moves at least."""

    ours: Callable[[], list[torch.Tensor]]
    eager: Callable[[], list[torch.Tensor]]
    exact: Callable[[], list[torch.Tensor]]
    moved: int


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def cases(device: str, tokens: int, heads: int, keys: int, d: int, wide: int) -> dict[str, Case]:
    """Op → its case, for `tokens` packed tokens of a block with heads of width d and an MLP of width `wide`; bfloat16 on a GPU,
    float32 on a CPU. What works in place works on copies that are made once: a second call goes on from the first."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, kind)

    hidden = heads * d
    q, k, gate, up, x, y = (
        some(tokens, heads, d),
        some(tokens, keys, d),
        *(some(tokens, n) for n in (wide, wide, hidden, hidden)),
    )
    angles = torch.randn(tokens, d // 2, generator=draw).repeat(1, 2)
    cos, sin = (f(angles).to(device, kind) for f in (torch.cos, torch.sin))
    weight = some(hidden)
    mine = [one.clone() for one in (q, k, gate)]

    def rope() -> list[torch.Tensor]:
        if device == "cpu":
            return list(reference.rope_reference(q, k, cos, sin))
        from leakfast.kernels.rope import rope as kernel

        kernel(mine[0], mine[1], cos, sin)
        return mine[:2]

    def gated() -> list[torch.Tensor]:
        if device == "cpu":
            return [reference.gated_reference(gate, up)]
        from leakfast.kernels.gated import gated as kernel

        return [kernel(mine[2], up)]

    def add_norm() -> list[torch.Tensor]:
        if device == "cpu":
            return list(reference.add_norm_reference(x, y, weight, EPS))
        from leakfast.kernels.add_norm import add_norm as kernel

        return list(kernel(x, y, weight, EPS))

    def norm_of(total: torch.Tensor) -> torch.Tensor:
        return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)

    wider = [one.double() for one in (q, k, cos, sin)]
    return {
        "rope": Case(
            rope,
            lambda: list(reference.rope_reference(q, k, cos, sin)),
            lambda: list(reference.rope_reference(*wider)),
            2 * _bytes(q, k) + _bytes(cos, sin),
        ),
        "gated": Case(
            gated,
            lambda: [reference.gated_reference(gate, up)],
            lambda: [reference.gated_reference(gate.double(), up.double())],
            3 * _bytes(gate),
        ),
        "add_norm": Case(
            add_norm,
            lambda: list(reference.add_norm_reference(x, y, weight, EPS)),
            lambda: [(x + y).double(), weight.double() * norm_of((x + y).double())],
            4 * _bytes(x),
        ),
        "fp8_rows": Case(
            lambda: _dequantized(*ops.fp8_rows(gate)),
            lambda: _dequantized(*reference.fp8_rows_reference(gate)),
            lambda: [gate.double()],
            _bytes(gate) + gate.numel(),
        ),
    }


def _dequantized(rows: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """What the rounded rows stand for."""
    return [rows.float() * scale]


def errors(case: Case) -> tuple[float, float]:
    """Root mean square errors of ours and of eager torch against float64; to be asked before anything is timed."""
    truth = case.exact()

    def off(found: list[torch.Tensor]) -> float:
        parts = [(a.double() - b).square().mean() for a, b in zip(found, truth, strict=True)]
        return float(torch.stack(parts).mean().sqrt())

    return off(case.ours()), off(case.eager())
