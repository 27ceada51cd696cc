"""A model that is steered inside a block: what its decoder blocks return is edited, whichever engine runs them. Demands a
decoder with a list of blocks (forward.packs.stack); knows nothing of personas."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import ModelError
from leakfast.forward import packs, passes
from leakfast.steering.directions import check_fits

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.steering.arms import Arm, Edit

log = logging.getLogger("leakfast.steering")


@contextmanager
def steered(loaded: Loaded, arm: Arm | None) -> Iterator[dict[int, int]]:
    """The model under an arm for the length of the block (None: as it is); afterwards exactly as before.

    Every token that passes a steered block is edited: of the prompt and of the reply, in the packed engine, in padded
    batches, in prefill and in decoding, where what later tokens attend to is edited too. Yields layer → calls of that
    block so far. An adapter that is on stays on: its blocks' outputs are edited.
    Raises InputError for a direction that does not fit the model, ModelError where a block asked for was never run,
    since what was measured then was not steered there."""
    if arm is None:
        yield {}
        return
    check_fits(arm.directions, loaded, arm.name)
    with edited(passes.decoder(loaded), arm.edits(loaded.device), arm.label) as calls:
        yield calls


@contextmanager
def edited(
    decoder: Any, edits: Mapping[int, Edit], label: str, *, must_run: bool = True
) -> Iterator[dict[int, int]]:
    """A decoder whose blocks' outputs are edited, layer → edit, for the length of the block; as `steered`. label: what a
    message calls it; must_run: whether a block that was never run is an error."""
    blocks = packs.stack(decoder)[1]
    calls = dict.fromkeys(edits, 0)
    own: dict[int, Any] = {}
    try:
        for layer, edit in edits.items():
            block = blocks[layer]
            own[layer] = vars(block).get("forward")
            # not a hook: the packed engine calls a narrowed block's forward by itself
            block.forward = partial(_edited, block.forward, edit, calls, layer)
        yield calls
    finally:
        for layer, forward in own.items():
            del blocks[layer].forward
            if forward is not None:
                blocks[layer].forward = forward
    idle = [str(layer) for layer, times in calls.items() if not times]
    if idle and must_run:
        raise ModelError(
            f"steering: {label} asks for layer {', '.join(idle)}, but no token passed there. Needed: a measurement that "
            "runs these blocks. Steer at a lower layer: leakfast directions --layers …"
        )
    log.debug("steering: %s: %s", label, ", ".join(f"block {k} ran {n} times" for k, n in calls.items()))


def _edited(
    forward: Callable[..., Any], edit: Edit, calls: dict[int, int], layer: int, *given: Any, **words: Any
) -> Any:
    """A block's forward, and what becomes of its output; one that stops half way is not counted."""
    out = forward(*given, **words)
    states: torch.Tensor = packs.states_of(out)
    calls[layer] += 1
    return (edit(states), *out[1:]) if isinstance(out, tuple) else edit(states)
