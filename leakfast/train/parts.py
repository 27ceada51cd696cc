"""What a pass over some rows of an optimizer step costs, however the rows were run. Demands nothing; leaves sums over
passes to loop.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Part:
    """learned (N,) and kept (H,), nats in float32 with a gradient: the cross-entropy of each label, and
    KL(unadapted ‖ adapted) at each held position; label_rows (N,), held_rows (H,) int64: whose they are, as places
    among the step's examples; firm (H,) bool: held positions that weigh as much as a label; n_tokens that were run."""

    learned: torch.Tensor
    kept: torch.Tensor
    label_rows: np.ndarray
    held_rows: np.ndarray
    firm: np.ndarray
    n_tokens: int
