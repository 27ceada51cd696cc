"""Every op of this folder in plain torch, fp32 accumulation: the truth that kernels are tested against,
and what runs where no kernel does. Needs torch only; knows nothing of personas or prompts."""

from __future__ import annotations

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
