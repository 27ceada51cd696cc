"""Log-probabilities of chosen next tokens, online over the vocabulary: no (N, V) tensor in memory.
Demands triton and tensors on one device; leaves which tokens are the choices to callers.

    logits = hidden · headᵀ    lse[n] = log Σ_v exp logits[n, v]    logprobs[n, c] = logits[n, token_ids[n, c]] − lse[n]

    torch:  x = hidden.float() @ head.float().T; torch.log_softmax(x, -1).gather(1, token_ids); x.logsumexp(-1)

hidden (N, D), head (V, D), token_ids (N, C) → float32 (N, C) and (N,). Products in the dtype of the
operands, summed in float32 and never rounded below it; float32 operands are multiplied as such, not as tf32.
2·N·V·D operations over (V + N)·D elements: bound by the matrix units from N ≈ 300 on, by bandwidth below.

First the logits of the choices, a program each: kept out of the next, whose registers its tile fills. First pass
over V: a program takes BLOCK_N rows and one part of the vocabulary, of a length fixed by the config, and leaves a
maximum and a sum for each row; programs of one part run side by side, so the head's tiles come from L2. Second pass:
all parts of a row, by one fixed tree. No atomics; equal shapes and inputs give equal bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

FAILURES = RuntimeError, TritonError  # of a config that does not fit this device


class Config(NamedTuple):
    """A tile is BLOCK_N × BLOCK_V logits, D in steps of BLOCK_D; a part of V is `tiles` tiles."""

    block_n: int
    block_v: int
    block_d: int
    tiles: int
    num_warps: int
    num_stages: int


# (most rows N, bytes of an element) → config. A stage holds (BLOCK_N + BLOCK_V)·BLOCK_D elements of 227 KB. Many rows
# take the widest tile that does not spill: at 128 × 128 the matrix units would wait for the L2.
CONFIGS = {
    (16, 2): Config(16, 128, 128, 2, 4, 4),
    (64, 2): Config(64, 128, 128, 4, 4, 3),
    (256, 2): Config(128, 128, 64, 4, 8, 4),
    (1 << 62, 2): Config(128, 256, 64, 2, 8, 4),
    (1 << 62, 4): Config(32, 64, 32, 16, 4, 2),
}
RAGGED = Config(64, 64, 32, 16, 4, 2)  # 2-byte rows that no 16-byte load fits: an odd D, a view
CHOSEN = 1024, 4  # numbers of D a program of the choices takes a step, and its warps
MERGE = 4, 512, 4  # rows a program of the second pass takes, parts of V a step, and its warps


def config_for(n: int, element_bytes: int, aligned: bool) -> Config:
    """The config of N rows of 2-byte or 4-byte elements; aligned: whole steps of D, from multiples of 16."""
    if element_bytes == 2 and not aligned:
        return RAGGED
    return next(c for (rows, size), c in CONFIGS.items() if n <= rows and size == element_bytes)


def fitted(config: Config, element_bytes: int, shared_bytes: int) -> Config:
    """The config with as many stages as the shared memory of a block holds: GPUs other than Hopper have less."""
    stage = (config.block_n + config.block_v) * config.block_d * element_bytes
    return config._replace(num_stages=max(1, min(config.num_stages, shared_bytes // stage)))


def candidates(hidden: torch.Tensor, head: torch.Tensor) -> tuple[tuple[object, ...], list[Config]]:
    """(class of shape, shipped configs that run such operands, the table's own first): N to a power of two."""
    size, aligned, n = _element_bytes(hidden, head), _aligned(hidden, head), len(hidden)
    found = [config_for(n, size, aligned)]
    if aligned or size == 4:
        found += [c for (_, s), c in CONFIGS.items() if s == size and c not in found]
    shape = 1 << max(n - 1, 0).bit_length(), *head.shape, size, aligned
    return shape, [fitted(c, size, _shared_bytes(hidden.device)) for c in found]


def _element_bytes(hidden: torch.Tensor, head: torch.Tensor) -> int:
    return 4 if hidden.dtype != head.dtype or hidden.dtype == torch.float32 else 2


def _aligned(hidden: torch.Tensor, head: torch.Tensor) -> bool:
    """Whether rows are whole steps of D that begin at multiples of 16 bytes."""
    return hidden.shape[1] % 128 == 0 and all(
        x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, head)
    )


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 << 10  # the interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


