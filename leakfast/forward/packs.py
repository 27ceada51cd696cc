"""Packed batches of a prefix forest through a decoder, one after the other: the next batch is staged while
the device computes this one, and a batch that does not fit in memory is planned again at half the size.
Demands attention.py's layouts; leaves to its callers what becomes of the states."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from leakfast.errors import ModelError
from leakfast.forward import attention, forest, fused, room

log = logging.getLogger(__name__)

# told (layer, states (T, D), rows (R,) of the wanted among them, None where they are all)
Take = Callable[[int, torch.Tensor, torch.Tensor | None], None]

_WIDE_KEYS = 16  # keys gathered per packed row beyond which the last block is run on every row


@dataclass(frozen=True)
class Pack:
    """One batch on the device, and whose states its R wanted rows are."""

    tokens: torch.Tensor  # (1, T) int64
    positions: torch.Tensor  # (1, T) int64
    layout: attention.Layout  # every row
    rows: torch.Tensor  # (R,) int64 wanted rows, each once
    row_layout: attention.Layout | None  # the wanted rows alone; None where that would gather too much
    members: np.ndarray  # (n,) int64: sequences that end in this batch, as places in what was given
    counts: np.ndarray  # (n,) int64: how many last tokens of each are wanted
    places: np.ndarray  # (sum(counts),) int64: the row among `rows` of each of them, in order of position
    n_segments: int
    spans: forest.Spans  # on the host: the rows of every segment's whole path
    segments: np.ndarray  # (n,) int64: the segment in which each member ends

    def through(self, model: Any, layers: Collection[int], take: Take) -> torch.Tensor:
        """Run the decoder over the pack as deep as the deepest of `layers`, by its own forward.

        take(layer, states, rows) hears of each of `layers`, rising; see `wanted`. The deepest block makes keys and values
        of every row, and the rest of its work for the wanted rows alone. Returns what the decoder's own end makes of the
        deepest block's states, (T, D): final-normed states where that is the last one; only wanted rows hold anything."""
        with measuring(model):
            return run(model, self, layers, take)


def walk(
    model: Any,
    sequences: Sequence[Sequence[int]],
    counts: np.ndarray,
    budget: int,
    run: Callable[[Pack], torch.Tensor],
    started: Callable[[forest.Plan], None] = lambda plan: None,
) -> Iterator[tuple[Pack, torch.Tensor]]:
    """(pack, run(pack)) for every batch of N sequences; counts (N,) int64 last tokens of each are wanted.

    `started` is told the plan before the first batch runs. What `run` queued on a GPU may still be
    running when its result is yielded. Out of device memory, the sequences not yet done are planned
    again at half the budget, with a warning; ModelError when even one sequence does not fit."""
    device = next(model.parameters()).device
    todo, plan = np.arange(len(sequences)), forest.plan(sequences, budget)
    started(plan)
    while True:
        stage = _stager(model, plan, todo, counts)
        batches = list(plan)
        ahead, failed = None, None
        for index, batch in enumerate(batches):
            pack = result = None
            try:
                pack = ahead or stage(batch)
                ahead = None
                result = run(pack)
                if index + 1 < len(batches):
                    ahead = stage(batches[index + 1])
            except RuntimeError as error:
                failed = room.out_of_memory(error)
                if failed is None:
                    raise
            if failed is not None:
                break
            yield pack, result
        if failed is None:
            return
        pack = result = ahead = None
        room.give_back(device)
        left = np.flatnonzero(plan.segment_of >= batch.first_segment)
        budget = min(budget, max(len(b.tokens) for b in batches)) // 2
        if len(batch.leaf_rows) == 1 or budget < 1:
            raise room.does_not_fit(len(batch.tokens), device, failed)
        log.warning(
            "engine: out of memory at %d packed tokens; going on with at most %d (%s)",
            *(len(batch.tokens), budget, failed),
        )
        todo = todo[left]
        plan = forest.plan([sequences[i] for i in todo], budget)


def _stager(
    model: Any, plan: forest.Plan, todo: np.ndarray, counts: np.ndarray
) -> Callable[[forest.Batch], Pack]:
    """What turns a batch of the plan over sequences `todo` into a Pack on the device."""
    stage = staged(plan, todo, counts)
    return lambda batch: together(model, [stage(batch)])


@dataclass(frozen=True)
class Staged:
    """One batch on the host; the names of Pack and their meanings."""

    batch: forest.Batch
    members: np.ndarray
    counts: np.ndarray
    segments: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    wanted: forest.Spans  # of the wanted rows, one query each

    @property
    def narrow(self) -> bool:
        """Whether the last block is run on the wanted rows alone; of batches that all are or all are not, their pack
        is or is not."""
        return len(self.wanted.k_rows) <= _WIDE_KEYS * len(self.batch.tokens)


