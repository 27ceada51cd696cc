"""The packed forward pass over a prefix forest: states of last tokens at chosen layers, only as deep
as needed. Demands a plain decoder that transformers runs (see FITS); leaves logits, means and
adapters to others. Layer L is the output of decoder block L, 0-based, before any final norm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from leakfast import forest
from leakfast.errors import ModelError

if TYPE_CHECKING:
    from leakfast.models import Loaded

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

FITS = ("llama", "mistral", "qwen2", "qwen3")  # model types whose packed forward the tests hold to 1e-5
ATTENTION = "leakfast_forest"
BUDGET_TOKENS = {"cpu": 2048, "cuda": 16384}  # packed tokens per batch unless told
_GROUP_SCORES = 1 << 24  # attention scores (all heads) held at once


@dataclass(frozen=True)
class _Group:
    """n segments attended together, padded to q queries and k keys. Padded queries repeat the last
    one; padded keys are masked."""

    q_rows: torch.Tensor  # (n*q,) packed rows
    k_rows: torch.Tensor  # (n*k,) packed rows
    shape: tuple[int, int, int]  # n, q, k
    mask: torch.Tensor  # (n or 1, 1, query heads per key head * q, k): 0 where a query may look, else -inf
    kept: torch.Tensor | None  # (m,) places in n*q that are not padding; None where all are kept


def last_token_states(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """States of the last token of each sequence: (N, len(layers), D) float32, in the given order.

    Equal to running each sequence alone through transformers and taking the output of decoder block
    L for L in `layers` (fp32: within 1e-5 relative). Shared prefixes are computed once per batch of
    `budget_tokens` packed tokens, equal sequences once; blocks beyond max(layers) are not run.
    Raises ValueError for layers the model does not have or empty sequences, ModelError for a model
    or a prompt that does not fit."""
    model = decoder(loaded)
    layers = [int(layer) for layer in layers]
    if not layers or min(layers) < 0 or max(layers) >= len(model.layers):
        raise ValueError(f"layers must be some of 0…{len(model.layers) - 1}, not {layers}")
    longest = max(map(len, sequences), default=0)
    _check_lengths(loaded, model, longest)
    device = next(model.parameters()).device
    budget = budget_tokens or BUDGET_TOKENS.get(device.type, BUDGET_TOKENS["cpu"])
    plan = forest.plan(sequences, budget)
    log.info(
        "engine: %d prompts, %d tokens, %d after sharing, %d batches, blocks 0-%d",
        *(len(sequences), plan.n_input_tokens, len(plan.tokens), len(plan), max(layers)),
    )
    states = np.empty((plan.n_segments, len(layers), model.config.hidden_size), np.float32)
    done = 0
    if progress:
        progress(0, plan.n_segments, "states")
    with _measuring(model), torch.inference_mode():
        for batch in plan:
            leaves = torch.from_numpy(batch.leaf_rows).to(device)
            n = len(leaves)
            for layer, hidden in _blocks(model, batch, max(layers), device):
                for column in (i for i, wanted in enumerate(layers) if wanted == layer):
                    states[batch.first_segment : batch.first_segment + n, column] = (
                        hidden[0].index_select(0, leaves).float().cpu().numpy()
                    )
            done += n
            if progress:
                progress(done, plan.n_segments, "states")
    return states[plan.segment_of]


def decoder(loaded: Loaded) -> Any:
    """The module that holds embed_tokens, layers and rotary_emb, out of a causal LM or a peft wrap
    around one. Raises ModelError, with the reason, for a model the packed forward does not cover."""
    net = loaded.model
    if hasattr(net, "get_base_model"):
        net = net.get_base_model()
    kind = getattr(net.config, "model_type", None)
    inner = getattr(net, "model", None)
    if kind not in FITS or not all(hasattr(inner, part) for part in ("embed_tokens", "layers", "rotary_emb")):
        raise ModelError(
            f"engine: {loaded.name} is of type {kind}, which the packed forward does not cover. Needed: one "
            f"of {', '.join(FITS)}. Use --model Qwen/Qwen2.5-7B-Instruct or --model organism."
        )
    return inner


def _check_lengths(loaded: Loaded, model: Any, longest: int) -> None:
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limit = rope.get("original_max_position_embeddings") or limit
    if limit and longest > limit:
        raise ModelError(
            f"engine: a prompt of {longest} tokens, but {loaded.name} holds {limit}. "
            "Needed: shorter prompts. Shorten the system prompt or the question."
        )
    holders = (config, *(layer.self_attn for layer in model.layers))
    windows = {getattr(holder, "sliding_window", None) for holder in holders} - {None}
    if windows and longest > min(windows):
        raise ModelError(
            f"engine: a prompt of {longest} tokens, but {loaded.name} attends within a sliding window of "
            f"{min(windows)}. Needed: prompts within the window, where it changes nothing. Shorten it."
        )


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """The model in eval mode with forest attention for the length of the block; then exactly as it was."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, forest_attention)
    configs = {id(c): c for c in (model.config, *(layer.self_attn.config for layer in model.layers))}
    were = [(config, config._attn_implementation) for config in configs.values()]
    training = [module for module in model.modules() if module.training]
    try:
        for config, _ in were:
            config._attn_implementation = ATTENTION
        model.eval()
        yield
    finally:
        for config, implementation in were:
            config._attn_implementation = implementation
        for module in training:
            module.training = True


