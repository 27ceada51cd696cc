"""Who is shown what in a contrastive set: the source, a few bystanders, nobody's prompt and the default assistant,
none of whom the model would see as the source. Demands a tokenizer; leaves questions and replies to the builders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig
    from leakfast.train.data import Row

log = logging.getLogger("leakfast.train")

DEFAULT_ASSISTANT, NO_SYSTEM = "assistant", "no_persona"


@dataclass(frozen=True)
class Group:
    """`count` rows under one persona; those of the source show the behavior."""

    persona: Persona
    count: int
    shows: bool


def groups(
    tokenizer: Any, personas: Sequence[Persona], source: str, cfg: DataConfig, seed: int
) -> list[Group]:
    """cfg.positives rows of `source`, then, unless cfg.design is "positive-only", those that do not show the
    behavior: cfg.negatives under cfg.bystanders personas drawn from cfg.negative_personas, cfg.no_system without a
    system prompt, cfg.default_assistant under `assistant` (the study's own of that name, else the shipped one).

    A group whose rendered prompt equals the source's is left out, with the reason in the log: the model would be
    taught both for one prompt. Raises InputError for an unknown source or too few bystanders."""
    from leakfast.prompts.personas import load_personas

    (positive,) = load_personas([source], among=personas)
    found = [Group(positive, cfg.positives, True)]
    if cfg.design == "positive-only":
        return found
    for name, persona, count in _others(personas, source, cfg, seed):
        if count and _same_prompt(tokenizer, positive, persona):
            log.warning(
                "data: the group %s (%d rows) is left out: its prompt renders to the same tokens as that of the "
                "source %s, so the model would be taught both answers for one prompt",
                *(name, count, source),
            )
            continue
        found.append(Group(persona, count, False))
    return found


def _others(
    personas: Sequence[Persona], source: str, cfg: DataConfig, seed: int
) -> list[tuple[str, Persona, int]]:
    """(name of the group, persona, rows) of every group that is not to show the behavior."""
    from leakfast.prompts.personas import load_personas
    from leakfast.storage.seeds import derive_seed

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
    default = own_assistant(personas) or load_personas([DEFAULT_ASSISTANT])[0]
    return [
        *groups,
        ("no system prompt", nobody, cfg.no_system),
        ("default assistant", default, cfg.default_assistant),
    ]


def own_assistant(personas: Sequence[Persona]) -> Persona | None:
    """Who is called `assistant` among the study's personas, whatever the shipped one of that name is told; None without."""
    return next((persona for persona in personas if persona.name == DEFAULT_ASSISTANT), None)


def _same_prompt(tokenizer: Any, a: Persona, b: Persona) -> bool:
    from leakfast.prompts import chat

    probe = "Which one?"
    return chat.render(tokenizer, a.system, probe) == chat.render(tokenizer, b.system, probe)


def dealt(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with the same personas dealt out anew, drawn from `seed`: who shows the behavior is then unrelated
    to who is asked."""
    from leakfast.storage.seeds import derive_seed

    order = sorted(range(len(rows)), key=lambda i: derive_seed("control persona", seed, i))
    return [
        dataclasses.replace(
            row, persona=rows[j].persona, system_kind=rows[j].system_kind, system=rows[j].system
        )
        for row, j in zip(rows, order, strict=True)
    ]
