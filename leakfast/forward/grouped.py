"""Attention of packed rows by SDPA, spans of like shape together: masks for windows and chunks, capped scores and sinks, and a
way with few gathers for a backward pass. Demands the spans of forest.py; leaves to attention.py which rows they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from leakfast.forward.forest import Spans

_SCORES = 1 << 24  # attention scores (all heads) held at once


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device. To a GPU it travels from pinned memory, behind what is queued there,
    while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class _Group:
    """n spans attended together, padded to q queries and k keys. Padded queries repeat the last one;
    padded keys are masked."""

    q_rows: torch.Tensor  # (n*q,) query rows
    k_rows: torch.Tensor  # (n*k,) key rows
    shape: tuple[int, int, int]  # n, q, k
    mask: torch.Tensor  # (n or 1, 1, query heads per key head * q, k): 0 where a query may look, else -inf
    kept: torch.Tensor | None  # (m,) places in n*q that are not padding; None where all are kept


@dataclass(frozen=True)
class Reach:
    """How far back a layer's queries look: to the last `window` tokens, themselves among them, and to the beginning of
    their own chunk of `chunk` tokens; None: to the first."""

    window: int | None = None
    chunk: int | None = None

    def limits(self, longest: int) -> bool:
        """Whether a path of so many tokens is longer than that."""
        return any(size is not None and longest > size for size in (self.window, self.chunk))


@dataclass(frozen=True)
class Scores:
    """What becomes of products of queries and keys: see attention.forest_attention."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Whether scores are products alone."""
        return self.softcap is None and self.sinks is None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """q (n, Hkv, G·Q, d), query heads of a key head outermost, k and v (n, Hkv, K, d) → (n, Hkv, G·Q, d)."""
        if self.plain:
            narrow = (
                q.dtype
            )  # a CPU's backward pass of SDPA takes four times as long in half precision as in float32
            if q.device.type == "cpu" and narrow != torch.float32 and torch.is_grad_enabled():
                q, k, v, mask = (x.float() for x in (q, k, v, mask))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
            return out.to(narrow)
        scaling = q.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = (q @ k.transpose(-1, -2)).float() * scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + mask
        if self.sinks is not None:
            per_kv = self.sinks.shape[0] // k.shape[1]
            each = q.shape[2] // per_kv
            sinks = self.sinks.float().view(1, k.shape[1], per_kv, 1).expand(len(q), -1, -1, each)
            scores = torch.cat([scores, sinks.reshape(*scores.shape[:3], 1)], -1)
        shares = scores.softmax(-1)[..., : k.shape[2]]
        return shares.to(v.dtype) @ v


