"""Picks the implementation of each op, once, and logs which and why. Demands torch tensors; the
kernels and their reference live in kernels/. A path asked for by name runs or raises."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

IMPLEMENTATIONS = {"segment_means": ("reference",)}


def segment_means(states: torch.Tensor, offsets: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Mean of each segment of rows: states (N, D), offsets (P+1,) int64 → (P, D) float32.

    Accumulated in float32 in a fixed order; equal to
    `torch.stack([states[a:b].float().mean(0) for a, b in pairwise(offsets)])`.
    impl: "auto" or a name of IMPLEMENTATIONS; a name that cannot run raises ValueError."""
    from leakfast.kernels import reference

    _choose("segment_means", impl)
    return reference.segment_means_reference(states, offsets)


def chosen_paths() -> dict[str, str]:
    """Op → implementation that "auto" takes on this machine."""
    return {op: _choose(op, "auto") for op in IMPLEMENTATIONS}


@cache
def _choose(op: str, impl: str) -> str:
    known = IMPLEMENTATIONS[op]
    if impl not in ("auto", *known):
        raise ValueError(f"{op}: implementation {impl!r} asked, there is {', '.join(('auto', *known))}")
    chosen = known[0] if impl == "auto" else impl
    why = "the only one there is" if impl == "auto" else "asked for by name"
    log.info("ops: %s runs as %s (%s)", op, chosen, why)
    return chosen
