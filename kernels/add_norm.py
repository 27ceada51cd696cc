"""A residual sum and its RMS norm, one pass. Demands triton and tensors on one device; leaves to the model what is added.

    total = x + y        normed = weight · total/√(mean(total²) + eps)

    torch:  total = x + y; h = total.float(); h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
            normed = weight * h.to(x.dtype)

x, y (T, D) of one float dtype, weight (D,) → total, normed (T, D). The sum is rounded to the dtype before it is squared, the
scaled row before it meets the weight, as in transformers. Moves four elements for each of x's, where two kernels move five
and eager torch twenty-one: bound by bandwidth. A row is a program of its own, added in a fixed order, so that its bits
depend on nothing beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 16_384  # a row is held in registers


@triton.jit
def _add_norm_kernel(x, y, weight, total, normed, d, stride_x, stride_y, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    b_x = tl.load(x + row * stride_x + o_d, mask=m_d, other=0.0)
    b_y = tl.load(y + row * stride_y + o_d, mask=m_d, other=0.0).to(tl.float32)
    kind = b_x.dtype
    b_total = (b_x.to(tl.float32) + b_y).to(kind)
    tl.store(total + row * d + o_d, b_total, mask=m_d)
    b_wide = b_total.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(b_wide * b_wide, axis=0) / d + eps)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed = (b_wide * scale).to(kind).to(tl.float32) * b_weight
    tl.store(normed + row * d + o_d, b_normed.to(kind), mask=m_d)


def warps_for(d: int) -> int:
    """Warps a row of D elements is held by: 16 elements a thread, 4 to 16 warps."""
    return min(16, max(4, triton.next_power_of_2(d) // 512))


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, its RMS norm times weight), each of x's shape (…, D), contiguous. x, y and weight of one float dtype and device,
    rows of x and y evenly apart. Raises ValueError on what does not fit, D above 16,384 too."""
    d = x.shape[-1]
    if x.shape != y.shape or weight.shape != (d,) or not 0 < d <= WIDEST:
        raise ValueError(f"x and y must be (…, D) and weight (D,), D of 1 to {WIDEST}")
    if len({x.dtype, y.dtype, weight.dtype}) > 1 or not x.is_floating_point():
        raise ValueError("x, y and weight must be of one float dtype")
    rows, more = x.reshape(-1, d), y.reshape(-1, d)
    if rows.stride(1) != 1 or more.stride(1) != 1:
        raise ValueError("the elements of a row must lie side by side")
    total = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(total)
    if len(rows):
        _add_norm_kernel[(len(rows),)](
            *(rows, more, weight.contiguous(), total, normed, d, rows.stride(0), more.stride(0), eps),
            BLOCK_D=triton.next_power_of_2(d),
            num_warps=warps_for(d),
        )
    return total.view(x.shape), normed.view(x.shape)