# sizes that change from batch to batch would each compile a kernel anew where they are 1 or multiples of 16
@triton.jit(do_not_specialize=["n_choices"])
def _chosen_kernel(
    hidden, head, token_ids, logits, v, d, n_choices, stride_hn, stride_vn, BLOCK_D: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + pid)
    if (token >= 0) & (token < v):
        from_hidden = hidden + (pid // n_choices) * stride_hn
        from_head = head + token * stride_vn
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        for step in range(0, d, BLOCK_D):
            o_d = step + tl.arange(0, BLOCK_D)
            b_h = tl.load(from_hidden + o_d, mask=o_d < d, other=0.0).to(tl.float32)
            b_w = tl.load(from_head + o_d, mask=o_d < d, other=0.0).to(tl.float32)
            b_sum += b_h * b_w
        tl.store(logits + pid, tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=["n", "n_parts", "n_blocks"])
def _vocabulary_kernel(
    hidden,
    head,
    maxima,
    sums,
    n,
    v,
    d,
    stride_hn,
    stride_vn,
    n_parts,
    n_blocks,
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
    o_v = tl.arange(0, BLOCK_V)  # within a tile: 32 bits, or a tile's columns alone would fill the registers
    m_n = o_n < n
    safe_n = tl.where(m_n, o_n, 0)
    begin = part * (BLOCK_V * TILES)
    end = tl.minimum(begin + BLOCK_V * TILES, v)
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(begin, end, BLOCK_V):
        left = tl.minimum(v - first, BLOCK_V)
        safe_v = first + tl.where(o_v < left, o_v, 0)
        from_hidden = hidden + safe_n[:, None].to(tl.int64) * stride_hn + o_d[None, :]
        from_head = head + safe_v[None, :].to(tl.int64) * stride_vn + o_d[:, None]
        b_logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for step in range(0, d, BLOCK_D):
            if EVEN_D:
                b_h = tl.load(from_hidden)
                b_w = tl.load(from_head)
            else:
                m_d = step + o_d < d
                b_h = tl.load(from_hidden, mask=m_d[None, :], other=0.0)
                b_w = tl.load(from_head, mask=m_d[:, None], other=0.0)
            if AS_FLOAT32:
                b_h = b_h.to(tl.float32)
                b_w = b_w.to(tl.float32)
            b_logits = tl.dot(b_h, b_w, b_logits, input_precision="ieee")
            from_hidden += BLOCK_D
            from_head += BLOCK_D
        b_logits = tl.where(o_v[None, :] < left, b_logits, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_sum = b_sum * tl.exp(b_max - b_top) + tl.sum(tl.exp(b_logits - b_top[:, None]), axis=1)
        b_max = b_top
    o_part = o_n.to(tl.int64) * n_parts + part
    tl.store(maxima + o_part, b_max, mask=m_n)
    tl.store(sums + o_part, b_sum, mask=m_n)


@triton.jit(do_not_specialize=["n", "n_choices", "n_parts"])
def _merge_kernel(
    maxima, sums, logprobs, lse, n, n_choices, n_parts, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n_parts, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        o_part = o_n[:, None] * n_parts + o_p[None, :]
        m_part = m_n[:, None] & (o_p < n_parts)[None, :]
        b_max = tl.load(maxima + o_part, mask=m_part, other=float("-inf"))
        b_sum = tl.load(sums + o_part, mask=m_part, other=0.0)
        b_new = tl.maximum(b_top, tl.max(b_max, axis=1))
        b_total = b_total * tl.exp(b_top - b_new) + tl.sum(b_sum * tl.exp(b_max - b_new[:, None]), axis=1)
        b_top = b_new
    b_log = tl.log(b_total)
    tl.store(lse + o_n, b_top + b_log, mask=m_n)
    for c in range(n_choices):
        place = logprobs + o_n * n_choices + c
        b_logprob = (tl.load(place, mask=m_n, other=0.0) - b_top) - b_log
        # the logit was added up in another order: no probability is above 1 by that
        tl.store(place, tl.where(b_logprob > 0.0, 0.0, b_logprob), mask=m_n)


def choice_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities in nats: hidden (N, D), head (V, D), token_ids (N, C) int64 → float32 logprobs
    (N, C) and lse (N,). float16, bfloat16 or float32; two different dtypes are multiplied in float32.

    A NaN in a row of hidden reaches that row alone. An id outside 0…V-1 gives NaN: ids on a device are
    not read back to be checked. config: one of `candidates`, else the table's. Raises ValueError on shapes
    or dtypes that do not fit."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or head.numel() == 0:
        raise ValueError("hidden must be (N, D) and head (V, D), with V and D of at least 1")
    if token_ids.ndim != 2 or len(token_ids) != len(hidden) or token_ids.dtype != torch.int64:
        raise ValueError("token_ids must be (N, C) int64")
    if any(x.dtype not in (torch.float16, torch.bfloat16, torch.float32) for x in (hidden, head)):
        raise ValueError("hidden and head must be float16, bfloat16 or float32")
    (n, d), v, n_choices = hidden.shape, len(head), token_ids.shape[1]
    logprobs = torch.full((n, n_choices), float("nan"), dtype=torch.float32, device=hidden.device)
    lse = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return logprobs, lse
    hidden, head = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head))
    config = config or candidates(hidden, head)[1][0]
    as_float32 = _element_bytes(hidden, head) == 4
    n_parts = triton.cdiv(v, config.block_v * config.tiles)
    maxima = torch.empty(n, n_parts, dtype=torch.float32, device=hidden.device)
    sums = torch.empty_like(maxima)
    n_blocks = triton.cdiv(n, config.block_n)
    strides = hidden.stride(0), head.stride(0)
    if n_choices:
        block_d, warps = CHOSEN
        _chosen_kernel[(n * n_choices,)](
            hidden,
            head,
            token_ids.contiguous(),
            logprobs,
            v,
            d,
            n_choices,
            *strides,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    _vocabulary_kernel[(n_blocks * n_parts,)](
        hidden,
        head,
        maxima,
        sums,
        n,
        v,
        d,
        *strides,
        n_parts,
        n_blocks,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        TILES=config.tiles,
        EVEN_D=d % config.block_d == 0,
        AS_FLOAT32=as_float32,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    rows, parts, warps = MERGE
    _merge_kernel[(triton.cdiv(n, rows),)](
        maxima, sums, logprobs, lse, n, n_choices, n_parts, BLOCK_N=rows, BLOCK_P=parts, num_warps=warps
    )
    return logprobs, lse
