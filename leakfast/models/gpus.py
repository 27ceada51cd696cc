"""The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes. Demands torch; starts no context."""

from __future__ import annotations

import os

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """Names of the GPUs, in order; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get(VISIBLE)
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
