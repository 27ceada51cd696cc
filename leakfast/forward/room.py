"""How many tokens a device has room for, and what is said and done where its memory is out. Demands torch; leaves to the walks
what is planned again."""

from __future__ import annotations

from typing import Any

import torch

from leakfast.errors import ModelError
from leakfast.forward import attention

_GPU_BUDGETS = (512, 32_768)  # packed tokens, least and most; beyond, products no longer get faster
_GPU_SHARE = 0.5  # of the free memory, for one batch


def tokens_that_fit(config: Any, size: int, free_bytes: int) -> int:
    """Packed tokens a batch for a GPU with so much free memory, `size` bytes an element."""
    low, high = _GPU_BUDGETS
    return int(min(max(_GPU_SHARE * free_bytes // bytes_a_token(config, size), low), high))


def bytes_a_token(config: Any, size: int) -> int:
    """Device bytes that one packed token takes at most while a block runs, `size` bytes an element:
    the residual stream, the norm's float32 copies, queries and outputs, keys and values with eight
    gathered copies of them, and the three wide tensors of the MLP."""
    d, heads, kv, width, wide = attention.sizes(config)
    return size * (4 * d + 4 * heads * width + 18 * kv * width + 3 * wide) + 8 * d


def give_back(device: torch.device) -> None:
    """What torch holds of a GPU's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def does_not_fit(n_tokens: int, device: torch.device, failed: str) -> ModelError:
    """The error of one prompt that is too much for the device."""
    return ModelError(
        f"engine: a prompt of {n_tokens} tokens does not fit in the memory of {device} "
        f"({failed}). Needed: memory for one prompt. Free the device, or use --dtype bfloat16."
    )


def out_of_memory(error: RuntimeError) -> str | None:
    """The first line of an error that says that memory is out, else None. Libraries that allocate beside
    torch (cuBLAS, a driver call) say it in words alone."""
    line = (str(error).splitlines() or ["out of memory"])[0]
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA driver error: out of memory")
    return line if isinstance(error, torch.OutOfMemoryError) or any(w in line for w in words) else None
