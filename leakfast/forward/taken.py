"""Which way a model's prompts go: packed, with shared prefixes computed once, or plain, one by one in padded batches. Types
that the tests hold to transformers go packed; any other is tried on a small forest against its own forward, and once more at
the caller's size. Demands a causal decoder; computes no prompt of the caller's."""

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
from leakfast.models.loading import FITS, reaches, rope_turns

log = logging.getLogger(__name__)

_SHARED, _TAILS, _ALONE = (
    19,
    (1, 6, 13),
    (8, 25),
)  # tokens of the small forest: a shared beginning, what follows, alone
_BEYOND = 9  # tokens that a prompt is longer than the window it tries
_BUDGET = 4096  # tokens of a batch of the small forest
_SHORT = 64  # a window of so many tokens is tried with the small forest at once
_ROUNDINGS = {torch.float32: 2e-5, torch.float64: 2e-5}  # relative; of others two roundings
_TIMES = 4  # of what its own forward differs by when the same prompts are padded
_MOST = {torch.float32: 1e-3, torch.float64: 1e-3}  # no rounding moves a state further; of others 0.1
_LOOKED_AT = (
    2  # of a pack of the caller's size, so many prompts are compared: those farthest from its beginning
)


@dataclass
class Way:
    """packed: prompts of at most `reach` tokens go packed (None: of any length), longer ones plain. why: in words, what
    sends which prompts the plain way. tried: windows that a longer prompt has been tried beyond. size: (longest prompt,
    packed tokens) tried. alone: plain batches are of one length, because padding moves the model's own states."""

    packed: bool
    reach: int | None
    why: str
    tried: set[int]
    size: tuple[int, int] = (0, 0)
    alone: bool = False


_ways: WeakKeyDictionary[Any, dict[tuple[Any, ...], Way]] = WeakKeyDictionary()


def way(model: Any, name: str, longest: int, packed_tokens: int = 0) -> Way:
    """The way of a decoder's prompts, the longest of `longest` tokens, in packs of at most `packed_tokens`; tried and said
    once a model, dtype and device, a window once a prompt is longer than it, a size once it is beyond those tried: that of the
    first call, then powers of two."""
    weight = next(model.parameters())
    known = _ways.setdefault(model, {})
    key = (weight.dtype, weight.device)
    if key not in known:
        known[key] = _found(model, name)
    found = known[key]
    if found.packed and model.config.model_type not in FITS:
        windows = sorted(reaches(model.config).values())
        for size in windows:
            within = found.reach is None or size < found.reach
            if longest > size and size not in found.tried and within:
                _try_beyond(model, name, found, size)
        here, size = min(longest, found.reach or longest), _doubled(packed_tokens)
        if here > found.size[0] or size > found.size[1]:
            context = getattr(model.config, "max_position_embeddings", None)
            ends = [end for end in (context, found.reach, *windows) if end and end >= here]
            again = found.size[1] > 0  # then for prompts that may grow further too
            _try_size(model, name, found, min([_doubled(here), *ends]) if again else here, size)
    return found


def _doubled(size: int) -> int:
    """The power of two that is not below it: sizes are tried again once a doubling, not with every longer prompt."""
    return 1 << (size - 1).bit_length() if size else 0


def _found(model: Any, name: str) -> Way:
    start = _start(model.config)
    turns = f"its rope turns otherwise beyond {start} tokens" if start else ""
    if model.config.model_type in FITS:
        return Way(True, start, turns, set())
    small = [size for size in reaches(model.config).values() if size <= _SHORT]
    forest = _forest(model.config, max([_SHARED, *(size - 1 for size in small)]), start)
    trouble = _trouble(model, forest)
    if trouble is None:
        kind = model.config.model_type
        log.info("engine: %s (%s) goes packed: a small forest agrees with its own forward", name, kind)
        if start:
            log.info("engine: %s: prompts beyond %d tokens go one by one (%s)", name, start, turns)
        return Way(True, start, turns, set(small), (max(map(len, forest)), 0))
    found = Way(False, 0, trouble, set())
    _go_plain(model, name, found, trouble)
    return found


def _go_plain(model: Any, name: str, found: Way, trouble: str) -> None:
    """No prompt goes packed; said, and whether prompts of several lengths may be padded together."""
    found.packed, found.reach, found.why = False, 0, trouble
    log.info("engine: %s goes in padded batches, nothing shared: %s", name, trouble)
    forest = _forest(model.config, _SHARED, _start(model.config))
    moved = _apart(
        *(_states(model, given, walk, None) for given, walk in ((forest, plain.walk), (forest, _one)))
    )
    found.alone = not moved <= _most(next(model.parameters()).dtype)
    if found.alone:
        log.info(
            "engine: %s: batches of one length each, because padding moves its states by %.0e", name, moved
        )


