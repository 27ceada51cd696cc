"""The packed forward pass over a prefix forest: states of last tokens at chosen layers, or final-normed for
the head, only as deep as needed. Demands a plain decoder that transformers runs (see FITS); leaves logits,
means and adapters to others. Layer L is the output of decoder block L, 0-based, before any final norm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leakfast.errors import ModelError
from leakfast.forward import attention, forest, ops, packs, plain, room, streaming, taken
from leakfast.models.loading import unfit
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger(__name__)


Batch = packs.Pack | plain.Padded

_CPU_BUDGET = 2048  # packed tokens per batch


@dataclass(frozen=True)
class FinalStates:
    """Final-normed states of one packed batch: what the head takes.

    Asked token m of M is token `positions[m]` of sequence `sequences[m]`, and its state is
    `states[rows[m]]`: a state that several sequences share (the end of a prompt under four answers)
    is there once. Tokens come sequence by sequence, in order of position."""

    states: torch.Tensor  # (R, D), the model's dtype and device
    rows: np.ndarray  # (M,) int64
    sequences: np.ndarray  # (M,) int64
    positions: np.ndarray  # (M,) int64


def last_token_states(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """States of the last token of each sequence: (N, len(layers), D) float32, in the given order.

    Equal to running each sequence alone through transformers and taking the output of decoder block
    L for L in `layers` (fp32: within 1e-5 relative). Shared prefixes are computed once per batch of
    `budget_tokens` packed tokens (default: see `budget_tokens()`), equal sequences once; blocks beyond
    max(layers) are not run. Raises ValueError for layers the model does not have or empty sequences,
    ModelError for a model or a prompt that does not fit."""
    model = decoder(loaded)
    layers = _checked(layers, len(packs.stack(model)[1]))
    counts = np.ones(len(sequences), np.int64)

    def reading(pack: Batch) -> streaming.Value:
        return lambda states, rows: packs.wanted(states, rows).float()

    states = np.empty((len(sequences), len(layers), model.config.hidden_size), np.float32)
    waiting: tuple[Batch, slice, Callable[[], np.ndarray]] | None = None
    for pack, which, found in _values(loaded, sequences, counts, budget_tokens, progress, layers, reading):
        fetched = _fetch(found)  # on its way to the host while the next batch runs
        if waiting:
            states[waiting[0].members, waiting[1]] = waiting[2]()[waiting[0].places]
        waiting = pack, which, fetched
    if waiting:
        states[waiting[0].members, waiting[1]] = waiting[2]()[waiting[0].places]
    return states


def last_token_sums(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    segments: Sequence[int] | np.ndarray,
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sums of squares of the last-token states of each segment: (len(layers), P, D) float32 twice.

    Sequence i belongs to segment segments[i], segments are 0…P-1. Equal to adding up the rows of
    `last_token_states` and their squares, but states are read where the batch has them
    (ops.centroid_sums) and never stored. Summed in float32: within a batch in the order of the
    sequences, then batch after batch; the same call gives the same bits.
    Raises as `last_token_states`, and ValueError for segments that do not fit."""
    model = decoder(loaded)
    layers = _checked(layers, len(packs.stack(model)[1]))
    segment_of = np.asarray(segments, np.int64)
    if segment_of.shape != (len(sequences),) or (len(segment_of) and segment_of.min() < 0):
        raise ValueError("segments must name one segment from 0 on for each sequence")
    n_segments = int(segment_of.max(initial=-1)) + 1

    def reading(pack: Batch) -> streaming.Value:
        order = np.lexsort((pack.members, segment_of[pack.members]))  # by segment, then as given
        ends = np.searchsorted(segment_of[pack.members][order], np.arange(n_segments + 1))
        device = pack.rows.device
        places, offsets = (attention.put(x.astype(np.int64), device) for x in (pack.places[order], ends))

        def sums_of(states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
            leaves = places if rows is None else rows.index_select(0, places)
            return torch.stack(ops.centroid_sums(states, leaves, offsets))

        return sums_of

    # added here and not by the op: a batch that runs out of memory half way counts for nothing
    device = next(model.parameters()).device
    total = torch.zeros(2, len(layers), n_segments, model.config.hidden_size, device=device)
    counts = np.ones(len(sequences), np.int64)
    for _, which, found in _values(loaded, sequences, counts, budget_tokens, progress, layers, reading):
        total[:, which] += found
    sums, squares = total.cpu().numpy()
    return sums, squares


def span_means(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    last: Sequence[int] | np.ndarray,
    layers: Sequence[int],
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Mean over the last `last[i]` tokens of each sequence's states: (N, len(layers), D) float32, in the given order.

    Equal to `output_of_block_L(sequence)[-last[i]:].float().mean(0)`, in float32 and a fixed order; what sequences share
    at their beginnings is computed once a batch. Raises as `final_states`."""
    model = decoder(loaded)
    layers = _checked(layers, len(packs.stack(model)[1]))
    counts = np.asarray(last, np.int64)
    if counts.shape != (len(sequences),) or not all(
        1 <= n <= len(one) for n, one in zip(counts.tolist(), sequences, strict=True)
    ):
        raise ValueError("last must lie between 1 and each sequence's length")

    def reading(pack: Batch) -> streaming.Value:
        device = pack.rows.device
        places = attention.put(pack.places.astype(np.int64), device)
        ends = attention.put(np.concatenate([[0], np.cumsum(pack.counts)]).astype(np.int64), device)
        return lambda states, rows: ops.segment_means(
            packs.wanted(states, rows).index_select(0, places), ends
        )

    means = np.empty((len(sequences), len(layers), model.config.hidden_size), np.float32)
    for pack, which, found in _values(loaded, sequences, counts, budget_tokens, progress, layers, reading):
        means[pack.members, which] = found.cpu().numpy()
    return means


def final_states(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    last: int | Sequence[int] = 1,
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Iterator[FinalStates]:
    """Final-normed states of the last token of each sequence, or of the last k, batch by batch.

    `last` is a number or one a sequence, from 1 to the sequence's length. Equal to
    `model.model(input_ids).last_hidden_state[0, -k:]` of each sequence alone (fp32: within 1e-5
    relative). Every sequence appears in exactly one batch, in an order of the engine's; nothing of a
    batch is kept once the next is asked for. The states are inference tensors. On a GPU the batch may
    still be computing when it is yielded: work queued on the current stream follows it.
    Raises as `last_token_states`, and ValueError for a `last` that does not fit, before the first batch."""
    model = decoder(loaded)
    counts = np.broadcast_to(np.asarray(last, np.int64), (len(sequences),)).copy()
    deepest = len(packs.stack(model)[1]) - 1

    def run(pack: Batch) -> torch.Tensor:
        with torch.inference_mode():
            states = pack.through(model, [deepest], lambda *told: None)
            return states.index_select(0, pack.rows)

    lengths = forest.lengths_of(sequences)
    if len(counts) and not (counts.min() >= 1 and (counts <= lengths).all()):
        raise ValueError("last must lie between 1 and each sequence's length")
    if loaded.stream is None:
        walked = _walk(loaded, sequences, counts, budget_tokens, progress, deepest, run)
    else:
        done, every = _from_disk(loaded, sequences, counts, budget_tokens, progress, deepest)
        walked = streaming.ends(loaded.stream, model, every, done)
    for pack, states in walked:
        ends = np.repeat(lengths[pack.members], pack.counts)
        after = np.repeat(np.cumsum(pack.counts), pack.counts) - np.arange(len(ends))
        yield FinalStates(states, pack.places, np.repeat(pack.members, pack.counts), ends - after)


def budget_tokens(loaded: Loaded) -> int:
    """Packed tokens a batch unless told: 2,048 on a CPU; on a GPU what half of its free memory holds of
    one block's activations, from 512 to 32,768."""
    model = decoder(loaded)
    first = next(model.parameters())
    if first.device.type != "cuda":
        return _CPU_BUDGET
    free = torch.cuda.mem_get_info(first.device)[0]
    free += torch.cuda.memory_reserved(first.device) - torch.cuda.memory_allocated(first.device)
    return room.tokens_that_fit(model.config, first.element_size(), free)


def decoder(loaded: Loaded) -> Any:
    """The causal decoder, out of a causal LM or a peft wrap around one. Raises ModelError, with the reason, for a model
    that has none."""
    net = loaded.model
    if hasattr(net, "get_base_model"):
        net = net.get_base_model()
    if getattr(net.config, "is_encoder_decoder", False):
        raise unfit("engine", loaded, "an encoder-decoder")
    inner = net.get_decoder() if hasattr(net, "get_decoder") else None
    inner = getattr(net, "model", None) if inner is net else inner
    if inner is None:
        raise unfit("engine", loaded, "which has no decoder of its own under its output head")
    try:
        packs.stack(inner)
    except ModelError as error:
        raise unfit("engine", loaded, f"without a list of blocks ({error})") from error
    return inner


def _checked(layers: Sequence[int], n_layers: int) -> list[int]:
    layers = [int(layer) for layer in layers]
    if not layers or min(layers) < 0 or max(layers) >= n_layers:
        raise ValueError(f"layers must be some of 0…{n_layers - 1}, not {layers}")
    return layers


def _values(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    budget: int | None,
    progress: Progress | None,
    layers: list[int],
    reading: Callable[[Batch], streaming.Value],
) -> Iterator[tuple[Batch, slice, torch.Tensor]]:
    """(batch, which of `layers`, what reading(batch) makes of each one's states, stacked as dimension 1): all layers of a
    batch at once, or of a model on disk a layer of all batches after the other."""
    model = decoder(loaded)
    if loaded.stream is not None:
        done, every = _from_disk(loaded, sequences, counts, budget, progress, max(layers))
        for pack, k, found in streaming.layer_values(loaded.stream, model, every, layers, reading, done):
            yield pack, slice(k, k + 1), found.unsqueeze(1)
        return

    def run(pack: Batch) -> torch.Tensor:
        value, found = reading(pack), {}

        def take(layer: int, states: torch.Tensor, rows: torch.Tensor | None) -> None:
            found[layer] = value(states, rows)

        with torch.inference_mode():
            pack.through(model, layers, take)
            return torch.stack([found[layer] for layer in layers], 1)

    for pack, stacked in _walk(loaded, sequences, counts, budget, progress, max(layers), run):
        yield pack, slice(None), stacked


def _from_disk(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    budget: int | None,
    progress: Progress | None,
    deepest: int,
) -> tuple[Callable[[Batch, float], None], Iterator[Batch]]:
    """What is told how much of a batch is done, and the batches that `_walk` makes of a model on disk."""
    shares: dict[int, tuple[Batch, float]] = {}
    told = 0.0
    total = len({tuple(one) for one in sequences}) if progress else 0

    def done(batch: Batch, share: float) -> None:
        nonlocal told
        told += batch.n_segments * (share - shares.get(id(batch), (batch, 0.0))[1])
        shares[id(batch)] = batch, share
        if share == 1:
            shares.pop(id(batch))
        if progress:
            progress(min(total, round(told)), total, "states")

    nothing = torch.empty(0)
    walked = _walk(loaded, sequences, counts, budget, None, deepest, lambda batch: nothing)
    return done, (batch for batch, _ in walked)


def _walk(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    budget: int | None,
    progress: Progress | None,
    deepest: int,
    run: Callable[[Batch], torch.Tensor],
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch of the sequences, packed or plain as taken.way has it, with the checks, the log and the progress that
    every job has."""
    model = decoder(loaded)
    lengths = forest.lengths_of(sequences)
    _check_lengths(loaded, model, int(lengths.max(initial=0)))
    budget = budget_tokens(loaded) if budget is None else budget
    if not len(sequences):
        return
    if not lengths.min() >= 1:
        raise ValueError("a sequence of at least one token is needed")
    found = taken.way(model, loaded.name, int(lengths.max()), min(budget, int(lengths.sum())))
    short = lengths <= (np.inf if found.reach is None else found.reach)
    done = 0

    def told(batch: Batch) -> None:
        nonlocal done
        done += batch.n_segments
        if progress:
            progress(done, total, "states")

    total = 0

    def begin(plan: forest.Plan) -> None:
        nonlocal total
        total = plan.n_segments + len(long)
        log.info(
            "engine: %d prompts, %d tokens, %d after sharing, %d batches, blocks 0-%d",
            *(len(plan.lengths), plan.n_input_tokens, len(plan.tokens), len(plan), deepest),
        )
        if progress:
            progress(0, total, "states")

    long = {tuple(sequences[i]) for i in np.flatnonzero(~short).tolist()}
    if short.any():
        for batch, result in _part(packs.walk, model, sequences, counts, short, budget, run, begin):
            yield batch, result
            told(batch)
    if long:
        total = total or len(long)
        how = {
            "alone": found.packed or found.alone
        }  # beyond its reach a prompt's length decides for the whole batch
        log.info("engine: %d prompts plain, blocks 0-%d (%s)", len(long), deepest, found.why)
        for batch, result in _part(plain.walk, model, sequences, counts, ~short, budget, run, **how):
            yield batch, result
            told(batch)


def _part(
    walk: Callable[..., Iterator[tuple[Any, torch.Tensor]]],
    model: Any,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    which: np.ndarray,
    budget: int,
    run: Callable[[Batch], torch.Tensor],
    *more: Any,
    **named: Any,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """`walk` over some of the sequences; its batches name them by their places among all."""
    if which.all():
        yield from walk(model, sequences, counts, budget, run, *more, **named)
        return
    at = np.flatnonzero(which)

    def placed(batch: Batch) -> Batch:
        return replace(batch, members=at[batch.members])

    some = [sequences[i] for i in at.tolist()]
    for batch, result in walk(model, some, counts[at], budget, lambda b: run(placed(b)), *more, **named):
        yield placed(batch), result


def _fetch(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Starts the copy to the host; the call returned waits for it."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.device(tensor.device):  # an event belongs to the current device, which may be another
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def _check_lengths(loaded: Loaded, model: Any, longest: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ModelError(
            f"engine: a prompt of {longest} tokens for {loaded.name}, but the model's context holds {limit}. "
            f"Needed: prompts of at most {limit} tokens. Shorten the system prompt or the question."
        )
