"""Attention of packed rows to their ancestors and causally to themselves, as transformers calls it: one
variable-length call a block where flash-attn or torch has one for the device, else SDPA per group of like
shapes. Demands the spans of forest.py; leaves what flows between blocks to the engine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from leakfast.errors import ModelError
from leakfast.forward import grouped
from leakfast.forward.forest import Spans
from leakfast.forward.grouped import Groups, Reach, Scores, put

log = logging.getLogger(__name__)

NAME = "leakfast_forest"  # in transformers' AttentionInterface

# (q (Tq, H, d), k and v (Tk, Hkv, d), cu_q and cu_k (S+1,) int32, max_q, max_k, scale) → (Tq, H, d)
Varlen = Callable[..., torch.Tensor]


# keywords of transformers' attention functions that would change scores in ways not computed here
_UNKNOWN = ("position_bias", "head_mask", "logit_softcapping", "sinks", "alibi")


class Caught(Exception):
    """Raised from inside a block once its keys and values are kept (Layout.catch): what follows is not wanted."""


@dataclass
class Layout:
    """Which rows look at which, on the device: spans, grouped for SDPA as layers ask for it, and where the device has
    variable-length attention its arrays. With `catch`, a call keeps its keys and values in `keys` and raises Caught; with
    `keys` set, a call looks at those instead of its own."""

    spans: Spans | None = None
    longest: int = 0  # tokens of the longest path
    varlen: Varlen | None = None
    k_rows: torch.Tensor | None = None  # (K,) int64
    cu_q: torch.Tensor | None = None  # (S+1,) int32
    cu_k: torch.Tensor | None = None  # (S+1,) int32
    max_q: int = 0
    max_k: int = 0
    catch: bool = False
    keys: tuple[torch.Tensor, torch.Tensor] | None = None
    # told every block's keys and values of all rows, (T, Hkv, d) each, with the block's number
    told: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
    _made: dict[tuple[Any, ...], Groups] = field(default_factory=dict)

    def groups(self, reach: Reach, heads: int, per_kv: int, like: torch.Tensor) -> Groups:
        """The spans in groups for layers of this reach, made once. Masks have the dtype and device of `like`."""
        reach = reach if reach.limits(self.longest) else Reach()
        key = (reach, heads, per_kv, like.dtype)
        if key not in self._made:
            self._made[key] = grouped.made(self.spans, reach, heads, per_kv, like)
        return self._made[key]

    @property
    def mask_bytes(self) -> int:
        """Of the groups made so far: masks, and which rows they are."""
        parts = [t for made in self._made.values() for g in made.groups for t in (g.mask, g.q_rows, g.k_rows)]
        return sum(t.numel() * t.element_size() for t in parts)

    def forget(self) -> None:
        """Has the groups made again when they are next asked for."""
        self._made.clear()


_ACTIVE: ContextVar[Layout | None] = ContextVar("leakfast_forest", default=None)


@contextmanager
def attending(layout: Layout) -> Iterator[None]:
    """Attention by `forest_attention` follows the layout for the length of the block."""
    token = _ACTIVE.set(layout)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def layout(spans: Spans, config: Any, like: torch.Tensor, *, by_groups: bool = False) -> Layout:
    """Spans as the attention of this device, dtype and head width wants them (those of `like`); by_groups: for SDPA
    whatever else there is, which has a backward pass everywhere."""
    width = None if by_groups else head_width(config)
    varlen = variable_length(like.device.type, like.device.index, like.dtype, width) if width else None
    longest = int(np.diff(spans.k_offsets).max(initial=0))
    if varlen is None:
        return Layout(spans, longest)
    return Layout(
        spans,
        longest,
        varlen=varlen,
        k_rows=put(spans.k_rows.astype(np.int64), like.device),
        cu_q=put(spans.q_offsets.astype(np.int32), like.device),
        cu_k=put(spans.k_offsets.astype(np.int32), like.device),
        max_q=int(np.diff(spans.q_offsets).max()),
        max_k=longest,
    )


def head_width(config: Any) -> int | None:
    """Width of a query head; None where it differs between layers."""
    try:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except RuntimeError:  # what transformers raises for a value that a config's layers do not share
        return None


def sizes(config: Any) -> tuple[int, int, int, int, int]:
    """(hidden size, query heads, key heads, head width, MLP width) of a block, to reckon memory by: what a config does not
    say is taken from the others (mixers without heads: one as wide as the state), of layers that differ the widest."""
    d = config.hidden_size

    def most(name: str) -> int | None:
        try:
            found = getattr(config, name, None)
        except RuntimeError:  # as in head_width
            found = [getattr(one, name, None) or 0 for one in config.per_layer_config]
        return max(found, default=None) if isinstance(found, list | tuple) else found

    heads = most("num_attention_heads") or 1
    width = most("head_dim") or d // heads
    return d, heads, most("num_key_value_heads") or heads, width, most("intermediate_size") or 4 * d


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """For AttentionInterface, inside `attending`: query (1, H, T, d), key and value (1, Hkv, T, d) → (1, T, H, d), None.

    sliding_window: how many tokens a query looks back to; softcap: scores become c·tanh(score/c); s_aux: (H,) a score of
    nothing a head, in the softmax alone. Raises ModelError for keywords that would change scores otherwise."""
    forest = _ACTIVE.get()
    if forest is None:
        raise ModelError("engine: attention outside a packed pass")
    if unknown := [name for name in _UNKNOWN if more.get(name) is not None]:
        raise ModelError(
            f"engine: {type(module).__name__} uses {', '.join(unknown)}, which is not computed here"
        )
    rows_q = query[0].transpose(0, 1)  # (T, H, d)
    if forest.told is not None:
        forest.told(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if forest.catch:
        forest.keys = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        raise Caught
    rows_k, rows_v = forest.keys or (key[0].transpose(0, 1), value[0].transpose(0, 1))
    reach = Reach(more.get("sliding_window"), _chunk(module))
    scores = Scores(scaling, more.get("softcap"), more.get("s_aux"))
    plain = scores.plain and not reach.limits(forest.longest)
    if forest.varlen is not None and plain and rows_v.shape[-1] == rows_q.shape[-1]:
        out = forest.varlen(
            rows_q.contiguous(),
            rows_k.index_select(0, forest.k_rows),
            rows_v.index_select(0, forest.k_rows),
            *(forest.cu_q, forest.cu_k, forest.max_q, forest.max_k, scaling),
        )
    else:
        heads = rows_q.shape[1]
        found = forest.groups(reach, heads, heads // rows_k.shape[1], rows_q)
        out = found.attend(rows_q, rows_k, rows_v, scores)
    return out[None], None


def _chunk(module: Any) -> int | None:
    """Tokens of the chunks that a layer attends within, by its config."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or index is None or kinds[index] != "chunked_attention":
        return None
    return config.attention_chunk_size