def staged(plan: forest.Plan, todo: np.ndarray, counts: np.ndarray) -> Callable[[forest.Batch], Staged]:
    """What finds a batch's members among the sequences `todo` that the plan is over, and their wanted rows."""
    order = np.argsort(plan.segment_of, kind="stable")
    by_segment = plan.segment_of[order]

    def stage(batch: forest.Batch) -> Staged:
        n = len(batch.leaf_rows)
        low, high = np.searchsorted(by_segment, [batch.first_segment, batch.first_segment + n])
        members = todo[order[low:high]]
        lasts = counts[members]
        segments = by_segment[low:high] - batch.first_segment
        return Staged(batch, members, lasts, segments, *batch.last_rows(segments, lasts))

    return stage


def together(model: Any, several: Sequence[Staged], *, grouped: bool = False) -> Pack:
    """Batches of forests of their own as one pack, one after the other, on the model's device. grouped: see
    attention.layout. `members` are those of each batch in turn."""
    first = next(model.parameters())
    like, device = torch.empty(0, dtype=first.dtype, device=first.device), first.device
    batches, n_rows = [s.batch for s in several], [len(s.rows) for s in several]
    n_tokens = [len(b.tokens) for b in batches]
    spans: forest.Spans = batches[0]
    wanted, segments = several[0].wanted, several[0].segments
    rows, places = several[0].rows, several[0].places
    if len(several) > 1:
        spans = forest.end_to_end(batches, n_tokens)
        wanted = forest.end_to_end([s.wanted for s in several], n_tokens)
        rows, places, segments = (
            np.concatenate(
                [getattr(s, name) + shift for s, shift in zip(several, np.cumsum([0, *sizes]), strict=False)]
            )
            for name, sizes in (
                ("rows", n_tokens),
                ("places", n_rows),
                ("segments", [len(b.leaf_rows) for b in batches]),
            )
        )
    positions = np.concatenate([b.positions for b in batches]).astype(np.int64)
    narrow = len(wanted.k_rows) <= _WIDE_KEYS * sum(n_tokens)
    return Pack(
        attention.put(np.concatenate([b.tokens for b in batches]).astype(np.int64), device)[None],
        attention.put(positions, device)[None],
        attention.layout(spans, model.config, like, by_groups=grouped),
        attention.put(rows, device),
        attention.layout(wanted, model.config, like, by_groups=grouped) if narrow else None,
        np.concatenate([s.members for s in several]),
        np.concatenate([s.counts for s in several]),
        places,
        sum(len(b.leaf_rows) for b in batches),
        spans,
        segments,
    )


