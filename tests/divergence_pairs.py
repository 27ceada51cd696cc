"""Pairs of states for the tests of divergences, their float64 truth, and the rule that no implementation errs more
than eager float32. Demands torch alone; holds no tests."""

from __future__ import annotations

import math

import torch

NAMES = "kl_pq", "kl_qp", "js"


def pairs_of(n, v, d, dtype=torch.float32, scale=1.0, apart=0.5, seed=0):
    """(states_p, states_q, head): q is p moved by `apart` of its own size."""
    draw = torch.Generator().manual_seed(seed)
    p = scale * torch.randn(n, d, generator=draw)
    q = p + scale * apart * torch.randn(n, d, generator=draw)
    return p.to(dtype), q.to(dtype), torch.randn(v, d, generator=draw).to(dtype)


def plain(states_p, states_q, head):
    """(3, N) in the dtype of the states, by the definitions, every logit in memory."""
    lp, lq = ((states @ head.T).log_softmax(-1) for states in (states_p, states_q))
    lm = torch.logaddexp(lp, lq) - math.log(2)
    p, q = lp.exp(), lq.exp()
    js = ((p * (lp - lm)).sum(-1) + (q * (lq - lm)).sum(-1)) / 2
    return torch.stack([(p * (lp - lq)).sum(-1), (q * (lq - lp)).sum(-1), js])


def check_errors(got, states_p, states_q, head):
    """Root mean square error against float64: no more than eager float32's. With fewer than 16 pairs chance decides
    below what one unit in the last place of the logits' sums does to a divergence, so that is let pass."""
    truth = plain(states_p.double(), states_q.double(), head.double())
    eager = plain(states_p.float(), states_q.float(), head.float()).double()
    sums = max(float((s.double().abs() @ head.double().abs().T).max()) for s in (states_p, states_q))
    for ours, torchs, true, name in zip(got, eager, truth, NAMES, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == true.shape
        error, allowed = (float((x.double() - true).square().mean().sqrt()) for x in (ours, torchs))
        floor = 2.0**-24 * sums * (1 + float(true.max())) if len(true) < 16 else 0.0
        assert error <= max(allowed, floor), (name, error, allowed)
