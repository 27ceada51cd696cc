"""Whether a training step keeps its activations or makes them again in the backward pass (gradient_checkpointing = "auto"):
what they take at most, against the memory there is. Demands a decoder's config; the choice changes no bit of an adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from leakfast.forward import attention
from leakfast.models import fits

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.study.config import TrainConfig
    from leakfast.train.collate import Example

log = logging.getLogger("leakfast.train")

SHARE = 0.5  # of the free memory, for the activations of one pass


def recomputes(
    loaded: Loaded, cfg: TrainConfig, examples: Sequence[Example], budget_tokens: int | None
) -> bool:
    """What cfg.gradient_checkpointing says; "auto": whether the activations of the largest pass would take more than half
    of the free memory, said in the log with both numbers. budget_tokens: of a packed pass; None: rows are padded."""
    if cfg.gradient_checkpointing != "auto":
        return bool(cfg.gradient_checkpointing)
    free = free_bytes(loaded.device)
    if free is None:
        log.info("train: activations are kept (how much memory is free is not known here)")
        return False
    lengths = sorted((len(e.ids) for e in examples), reverse=True)
    if budget_tokens is None:
        n_tokens = lengths[0] * min(cfg.batch_size, len(lengths))
    else:
        rows = cfg.batch_size * cfg.accumulation
        n_tokens = min(max(budget_tokens, lengths[0]), sum(lengths[:rows]))
    config = loaded.model.config
    size = next(loaded.model.parameters()).element_size()
    needed = n_tokens * loaded.n_layers * bytes_a_token(config, size, loaded.device.type)
    again = needed > SHARE * free
    told = ("made again in the backward pass" if again else "kept", n_tokens, needed / 1e9, free / 1e9)
    log.info("train: activations are %s (%d tokens a pass take about %.2f GB, %.1f GB are free)", *told)
    return again


def bytes_a_token(config: Any, size: int, device: str) -> int:
    """Bytes that one block keeps of a packed token for its backward pass, `size` bytes an element: the residual stream
    twice, two normed copies of it, the attention's output, queries with keys and values as they are, turned, and
    gathered for their groups, and three wide tensors of the MLP. A CPU attends in float32 whatever the dtype. LoRA's own,
    rank columns a layer, are left out."""
    d, heads, kv, width, wide = attention.sizes(config)
    attended = (2 * heads + 2 * kv) * width  # queries, keys, values and output of the groups
    own = 4 * d + heads * width + 2 * (heads + 2 * kv) * width + 3 * wide
    return int(size * own + (4 if device == "cpu" else size) * attended)


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors can have on the device; None where nothing says."""
    if device.type not in ("cpu", "cuda"):
        return None
    free = fits.free_bytes(device)
    if device.type == "cpu" or free is None:
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
