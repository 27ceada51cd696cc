"""Batches through a decoder whose blocks are read from disk: all of them through a block before the next is read, their
states between blocks in memory, and past a budget in a file. Demands models.streamed.Blocks and batches of packs.py or
plain.py; computes each block as their own `through` does, so that the bits are the same."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leakfast.errors import ModelError
from leakfast.forward import packs, plain, room
from leakfast.models.loading import FITS

if TYPE_CHECKING:
    from leakfast.models.streamed import Blocks

log = logging.getLogger(__name__)

Batch = packs.Pack | plain.Padded
# (states (T, D), rows of the wanted among them or None) → what is kept of a layer
Value = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

HELD_BYTES = 512 << 20  # of states between blocks in memory; what is more goes into a file
SPILLED_BYTES = 16 << 30  # of states in the file at most, and half of what its disk has free
_TRIAL_TOKENS = 12
MASK_BYTES = 128 << 20  # of attention's masks and rows kept from one block to the next


def layer_values(
    blocks: Blocks,
    model: Any,
    batches: Iterable[Batch],
    layers: Sequence[int],
    reading: Callable[[Batch], Value],
    done: Callable[[Batch, float], None],
) -> Iterator[tuple[Batch, int, torch.Tensor]]:
    """(batch, place of a layer among `layers`, what `reading(batch)` makes of its states), layer after layer, and within a
    layer batch after batch in their order. done(batch, share of its work): told after each block of each batch. No block
    beyond the deepest layer is read.

    Equal, bit for bit, to the values of batch.through(model, layers, …). A generator whose values are inference tensors.
    Raises ModelError where the device's memory is out."""
    places = {layer: [k for k, one in enumerate(layers) if one == layer] for layer in layers}
    for some in _chunks(batches, _state_bytes(model)):
        readings = [reading(one) for one in some]
        for n, index, found, _ in _through(blocks, model, some, layers, readings, done):
            for place in places.get(n, ()):
                yield some[index], place, found


