"""Drawing one token per row: counter-based uniforms and the inverse CDF of the nucleus.
Demands torch logits and one 64-bit seed per row; knows nothing of models, batches or text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_RUN = 32  # tokens whose maximum is taken together
_FEW_RUNS = 4  # runs there must be for each token ranked, or looking for them saves nothing
_FIRST_RANKED = 64  # likeliest tokens ranked at first; rows that need more get 8 times as many, and so on


def uniforms(seeds: np.ndarray, step: int) -> np.ndarray:
    """One uniform in [0, 1) per seed, a pure function of (seed, step): SplitMix64, top 53 bits.

    seeds: (B,) uint64. Returns (B,) float64. The same seed and step give the same number whatever
    else is drawn, so a completion's draws depend on its request alone. (Steele et al. 2014.)
    """
    if seeds.dtype != np.uint64:
        raise ValueError(f"seeds must be uint64, not {seeds.dtype}")
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * np.uint64(step + 1)
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z = z ^ (z >> np.uint64(31))
        # a second round, so that seeds a multiple of the increment apart share nothing
        z = z * _MIX_1
        z = (z ^ (z >> np.uint64(29))) * _MIX_2
        z = z ^ (z >> np.uint64(32))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    logits: torch.Tensor, u: np.ndarray | None, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token of each row: argmax at temperature 0, else the inverse CDF at `u`.

    logits: (B, V) any float dtype; u: (B,) float64 in [0, 1), ignored at temperature 0.
    Probabilities are softmax(logits / temperature) in fp32. The nucleus is the shortest list of
    tokens, most likely first and equal ones by index, whose mass reaches top_p; the drawn token is
    the first whose cumulative mass (fp64) exceeds u times the nucleus' mass.
    Returns (tokens (B,) int64, ok (B,) bool); ok is False where the logits hold NaN or +inf.
    """
    import torch

    if temperature == 0:
        top, tokens = logits.max(dim=-1)
        return tokens, torch.isfinite(top)
    if u is None:
        raise ValueError("temperature > 0 needs one uniform per row")
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    probs = torch.softmax(scaled, dim=-1)
    u_rows = torch.from_numpy(u).to(probs.device)
    ok = torch.isfinite(probs[:, 0])
    rows: torch.Tensor | None = None  # None: all
    k = _FIRST_RANKED
    while True:
        part, part_u = (probs, u_rows) if rows is None else (probs[rows], u_rows[rows])
        chosen, sure = _among_first(part, part_u, top_p, k)
        if rows is None:
            tokens = chosen
        else:
            tokens[rows] = chosen
        open_rows = (~sure & (ok if rows is None else ok[rows])).nonzero()[:, 0]
        if not len(open_rows):
            return tokens, ok
        rows = open_rows if rows is None else rows[open_rows]
        k *= 8


def _among_first(
    probs: torch.Tensor, u: torch.Tensor, top_p: float, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,) drawn with the k likeliest ranked, and whether ranking more could change them.

    The k likeliest decide a row only if the last token needed outranks the k-th strictly: otherwise
    tokens outside could belong before it.
    """
    import torch

    if k >= probs.shape[-1]:
        values, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
        tokens, _, _ = _pick(values, ids, u, top_p)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    values, ids = _order_ties(*_likeliest(probs, k))
    tokens, rank, reached = _pick(values, ids, u, top_p)
    return tokens, reached & (values.gather(1, rank[:, None])[:, 0] > values[:, -1])


def _likeliest(probs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk(probs, k), equal ones apart, looking at few of them where the vocabulary is large.

    Of V tokens in runs of _RUN, whatever exceeds the k-th likeliest lies in one of the k runs with the highest maxima."""
    import torch

    n_rows, n_vocab = probs.shape
    n_runs = n_vocab // _RUN
    if k * _FEW_RUNS > n_runs:
        return torch.topk(probs, k, dim=-1)
    probs = probs.contiguous()
    end = n_runs * _RUN
    highest = probs[:, :end].view(n_rows, n_runs, _RUN).amax(dim=-1)
    runs = torch.topk(highest, k, dim=-1, sorted=False).indices  # (B, k)
    first = torch.arange(n_rows, device=probs.device)[:, None] * n_vocab + runs * _RUN
    # row i of this view: the _RUN numbers from place i on
    taken = probs.as_strided((n_rows * n_vocab - _RUN + 1, _RUN), (1, 1)).index_select(0, first.view(-1))
    few = torch.cat([taken.view(n_rows, k * _RUN), probs[:, end:]], dim=1)
    values, places = torch.topk(few, k, dim=-1)
    of_run = runs.gather(1, (places // _RUN).clamp(max=k - 1)) * _RUN + places % _RUN
    return values, torch.where(places < k * _RUN, of_run, places - k * _RUN + end)


def _order_ties(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by (probability descending, index ascending); topk alone leaves the order of equals open."""
    import torch

    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)  # what underflowed is never drawn
    if not bool(tied.any()):
        return values, ids
    by_index = ids.argsort(dim=-1)
    values, ids = values.gather(1, by_index), ids.gather(1, by_index)
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return values.gather(1, order), ids.gather(1, order)


def _pick(
    values: torch.Tensor, ids: torch.Tensor, u: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, rank of the last token the decision rests on, and whether `values` (B, K) sufficed."""
    import torch

    mass = values.double().cumsum(dim=-1)
    last = (values > 0).sum(dim=-1) - 1  # rounding of the sum never lets a token of probability 0 be drawn
    if top_p < 1.0:
        reached = mass[:, -1] >= top_p
        end = torch.minimum((mass < top_p).sum(dim=-1), last)
        kept = mass.gather(1, end.clamp(min=0)[:, None])[:, 0]
    else:
        # softmax sums to one up to fp32 rounding: the whole list is the nucleus
        reached = u < mass[:, -1]
        end, kept = last, torch.ones_like(u)
    end = end.clamp(min=0)  # rows of NaN have no positive probability; draw() reports them
    rank = torch.minimum((mass <= (u * kept)[:, None]).sum(dim=-1), end)
    needed = end if top_p < 1.0 else rank
    return ids.gather(1, rank[:, None])[:, 0], needed, reached
