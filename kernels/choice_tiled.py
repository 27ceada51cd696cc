"""Choice log-probabilities in plain torch, tile after tile of the vocabulary: where neither the Triton kernel
nor the C++ one runs. Demands torch only. Same equation and results as choice_logprobs_reference, one tile of
float32 logits (1 MB, on a GPU 256 MB) in memory instead of (N, V), beside what torch's matrix product takes for
itself. On a GPU 2-byte operands are multiplied as they are, with float32 results, which cuBLAS does."""

from __future__ import annotations

import torch

TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}  # of float32 logits, or of the head's rows in float32, if more


def choice_logprobs_tiled(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities in nats: hidden (N, D) and head (V, D), any float dtype, multiplied in float32;
    token_ids (N, C) int64 in 0…V-1 → float32 logprobs (N, C) and lse (N,). Trusts shapes and ids."""
    (n, d), v = hidden.shape, len(head)
    as_they_are = hidden.is_cuda and hidden.dtype == head.dtype and hidden.element_size() == 2
    tile = max(1, TILE_BYTES["cuda" if hidden.is_cuda else "cpu"] // (4 * max(n, d, 1)))
    hidden = hidden if as_they_are else hidden.float()
    logits = torch.full(token_ids.shape, float("nan"), dtype=torch.float32, device=hidden.device)
    top = torch.full((n,), float("-inf"), dtype=torch.float32, device=hidden.device)
    total = torch.zeros(n, dtype=torch.float64, device=hidden.device)
    for first in range(0, v, tile):
        rows = head[first : first + tile].T
        x = torch.mm(hidden, rows, out_dtype=torch.float32) if as_they_are else hidden @ rows.float()
        here = (token_ids >= first) & (token_ids < first + x.shape[1])
        logits = torch.where(here, x.gather(1, (token_ids - first).clamp(0, x.shape[1] - 1)), logits)
        before, top = top, torch.maximum(top, x.amax(1))
        total = total * (before - top).double().exp() + x.sub_(top[:, None]).exp_().sum(
            1, dtype=torch.float64
        )
    log_total = total.log()
    logprobs = (logits.double() - top[:, None].double()) - log_total[:, None]
    return logprobs.float(), (top.double() + log_total).float()
