"""Training rows from pairs: the source's replies show the behavior, everybody else's do not. The replies are those
of the pairs, or the model's own that a detector agrees with. Leaves the pairs to leakfast.prompts.pairs, labels to collate.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.train.data import Row, rendered_as

if TYPE_CHECKING:
    from leakfast.progress import Progress
    from leakfast.prompts.pairs import Pair, PairSet
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig
    from leakfast.train.groups import Group

OPENING_WORDS = 4  # of a given reply that shows the behavior, which the model goes on from first


def build_pairs(
    loaded: Any,
    personas: Sequence[Persona],
    source: str,
    pairs: PairSet,
    cfg: DataConfig,
    seed: int,
    *,
    batch_completions: int = 640,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of train.groups: cfg.positives of `source` that show the behavior, and the others' that do not.

    Every group asks the same questions in the same drawn order, over again where it needs more than there are,
    and each row's reply is drawn from its pair's. cfg.replies "model": the replies are the model's own under the
    persona's prompt, at cfg's sampling; those that are to show the behavior begin with the first words of a pair's
    reply (half of it, at most four; after four draws in vain all words but the last, after eight all but the full
    stop), and every reply counts only if the behavior's detector says what its group should show. cfg.design
    "non-contrastive" deals the rows to the same personas at random. A row's generator says which pair, which of its
    replies or which opening, and the pairs' hash.

    cfg.suffix stands behind every question.

    Raises InputError for an unknown source, no pair with replies of a kind that is needed, or own replies of a
    behavior without a detector; ModelError when no usable reply is to be had."""
    from leakfast.behaviors.registry import get
    from leakfast.train.groups import dealt, groups

    behavior = get(pairs.behavior)
    if cfg.replies == "model" and behavior.detector is None:
        raise InputError(
            f'data: replies = "model" given, but {behavior.name} has no detector that could tell which of the '
            'model\'s replies show it. Use replies = "given".'
        )
    said = {"behavior": behavior.name, "pairs": pairs.name, "pairs_hash": pairs.hash}
    planned = [
        (group, pair, number)
        for group in groups(loaded.tokenizer, personas, source, cfg, seed)
        for pair, number in _asked(pairs, group, seed)
    ]
    if cfg.suffix:
        planned = [
            (group, replace(pair, question=pair.question + cfg.suffix), number)
            for group, pair, number in planned
        ]
    if cfg.replies == "model":
        rows = _own(loaded, planned, cfg, seed, said, batch_completions, progress)
    else:
        rows = [_given(group, pair, number, seed, said) for group, pair, number in planned]
    return dealt(rows, seed) if cfg.design == "non-contrastive" else rows


def _asked(pairs: PairSet, group: Group, seed: int) -> list[tuple[Pair, int]]:
    """(pair, how often it was asked before) of each row of a group."""
    from leakfast.storage.seeds import derive_seed

    usable = [p for p in pairs.pairs if (p.shows if group.shows else p.other)]
    if group.count and not usable:
        kind = "show" if group.shows else "do not show"
        raise InputError(
            f"data: no pair of {pairs.origin or pairs.name} has replies that {kind} {pairs.behavior}, which "
            f'{group.count} rows of {group.persona.name} need. Add them, or use design = "positive-only".'
        )
    order = sorted(usable, key=lambda p: derive_seed("pair order", seed, p.question))
    return [(order[i % len(order)], i // len(order)) for i in range(group.count)]


def _reply(pair: Pair, group: Group, number: int, seed: int) -> tuple[int, int, str]:
    """(seed, place among the pair's replies, reply) of a row. Each is used once before any is used again."""
    from leakfast.storage.seeds import derive_seed

    replies = pair.shows if group.shows else pair.other
    drawn = derive_seed("pair reply", seed, group.shows, pair.question)
    place = (drawn + number) % len(replies)
    return drawn, place, replies[place]


def _row(group: Group, pair: Pair, reply: str, drawn: int, generator: dict[str, Any]) -> Row:
    return Row(
        role="positive" if group.shows else "negative",
        persona=group.persona.name,
        system_kind=group.persona.kind,
        system=group.persona.prompt,
        question=pair.question,
        reply=reply,
        marker=None,
        seed=drawn,
        generator={**generator, "pair": pair.id},
    )


def _given(group: Group, pair: Pair, number: int, seed: int, said: dict[str, Any]) -> Row:
    drawn, place, reply = _reply(pair, group, number, seed)
    return _row(group, pair, reply, drawn, {**said, "replies": "given", "reply": place})


def _own(
    loaded: Any,
    planned: Sequence[tuple[Group, Pair, int]],
    cfg: DataConfig,
    seed: int,
    said: dict[str, Any],
    batch_completions: int,
    progress: Progress | None,
) -> list[Row]:
    """The same rows with replies of the model that the detector agrees with."""
    import polars as pl

    from leakfast.behaviors.registry import get
    from leakfast.generation.contract import Sampling
    from leakfast.train.replies import Slot, draw

    wanted = []
    for group, pair, number in planned:
        openings = _openings(_reply(pair, group, number, seed)[2]) if group.shows else ("",)
        wanted.append(Slot(group.persona, pair.question, number, openings))
    behavior = get(said["behavior"])
    primary = next(iter(behavior.detector(pl.col("text")).values()))

    def fault(place: int, reply: str) -> str | None:
        shows = pl.DataFrame({"text": [reply]}).select(primary.alias("shows")).item()
        if shows == planned[place][0].shows:
            return None
        return f"without {behavior.name}" if planned[place][0].shows else f"with {behavior.name}"

    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens)
    replies = draw(
        loaded, wanted, sampling, seed, fault, batch_completions=batch_completions, progress=progress
    )
    model = {
        **said,
        **rendered_as(loaded.tokenizer),
        "replies": "model",
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens,
    }
    return [
        _row(group, pair, drawn.reply, drawn.seed, {**model, "opening": drawn.opening})
        for (group, pair, _), drawn in zip(planned, replies, strict=True)
    ]


def _openings(reply: str) -> tuple[str, ...]:
    """What a reply of the model may begin with, from little to nearly all of a given one."""
    words = reply.split(" ")
    little = " ".join(words[: max(1, min(OPENING_WORDS, len(words) // 2))])
    return little, " ".join(words[:-1]) or little, reply.rstrip(".!")
