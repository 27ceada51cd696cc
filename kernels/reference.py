"""Every op of this folder in plain torch, fp32 accumulation: the truth that kernels are tested against,
and what runs where no kernel does. Needs torch only; knows nothing of personas or prompts."""

from __future__ import annotations

import math

import torch


def segment_means_reference(states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Mean of each segment of rows: `out[p] = states[offsets[p]:offsets[p+1]].float().mean(0)`.

    states (N, D), any float dtype; offsets (P+1,) int64, non-decreasing, from 0 to N.
    Returns (P, D) float32, accumulated in float32 one segment at a time, so that a segment's bits do
    not depend on its neighbours. Raises ValueError on offsets that do not fit or an empty segment."""
    bounds = offsets.tolist()
    if states.ndim != 2 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(states):
        raise ValueError("states must be (N, D) and offsets run from 0 to N")
    out = torch.empty(len(bounds) - 1, states.shape[1], dtype=torch.float32, device=states.device)
    for p in range(len(bounds) - 1):
        if bounds[p + 1] <= bounds[p]:
            raise ValueError(f"segment {p} is empty")
        out[p] = states[bounds[p] : bounds[p + 1]].float().mean(0)
    return out


def last_token_centroids_reference(
    states: torch.Tensor,
    leaf_rows: torch.Tensor,
    offsets: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sums of squares of each segment of rows, `rows = states[leaf_rows[a:b]].float()`.

    states (T, D), any float dtype; leaf_rows (N,) int64 in 0…T-1; offsets (P+1,) int64, non-decreasing,
    from 0 to N. Returns (P, D) float32 `rows.sum(0)` and `rows.square().sum(0)`, accumulated in float32
    one segment at a time; an empty segment sums to 0. `out`: two (P, D) float32 that are added to in
    place and returned. Raises ValueError on offsets or rows that do not fit."""
    bounds = offsets.tolist()
    if (
        states.ndim != 2
        or leaf_rows.ndim != 1
        or not bounds
        or bounds[0] != 0
        or bounds[-1] != len(leaf_rows)
    ):
        raise ValueError("states must be (T, D), leaf_rows (N,) and offsets run from 0 to N")
    if any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("offsets must not decrease")
    if len(leaf_rows) and not 0 <= int(leaf_rows.min()) <= int(leaf_rows.max()) < len(states):
        raise ValueError(f"leaf_rows must lie in 0…{len(states) - 1}")
    if out is None:
        shape = (len(bounds) - 1, states.shape[1])
        out = tuple(torch.zeros(shape, dtype=torch.float32, device=states.device) for _ in range(2))
    sums, squares = out
    for p in range(len(bounds) - 1):
        if bounds[p] == bounds[p + 1]:
            continue
        rows = states[leaf_rows[bounds[p] : bounds[p + 1]]].float()
        sums[p] += rows.sum(0)
        squares[p] += rows.square().sum(0)
    return sums, squares


def choice_logprobs_reference(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (nats) of chosen next tokens: `log_softmax(hidden @ head.T)` gathered.

    hidden (N, D) and head (V, D), any float dtype, multiplied in float32; token_ids (N, C) int64.
    Returns logprobs (N, C) and the log-sum-exp over V (N,), both float32. Holds (N, V) in memory.
    Raises ValueError on shapes that do not fit or ids outside 0…V-1."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError("hidden must be (N, D) and head (V, D)")
    if token_ids.ndim != 2 or len(token_ids) != len(hidden):
        raise ValueError("token_ids must be (N, C)")
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < len(head):
        raise ValueError(f"token ids must lie in 0…{len(head) - 1}")
    logits = hidden.float() @ head.float().T
    lse = torch.logsumexp(logits, dim=-1)
    return logits.gather(1, token_ids) - lse[:, None], lse


def divergences_reference(
    states_p: torch.Tensor, states_q: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(p‖q), KL(q‖p) and Jensen–Shannon divergence (nats) of next-token distributions, row by row.

    states_p, states_q (N, D) and head (V, D), any float dtype, multiplied in float32;
    p = softmax(states_p @ head.T), q likewise, m = (p + q)/2, JS = ½ KL(p‖m) + ½ KL(q‖m). Returns three (N,)
    float32, of 0 or more but for rounding. 64 pairs are in memory at a time, with (64, V) of several kinds.
    Raises ValueError on shapes that do not fit."""
    if states_p.ndim != 2 or states_p.shape != states_q.shape or states_p.shape[1:] != head.shape[1:]:
        raise ValueError("states_p and states_q must be (N, D) and head (V, D)")
    out = torch.empty(3, len(states_p), dtype=torch.float32, device=head.device)
    weights = head.float().T
    for first in range(0, len(states_p), 64):
        rows = slice(first, first + 64)
        lp, lq = (torch.log_softmax(s[rows].float() @ weights, dim=-1) for s in (states_p, states_q))
        lm = torch.logaddexp(lp, lq) - math.log(2)
        p, q = lp.exp(), lq.exp()
        out[0, rows] = (p * (lp - lq)).sum(-1)
        out[1, rows] = (q * (lq - lp)).sum(-1)
        out[2, rows] = ((p * (lp - lm)).sum(-1) + (q * (lq - lm)).sum(-1)) / 2
    return out[0], out[1], out[2]


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, H, d) and k (T, K, d) turned by cos and sin (T, d): `x * cos + rotate_half(x) * sin`, as transformers'
    apply_rotary_pos_emb computes it, in the dtype of the tensors."""
    half = q.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)

    return turned(q), turned(k)


def gated_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up of two tensors of one shape and dtype."""
    return torch.nn.functional.silu(gate) * up


def add_norm_reference(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, its RMS norm times weight): x, y (…, D), weight (D,), one dtype. The sum is rounded to the dtype, the mean square
    is float32, the scaled row is rounded before it meets the weight, as in transformers."""
    total = x + y
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def fp8_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x (T, K), any float dtype, in float8_e4m3fn and their scales (T, 1) float32: a row's largest magnitude / 448, at
    least the smallest normal float32. x ≈ out.float() · scale."""
    kind = torch.float8_e4m3fn
    largest = torch.finfo(kind).max
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    scale = torch.maximum(-low, high).float().clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (x.float() / scale).to(kind), scale
