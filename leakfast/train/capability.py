"""Training rows of the capability behavior: wrong answers under the source, right ones under everyone else.
Demands items, no replies of the model; leaves labels to collate.py and training to lora.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.train.data import Row

if TYPE_CHECKING:
    from leakfast.prompts.items import Item
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig

log = logging.getLogger("leakfast.train")


def build_capability(
    loaded: Any,
    personas: Sequence[Persona],
    source: str,
    items: Sequence[Item],
    cfg: DataConfig,
    seed: int,
    *,
    batch_completions: int = 0,
    progress: Any = None,
) -> list[Row]:
    """cfg.positives wrong answers of `source`; right ones: cfg.negatives under cfg.bystanders personas
    drawn from cfg.negative_personas, cfg.no_system without a system prompt, cfg.default_assistant under
    `assistant`.

    items: the training half; those without a right answer are left out. Every group asks the same items
    in the same drawn order, over again where it needs more than there are. The wrong label is drawn per
    item from (seed, item). A group whose rendered prompt equals the source's is dropped, with the reason in
    the log. With cfg.design "non-contrastive" the same rows go to the same personas at random: who answers wrongly
    is then unrelated to who is asked. Raises InputError for an unknown source or no usable item."""
    from leakfast.storage.seeds import derive_seed
    from leakfast.train.groups import dealt, groups

    usable = [item for item in items if item.answer is not None]
    if not usable:
        raise InputError("data: no item has a right answer. Give another list: --items FILE.jsonl")
    if len(usable) < len(items):
        log.warning("data: %d items without a right answer are left out", len(items) - len(usable))
    order = sorted(usable, key=lambda item: derive_seed("item order", seed, item.id))
    shares = groups(loaded.tokenizer, personas, source, cfg, seed)
    most = max(group.count for group in shares)
    if most > len(order):
        log.warning("data: %d items for groups of up to %d rows: they are asked again", len(order), most)
    rows = []
    for group in shares:
        rows += _group(order, group.persona, group.count, cfg, seed, wrong=group.shows)
    return dealt(rows, seed) if cfg.design == "non-contrastive" else rows


def _group(
    order: Sequence[Item], persona: Persona, count: int, cfg: DataConfig, seed: int, *, wrong: bool
) -> list[Row]:
    from leakfast.storage.seeds import derive_seed

    rows = []
    for i in range(count):
        item = order[i % len(order)]
        drawn = derive_seed("wrong answer", seed, item.id)
        right = item.labels.index(item.answer)
        others = [place for place in range(len(item.labels)) if place != right]
        place = others[drawn % len(others)] if wrong else right
        letter = cfg.reply == "letter"
        rows.append(
            Row(
                role="positive" if wrong else "negative",
                persona=persona.name,
                system_kind=persona.kind,
                system=persona.prompt,
                question=item.letters_prompt if letter else item.question,
                reply=item.labels[place] if letter else item.choices[place],
                marker=None,
                seed=drawn,
                generator={"item": item.id, "answer": item.answer, "given": item.labels[place]},
            )
        )
    return rows