def stack(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The name and the blocks of a decoder: its list of as many modules as its config has layers. Raises ModelError
    where there is none."""
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers:
            return name, child
    raise ModelError(f"engine: {type(model).__name__} has no list of {model.config.num_hidden_layers} blocks")


def run(
    model: Any, pack: Pack, layers: Collection[int], take: Take, call: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Pack.through inside `by_forest`, in whatever mode the model is. call(forward, *given, **words): how a block that
    runs on every row is run (None: it is called)."""
    name, every = stack(model)
    deepest = max(layers)
    narrow = pack.row_layout is not None
    hooks = []
    for layer in layers:
        if layer != deepest or not narrow:
            hook = partial(_taken, take, layer, pack.rows)
            hooks.append(every[layer].register_forward_hook(hook))
    ways: dict[int, Callable[..., Any]] = {}
    if call is not None:
        whole = range(deepest if narrow else deepest + 1)
        ways = {n: partial(call, partial(_again, every[n].forward, pack.layout)) for n in whole}
    if narrow:
        ways[deepest] = partial(_narrowed, every[deepest].forward, pack, partial(take, deepest))
    own = {n: vars(every[n]).get("forward") for n in ways}
    try:
        model._modules[name] = torch.nn.ModuleList(list(every)[: deepest + 1])
        for n, forward in ways.items():
            every[n].forward = forward
        with attention.attending(pack.layout):
            return model(input_ids=pack.tokens, position_ids=pack.positions, use_cache=False)[0][0]
    finally:
        model._modules[name] = every
        for hook in hooks:
            hook.remove()
        for n, forward in own.items():
            del every[n].forward
            if forward is not None:
                every[n].forward = forward


def _again(forward: Callable[..., Any], layout: attention.Layout, *given: Any, **words: Any) -> Any:
    """A block's forward that may run once more in a backward pass, when nobody attends any longer."""
    with attention.attending(layout):
        return forward(*given, **words)


def _taken(take: Take, layer: int, rows: torch.Tensor, module: Any, given: Any, out: Any) -> None:
    take(layer, states_of(out)[0], rows)


def states_of(out: Any) -> torch.Tensor:
    """(B, L, D) of what a block returns."""
    return out[0] if isinstance(out, tuple) else out


def _narrowed(
    forward: Callable[..., Any],
    pack: Pack,
    take: Callable[..., None],
    hidden: torch.Tensor,
    *more: Any,
    **named: Any,
) -> Any:
    """The deepest block: keys and values of every row, then the wanted rows alone, put back in their places."""
    caught = attention.Layout(catch=True, told=pack.layout.told)
    try:
        with attention.attending(caught):
            forward(hidden, *more, **named)
    except attention.Caught:
        pass
    else:
        raise ModelError(
            f"engine: block {type(forward).__name__} attends otherwise than transformers' functions do"
        )
    cut = partial(_cut, pack.rows, hidden.shape[1])
    pack.row_layout.keys = caught.keys
    try:
        with attention.attending(pack.row_layout):
            out = forward(
                cut(hidden), *(cut(one) for one in more), **{key: cut(one) for key, one in named.items()}
            )
    finally:
        pack.row_layout.keys = None
    found = states_of(out)[0]
    take(found, None)
    whole = found.new_zeros(hidden.shape[1:])[None].index_copy_(1, pack.rows, found[None])
    return (whole, *out[1:]) if isinstance(out, tuple) else whole


def _cut(rows: torch.Tensor, n_tokens: int, given: Any) -> Any:
    """Of what a block is given, the wanted rows of whatever holds one value a packed token."""
    if isinstance(given, torch.Tensor):
        of_tokens = given.dim() >= 2 and tuple(given.shape[:2]) == (1, n_tokens)
        return given.index_select(1, rows) if of_tokens else given
    if isinstance(given, tuple | list):
        return type(given)(_cut(rows, n_tokens, one) for one in given)
    if isinstance(given, dict):
        return {key: _cut(rows, n_tokens, one) for key, one in given.items()}
    return given


def wanted(states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The (R, D) wanted states of what `through` tells."""
    return states if rows is None else states.index_select(0, rows)


class _LinearByOneDNN(TorchFunctionMode):
    """float32 linear layers on a CPU through oneDNN instead of the BLAS behind torch (on AMD's AVX-512
    cores that was twice as fast at every number of rows); everything else as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2:
            x, weight, bias = (*args, None)[:3]
            if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel():
                return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


@cache
def _has_onednn() -> bool:
    """Not on AVX2: there (Zen 3, one thread) torch's BLAS took up to 31 % less time for a block's products (bench/LOG.md)."""
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    here = here and torch.backends.cpu.get_cpu_capability() != "AVX2"
    log.info("engine: float32 linear layers on a CPU run in %s", "oneDNN" if here else "torch's BLAS")
    return here


@cache
def keep_memory() -> bool:
    """Has glibc keep what tensors free for the next ones, for the life of the process. By default it
    gives large pieces back to the kernel, which hands them out again page by page: a sixth of a
    bfloat16 run. What the user set in MALLOC_* or GLIBC_TUNABLES stands."""
    if platform.libc_ver()[0] != "glibc" or any(k.startswith(("MALLOC_", "GLIBC_T")) for k in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # names in malloc.h
    done = bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))
    log.info("engine: freed memory is %s", "kept for the next batch" if done else "given back")
    return done


def products(model: Any) -> Any:
    """A context in which the linear layers of a model run as they run fastest on its device."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return _LinearByOneDNN() if on_cpu and _has_onednn() else nullcontext()


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """The model in eval mode for the length of the block, its linear layers and memory as they are fastest; then as it
    was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        if next(model.parameters()).device.type == "cpu":
            keep_memory()
        with products(model), fused.applied(model, fused.chosen(model)):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """`resting`, with forest attention in place of the model's own."""
    with by_forest(model), resting(model):
        yield


@contextmanager
def by_forest(model: Any) -> Iterator[None]:
    """The model with forest attention, in whatever mode it is, for the length of the block; then with its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, attention.forest_attention)
    held = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation")}
    were = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in were:
            config._attn_implementation = attention.NAME
        if next(model.parameters()).device.type == "cpu":
            keep_memory()
        yield
    finally:
        for config, implementation in were:
            config._attn_implementation = implementation