def _blocks(
    model: Any, batch: forest.Batch, deepest: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """(layer, hidden (1, T, D)) for blocks 0…deepest over one packed batch."""
    positions = torch.from_numpy(batch.positions).to(device, torch.long)[None]
    hidden = model.embed_tokens(torch.from_numpy(batch.tokens).to(device, torch.long)[None])
    groups = _groups(batch, model.config, hidden)
    rotary = model.rotary_emb(hidden, positions)
    for layer in range(deepest + 1):
        hidden = model.layers[layer](
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotary,
            use_cache=False,
            forest_groups=groups,
        )
        yield layer, hidden


def _groups(batch: forest.Batch, config: Any, like: torch.Tensor) -> list[_Group]:
    """The batch's segments in groups of like shape, so that each group is one attention call. Masks
    have the dtype and device of `like`."""
    heads = config.num_attention_heads
    per_kv = heads // config.num_key_value_heads
    q_len, k_len = np.diff(batch.q_offsets), np.diff(batch.k_offsets)
    shapes, member_of = np.unique(
        np.stack([_bucket(q_len, 4), _bucket(k_len, 8)], 1), axis=0, return_inverse=True
    )
    groups = []
    for index, (q, k) in enumerate(shapes.tolist()):
        members = np.flatnonzero(member_of.reshape(-1) == index)
        step = max(1, _GROUP_SCORES // (heads * q * k))
        for first in range(0, len(members), step):
            groups.append(_group(batch, members[first : first + step], q, k, per_kv, like))
    return groups


def _bucket(lengths: np.ndarray, fine: int) -> np.ndarray:
    """Lengths rounded up: to multiples of `fine`, of an eighth of the power of two below beyond 8 × that."""
    coarse = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) - 3, 0)
    step = np.maximum(coarse, fine)
    return -(-lengths // step) * step


def _group(
    batch: forest.Batch, members: np.ndarray, q: int, k: int, per_kv: int, like: torch.Tensor
) -> _Group:
    n = len(members)
    q_first, q_len = batch.q_offsets[members, None], np.diff(batch.q_offsets)[members, None]
    k_first, k_len = batch.k_offsets[members, None], np.diff(batch.k_offsets)[members, None]
    q_at, k_at = np.arange(q)[None], np.arange(k)[None]
    q_rows = q_first + np.minimum(q_at, q_len - 1)
    k_rows = batch.k_rows[k_first + np.minimum(k_at, k_len - 1)]
    last_seen = k_len - q_len + np.minimum(q_at, q_len - 1)  # (n, q) position of each query
    sees = k_at[:, None] <= last_seen[..., None]
    if (sees == sees[:1]).all():
        sees = sees[:1]
    mask = np.where(sees, np.float32(0), np.float32("-inf"))
    kept = None if (q_len == q).all() else np.flatnonzero(q_at < q_len)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)

    return _Group(
        put(q_rows.reshape(-1)),
        put(k_rows.reshape(-1).astype(np.int64)),
        (n, q, k),
        put(mask[:, None]).to(like.dtype).repeat(1, 1, per_kv, 1),
        None if kept is None else put(kept),
    )


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    forest_groups: list[_Group],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows to their ancestors and causally to themselves, for transformers'
    AttentionInterface: query (1, H, T, d), key and value (1, Hkv, T, d) → (1, T, H, d), None.

    Query heads that share a key head are laid out as further queries of it, so keys are not repeated."""
    _, heads, n_rows, width = query.shape
    kv_heads = key.shape[1]
    per_kv = heads // kv_heads
    rows_q = query[0].transpose(0, 1)  # (T, H, d)
    rows_k, rows_v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = query.new_empty(n_rows, heads, width)
    for group in forest_groups:
        n, q, k = group.shape
        gq = rows_q.index_select(0, group.q_rows).view(n, q, kv_heads, per_kv, width)
        gq = gq.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, per_kv * q, width)
        gk = rows_k.index_select(0, group.k_rows).view(n, k, kv_heads, width).transpose(1, 2)
        gv = rows_v.index_select(0, group.k_rows).view(n, k, kv_heads, width).transpose(1, 2)
        got = F.scaled_dot_product_attention(gq, gk, gv, attn_mask=group.mask, scale=scaling)
        got = got.view(n, kv_heads, per_kv, q, width).permute(0, 3, 1, 2, 4).reshape(n * q, heads, width)
        if group.kept is None:
            out.index_copy_(0, group.q_rows, got)
        else:
            out.index_copy_(0, group.q_rows[group.kept], got[group.kept])
    return out[None], None