@cache
def variable_length(device: str, index: int | None, dtype: torch.dtype, width: int) -> Varlen | None:
    """The variable-length attention for a device, dtype and head width, chosen once and logged:
    flash-attn, else torch's own, else None (SDPA per group). A candidate is taken when a small
    case on the device agrees with plain softmax attention, bottom-right causal."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        log.info("attention: SDPA per group (variable-length attention is for half precision on a GPU)")
        return None
    reasons = []
    candidates = {
        "flash-attn": _flash_attn(),
        "torch varlen_attn, unsplit keys": _torch_varlen(num_splits=1),
        "torch varlen_attn": _torch_varlen(),
    }
    for name, varlen in candidates.items():
        if isinstance(varlen, str):
            reasons.append(f"{name}: {varlen}")
            continue
        trouble = trial(varlen, torch.device(device, index), dtype, width)
        if trouble is None:
            log.info("attention: %s%s", name, "".join(f" ({reason})" for reason in reasons))
            return varlen
        reasons.append(f"{name}: {trouble}")
    log.warning("attention: SDPA per group, slower (%s)", "; ".join(reasons))
    return None


def _flash_attn() -> Varlen | str:
    """flash-attn's call, or why there is none. Its causal mask is bottom-right from 2.1 on."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        return str(error)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)

    return varlen


def _torch_varlen(**wanted: Any) -> Varlen | str:
    """torch's call with further settings `wanted`, or why there is none. It hands `causal` to the flash
    kernel, whose mask is bottom-right; num_splits=1 keeps a prompt's bits free of what it is packed
    with. Which words it knows differs between versions of torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return str(error)
    known = inspect.signature(varlen_attn).parameters
    extra = dict(wanted)
    if "enable_gqa" in known:  # before that word, fewer key heads were taken as they were
        extra["enable_gqa"] = True
    extra |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if unknown := extra.keys() - known.keys():
        return f"this torch does not know {', '.join(sorted(unknown))}"

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        if "scale" not in known:  # older: the kernel's own scale, 1/sqrt(d)
            q = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
            return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **extra)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, **extra)

    return varlen


def trial(varlen: Varlen, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """None if two small cases (3 spans of shared key heads; queries shorter than keys, and one query each, as the
    deepest block has them and libraries treat apart) come out as plain softmax attention in float32 has them, to a
    few roundings of `dtype`; else what went wrong."""
    cases = ([3, 1, 4], [5, 7, 4]), ([1, 1, 1], [40, 1, 17])
    found = (_trial(varlen, device, dtype, width, *case) for case in cases)
    return next((trouble for trouble in found if trouble), None)


def _trial(
    varlen: Varlen, device: torch.device, dtype: torch.dtype, width: int, q_len: list[int], k_len: list[int]
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, width, generator=generator).to(device, dtype)
        for n, heads in ((sum(q_len), 4), (sum(k_len), 2), (sum(k_len), 2))
    )
    cu_q, cu_k = (
        torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
        for lengths in (q_len, k_len)
    )
    scale = width**-0.5
    try:
        got = varlen(q, k, v, cu_q, cu_k, max(q_len), max(k_len), scale).float()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    at_q = at_k = 0
    for n_q, n_k in zip(q_len, k_len, strict=True):
        one_q, one_k, one_v = q[at_q : at_q + n_q], k[at_k : at_k + n_k], v[at_k : at_k + n_k]
        one_k, one_v = (x.float().repeat_interleave(2, 1) for x in (one_k, one_v))
        scores = torch.einsum("qhd,khd->hqk", one_q.float(), one_k) * scale
        later = torch.ones(n_q, n_k, dtype=torch.bool, device=device).triu(n_k - n_q + 1)
        truth = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), one_v)
        if not (got[at_q : at_q + n_q] - truth).abs().max() <= 8 * torch.finfo(dtype).eps * truth.abs().max():
            return "its values are not those of bottom-right causal attention"
        at_q, at_k = at_q + n_q, at_k + n_k
    return None
