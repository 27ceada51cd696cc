"""Which engines take a steered model: those whose blocks run in this process. Demands a request; measures nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.measure.request import Request


def steerable(drawing: Drawing, request: Request, at: str = "final") -> Drawing:
    """The drawing, with `auto` settled to transformers where the request has arms. Raises InputError where vLLM is to draw
    or to score under an arm, at checkpoints, and for probabilities on an arm's own replies."""
    if not request.arms:
        return drawing
    if drawing.backend == "vllm" or drawing.letters != "packed":
        raise InputError(
            "steering: vLLM given, but it runs the model's blocks inside compiled graphs in a process of its own, where "
            "nothing can be done to their outputs. Use --backend transformers, and --engine packed for letters."
        )
    if at == "checkpoints":
        raise InputError(
            "steering: --checkpoints given, but adapters are steered as they are at the end. Leave it out, or give a "
            "checkpoint's folder with --adapter."
        )
    if any(not one.by_choices and one.config.probability_replies != "base" for one in request.asked):
        raise InputError(
            "steering: probabilities on each adapter's own replies asked, but an arm has none. Use --probability-replies "
            "base."
        )
    return replace(drawing, backend="transformers")
