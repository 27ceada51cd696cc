"""Which way a model's prompts go: packed, with shared prefixes computed once, or plain, one by one in padded batches. Types
that the tests hold to transformers go packed; any other is tried once on a small forest against its own forward. Demands a
causal decoder; computes no prompt of the caller's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from leakfast.errors import ModelError
from leakfast.forward import packs, plain
from leakfast.models.loading import FITS

log = logging.getLogger(__name__)

_SHARED, _TAILS, _ALONE = (
    19,
    (1, 6, 13),
    (8, 25),
)  # tokens of the small forest: a shared beginning, what follows, alone
_BEYOND = 9  # tokens that a prompt is longer than the window it tries
_SHORT = 64  # a window of so many tokens is tried with the small forest at once
_ROUNDINGS = {torch.float32: 2e-5, torch.float64: 2e-5}  # relative; of others two roundings
_TIMES = 4  # of what its own forward differs by when the same prompts are padded


@dataclass
class Way:
    """packed: prompts of at most `reach` tokens go packed (None: of any length), longer ones plain. why: in words, what
    sends which prompts the plain way. tried: windows that a longer prompt has been tried beyond."""

    packed: bool
    reach: int | None
    why: str
    tried: set[int]


_ways: WeakKeyDictionary[Any, dict[tuple[Any, ...], Way]] = WeakKeyDictionary()


def way(model: Any, name: str, longest: int) -> Way:
    """The way of a decoder's prompts, the longest of `longest` tokens; tried and said once a model, dtype and device, a
    window once a prompt is longer than it."""
    weight = next(model.parameters())
    known = _ways.setdefault(model, {})
    key = (weight.dtype, weight.device)
    if key not in known:
        known[key] = _found(model, name)
    found = known[key]
    if found.packed and model.config.model_type not in FITS:
        for size in _windows(model.config):
            within = found.reach is None or size < found.reach
            if longest > size and size not in found.tried and within:
                _try_beyond(model, name, found, size)
    return found


def _found(model: Any, name: str) -> Way:
    start = _rope_turns(model.config)
    turns = f"its rope turns otherwise beyond {start} tokens" if start else ""
    if model.config.model_type in FITS:
        return Way(True, start, turns, set())
    small = [size for size in _windows(model.config) if size <= _SHORT]
    forest = _forest(model.config, max([_SHARED, *(size - 1 for size in small)]), start)
    trouble = _trouble(model, forest)
    if trouble is None:
        kind = model.config.model_type
        log.info("engine: %s (%s) goes packed: a small forest agrees with its own forward", name, kind)
        if start:
            log.info("engine: %s: prompts beyond %d tokens go one by one (%s)", name, start, turns)
        return Way(True, start, turns, set(small))
    log.info("engine: %s goes in padded batches, nothing shared: %s", name, trouble)
    return Way(False, 0, trouble, set())


def _try_beyond(model: Any, name: str, found: Way, size: int) -> None:
    """A prompt longer than a window, packed and alone; where they differ, prompts beyond the window go plain."""
    found.tried.add(size)
    rng = np.random.default_rng(size)
    shared = rng.integers(0, model.config.vocab_size, size - _BEYOND // 2).tolist()
    tails = [rng.integers(0, model.config.vocab_size, _BEYOND).tolist() for _ in range(2)]
    trouble = _trouble(model, [shared + tail for tail in tails])
    if trouble is None:
        log.info("engine: %s goes packed beyond its window of %d tokens: tried", name, size)
        return
    found.reach, found.why = size, f"beyond its window of {size} tokens, {trouble}"
    log.info("engine: %s: prompts beyond %d tokens go plain: %s", name, size, trouble)


def _windows(config: Any) -> list[int]:
    """The windows and chunks that some layer looks back to, rising."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    sizes = set()
    if "sliding_attention" in kinds and getattr(config, "use_sliding_window", True):
        sizes.add(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds:
        sizes.add(getattr(config, "attention_chunk_size", None))
    return sorted(size for size in sizes if size)


def _rope_turns(config: Any) -> int | None:
    """The length from which the model's rope turns otherwise for a whole batch; None where it never does."""
    ropes = getattr(config, "rope_parameters", None) or {}
    each = list(ropes.values()) if ropes and all(isinstance(r, dict) for r in ropes.values()) else [ropes]
    context = getattr(config, "max_position_embeddings", None)
    starts = [
        rope.get("original_max_position_embeddings") or context
        for rope in each
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((start for start in starts if start), default=None)


def _forest(config: Any, shared: int, most: int | None) -> list[list[int]]:
    """Prompts that share a beginning, one that is the beginning of others, and prompts alone; none beyond `most` tokens."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, config.vocab_size, n).tolist() for n in (shared, *_TAILS, *_ALONE)]
    root, tails, alone = drawn[0], drawn[1 : 1 + len(_TAILS)], drawn[1 + len(_TAILS) :]
    forest = [root + tail for tail in tails] + [root[: len(root) // 2 + 1]] + alone
    return [one[:most] for one in forest]


def _trouble(model: Any, sequences: Sequence[Sequence[int]]) -> str | None:
    """None where packed states agree with the model's own to the dtype's rounding, at a middle block, the last and the
    end; else what went wrong."""
    depth = len(packs.stack(model)[1])
    try:
        own = [_states(model, [one], plain.walk, depth)[0] for one in sequences]
        padded = _states(model, sequences, plain.walk, depth)
        ours = _states(model, sequences, packs.walk, depth)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, ModelError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    floor = _ROUNDINGS.get(own[0].dtype, 2 * torch.finfo(own[0].dtype).eps)
    bound = max(floor, _TIMES * _apart(padded, own))
    apart = _apart(ours, own)
    if not apart <= bound:
        return f"packed states are {apart:.1e} (relative) from its own, more than {bound:.0e}"
    return None


def _apart(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Largest ‖a − b‖ / ‖b‖ over prompts and places in the model; inf where one is not finite."""
    most = 0.0
    for a, b in zip(some, others, strict=True):
        far = ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max()
        most = max(most, float(far)) if torch.isfinite(far) else float("inf")
    return most


@torch.inference_mode()
def _states(model: Any, sequences: Sequence[Sequence[int]], walk: Any, depth: int) -> list[torch.Tensor]:
    """(3, D) of each sequence's last token: after a middle block, after the last, at the decoder's end."""
    layers = sorted({depth // 2, depth - 1})

    def run(batch: Any) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        keep = partial(_keep, found)
        # the middle one by itself first: there too a block is the deepest that is run
        batch.through(model, layers[:1], keep)
        middle = found[layers[0]]
        ended = batch.through(model, layers[-1:], keep).index_select(0, batch.rows)
        return torch.stack([middle, found[layers[-1]], ended], 1)

    out: dict[int, torch.Tensor] = {}
    for batch, found in walk(
        model, [list(one) for one in sequences], np.ones(len(sequences), np.int64), 4096, run
    ):
        out |= {int(m): found[int(p)] for m, p in zip(batch.members, batch.places, strict=True)}
    return [out[i] for i in range(len(sequences))]


def _keep(
    found: dict[int, torch.Tensor], layer: int, states: torch.Tensor, rows: torch.Tensor | None
) -> None:
    found[layer] = packs.wanted(states, rows)
