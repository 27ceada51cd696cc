"""Which engines take a steered model, or a whole one in an adapter's place: those whose blocks are run one by one, where we can
reach them. Demands a request; measures nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.models.whole import is_whole

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.measure.request import Request

log = logging.getLogger("leakfast.evaluate")


def steerable(drawing: Drawing, request: Request, at: str = "final") -> Drawing:
    """The drawing, with `auto` settled to transformers where the request has arms. Raises InputError where vLLM is to score
    letters under an arm, or to draw on several GPUs an engine; for arms at checkpoints, or probabilities on an arm's own
    replies; and for a whole model in an adapter's place under arms or by vLLM."""
    whole = [adapter for adapter in request.adapters if is_whole(adapter)]
    if whole:
        drawing = _of_whole(drawing, request, str(whole[0]))
    if not request.arms:
        return drawing
    if drawing.letters != "packed":
        raise InputError(
            "steering: vLLM given as the engine of letters, but it runs the model's blocks there inside compiled graphs, where "
            "nothing can be done to their outputs. Use --engine packed."
        )
    if drawing.backend == "vllm" and drawing.options.tensor_parallel > 1:
        raise InputError(
            f"steering: --tensor-parallel {drawing.options.tensor_parallel} given, but blocks that lie on several GPUs are in "
            "processes where nothing can be done to their outputs. Use --tensor-parallel 1 (in a study: [vllm]), or "
            "--backend transformers."
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
    return drawing if drawing.backend == "vllm" else replace(drawing, backend="transformers")


def _of_whole(drawing: Drawing, request: Request, first: str) -> Drawing:
    """The drawing of a request with whole models among its adapters."""
    by_vllm = drawing.backend == "vllm" or drawing.letters != "packed"
    if by_vllm or request.arms:
        asked = "vLLM" if by_vllm else "a steering"
        raise InputError(
            f"eval: {asked} given, but {first} is a whole model, not an adapter. Needed: a model as it is, run in this process "
            "in the base's place. Leave --steer out, use --backend transformers and --engine packed; or give it as --model "
            "alone, as a base of its own."
        )
    if drawing.backend == "auto":
        log.info("eval: completions are drawn by transformers, because %s is a whole model", first)
    return replace(drawing, backend="transformers")
