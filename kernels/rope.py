"""Rotary position embedding of queries and keys in place, one pass. Demands triton and tensors on one device; leaves the
angles to the model.

    q[h], k[h] ← q[h]·cos + rotate_half(q[h])·sin        rotate_half(x) = (−x[d/2:], x[:d/2])

    torch:  transformers' apply_rotary_pos_emb(q, k, cos, sin), the two products rounded to the dtype of q, then their sum

q (T, H, d) and k (T, K, d) of the same float dtype, heads of a token side by side; cos, sin (T, d). Moves 2·(H + K)·d and
2·d elements a token, where eager torch's ten kernels move nine times as much: bound by bandwidth. A token is a program of
its own, so that its bits depend on nothing beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS = 4


@triton.jit
def _turn(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    o_h = tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HALF
    m = (o_h < HEADS)[:, None] & m_d[None, :]
    cos_low = tl.load(cos + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    places = x + o_h[:, None] * (2 * HALF) + o_d[None, :]
    b_loaded = tl.load(places, mask=m, other=0.0)
    b_low = b_loaded.to(tl.float32)
    b_high = tl.load(places + HALF, mask=m, other=0.0).to(tl.float32)
    kind = b_loaded.dtype
    low = (b_low * cos_low).to(kind).to(tl.float32) + (-b_high * sin_low).to(kind).to(tl.float32)
    high = (b_high * cos_high).to(kind).to(tl.float32) + (b_low * sin_high).to(kind).to(tl.float32)
    tl.store(places, low.to(kind), mask=m)
    tl.store(places + HALF, high.to(kind), mask=m)


@triton.jit
def _rope_kernel(
    q,
    k,
    cos,
    sin,
    stride_q,
    stride_k,
    stride_cos,
    stride_sin,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos += token * stride_cos
    sin += token * stride_sin
    _turn(q + token * stride_q, cos, sin, QUERIES, HALF, BLOCK_Q, BLOCK_D)
    _turn(k + token * stride_k, cos, sin, KEYS, HALF, BLOCK_K, BLOCK_D)


def constants(heads: int, keys: int, d: int) -> dict[str, int]:
    """The kernel's compile-time numbers for H heads of queries and K of keys, d wide."""
    return {
        "QUERIES": heads,
        "KEYS": keys,
        "HALF": d // 2,
        "BLOCK_Q": triton.next_power_of_2(heads),
        "BLOCK_K": triton.next_power_of_2(keys),
        "BLOCK_D": triton.next_power_of_2(d // 2),
    }


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turns q (T, H, d) and k (T, K, d) in place by cos and sin (T, d). Tokens may lie apart in memory, a token's heads may
    not. All on one device. Raises ValueError on shapes, dtypes or strides that do not fit."""
    t, heads, d = q.shape
    if k.shape[::2] != (t, d) or cos.shape != (t, d) or sin.shape != (t, d) or d % 2:
        raise ValueError("q must be (T, H, d), k (T, K, d), cos and sin (T, d), d even")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError("q and k must be of one float dtype")
    if any(x.stride()[1:] != (d, 1) for x in (q, k)) or cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("the heads of a token must lie side by side, and so must cos and sin")
    if t == 0:
        return
    _rope_kernel[(t,)](
        *(q, k, cos, sin, q.stride(0), k.stride(0), cos.stride(0), sin.stride(0)),
        **constants(heads, k.shape[1], d),
        num_warps=WARPS,
    )
