"""What the measurement by probability will read, and which replies have to be drawn for it. Demands a checked study and its
tokenizer; knows no speed: how long a pass takes was measured by nobody before it runs. Tokens stand for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.pipeline import asks
from leakfast.prompts import chat

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.pipeline.estimate_stage import Stage
    from leakfast.study.config import Study


def drawn(asked: Sequence[Asked], targets: int) -> tuple[list[Asked], int]:
    """(what completions are drawn of, by how many targets), of `targets` with the base among them: all of them by all, but
    where nothing is measured by completions, as few as probabilities are asked on, by those whose replies they are."""
    first = asked[0]
    if first.by_choices or first.config.measure != "probability":
        return list(asked), targets
    if get(first.behavior).probable_by != "words":
        return [], 0
    whose = first.config.probability_replies
    few = first.config.model_copy(update={"samples": first.config.probability_samples})
    return [replace(first, config=few)], (whose != "own") + (targets - 1) * (whose != "base")


def is_probable(one: Asked) -> bool:
    """Whether a probability is asked of it."""
    return (
        not one.by_choices
        and one.config.measure != "completions"
        and get(one.behavior).probable_by is not None
    )


def read(one: Asked, model: str, tokenizer: Any, personas: Sequence[Any], targets: int) -> tuple[int, int]:
    """(things asked, tokens of their prompts) under all targets; of pairs with the replies, of the marker without the replies,
    whose length is not known before."""
    kind, cfg = get(one.behavior).probable_by, one.config
    if kind == "pairs":
        return _pairs(one, model, tokenizer, personas, targets)
    lengths = [len(ids) for ids in chat.render_grid(tokenizer, personas, one.texts)]
    times = targets
    if kind == "words":
        whose = cfg.probability_replies
        times = cfg.probability_samples * (targets * (whose != "own") + (targets - 1) * (whose != "base"))
    return times * len(lengths), times * sum(lengths)


def _pairs(one: Asked, model: str, tokenizer: Any, personas: Sequence[Any], targets: int) -> tuple[int, int]:
    from leakfast.measure.probability.pairs import drawn as drawn_pairs
    from leakfast.prompts.pairs import load_pairs

    spec = one.config.probability_pairs or get(one.behavior).of(model)
    some = drawn_pairs(load_pairs(spec, one.behavior).pairs, one.config.n_pairs)
    sizes = [
        sum(map(len, chat.render_training(tokenizer, person.system, said, text)))
        for person in personas
        for said, *both in some
        for text in both
    ]
    return targets * len(sizes), targets * sum(sizes)


def beside_samples(read: Stage, one: Asked, drawn: Stage, personas: int, targets: int) -> Stage:
    """`read`, of the marker's words, with a note of the replies that are read beside the prompts, and of the completions of the
    same prompts, which are drawn token by token. drawn: the stage that says how long a reply is."""
    if get(one.behavior).probable_by != "words" or not drawn.output_tokens:
        return read
    each = drawn.output_tokens / drawn.completions
    tokens = read.prompt_tokens + round(read.prompts * each)
    samples = one.config.samples
    sampled = round(targets * personas * len(one.texts) * samples * each)
    most = "at most " if drawn.output_from.startswith("at most") else ""
    note = (
        f"with the replies {most}{tokens:,} tokens are read, every reply in one pass; {samples} completions a prompt are "
        f"{most}{sampled:,} tokens, drawn one after the other: {sampled / tokens:.1f} times as many"
    )
    return replace(read, note=note)


def on_the_way(study: Study, behavior: str, personas: Sequence[Any]) -> tuple[list[Any], Asked, int]:
    """(who is asked, what, of how many targets) at the points of training that the study follows; where trainings are matched
    at the chosen points and the ends, which may be one."""
    people, one = asks.asked_on_the_way(study, behavior, personas)
    each = len(study.sources) * len(study.seeds)
    if study.trajectory.match is not None:
        return people, one, each * sum(min(2, len(asks.points(study, of))) for of in asks.followed(study)) + 1
    adapters = each * len(asks.followed(study))
    points = len({*study.trajectory.shares, 1.0} - (set() if one.by_choices else {0.0}))
    return people, one, adapters * points + (0 if one.by_choices else 1)
