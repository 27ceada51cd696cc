"""SiLU of the gate times the up-projection in place of the gate, one pass (SwiGLU's middle). Demands triton and tensors on
one device; leaves the products around it to the model.

    gate ← silu(gate)·up        silu(x) = x/(1 + exp(−x))

    torch:  F.silu(gate) * up, the first rounded to the dtype of gate, then the product

gate, up of one shape and one float dtype. Moves three elements for each of gate's, where eager torch moves five; bound by
bandwidth. Every element depends on its own pair alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # 16 bytes of bfloat16 a thread and load, two in flight


@triton.jit
def _gated_kernel(gate, up, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_loaded = tl.load(gate + o, mask=m, other=0.0)
    b_gate = b_loaded.to(tl.float32)
    b_up = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(b_loaded.dtype).to(tl.float32)
    tl.store(gate + o, (b_silu * b_up).to(b_loaded.dtype), mask=m)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up, written over gate and returned. Both contiguous, of one shape, float dtype and device. Raises
    ValueError where they are not."""
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError("gate and up must be of one shape and one float dtype")
    if not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError("gate and up must be contiguous")
    n = gate.numel()
    if n:
        _gated_kernel[(triton.cdiv(n, BLOCK),)](gate, up, n, BLOCK=BLOCK, num_warps=WARPS)
    return gate