def _try_size(model: Any, name: str, found: Way, longest: int, packed_tokens: int) -> None:
    """Prompts of the caller's length, as many as a pack of the caller's holds, the last two compared: what goes by a
    token's place in the pack, or by a length that no config names as a window, shows there."""
    longest, packed_tokens = max(longest, found.size[0]), max(packed_tokens, found.size[1], longest)
    rng = np.random.default_rng(longest)
    shared = max(0, longest - _BEYOND)
    root = rng.integers(0, model.config.vocab_size, shared).tolist()
    ends = [root + rng.integers(0, model.config.vocab_size, longest - shared).tolist() for _ in range(2)]
    n_more = max(0, (packed_tokens - longest - _BEYOND) // longest)
    more = rng.integers(0, model.config.vocab_size, (n_more, longest)).tolist()
    found.size = longest, packed_tokens
    trouble = _trouble(model, [*more, *ends], _LOOKED_AT, packed_tokens)
    if trouble is not None:
        _go_plain(model, name, found, f"at {longest} tokens a prompt and {packed_tokens} a pack, {trouble}")


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


def _start(config: Any) -> int | None:
    """The length from which the model's rope turns otherwise; None where it never does."""
    turns = rope_turns(config)
    return turns[0] if turns else None


def _forest(config: Any, shared: int, most: int | None) -> list[list[int]]:
    """Prompts that share a beginning, one that is the beginning of others, and prompts alone; none beyond `most` tokens."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, config.vocab_size, n).tolist() for n in (shared, *_TAILS, *_ALONE)]
    root, tails, alone = drawn[0], drawn[1 : 1 + len(_TAILS)], drawn[1 + len(_TAILS) :]
    forest = [root + tail for tail in tails] + [root[: len(root) // 2 + 1]] + alone
    return [one[:most] for one in forest]


def _trouble(
    model: Any, sequences: Sequence[Sequence[int]], looked_at: int | None = None, budget: int = _BUDGET
) -> str | None:
    """None where packed states agree with the model's own to the dtype's rounding, at a middle block, the last and the
    end; else what went wrong. looked_at: only so many, those farthest from the beginning of a pack, are compared, and not
    at the middle block."""
    depth = len(packs.stack(model)[1])
    try:
        places: dict[int, int] = {}
        middle = depth if looked_at is None else None
        ours = _states(model, sequences, packs.walk, middle, budget, places)
        some = sorted(range(len(sequences)), key=lambda i: places[i])[-(looked_at or len(sequences)) :]
        given, ours = [sequences[i] for i in some], [ours[i] for i in some]
        own = _states(model, given, _one, middle)
        beside = [] if looked_at is None else [given[0][: len(given[0]) // 2 + 1]]
        padded = _states(
            model, [*given, *beside], plain.walk, middle, len(given + beside) * max(map(len, given))
        )
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, ModelError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    dtype = own[0].dtype
    floor = _ROUNDINGS.get(dtype, 2 * torch.finfo(dtype).eps)
    bound = min(max(floor, _TIMES * _apart(padded[: len(given)], own)), _most(dtype))
    apart = _apart(ours, own)
    if not apart <= bound:
        return f"packed states are {apart:.1e} (relative) from its own, more than {bound:.0e}"
    return None


def _most(dtype: torch.dtype) -> float:
    return _MOST.get(dtype, 0.1)


def _one(model: Any, sequences: Sequence[Sequence[int]], counts: np.ndarray, budget: int, run: Any) -> Any:
    """plain.walk, one prompt a batch."""
    return plain.walk(model, sequences, counts, 1, run)


def _apart(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Largest ‖a − b‖ / ‖b‖ over prompts and places in the model; inf where one is not finite."""
    most = 0.0
    for a, b in zip(some, others, strict=True):
        far = ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max()
        most = max(most, float(far)) if torch.isfinite(far) else float("inf")
    return most


@torch.inference_mode()
def _states(
    model: Any,
    sequences: Sequence[Sequence[int]],
    walk: Any,
    depth: int | None,
    budget: int = _BUDGET,
    places: dict[int, int] | None = None,
) -> list[torch.Tensor]:
    """(3, D) of each sequence's last token: after a middle block of `depth`, after the last, at the decoder's end; depth
    None: (2, D) of the two last. places: filled with the packed place of each."""
    last = len(packs.stack(model)[1]) - 1

    def run(batch: Any) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        keep = partial(_keep, found)
        if depth is not None:
            # the middle one by itself first: there too a block is the deepest that is run
            batch.through(model, [depth // 2], keep)
            found[-1] = found[depth // 2]
        ended = batch.through(model, [last], keep).index_select(0, batch.rows)
        return torch.stack([*([found[-1]] if depth is not None else []), found[last], ended], 1)

    out: dict[int, torch.Tensor] = {}
    every = [list(one) for one in sequences]
    for batch, found in walk(model, every, np.ones(len(every), np.int64), budget, run):
        where = zip(batch.members.tolist(), batch.places.tolist(), strict=True)
        rows = batch.rows.tolist()
        for m, p in where:
            out[m] = found[p]
            if places is not None:
                places[m] = rows[p]
    return [out[i] for i in range(len(sequences))]


def _keep(
    found: dict[int, torch.Tensor], layer: int, states: torch.Tensor, rows: torch.Tensor | None
) -> None:
    found[layer] = packs.wanted(states, rows)
