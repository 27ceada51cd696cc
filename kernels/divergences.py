"""KL both ways and Jensen–Shannon divergence between next-token distributions of pairs of states under one head, tile
after tile of the vocabulary: no (N, V) tensor in memory. Demands triton and tensors on one device; leaves which states
are compared to callers.

    p = softmax(states_p · headᵀ)    q = softmax(states_q · headᵀ)    m = (p + q)/2    row by row, in nats
    kl_pq = Σ_v p·log(p/q)    kl_qp = Σ_v q·log(q/p)    js = ½ Σ_v [p·log(p/m) + q·log(q/m)]

    torch:  lp, lq = ((s.float() @ head.float().T).log_softmax(-1) for s in (states_p, states_q))
            (lp.exp() * (lp - lq)).sum(-1)

states_p, states_q (N, D), head (V, D) → three float32 (N,). Products in the dtype of the operands, summed in float32 and
never rounded below it; float32 operands are multiplied as such, not as tf32. Two passes over V, 8·N·V·D operations: JS
needs both log-sum-exps before its first term (KL alone could do with running sums), and on a GPU a second product costs
less than 2·N·V logits written and read. First pass: maximum and sum of each part of V, merged by one fixed tree. Second:
the terms of each part, whose algebra csrc/divergence_tile.hpp tells: each 0 or more, small ones from series. No atomics;
equal shapes and inputs give equal bits, equal states exactly 0."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

FAILURES = RuntimeError, TritonError  # of a config that does not fit this device


class Config(NamedTuple):
    """A tile is 2 × BLOCK_N × BLOCK_V logits, D in steps of BLOCK_D; a part of V is `tiles` tiles."""

    block_n: int
    block_v: int
    block_d: int
    tiles: int
    num_warps: int
    num_stages: int


# (most rows N, bytes of an element) → config. A stage holds (2·BLOCK_N + BLOCK_V)·BLOCK_D elements of 227 KB. The second
# pass has two tiles of logits and their terms in registers: tiles of twice the width spill.
CONFIGS = {
    (16, 2): Config(16, 128, 128, 2, 4, 4),
    (1 << 62, 2): Config(64, 64, 64, 8, 8, 4),
    (1 << 62, 4): Config(32, 64, 32, 16, 8, 2),
}
RAGGED = Config(32, 64, 32, 16, 4, 2)  # 2-byte rows that no 16-byte load fits: an odd D, a view
MERGE = 4, 512, 4  # rows a program of a merge takes, parts of V a step, and its warps
_ROWS = 4  # of parts of V: top and sum of p, top and sum of q; then the three divergences


def config_for(n: int, element_bytes: int, aligned: bool) -> Config:
    """The config of N rows of 2-byte or 4-byte elements; aligned: whole steps of D, from multiples of 16."""
    if element_bytes == 2 and not aligned:
        return RAGGED
    return next(c for (rows, size), c in CONFIGS.items() if n <= rows and size == element_bytes)


def fitted(config: Config, element_bytes: int, shared_bytes: int) -> Config:
    """The config with as many stages as the shared memory of a block holds: GPUs other than Hopper have less."""
    stage = (2 * config.block_n + config.block_v) * config.block_d * element_bytes
    return config._replace(num_stages=max(1, min(config.num_stages, shared_bytes // stage)))


def candidates(
    states_p: torch.Tensor, states_q: torch.Tensor, head: torch.Tensor
) -> tuple[tuple[object, ...], list[Config]]:
    """(class of shape, shipped configs that run such operands, the table's own first): N to a power of two."""
    given = states_p, states_q, head
    size, aligned, n = _element_bytes(given), _aligned(given), len(states_p)
    found = [config_for(n, size, aligned)]
    if aligned or size == 4:
        found += [c for (_, s), c in CONFIGS.items() if s == size and c not in found]
    shape = 1 << max(n - 1, 0).bit_length(), *head.shape, size, aligned
    return shape, [fitted(c, size, _shared_bytes(head.device)) for c in found]


def _element_bytes(given: tuple[torch.Tensor, ...]) -> int:
    dtypes = {x.dtype for x in given}
    return 4 if len(dtypes) > 1 or torch.float32 in dtypes else 2


def _aligned(given: tuple[torch.Tensor, ...]) -> bool:
    """Whether rows are whole steps of D that begin at multiples of 16 bytes."""
    return given[0].shape[1] % 128 == 0 and all(
        x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in given
    )


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 << 10  # the interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@triton.jit
def _terms(b_lp, b_lq):
    """What a token of these log-probabilities adds to KL(p‖q), KL(q‖p) and JS."""
    b_u = tl.abs(b_lp - b_lq)
    b_large = tl.exp(tl.maximum(b_lp, b_lq))
    # u up to log √2: lost = 1 − exp(−u) by its series, w = tanh(u/2)
    b_lost = b_u * (-1.0 / 5040) + 1.0 / 720
    b_lost = b_lost * b_u - 1.0 / 120
    b_lost = b_lost * b_u + 1.0 / 24
    b_lost = b_lost * b_u - 1.0 / 6
    b_lost = b_lost * b_u + 0.5
    b_lost = b_u - b_lost * b_u * b_u
    b_w = b_lost / (2.0 - b_lost)
    b_square = b_w * b_w
    b_mean = b_large - b_large * b_lost * 0.5
    b_rest = b_w * (((b_square / 9.0 + 1.0 / 7) * b_square + 1.0 / 5) * b_square + 1.0 / 3)
    b_lead = 2.0 * b_mean * b_square
    b_near_js = ((b_square / 56.0 + 1.0 / 30) * b_square + 1.0 / 12) * b_square + 0.5
    # u above
    b_e = tl.exp(-b_u)
    b_small = b_large * b_e
    b_between = b_large - b_small
    b_far_js = 0.5 * ((b_large + b_small) * (0.6931471805599453 - tl.log(1.0 + b_e)) - b_small * b_u)
    b_near = b_u < 0.34657359
    b_down = tl.where(b_near, b_lead * (1.0 + (1.0 + b_w) * b_rest), b_large * b_u - b_between)
    b_up = tl.where(b_near, b_lead * (1.0 - (1.0 - b_w) * b_rest), b_between - b_small * b_u)
    b_js = tl.where(b_near, b_mean * b_square * b_near_js, b_far_js)
    b_first = b_lp > b_lq
    return tl.where(b_first, b_down, b_up), tl.where(b_first, b_up, b_down), b_js


# sizes that change from batch to batch would each compile a kernel anew where they are 1 or multiples of 16
@triton.jit(do_not_specialize=["n", "n_parts", "n_blocks"])
def _tiles_kernel(
    states_p,
    states_q,
    head,
    normal,
    parts,
    n,
    v,
    d,
    stride_pn,
    stride_qn,
    stride_vn,
    n_parts,
    n_blocks,
    COMPARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_D: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
):
    pid = tl.program_id(0)
    part = pid // n_blocks
    o_n = (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_n = o_n < n
    safe_n = tl.where(m_n, o_n, 0).to(tl.int64)
    begin = part * (BLOCK_V * TILES)
    end = tl.minimum(begin + BLOCK_V * TILES, v)
    rows = n.to(tl.int64)
    if COMPARE:
        b_top_p = tl.load(normal + safe_n)
        b_log_p = tl.load(normal + rows + safe_n)
        b_top_q = tl.load(normal + 2 * rows + safe_n)
        b_log_q = tl.load(normal + 3 * rows + safe_n)
    else:
        b_top_p = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        b_top_q = b_top_p
    b_first = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp of p, or KL(p‖q)
    b_second = tl.zeros((BLOCK_N,), tl.float32)  # the same of q, or KL(q‖p)
    b_third = tl.zeros((BLOCK_N,), tl.float32)  # JS
    for first in range(begin, end, BLOCK_V):
        left = tl.minimum(v - first, BLOCK_V)
        m_v = (o_v < left)[None, :]
        safe_v = first + tl.where(o_v < left, o_v, 0)
        from_p = states_p + safe_n[:, None] * stride_pn + o_d[None, :]
        from_q = states_q + safe_n[:, None] * stride_qn + o_d[None, :]
        from_head = head + safe_v[None, :].to(tl.int64) * stride_vn + o_d[:, None]
        b_p = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        b_q = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for step in range(0, d, BLOCK_D):
            if EVEN_D:
                b_sp = tl.load(from_p)
                b_sq = tl.load(from_q)
                b_w = tl.load(from_head)
            else:
                m_d = step + o_d < d
                b_sp = tl.load(from_p, mask=m_d[None, :], other=0.0)
                b_sq = tl.load(from_q, mask=m_d[None, :], other=0.0)
                b_w = tl.load(from_head, mask=m_d[:, None], other=0.0)
            if AS_FLOAT32:
                b_sp = b_sp.to(tl.float32)
                b_sq = b_sq.to(tl.float32)
                b_w = b_w.to(tl.float32)
            b_p = tl.dot(b_sp, b_w, b_p, input_precision="ieee")
            b_q = tl.dot(b_sq, b_w, b_q, input_precision="ieee")
            from_p += BLOCK_D
            from_q += BLOCK_D
            from_head += BLOCK_D
        if COMPARE:
            b_p = (b_p - b_top_p[:, None]) - b_log_p[:, None]
            b_q = (b_q - b_top_q[:, None]) - b_log_q[:, None]
            b_pq, b_qp, b_js = _terms(b_p, b_q)
            b_first += tl.sum(tl.where(m_v, b_pq, 0.0), axis=1)
            b_second += tl.sum(tl.where(m_v, b_qp, 0.0), axis=1)
            b_third += tl.sum(tl.where(m_v, b_js, 0.0), axis=1)
        else:
            b_p = tl.where(m_v, b_p, float("-inf"))
            b_q = tl.where(m_v, b_q, float("-inf"))
            b_new_p = tl.maximum(b_top_p, tl.max(b_p, axis=1))
            b_new_q = tl.maximum(b_top_q, tl.max(b_q, axis=1))
            b_first = b_first * tl.exp(b_top_p - b_new_p) + tl.sum(tl.exp(b_p - b_new_p[:, None]), axis=1)
            b_second = b_second * tl.exp(b_top_q - b_new_q) + tl.sum(tl.exp(b_q - b_new_q[:, None]), axis=1)
            b_top_p = b_new_p
            b_top_q = b_new_q
    o_part = o_n.to(tl.int64) * n_parts + part
    plane = rows * n_parts
    if COMPARE:
        tl.store(parts + o_part, b_first, mask=m_n)
        tl.store(parts + plane + o_part, b_second, mask=m_n)
        tl.store(parts + 2 * plane + o_part, b_third, mask=m_n)
    else:
        tl.store(parts + o_part, b_top_p, mask=m_n)
        tl.store(parts + plane + o_part, b_first, mask=m_n)
        tl.store(parts + 2 * plane + o_part, b_top_q, mask=m_n)
        tl.store(parts + 3 * plane + o_part, b_second, mask=m_n)


@triton.jit(do_not_specialize=["n", "n_parts"])
def _merge_kernel(parts, out, n, n_parts, TOTAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """TOTAL: out[k] = Σ parts[k]; else the maximum and log-sum of side k to out[2k] and out[2k + 1]."""
    kind = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    rows = n.to(tl.int64)
    plane = rows * n_parts
    b_top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n_parts, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        o_part = o_n[:, None] * n_parts + o_p[None, :]
        m_part = m_n[:, None] & (o_p < n_parts)[None, :]
        if TOTAL:
            b_total += tl.sum(tl.load(parts + kind * plane + o_part, mask=m_part, other=0.0), axis=1)
        else:
            b_max = tl.load(parts + 2 * kind * plane + o_part, mask=m_part, other=float("-inf"))
            b_sum = tl.load(parts + (2 * kind + 1) * plane + o_part, mask=m_part, other=0.0)
            b_new = tl.maximum(b_top, tl.max(b_max, axis=1))
            b_sum = tl.sum(b_sum * tl.exp(b_max - b_new[:, None]), axis=1)
            b_total = b_total * tl.exp(b_top - b_new) + b_sum
            b_top = b_new
    if TOTAL:
        tl.store(out + kind * rows + o_n, b_total, mask=m_n)
    else:
        tl.store(out + 2 * kind * rows + o_n, b_top, mask=m_n)
        tl.store(out + (2 * kind + 1) * rows + o_n, tl.log(b_total), mask=m_n)


def divergences(
    states_p: torch.Tensor, states_q: torch.Tensor, head: torch.Tensor, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL(p‖q), KL(q‖p), JS) in nats, each (N,) float32, of states_p and states_q (N, D) under head (V, D).
    float16, bfloat16 or float32; different dtypes are multiplied in float32.

    A NaN in a row of states reaches that pair alone. config: one of `candidates`, else the table's. Raises
    ValueError on shapes or dtypes that do not fit."""
    given = states_p, states_q, head
    if any(x.ndim != 2 for x in given) or head.numel() == 0:
        raise ValueError("states must be (N, D) and head (V, D), with V and D of at least 1")
    if states_p.shape != states_q.shape or states_p.shape[1] != head.shape[1]:
        raise ValueError("states_p and states_q must be (N, D), with the head's D")
    if any(x.dtype not in (torch.float16, torch.bfloat16, torch.float32) for x in given):
        raise ValueError("states and head must be float16, bfloat16 or float32")
    (n, d), v = states_p.shape, len(head)
    out = torch.empty(3, n, dtype=torch.float32, device=head.device)
    if n == 0:
        return out[0], out[1], out[2]
    given = tuple(x if x.stride(1) == 1 else x.contiguous() for x in given)
    config = config or candidates(*given)[1][0]
    n_parts, n_blocks = triton.cdiv(v, config.block_v * config.tiles), triton.cdiv(n, config.block_n)
    parts = torch.empty(_ROWS, n, n_parts, dtype=torch.float32, device=head.device)
    normal = torch.empty(_ROWS, n, dtype=torch.float32, device=head.device)
    rows, block_p, warps = MERGE
    for compare, sides, to in ((False, 2, normal), (True, 3, out)):
        _tiles_kernel[(n_blocks * n_parts,)](
            *given,
            normal,
            parts,
            n,
            v,
            d,
            *(x.stride(0) for x in given),
            n_parts,
            n_blocks,
            COMPARE=compare,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_D=config.block_d,
            TILES=config.tiles,
            EVEN_D=d % config.block_d == 0,
            AS_FLOAT32=_element_bytes(given) == 4,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _merge_kernel[(triton.cdiv(n, rows), sides)](
            parts, to, n, n_parts, TOTAL=compare, BLOCK_N=rows, BLOCK_P=block_p, num_warps=warps
        )
    return out[0], out[1], out[2]
