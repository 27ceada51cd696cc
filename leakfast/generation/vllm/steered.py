"""Steering inside vLLM: what its decoder blocks return is edited, in the process that runs them. Demands an engine that runs
them eagerly (a compiled graph would not ask), on one device, with nothing under way and nothing cached when an arm changes.

vLLM's blocks return (h, r), whose sum is the residual stream, added up by the next norm: what is edited is h + r, and (edited,
0) goes on. All tokens of all requests are edited alike, so an engine runs one arm at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from leakfast.errors import ModelError

if TYPE_CHECKING:
    from leakfast.steering.arms import Arm, Edit


class Steered:
    """The blocks of an engine's model, and the arm that they run under. calls: layer → times it ran so far."""

    def __init__(self) -> None:
        self.arm: Arm | None = None
        self.calls: dict[int, int] = {}
        self._blocks: list[Any] = []

    @property
    def digest(self) -> str | None:
        return None if self.arm is None else self.arm.digest

    def put(self, arm: Arm | None, model: Any) -> None:
        """The model under an arm (None: as it is) in place of the one before. Raises ModelError for a model without a list of
        blocks, or too few."""
        for block in self._blocks:
            del block.forward  # the class's own is found again
        self._blocks, self.arm, self.calls = [], None, {}
        if arm is None:
            return
        from leakfast.forward import packs

        every = packs.stack(model.model)[1]
        self.calls = dict.fromkeys(arm.at, 0)
        for layer, edit in arm.edits(next(model.parameters()).device).items():
            block = every[layer]
            block.forward = partial(_edited, block.forward, edit, self.calls, layer)
            self._blocks.append(block)
        self.arm = arm

    def check(self) -> None:
        """What was drawn since `put` was steered. Raises ModelError where a block never ran as ours."""
        idle = [str(layer) for layer, times in self.calls.items() if not times]
        if self.arm is not None and idle:
            raise ModelError(
                f"vllm: {self.arm.label} steers layer {', '.join(idle)}, but vLLM ran it otherwise than block by block. Needed: "
                "eager blocks. Use --backend transformers."
            )


def _edited(
    forward: Callable[..., Any], edit: Edit, calls: dict[int, int], layer: int, *given: Any, **words: Any
) -> Any:
    """A block's forward, and what becomes of its output."""
    import torch

    out = forward(*given, **words)
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(one, torch.Tensor) for one in out)):
        raise ModelError(
            f"vllm: block {layer} returns {type(out).__name__}, and steering needs the two tensors that add up to the residual "
            "stream. Use --backend transformers."
        )
    hidden, residual = out
    calls[layer] += 1
    return edit(hidden + residual), torch.zeros_like(residual)
