"""Rows rounded to FP8 (e4m3) with one scale a row, one kernel. Demands triton, a GPU that has the format or the interpreter;
leaves the product to torch.

    scale[t] = max|x[t]|/448        out[t] = e4m3(x[t]/scale[t])

    torch:  scale = x.abs().amax(1, keepdim=True).float().clamp(min=tiny·448)/448; (x.float()/scale).to(torch.float8_e4m3fn)

x (T, K) any float dtype → out (T, K) float8_e4m3fn, scale (T, 1) float32. Reads x twice, the second time from the cache where
a row of every program fits there, and writes one byte an element: 3 to 5 bytes an element of bfloat16, where eager torch's four
kernels move 21. Divides as IEEE 754 does, so that its bits are torch's. A row is a program of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 2048, 4
_LARGEST = tl.constexpr(448.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _fp8_rows_kernel(x, out, scales, d, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    b_top = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, d, BLOCK):
        b_x = tl.load(x + row * stride_x + first + o_d, mask=first + o_d < d, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_top, tl.abs(b_x))
    largest = tl.maximum(tl.max(b_top, axis=0), _TINY * _LARGEST)
    scale = tl.math.div_rn(largest, tl.full((), 448.0, tl.float32))
    tl.store(scales + row, scale)
    for first in range(0, d, BLOCK):
        b_x = tl.load(x + row * stride_x + first + o_d, mask=first + o_d < d, other=0.0).to(tl.float32)
        b_out = tl.math.div_rn(b_x, tl.broadcast_to(scale, (BLOCK,)))
        tl.store(out + row * d + first + o_d, b_out.to(tl.float8e4nv), mask=first + o_d < d)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K) in FP8 e4m3 and the scales (T, 1) float32: x ≈ out.float() · scale. Raises ValueError on what is not a matrix
    of floats whose rows' elements lie side by side."""
    if x.ndim != 2 or not x.is_floating_point() or x.stride(1) != 1:
        raise ValueError("x must be (T, K) of a float dtype, a row's elements side by side")
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if x.numel():
        _fp8_rows_kernel[(len(x),)](x, out, scales, x.shape[1], x.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return out, scales
