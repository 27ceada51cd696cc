"""What is said and done where a device's memory is out. Demands torch; leaves to the walks what is planned again."""

from __future__ import annotations

import torch

from leakfast.errors import ModelError


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
