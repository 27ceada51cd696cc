"""Sums and second moments of the last-token states of each persona, read in place from packed states.
Demands triton and tensors on one device; leaves dividing by the counts, and choosing layers, to callers.

    sums[p] = Σ states[leaf_rows[i]]    squares[p] = Σ states[leaf_rows[i]]²    i = offsets[p] … offsets[p+1] − 1

    torch:  rows = states[leaf_rows[a:b]].float(); sums[p] = rows.sum(0); squares[p] = rows.square().sum(0)

states (T, D) any float dtype, leaf_rows (N,) int64, offsets (P+1,) int64 → two (P, D) float32, summed in
float32. Moves N·D elements in and 2·P·D float32 out, 3·N·D operations: bound by bandwidth.

Row i of a persona is added to lane i mod BLOCK_R, lanes are folded by one fixed tree at the end. No atomics;
a persona's bits depend on its own rows and D alone, not on its neighbours or their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

FAILURES = RuntimeError, TritonError  # of a config that does not fit this device


class Config(NamedTuple):
    """BLOCK_R rows × BLOCK_D columns a step: 16 bytes of bfloat16 a thread and load, 4 loads in flight."""

    block_r: int
    block_d: int
    num_warps: int
    num_stages: int


# widest D → config; narrower blocks keep enough programs for a small D
CONFIGS = {1024: Config(32, 128, 4, 2), 1 << 62: Config(16, 256, 4, 2)}


def config_for(d: int) -> Config:
    """The config of a width D."""
    return next(config for widest, config in CONFIGS.items() if d <= widest)


@triton.jit
def _last_token_centroids_kernel(
    states,
    leaf_rows,
    offsets,
    sums,
    squares,
    d,
    stride_t,
    stride_d,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    persona = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_r = tl.arange(0, BLOCK_R)
    m_d = o_d < d
    begin = tl.load(offsets + persona)
    end = tl.load(offsets + persona + 1)
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    b_square = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    rows = tl.load(leaf_rows + begin + o_r, mask=begin + o_r < end, other=0)
    for first in range(begin, end, BLOCK_R):
        places = states + rows[:, None] * stride_t + o_d[None, :] * stride_d
        b_loaded = tl.load(places, mask=(first + o_r < end)[:, None] & m_d[None, :], other=0.0)
        o_next = first + BLOCK_R + o_r  # on their way while these states are
        rows = tl.load(leaf_rows + o_next, mask=o_next < end, other=0)
        b_x = b_loaded.to(tl.float32)
        b_sum += b_x
        b_square += b_x * b_x
    total = tl.sum(b_sum, axis=0)
    total_square = tl.sum(b_square, axis=0)
    o_out = persona * d + o_d
    if ADD:
        total += tl.load(sums + o_out, mask=m_d, other=0.0)
        total_square += tl.load(squares + o_out, mask=m_d, other=0.0)
    tl.store(sums + o_out, total, mask=m_d)
    tl.store(squares + o_out, total_square, mask=m_d)


def last_token_centroids(
    states: torch.Tensor,
    leaf_rows: torch.Tensor,
    offsets: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums, squares), each (P, D) float32, of states (T, D) at leaf_rows (N,), persona p owning
    leaf_rows[offsets[p]:offsets[p+1]]; an empty persona sums to 0. `out`: two contiguous (P, D) float32
    that are added to in place. config: one of CONFIGS, else the one for D. All tensors on the device of
    states; leaf_rows and offsets are trusted. Raises ValueError on shapes or dtypes that do not fit."""
    if states.ndim != 2 or not states.is_floating_point():
        raise ValueError("states must be (T, D) of a float dtype")
    if leaf_rows.ndim != 1 or offsets.ndim != 1 or len(offsets) < 1:
        raise ValueError("leaf_rows must be (N,) and offsets (P+1,)")
    if leaf_rows.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise ValueError("leaf_rows and offsets must be int64")
    n_personas, d = len(offsets) - 1, states.shape[1]
    if out is None:
        sums = torch.empty(n_personas, d, dtype=torch.float32, device=states.device)
        squares = torch.empty_like(sums)
    else:
        sums, squares = out
        for given in out:
            if given.shape != (n_personas, d) or given.dtype != torch.float32 or not given.is_contiguous():
                raise ValueError(f"out must be two contiguous float32 tensors ({n_personas}, {d})")
    if n_personas == 0 or d == 0:
        return sums, squares
    config = config or config_for(d)
    grid = (n_personas, triton.cdiv(d, config.block_d))
    _last_token_centroids_kernel[grid](
        states,
        leaf_rows.contiguous(),
        offsets.contiguous(),
        sums,
        squares,
        d,
        states.stride(0),
        states.stride(1),
        ADD=out is not None,
        BLOCK_R=config.block_r,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return sums, squares
