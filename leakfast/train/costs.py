"""What rows cost under the output head, and the gradient of it, without a matrix of logits kept: the cross-entropy of
labels, and the divergence from the unadapted model where a reply is held. Demands final-normed states of the positions
asked; leaves sums and weights of them to loop.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LOGITS = 1 << 23  # held at once


def cross_entropy(states: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """(N,) float32, nats: F.cross_entropy(head(states).float(), targets, reduction="none"), for states (N, D)."""
    nats: torch.Tensor = _Costs.apply(states, head.weight, head.bias, targets, None)
    return nats


def divergence(states: torch.Tensor, head: Any, before: torch.Tensor) -> torch.Tensor:
    """(N,) float32, nats: KL(softmax head(before) ‖ softmax head(states)), row by row. before (N, D): states of the
    unadapted model, which carry no gradient."""
    nats: torch.Tensor = _Costs.apply(states, head.weight, head.bias, None, before)
    return nats


class _Costs(torch.autograd.Function):
    """The gradient of a row's cost for its state is made beside the cost, (p − wanted)·W, and only scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor | None,
        before: torch.Tensor | None,
    ) -> torch.Tensor:
        size = max(1, _LOGITS // len(weight))
        nats = torch.empty(len(states), device=states.device)
        slopes = torch.empty_like(states)
        for first in range(0, len(states), size):
            at = slice(first, first + size)
            log_p = F.linear(states[at], weight, bias).float().log_softmax(-1)
            if targets is not None:
                wanted = targets[at, None]
                nats[at] = -log_p.gather(1, wanted)[:, 0]
                slope = log_p.exp_()
                slope.scatter_add_(1, wanted, slope.new_full((len(wanted), 1), -1.0))
            else:
                assert before is not None
                log_q = F.linear(before[at], weight, bias).float().log_softmax(-1)
                q = log_q.exp()
                nats[at] = (q * log_q.sub_(log_p)).sum(-1)
                slope = log_p.exp_().sub_(q)
            slopes[at] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(slopes)
        return nats

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes.float() * grad[:, None]).to(slopes.dtype), None, None, None, None