def ends(
    blocks: Blocks, model: Any, batches: Iterable[Batch], done: Callable[[Batch, float], None]
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """(batch, final-normed states (R, D) of its wanted rows) in the order of the batches; as `layer_values`."""
    for some in _chunks(batches, _state_bytes(model)):
        last = len(packs.stack(model)[1]) - 1
        nothing: list[Value] = [lambda states, rows: states[:0]] * len(some)
        for n, index, _, ended in _through(blocks, model, some, [last], nothing, done):
            if n == last:
                yield some[index], ended.index_select(0, some[index].rows)


def _through(
    blocks: Blocks,
    model: Any,
    batches: list[Batch],
    layers: Sequence[int],
    readings: Sequence[Value],
    done: Callable[[Batch, float], None],
) -> Iterator[tuple[int, int, Any, Any]]:
    """(block, place of the batch, its value where the block is one of `layers`, the decoder's own end after the deepest)."""
    run = _Run(model, max(layers))
    _try(blocks, model, run.deepest)
    blocks.until = run.deepest
    with _held(model, batches) as held:
        for n in range(run.deepest + 1):
            blocks.bring(n)
            for index, batch in enumerate(batches):
                value = readings[index] if n in layers else None
                found, state, ended = run.step(batch, n, held.get(index), value)
                if n < run.deepest:
                    held.put(index, state)
                state = None
                done(batch, (n + 1) / (run.deepest + 1))
                if n in layers:
                    yield n, index, found, ended


def _try(blocks: Blocks, model: Any, deepest: int) -> None:
    """ModelError where block after block is not what the decoder's own forward gives for a short prompt, as where later blocks
    take more from earlier ones than states. Once a depth; types that the tests hold to transformers are not tried."""
    if model.config.model_type in FITS or deepest <= blocks.tried:
        return
    blocks.tried = deepest
    ids = (torch.arange(_TRIAL_TOKENS) % model.config.vocab_size).tolist()
    found: list[torch.Tensor] = []

    def own(batch: plain.Padded) -> torch.Tensor:
        with torch.inference_mode():
            return batch.through(model, [deepest], lambda n, states, rows: found.append(states.clone()))

    try:
        ((batch, _),) = plain.walk(model, [ids], np.ones(1, np.int64), _TRIAL_TOKENS, own)
        ours: list[Value] = [lambda states, rows: states]
        ((_, _, states, _),) = _through(blocks, model, [batch], [deepest], ours, lambda batch, share: None)
        trouble = None if torch.equal(states, found[0]) else "its states are others, block after block"
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if trouble is not None:
        blocks.tried = -1
        raise ModelError(
            f"engine: a model of type {model.config.model_type} is read block by block, but {trouble}. Needed: blocks that take "
            "nothing but states from one another. Use --stream off."
        )


class _Run:
    """A decoder, the deepest block that is run, and how its blocks return states, as the first that has run says."""

    def __init__(self, model: Any, deepest: int) -> None:
        self.model, self.deepest, self.by_tuple = model, deepest, False

    @torch.inference_mode()
    def step(
        self, batch: Batch, n: int, before: torch.Tensor | None, value: Value | None
    ) -> tuple[Any, Any, torch.Tensor]:
        """Block n of a batch: (value of its states where one is asked, the states (T, D) themselves unless it is the
        deepest, what the decoder's own end makes of them).

        The decoder's own forward runs, with the blocks below n passed over: they hand on the states before block n."""
        kept: dict[str, torch.Tensor] = {}

        def take(layer: int, states: torch.Tensor, rows: torch.Tensor | None) -> None:
            if value is not None:
                kept["value"] = value(states, rows)
            if n < self.deepest:
                kept["state"] = states

        whole = n < self.deepest and isinstance(batch, packs.Pack)
        asked = replace(batch, row_layout=None) if whole else batch  # every row goes on to the next block
        try:
            with self._passed_over(n, before):
                ended = asked.through(self.model, [n], take)
        except RuntimeError as error:
            failed = room.out_of_memory(error)
            if failed is None:
                raise
            raise ModelError(
                f"engine: {batch.tokens.numel()} packed tokens do not fit in the memory of {batch.tokens.device} beside a "
                f"block ({failed}). Needed: memory for one batch. Free the device, or use --stream off."
            ) from error
        return kept.get("value"), kept.get("state"), ended

    @contextmanager
    def _passed_over(self, n: int, state: torch.Tensor | None) -> Iterator[None]:
        """The blocks below n hand on `state` in place of their output, those above n what they are given."""
        _, every = packs.stack(self.model)
        own = {i: vars(block).get("forward") for i, block in enumerate(every) if i != n}
        hook = every[n].register_forward_hook(self._seen)
        try:
            for i in own:
                every[i].forward = partial(self._handed, state if i < n else None)
            yield
        finally:
            hook.remove()
            for i, forward in own.items():
                del every[i].forward
                if forward is not None:
                    every[i].forward = forward

    def _seen(self, module: Any, given: Any, out: Any) -> None:
        self.by_tuple = isinstance(out, tuple)

    def _handed(self, state: torch.Tensor | None, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if state is None else state.view(hidden.shape)
        return (out,) if self.by_tuple else out


class _Held:
    """States of batches between two blocks: the first `HELD_BYTES` of them where they are, the rest in a mapped file, whose
    pages are the page cache's. Masks are dropped after a block once they are more than `MASK_BYTES`."""

    def __init__(self, model: Any, batches: Sequence[Batch], folder: str) -> None:
        each = _state_bytes(model)
        weight = next(model.parameters())
        self.device, self.batches = weight.device, batches
        self.states: list[Any] = [None] * len(batches)
        self.places: dict[int, slice] = {}
        held = spilled = 0
        for index, batch in enumerate(batches):
            size = batch.tokens.numel() * each
            if held + size <= HELD_BYTES:
                held += size
            else:
                self.places[index] = slice(spilled, spilled + size)
                spilled += size
        self.file = None
        if spilled:
            log.info(
                "engine: %.1f GiB of states between blocks go into a file in %s", spilled / 2**30, folder
            )
            path = Path(folder) / "states"
            self.file = torch.from_file(str(path), shared=True, size=spilled, dtype=torch.uint8)
            path.unlink()  # what is mapped stays until it is let go

    def get(self, index: int) -> torch.Tensor | None:
        state = self.states[index]
        return state if state is None or index not in self.places else state.to(self.device)

    def put(self, index: int, state: torch.Tensor) -> None:
        if index in self.places and self.states[index] is None:
            self.states[index] = self.file[self.places[index]].view(state.dtype).view(state.shape)
        if index in self.places:
            self.states[index].copy_(state)
        else:
            self.states[index] = state
        batch = self.batches[index]
        if isinstance(batch, packs.Pack) and batch.layout.mask_bytes * len(self.batches) > MASK_BYTES:
            batch.layout.forget()


@contextmanager
def _held(model: Any, batches: Sequence[Batch]) -> Iterator[_Held]:
    with tempfile.TemporaryDirectory(prefix="leakfast-states-") as folder:
        yield _Held(model, batches, folder)


def _state_bytes(model: Any) -> int:
    """Of one token between two blocks."""
    return model.config.hidden_size * next(model.parameters()).element_size()


def _chunks(batches: Iterable[Batch], each: int) -> Iterator[list[Batch]]:
    """Batches whose states fit together in memory and the file; the blocks are read once for each chunk."""
    room_bytes = HELD_BYTES + min(SPILLED_BYTES, shutil.disk_usage(tempfile.gettempdir()).free // 2)
    some: list[Batch] = []
    size = 0
    for batch in batches:
        more = batch.tokens.numel() * each
        if some and size + more > room_bytes:
            log.info("engine: %d batches through all blocks, as many as the file of states holds", len(some))
            yield some
            some, size = [], 0
        some.append(batch)
        size += more
    if some:
        yield some
