"""What is looked at before the first completion under steering is drawn: that an engine is steered as transformers is, for
every arm under every adapter. Demands an open engine that canary.check_engine has passed; a failed check may be let pass."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.generation import canary
from leakfast.models.attach import adapted
from leakfast.prompts import chat
from leakfast.steering.running import steered

if TYPE_CHECKING:
    from leakfast.steering.arms import Arm

log = logging.getLogger("leakfast.generate")


def check_steered(
    engine: Any,
    loaded: Any,
    pairs: Sequence[tuple[Path | None, Arm]],
    personas: Sequence[Any],
    questions: Sequence[str],
    allow: Collection[str] = (),
    sources: Mapping[Path | None, str | None] | None = None,
    longest: int | None = None,
) -> None:
    """An engine, or each of several, beside transformers under each (adapter, arm), in the likeliest next tokens at the places
    of a text where the arm shows most: as near as two engines are, or an eighth of what the arm moves; and less than half of
    that, where it is more than the engine's own rounding makes, so that one that is not steered, or by another strength, is
    found out.

    sources, longest: as of canary.check_engine; ModelError too."""
    looks = canary.looks_of(engine, loaded, allow)
    ids = chat.render(loaded.tokenizer, personas[0].system, questions[0])
    base = canary.log_probs(loaded, ids)
    for look in looks:
        look.rounding(ids, base)
    worst = 0.0
    for adapter, arm in pairs:
        text = canary.text_under(loaded, (sources or {}).get(adapter), personas, questions[0])
        text = text[: longest and longest - 1]
        with adapted(loaded, adapter) as current:
            plain = canary.log_probs(current, text)
            with steered(current, arm):
                moved = canary.log_probs(current, text)
        places = _places(moved, plain)
        prompts = canary.up_to(text, places, moved)
        for look in looks:
            said = look.ask("next_tokens", prompts, [adapter], canary.TOP, 1, arm)
            if said is None or look.own is None:
                continue
            answers = [steps[0] for steps in said[0]]
            off = canary.apart_of(answers, places, moved)
            apart = float(np.sqrt(np.mean(off**2)))
            shows = float(np.sqrt(np.mean((canary.apart_of(answers, places, plain) - off) ** 2)))
            worst = max(worst, apart)
            near = apart <= max(look.bound, shows / 8)
            if not near or (shows > canary.CLEAR * look.own and not apart < shows / 2):
                name = adapter.name if adapter else "the base"
                canary.fail(
                    "logits",
                    f"{name} under {arm.label} is {apart:.2g} nats (root mean square) from transformers' in vLLM, where the arm "
                    f"moves it by {shows:.2g}. Needed: blocks that are steered alike. Use --backend transformers",
                    allow,
                )
    log.info("canary: %d arms steer vLLM as transformers, within %.1e nats", len(pairs), worst)


def _places(moved: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Of the (T, V) nats those rows where the likeliest next tokens are moved most."""
    top = np.argpartition(-moved, min(canary.TOP, moved.shape[1]) - 1, axis=1)[:, : canary.TOP]
    shows = (np.take_along_axis(moved - plain, top, 1) ** 2).sum(1)
    return np.sort(np.argsort(shows, kind="stable")[-canary.PLACES :])
