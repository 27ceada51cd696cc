"""Attention of rows that share their prompt: the prompt's keys and values are held once, each row's own
beside them. Demands a decoder that takes a registered attention function and full causal attention;
leaves choosing tokens and batches to transformers.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from leakfast.errors import ModelError

ATTENTION = "leakfast_shared_prompt"
_FIRST_CAPACITY_TOKENS = 32  # suffix cache rows grow 32, 64, 128 … tokens
_REFUSED_KEYWORDS = ("softcap", "logit_softcapping", "s_aux", "sinks", "position_bias", "head_mask")


class Block:
    """Keys and values of one block: P prompts (shared) and B alive rows (own suffix), per layer."""

    def __init__(self, lengths: torch.Tensor, width: int, n_samples: int, max_new_tokens: int) -> None:
        self.lengths = lengths  # (P,) prompt lengths in tokens
        self.width = width  # padded prompt length
        self.samples = n_samples  # rows per prompt in the grid, dead ones included
        self.grid: torch.Tensor | None = None  # (B,) place of each row in the (P, samples) grid; None: all
        self.max_new_tokens = max_new_tokens
        self.capacity = min(_FIRST_CAPACITY_TOKENS, max_new_tokens)
        self.step = -1  # -1: prefill; t: the t-th generated token is being fed
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> K, V (P, Hkv, width, d)
        self.suffix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> K, V (B, Hkv, capacity, d)
        self.bias: torch.Tensor | None = None  # (P, 1, width): -inf on padding
        if int(lengths.min()) < width:
            pad = torch.arange(width, device=lengths.device)[None, :] >= lengths[:, None]
            self.bias = torch.zeros(pad.shape, device=lengths.device).masked_fill_(pad, float("-inf"))[
                :, None
            ]

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.samples if self.grid is None else len(self.grid)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this step's K and V (B, Hkv, 1, d); return views (B, Hkv, step+1, d) of all so far."""
        if layer not in self.suffix:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.suffix[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.suffix[layer]
        keys[:, :, self.step] = key[:, :, 0]
        values[:, :, self.step] = value[:, :, 0]
        return keys[:, :, : self.step + 1], values[:, :, : self.step + 1]

    def make_room(self) -> None:
        """Double the suffix buffers when the next token would not fit."""
        if self.step < self.capacity:
            return
        self.capacity = min(2 * self.capacity, self.max_new_tokens)
        for layer, pair in self.suffix.items():
            self.suffix[layer] = tuple(_grown(t, t.shape[0], self.capacity, self.step) for t in pair)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but `rows` (sorted positions among the alive), and prompts left without rows."""
        places = rows if self.grid is None else self.grid[rows]
        prompt_of, slot_of = places // self.samples, places % self.samples
        prompts, prompt_of = torch.unique_consecutive(prompt_of, return_inverse=True)
        # pack each prompt's rows to the front of its grid line
        first = torch.searchsorted(prompt_of, prompt_of)
        slot_of = torch.arange(len(places), device=places.device) - first
        self.samples = int(slot_of.max()) + 1
        self.grid = prompt_of * self.samples + slot_of
        if len(self.grid) == len(prompts) * self.samples:
            self.grid = None
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            self.prompt = {n: (k[prompts], v[prompts]) for n, (k, v) in self.prompt.items()}
            self.bias = self.bias[prompts] if self.bias is not None else None
        for layer, pair in self.suffix.items():
            self.suffix[layer] = tuple(_grown(t, rows, self.capacity, self.step + 1) for t in pair)

    def row_lengths(self) -> torch.Tensor:
        """(B,) prompt length of every alive row."""
        spread = self.lengths.repeat_interleave(self.samples)
        return spread if self.grid is None else spread[self.grid]


def _grown(old: torch.Tensor, rows: int | torch.Tensor, capacity: int, used: int) -> torch.Tensor:
    """Copy of `old` (B, Hkv, T, d) with the given rows and room for `capacity` tokens, `used` filled."""
    count = rows if isinstance(rows, int) else len(rows)
    new = old.new_empty((count, old.shape[1], capacity, old.shape[3]))
    filled = old[:, :, :used]
    new[:, :, :used] = filled if isinstance(rows, int) else filled[rows]
    return new


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, block=None, **kwargs):
    """Attention of one layer over the shared prompt and the row's own suffix, joined in one softmax.

    Prefill: causal over (P, H, width, d). Decode: scores of (P, Hkv, samples·G, d) against the prompt and of
    (B·Hkv, G, d) against the suffix, softmax in fp32 over both. Returns ((B, T, H, d), None).
    """
    if block is None:
        raise ModelError(
            f"generate: {type(module).__name__} does not hand on what a registered attention function is given, so "
            "prompts cannot be shared. Needed: a plain decoder (Qwen2, Qwen3, Llama, Mistral). Use one, or another backend."
        )
    _refuse_unknown(module, kwargs, block)
    layer = module.layer_idx
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    if block.step < 0:
        block.prompt[layer] = (key, value)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    n_rows, n_heads, _, d = query.shape
    n_kv = key.shape[1]
    group = n_heads // n_kv
    keys, values = block.append(layer, key, value)
    length = keys.shape[2]
    query = query.reshape(n_rows, n_kv, group, d)
    # suffix scores, and the prompt's scores in the same buffer
    width = block.width
    scores = query.new_empty((n_rows, n_kv, group, width + length), dtype=torch.float32)
    own = torch.bmm(query.reshape(n_rows * n_kv, group, d), keys.reshape(-1, length, d).transpose(1, 2))
    scores[..., width:] = own.view(n_rows, n_kv, group, length)
    scores[..., :width] = _prompt_scores(block, layer, query)
    probs = torch.softmax(scores.mul_(scaling), dim=-1).to(value.dtype)
    out = torch.bmm(probs[..., width:].reshape(-1, group, length), values.reshape(-1, length, d))
    out = out.view(n_rows, n_kv, group, d) + _prompt_values(block, layer, probs[..., :width])
    return out.view(n_rows, 1, n_heads, d), None


def _prompt_scores(block: Block, layer: int, query: torch.Tensor) -> torch.Tensor:
    """Query (B, Hkv, G, d) against the shared prompt keys: (B, Hkv, G, width), -inf on padding."""
    keys = block.prompt[layer][0]
    n_prompts, n_kv, width, d = keys.shape
    group = query.shape[2]
    if block.grid is not None:
        spread = query.new_zeros((n_prompts * block.samples, n_kv, group, d))
        spread[block.grid] = query
        query = spread
    grid = query.reshape(n_prompts, block.samples, n_kv, group, d).transpose(1, 2)
    scores = torch.bmm(
        grid.reshape(n_prompts * n_kv, block.samples * group, d), keys.reshape(-1, width, d).transpose(1, 2)
    )
    if block.bias is not None:
        # added once for all kv heads and rows of a prompt
        scores = scores.view(n_prompts, n_kv * block.samples * group, width) + block.bias
    scores = scores.view(n_prompts, n_kv, block.samples, group, width).transpose(1, 2)
    if block.grid is None:
        return scores.reshape(-1, n_kv, group, width)
    return scores.reshape(-1, n_kv, group, width)[block.grid]


def _prompt_values(block: Block, layer: int, probs: torch.Tensor) -> torch.Tensor:
    """Weights (B, Hkv, G, width) times the shared prompt values: (B, Hkv, G, d)."""
    values = block.prompt[layer][1]
    n_prompts, n_kv, width, d = values.shape
    group = probs.shape[2]
    if block.grid is not None:
        spread = probs.new_zeros((n_prompts * block.samples, n_kv, group, width))
        spread[block.grid] = probs
        probs = spread
    grid = probs.reshape(n_prompts, block.samples, n_kv, group, width).transpose(1, 2)
    out = torch.bmm(
        grid.reshape(n_prompts * n_kv, block.samples * group, width), values.reshape(-1, width, d)
    )
    out = out.view(n_prompts, n_kv, block.samples, group, d).transpose(1, 2).reshape(-1, n_kv, group, d)
    return out if block.grid is None else out[block.grid]


def _refuse_unknown(module: Any, kwargs: dict, block: Block) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and window < block.width + block.max_new_tokens:
        raise ModelError(
            f"generate: {type(module).__name__} attends to a sliding window of {window} tokens, but prompts and "
            f"replies here reach {block.width + block.max_new_tokens}. Only full attention is decoded: "
            f"use --max-new-tokens {max(1, window - block.width)} or less, or another backend."
        )
    used = [name for name in _REFUSED_KEYWORDS if kwargs.get(name) is not None]
    if used:
        raise ModelError(
            f"generate: {type(module).__name__} uses {', '.join(used)}, which this decode loop does not compute. "
            "Use another backend or a model with plain attention (Qwen2, Qwen3, Llama, Mistral)."
        )


@contextmanager
def shared_prompt_attention(model: Any) -> Iterator[None]:
    """The model's attention is ours inside, its own again outside."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
    except ValueError as error:
        raise ModelError(
            f"generate: {type(model).__name__} does not take a registered attention function ({error}). "
            "Use another backend or a model that does (Qwen2, Qwen3, Llama, Mistral)."
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