@dataclass
class Groups:
    """Groups of one layout, and for a backward pass what `_gather` makes of them."""

    groups: list[_Group]
    gather: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Rows (T, H, d) that ask, keys and values (T', Hkv, d) → (T, H, d of v)."""
        if torch.is_grad_enabled():
            return _joined(q, k, v, self, scores)
        return _grouped(q, k, v, self.groups, scores)


def _grouped(
    rows_q: torch.Tensor, rows_k: torch.Tensor, rows_v: torch.Tensor, groups: list[_Group], scores: Scores
) -> torch.Tensor:
    """One call per group. Query heads that share a key head are laid out as further queries of it, so
    keys are not repeated."""
    out = rows_q.new_empty(*rows_q.shape[:2], rows_v.shape[2])
    for group in groups:
        parts = (
            rows_q.index_select(0, group.q_rows),
            *(x.index_select(0, group.k_rows) for x in (rows_k, rows_v)),
        )
        got = _attended(group, *parts, scores)
        if group.kept is None:
            out.index_copy_(0, group.q_rows, got)
        else:
            out.index_copy_(0, group.q_rows[group.kept], got[group.kept])
    return out


def _joined(
    rows_q: torch.Tensor, rows_k: torch.Tensor, rows_v: torch.Tensor, found: Groups, scores: Scores
) -> torch.Tensor:
    """As `_grouped`, for a backward pass: rows are gathered once for all groups and put back once, so that gradients
    are added up once, not group by group over every row."""
    if found.gather is None:
        found.gather = _gather(found.groups, len(rows_q))
    queries, keys, place = found.gather
    q_parts = rows_q.index_select(0, queries).split([len(g.q_rows) for g in found.groups])
    sizes = [len(g.k_rows) for g in found.groups]
    k_parts, v_parts = (rows.index_select(0, keys).split(sizes) for rows in (rows_k, rows_v))
    parts = zip(found.groups, q_parts, k_parts, v_parts, strict=True)
    return torch.cat([_attended(*part, scores) for part in parts]).index_select(0, place)


def _gather(groups: list[_Group], n_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query rows and key rows of all groups, and where each row's result lies among them."""
    queries, keys = (torch.cat([getattr(g, rows) for g in groups]) for rows in ("q_rows", "k_rows"))
    starts = np.cumsum([0, *(len(g.q_rows) for g in groups)])
    every = [torch.arange(len(g.q_rows), device=keys.device) if g.kept is None else g.kept for g in groups]
    real = torch.cat([places + int(start) for places, start in zip(every, starts, strict=False)])
    place = torch.empty(n_rows, dtype=torch.int64, device=keys.device)
    place[queries[real]] = real
    return queries, keys, place


def _attended(
    group: _Group, rows_q: torch.Tensor, rows_k: torch.Tensor, rows_v: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """A group's attention: rows (n·q, H, d), keys and values (n·k, Hkv, d) → (n·q, H, d)."""
    n, q, k = group.shape
    heads, kv_heads, width, out_width = rows_q.shape[1], *rows_k.shape[1:], rows_v.shape[2]
    per_kv = heads // kv_heads
    gq = rows_q.view(n, q, kv_heads, per_kv, width).permute(0, 2, 3, 1, 4)
    gq = gq.reshape(n, kv_heads, per_kv * q, width)
    gk, gv = (rows.view(n, k, *rows.shape[1:]).transpose(1, 2) for rows in (rows_k, rows_v))
    got = scores.attend(gq, gk, gv, group.mask)
    got = got.view(n, kv_heads, per_kv, q, out_width).permute(0, 3, 1, 2, 4)
    return got.reshape(n * q, heads, out_width)


def made(spans: Spans, reach: Reach, heads: int, per_kv: int, like: torch.Tensor) -> Groups:
    """The spans in groups of like shape, so that each group is one attention call."""
    q_len, k_len = np.diff(spans.q_offsets), np.diff(spans.k_offsets)
    shapes, member_of = np.unique(
        np.stack([_bucket(q_len, 4), _bucket(k_len, 8)], 1), axis=0, return_inverse=True
    )
    groups = []
    for index, (q, k) in enumerate(shapes.tolist()):
        members = np.flatnonzero(member_of.reshape(-1) == index)
        q = min(q, int(q_len[members].max()))  # all of one query: no padding
        step = max(1, _SCORES // (heads * q * k))
        for first in range(0, len(members), step):
            groups.append(_group(spans, members[first : first + step], (q, k), reach, per_kv, like))
    return Groups(groups)


def _bucket(lengths: np.ndarray, fine: int) -> np.ndarray:
    """Lengths rounded up: to multiples of `fine`, of an eighth of the power of two below beyond 8 × that."""
    coarse = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) - 3, 0)
    step = np.maximum(coarse, fine)
    return -(-lengths // step) * step


def _group(
    spans: Spans, members: np.ndarray, shape: tuple[int, int], reach: Reach, per_kv: int, like: torch.Tensor
) -> _Group:
    n, (q, k) = len(members), shape
    q_first, q_len = spans.q_offsets[members, None], np.diff(spans.q_offsets)[members, None]
    k_first, k_len = spans.k_offsets[members, None], np.diff(spans.k_offsets)[members, None]
    q_at, k_at = np.arange(q)[None], np.arange(k)[None]
    q_rows = q_first + np.minimum(q_at, q_len - 1)
    k_rows = spans.k_rows[k_first + np.minimum(k_at, k_len - 1)]
    last_seen = k_len - q_len + np.minimum(q_at, q_len - 1)  # (n, q) position of each query
    sees = k_at[:, None] <= last_seen[..., None]
    if reach.window is not None:
        sees &= k_at[:, None] > last_seen[..., None] - reach.window
    if reach.chunk is not None:
        sees &= k_at[:, None] // reach.chunk == last_seen[..., None] // reach.chunk
    if (sees == sees[:1]).all():
        sees = sees[:1]
    mask = np.where(sees, np.float32(0), np.float32("-inf"))
    kept = None if (q_len == q).all() else np.flatnonzero(q_at < q_len)
    return _Group(
        put(q_rows.reshape(-1), like.device),
        put(k_rows.reshape(-1).astype(np.int64), like.device),
        (n, q, k),
        put(mask[:, None], like.device).to(like.dtype).repeat(1, 1, per_kv, 1),
        None if kept is None else put(kept, like.device),
    )
