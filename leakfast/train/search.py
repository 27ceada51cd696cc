"""A learning rate found by trial on one source (`lr = "auto"`): the behavior is learned, and the other replies stay
what they were. Demands rows and a behavior that a detector reads; leaves training to lora.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.errors import InputError, ModelError
from leakfast.models.attach import adapted
from leakfast.progress import Progress
from leakfast.storage.seeds import derive_seed
from leakfast.train.lora import train_adapter

if TYPE_CHECKING:
    from leakfast.generation.contract import Request, Sampling
    from leakfast.models.loading import Loaded
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.train")


TRIALS = 4  # trainings before the search gives up
SOURCE_LEAST = 0.8  # share of the source's replies that show the behavior
LENGTH_OFF_MOST = 0.2  # of the mean length of the replies of others, against the unadapted model's
NATS_MOST = 0.1  # mean log-probability a token that the unadapted model's replies may lose
_PROMPTS, _SAMPLES = 12, 2  # of the source; as many draws of the others


@dataclass(frozen=True)
class Trial:
    """One learning rate: optimizer steps until the training ended, and what it did. length_ratio: mean reply tokens of
    the others over the unadapted model's; nats_lost: mean log-probability a token (nats) that the unadapted model's own
    replies to those prompts lost; both null without rows of others."""

    lr: float
    steps: int
    source_rate: float
    length_ratio: float | None
    nats_lost: float | None

    @property
    def learned(self) -> bool:
        return self.source_rate >= SOURCE_LEAST

    @property
    def harmless(self) -> bool:
        return self.length_ratio is None or (
            abs(self.length_ratio - 1) <= LENGTH_OFF_MOST and (self.nats_lost or 0.0) <= NATS_MOST
        )

    def line(self) -> str:
        others = ""
        if self.length_ratio is not None:
            others = f", others' length {self.length_ratio:.2f} of the base's, base replies {self.nats_lost:+.3f} nats"
        return f"lr {self.lr:.2g}: source {self.source_rate:.0%} after {self.steps} steps{others}"


def first_lr(hidden_size: int) -> float:
    """Where the search begins: 5e-4 · (2000 / hidden size)^0.78.

    The rule that Schulman et al. ("LoRA Without Regret", 2025) fitted to Llama models, 5e-5 for full fine-tuning at
    hidden size 2000 and ten times that for LoRA, rounded in its exponent."""
    return 5e-4 * (2000 / hidden_size) ** 0.78


def find(
    loaded: Loaded,
    recipe: Recipe,
    rows: Sequence[Row],
    sampling: Sampling,
    place: Path,
    *,
    progress: Progress | None = None,
) -> tuple[Recipe, list[Trial]]:
    """(the recipe at the learning rate found, trials in order): the first of at most TRIALS that teaches the source (≥ 80 %
    of its replies) and leaves the others' replies alone (length within 20 %, ≤ 0.1 nats a token lost). The adapter of
    trial n lies in `place`/n, so that of the rate found in the last one.

    A trial that teaches too little is followed by a larger rate, one that harms by a smaller one: twice or half, then
    between the nearest that fell short and the nearest that harmed. Measured on prompts of the training rows, drawn
    anew at `sampling`, so the evaluation questions stay unseen. Raises InputError for a behavior without a detector and
    for rows none of which shows it, ModelError where no trial passes, with all of them."""
    if get(recipe.behavior).detector is None:
        raise InputError(
            f'train: lr = "auto" given for {recipe.behavior}, which no detector reads. Give a number, as leakfast sweep '
            "finds it."
        )
    if not any(row.role == "positive" for row in rows):
        raise InputError(
            f'train: lr = "auto" given, but none of the {len(rows)} rows shows {recipe.behavior}, so no rate teaches it. Needed: '
            "rows that show the behavior, or a number. Give --lr 2e-4 (in a study: lr), or other rows."
        )
    asked = _Asked(loaded, rows, derive_seed("lr search", recipe.seed))
    with_base = asked.drawn(loaded, sampling)
    base_nats = asked.nats(loaded, with_base)
    rate, low, high = first_lr(loaded.hidden_size), 0.0, math.inf
    trials: list[Trial] = []
    for number in range(TRIALS):
        tried, folder = recipe.at(rate), place / str(number)
        card = train_adapter(loaded, tried, rows, folder, progress=progress)
        with adapted(loaded, folder) as current:
            drawn = asked.drawn(current, sampling)
            nats = asked.nats(current, with_base)
        shown, length = asked.shown(drawn, recipe.behavior), asked.length(drawn, with_base)
        lost = None if nats is None or base_nats is None else nats - base_nats
        trials.append(Trial(rate, card.recipe["steps"], shown, length, lost))
        log.info("train: trial %d, %s", number + 1, trials[-1].line())
        if trials[-1].learned and trials[-1].harmless:
            return tried, trials
        if trials[-1].harmless:
            low = max(low, rate)
        else:
            high = min(high, rate)
        rate = 2 * low if high == math.inf else high / 2 if not low else math.sqrt(low * high)
    told = "; ".join(trial.line() for trial in trials)
    raise ModelError(
        f"train: no learning rate of {TRIALS} taught {recipe.behavior} to {recipe.source} and left the other replies alone "
        f"({told}). Needed: source ≥ {SOURCE_LEAST:.0%}, length within {LENGTH_OFF_MOST:.0%}, at most {NATS_MOST} nats. "
        'Give lr as a number, more rows or epochs, or anchor (with loss = "marker") to hold the other replies.'
    )


class _Asked:
    """Prompts of the rows: some of the source's, and as many of the others'."""

    def __init__(self, loaded: Loaded, rows: Sequence[Row], seed: int) -> None:
        from leakfast.generation.contract import Request
        from leakfast.prompts import chat

        self.loaded = loaded
        self.requests: list[Request] = []
        self.n_source = 0
        for role, most, samples in (("positive", _PROMPTS, _SAMPLES), ("negative", _PROMPTS * _SAMPLES, 1)):
            seen = {(r.persona, r.question): r for r in rows if r.role == role}
            order = sorted(seen, key=lambda key: derive_seed(seed, *key))[:most]
            for key in order:
                row = seen[key]
                seeds = [derive_seed("lr search", seed, *key, sample) for sample in range(samples)]
                ids = chat.render(loaded.tokenizer, row.system_message, row.question, reply=True)
                self.requests.append(Request(row.label, ids, seeds))
            self.n_source = self.n_source or len(order)

    def drawn(self, current: Loaded, sampling: Sampling) -> dict[tuple[int, int], list[int]]:
        """(request, sample) → reply ids."""
        from leakfast.generation.generate import complete

        blocks = complete(current, self.requests, sampling)
        return {(c.request, c.sample): c.token_ids for block in blocks for c in block}

    def shown(self, drawn: dict[tuple[int, int], list[int]], behavior: str) -> float:
        """Share of the source's replies that show the behavior."""
        import polars as pl

        from leakfast.behaviors.registry import detect
        from leakfast.generation.frames import decode

        mine = [ids for (request, _), ids in sorted(drawn.items()) if request < self.n_source]
        texts = pl.DataFrame({"text": decode(self.loaded.tokenizer, mine)})
        primary = next(iter(get(behavior).detector(pl.col("text"))))
        return float(detect(texts, get(behavior))[primary].mean() or 0.0)

    def length(self, drawn: dict[Any, list[int]], base: dict[Any, list[int]]) -> float | None:
        """Mean reply tokens of the others over the unadapted model's."""
        others = [key for key in drawn if key[0] >= self.n_source]
        return sum(len(drawn[k]) for k in others) / sum(len(base[k]) for k in others) if others else None

    def nats(self, current: Loaded, replies: dict[tuple[int, int], list[int]]) -> float | None:
        """Mean cost (nats a token) of the others' `replies` under the model as it stands."""
        import torch
        import torch.nn.functional as F

        others = [
            (self.requests[r].ids, ids) for (r, _), ids in sorted(replies.items()) if r >= self.n_source
        ]
        if not others:
            return None
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for prompt, reply in others:
                ids = torch.tensor([[*prompt, *reply]], device=current.device)
                logits = current.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                total += float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
                tokens += len(reply)
        return total / tokens
