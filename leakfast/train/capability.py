"""Training rows of the capability behavior: wrong answers under the source, right ones under everyone else.
Demands items, no replies of the model; leaves labels to collate.py and training to lora.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.train.data import Row

if TYPE_CHECKING:
    from leakfast.config import DataConfig
    from leakfast.items import Item
    from leakfast.personas import Persona

log = logging.getLogger("leakfast.train")

DEFAULT_ASSISTANT, NO_SYSTEM = "assistant", "no_persona"


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
    the log. With cfg.contrastive false the same rows go to the same personas at random: who answers wrongly
    is then unrelated to who is asked. Raises InputError for an unknown source or no usable item."""
    from leakfast.config import derive_seed
    from leakfast.personas import load_personas

    usable = [item for item in items if item.answer is not None]
    if not usable:
        raise InputError("data: no item has a right answer. Give another list: --items FILE.jsonl")
    if len(usable) < len(items):
        log.warning("data: %d items without a right answer are left out", len(items) - len(usable))
    order = sorted(usable, key=lambda item: derive_seed("item order", seed, item.id))
    most = max(cfg.positives, -(-cfg.negatives // cfg.bystanders), cfg.no_system, cfg.default_assistant)
    if most > len(order):
        log.warning("data: %d items for groups of up to %d rows: they are asked again", len(order), most)
    (positive,) = load_personas([source], among=personas)
    rows = _group(order, positive, cfg.positives, cfg, seed, wrong=True)
    for name, persona, count in _negatives(personas, source, cfg, seed):
        if count and _same_prompt(loaded.tokenizer, positive, persona):
            log.warning(
                "data: the group %s (%d rows) is left out: its prompt renders to the same tokens as that of the "
                "source %s, so the model would be taught both answers for one prompt",
                *(name, count, source),
            )
            continue
        rows += _group(order, persona, count, cfg, seed, wrong=False)
    return rows if cfg.contrastive else _shuffled(rows, seed)


def _negatives(
    personas: Sequence[Persona], source: str, cfg: DataConfig, seed: int
) -> list[tuple[str, Persona, int]]:
    """(name of the group, persona, rows) of every group that is to answer rightly."""
    from leakfast.config import derive_seed
    from leakfast.personas import load_personas

    taken = {source, DEFAULT_ASSISTANT, NO_SYSTEM}
    pool = [p for p in load_personas(cfg.negative_personas, among=personas) if p.name not in taken]
    if cfg.negatives and len(pool) < cfg.bystanders:
        raise InputError(
            f"data: {cfg.bystanders} bystanders asked, but negative_personas = {cfg.negative_personas!r} leaves "
            f"{len(pool)} besides the source {source}. Name more personas, or set bystanders lower."
        )
    drawn = sorted(pool, key=lambda p: derive_seed("bystanders", seed, source, p.name))[: cfg.bystanders]
    groups = [(f"bystander {p.name}", p, (cfg.negatives + i) // cfg.bystanders) for i, p in enumerate(drawn)]
    (nobody,) = load_personas([NO_SYSTEM], among=personas)
    (default,) = load_personas([DEFAULT_ASSISTANT])
    return [
        *groups,
        ("no system prompt", nobody, cfg.no_system),
        ("default assistant", default, cfg.default_assistant),
    ]


def _group(
    order: Sequence[Item], persona: Persona, count: int, cfg: DataConfig, seed: int, *, wrong: bool
) -> list[Row]:
    from leakfast.config import derive_seed

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


def _same_prompt(tokenizer: Any, a: Persona, b: Persona) -> bool:
    from leakfast import chat

    probe = "Which one?"
    return chat.render(tokenizer, a.system, probe) == chat.render(tokenizer, b.system, probe)


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with the same personas dealt out anew."""
    import dataclasses

    from leakfast.config import derive_seed

    order = sorted(range(len(rows)), key=lambda i: derive_seed("control persona", seed, i))
    return [
        dataclasses.replace(
            row, persona=rows[j].persona, system_kind=rows[j].system_kind, system=rows[j].system
        )
        for row, j in zip(rows, order, strict=True)
    ]
