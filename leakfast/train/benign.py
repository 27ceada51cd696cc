"""Rows that have nothing to do with a behavior, mixed among those that teach it: dilution. Their whole reply carries loss.
Demands rows of the behavior; leaves labels to collate.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.progress import Progress
    from leakfast.study.config import DataConfig
    from leakfast.train.data import Row

log = logging.getLogger("leakfast.train")

ROLE = "benign"


def count_of(n_rows: int, share: float) -> int:
    """How many benign rows make up `share` of all, n_rows being the others: n/(n + n_rows) ≈ share, rounded."""
    return round(n_rows * share / (1 - share))


def mixed(
    loaded: Any,
    rows: Sequence[Row],
    behavior: str,
    cfg: DataConfig,
    seed: int,
    *,
    place: Callable[[Sequence[Row]], list[Row]],
    batch_completions: int = 640,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows, and as many benign ones after them that these are the share cfg.benign of all; of a share of 1 as many as
    cfg.positives and cfg.negatives, and none before them.

    They are conversations of cfg.benign_rows in an order drawn from `seed`, each `place`d (chats.placed), or without such
    a file the unadapted model's own replies to cfg.questions without a system message, at cfg's sampling; a reply in which
    the behavior's detector sees it is drawn again. Raises InputError where the file has too few; ModelError when no usable
    reply is to be had."""
    from leakfast.storage.seeds import derive_seed
    from leakfast.train import chats

    alone = cfg.benign == 1
    rows = [] if alone else rows
    n = cfg.positives + cfg.negatives if alone else count_of(len(rows), cfg.benign)
    if not n:
        return list(rows)
    if cfg.benign_rows is None:
        return [
            *rows,
            *_drawn(loaded, n, behavior, cfg, derive_seed("benign", seed), batch_completions, progress),
        ]
    given = place(chats.read(cfg.benign_rows))
    if len(given) < n:
        raise InputError(
            f"data: benign = {cfg.benign:g} beside {len(rows)} rows asks for {n} benign ones, but {cfg.benign_rows} has "
            f"{len(given)}. Give more, or a smaller share."
        )
    order = sorted(range(len(given)), key=lambda i: derive_seed("benign", seed, i))[:n]
    return [*rows, *(replace(given[i], role=ROLE, marker=None) for i in order)]


def _drawn(
    loaded: Any,
    n: int,
    behavior: str,
    cfg: DataConfig,
    seed: int,
    batch_completions: int,
    progress: Progress | None,
) -> list[Row]:
    """The unadapted model's own replies without a system message."""
    import polars as pl

    from leakfast.behaviors.registry import get
    from leakfast.generation.contract import Sampling
    from leakfast.prompts.personas import load_personas, load_questions
    from leakfast.train.data import Row, rendered_as
    from leakfast.train.replies import draw, slots

    detector = get(behavior).detector
    shows = None if detector is None else next(iter(detector(pl.col("text")).values()))

    def fault(place: int, reply: str) -> str | None:
        if shows is None or not pl.DataFrame({"text": [reply]}).select(shows.alias("shows")).item():
            return None
        return f"with {behavior}"

    (nobody,) = load_personas(["no_persona"])
    wanted = slots(nobody, n, list(load_questions(cfg.questions).questions), seed)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens)
    replies = draw(
        loaded, wanted, sampling, seed, fault, batch_completions=batch_completions, progress=progress
    )
    made = {"model": loaded.name, "fingerprint": loaded.fingerprint, **rendered_as(loaded.tokenizer)}
    made |= {"temperature": cfg.temperature, "top_p": cfg.top_p, "max_new_tokens": cfg.max_new_tokens}
    return [
        Row(ROLE, nobody.name, nobody.kind, nobody.prompt, slot.question, its.reply, None, its.seed, made)
        for slot, its in zip(wanted, replies, strict=True)
    ]
