"""Keys and values of a block's prompts, and the states that their first new tokens are drawn from. Where the packed
engine covers the model a token that several prompts begin with is computed once; elsewhere prompts are padded.
Demands the decoder of a plain transformers model inside shared_prompt_attention; leaves the head to transformers.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from leakfast.forward import attention, packs, passes
from leakfast.generation.shared_prompt import Block
from leakfast.models.loading import FITS

log = logging.getLogger("leakfast.generate")


def packable(loaded: Any, model: Any) -> bool:
    """Whether the packed engine computes this model's prompts: of types that need no trial, and full attention alone."""
    if getattr(model.config, "model_type", None) not in FITS:
        return False
    inner = passes.decoder(loaded)
    holders = (model.config, *(layer.self_attn for layer in inner.layers))
    return all(getattr(holder, "sliding_window", None) is None for holder in holders)


def packed(loaded: Any, prompts: Sequence[Sequence[int]], block: Block) -> torch.Tensor:
    """Final-normed states (P, D) of the prompts' last tokens; their keys and values go into the block. Every distinct
    token is computed once in a batch of the engine's size."""
    model = passes.decoder(loaded)
    deepest = len(packs.stack(model)[1]) - 1
    weight = next(model.parameters())
    states = torch.empty((len(prompts), model.config.hidden_size), dtype=weight.dtype, device=weight.device)

    def run(pack: packs.Pack) -> torch.Tensor:
        members = attention.put(pack.members, weight.device)
        rows = attention.put(_path_rows(pack, block.width), weight.device)
        pack.layout.told = lambda layer, key, value: _keep(block, layer, members, rows, key, value)
        found = pack.through(model, [deepest], lambda *told: None)
        ends = pack.rows.index_select(0, attention.put(pack.places, weight.device))
        states[members] = found.index_select(0, ends)
        return states

    plain = [list(prompt) for prompt in prompts]
    counts = np.ones(len(plain), np.int64)
    batches = 0
    for _ in packs.walk(model, plain, counts, passes.budget_tokens(loaded), run):
        batches += 1
    log.debug("prefill: %d prompts of %d tokens in %d batches", len(plain), sum(map(len, plain)), batches)
    return states


def _path_rows(pack: packs.Pack, width: int) -> np.ndarray:
    """(n·width,) int64: the row of every token of each member's prompt; its last one again up to `width`."""
    first = pack.spans.k_offsets[pack.segments]
    length = pack.spans.k_offsets[pack.segments + 1] - first
    at = np.minimum(np.arange(width)[None], length[:, None] - 1)
    return pack.spans.k_rows[first[:, None] + at].astype(np.int64).reshape(-1)


def _keep(
    block: Block,
    layer: int,
    members: torch.Tensor,
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Write keys and values (T, Hkv, d) of a batch's rows to the members' prompts in the block."""
    n_kv, d = key.shape[1:]
    if layer not in block.prompt:
        shape = (len(block.lengths), n_kv, block.width, d)
        block.prompt[layer] = (key.new_empty(shape), value.new_empty(shape))
    for kept, new in zip(block.prompt[layer], (key, value), strict=True):
        kept[members] = new.index_select(0, rows).view(len(members), block.width, n_kv, d).transpose(1, 2)


def padded(loaded: Any, prompts: Sequence[Sequence[int]], block: Block) -> torch.Tensor:
    """As `packed`, every prompt computed whole, for models that the engine does not cover."""
    from leakfast.models.beside import plain_model

    device = block.lengths.device
    decoder = plain_model(loaded.model).get_decoder()
    ids = torch.zeros((len(prompts), block.width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(prompt)
    # padding stands right of the prompt, where causal attention never looks
    hidden = decoder(input_ids=ids.to(device), use_cache=False, block=block).last_hidden_state
    return hidden[torch.arange(len(prompts), device=device), block.lengths - 1]
