"""Replies of the model itself for training rows, drawn until they are usable. A slot may open a reply with
words that are given, so that the model goes on from there. Demands a loaded model; leaves rows to data.py."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import ModelError
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.generation.contract import Sampling
    from leakfast.prompts.personas import Persona

log = logging.getLogger("leakfast.train")


ATTEMPTS = 12  # draws for one row before the builder gives up
EARLY = 32  # first draws after which it gives up where most of them were cut or empty


@dataclass(frozen=True)
class Slot:
    """One reply to be drawn: the sample-th of this persona to this question. openings: words it begins with; the
    first are given for the first of the attempts, the next where none of those draws was usable."""

    persona: Persona
    question: str
    sample: int
    openings: tuple[str, ...] = ("",)

    def opening(self, attempt: int) -> str:
        return self.openings[attempt * len(self.openings) // ATTEMPTS]


@dataclass(frozen=True)
class Drawn:
    """A usable reply without trailing space, the seed that drew it, and the words it was given to begin with."""

    reply: str
    seed: int
    opening: str


def slots(persona: Persona, count: int, questions: Sequence[str], seed: int) -> list[Slot]:
    """`count` slots of one persona: every question once before any is asked twice."""
    from leakfast.storage.seeds import derive_seed

    order = sorted(questions, key=lambda q: derive_seed("question order", seed, persona.name, q))
    return [Slot(persona, order[i % len(order)], i // len(order)) for i in range(count)]


def draw(
    loaded: Any,
    wanted: Sequence[Slot],
    sampling: Sampling,
    seed: int,
    fault: Callable[[int, str], str | None],
    *,
    batch_completions: int = 640,
    progress: Progress | None = None,
) -> list[Drawn]:
    """The reply of every slot, in order; unusable draws are repeated with a new seed.

    fault(place, reply): why the reply of that slot cannot be used, in one or two words; None if it can. Empty
    and truncated ones never can. Raises ModelError naming a slot that 12 draws did not fill, and at once where more
    than half of the first block of draws (EARLY of them or more) were cut or empty: what follows would be no better."""
    from leakfast.generation.contract import Request
    from leakfast.generation.frames import decode
    from leakfast.generation.generate import complete
    from leakfast.prompts.reasoning import read
    from leakfast.storage.seeds import derive_seed

    ids = _prompts(loaded.tokenizer, wanted)
    replies: list[Drawn | None] = [None] * len(wanted)
    reasons: Counter[str] = Counter()
    waiting = list(range(len(wanted)))
    drawn = 0
    for attempt in range(ATTEMPTS):
        seeds = {
            i: derive_seed("training reply", seed, s.persona.name, s.question, s.sample, attempt)
            for i in waiting
            for s in [wanted[i]]
        }
        requests = [
            Request(
                f"persona {wanted[i].persona.name}, question {wanted[i].question[:40]!r}",
                ids[_key(wanted[i], attempt)],
                [seeds[i]],
            )
            for i in waiting
        ]
        for block in complete(loaded, requests, sampling, batch_completions=batch_completions):
            token_ids = [c.token_ids for c in block]
            texts = read(loaded.tokenizer, token_ids, decode(loaded.tokenizer, token_ids))
            for completion, text in zip(block, texts, strict=True):
                place = waiting[completion.request]
                opening = wanted[place].opening(attempt)
                reply = f"{opening}{text.text}".rstrip()
                why = _unusable(text, reply, completion.finish_reason) or fault(place, reply)
                if why:
                    reasons[why] += 1
                else:
                    replies[place] = Drawn(reply, seeds[place], opening)
            if attempt == 0 and drawn < EARLY <= drawn + len(block):
                _look(reasons, drawn + len(block), sampling.max_new_tokens)
            drawn += len(block)
            if progress is not None:
                progress(sum(r is not None for r in replies), len(wanted), "replies")
        waiting = [i for i in waiting if replies[i] is None]
        if not waiting:
            break
    if told := ", ".join(f"{n} {why}" for why, n in sorted(reasons.items())):
        log.info("data: drawn again: %s", told)
    if waiting:
        worst = wanted[waiting[0]]
        raise ModelError(
            f"data: {ATTEMPTS} draws gave no usable reply of {worst.persona.name} to {worst.question[:60]!r} "
            f"(and {len(waiting) - 1} others; {told}; longest {sampling.max_new_tokens} tokens). "
            "Raise max_new_tokens, or give replies that are written already."
        )
    return [r for r in replies if r is not None]


def _unusable(text: Any, reply: str, finish_reason: str) -> str | None:
    """Why no row can use the reply, whatever it says."""
    if text.is_open:
        return "reasoning without end"
    if not reply.strip():
        return "empty"
    return "truncated" if finish_reason == "length" else None


def _look(reasons: Counter[str], drawn: int, max_new_tokens: int) -> None:
    """Raises ModelError where most of the draws so far cannot be used whatever they say."""
    lost = reasons["truncated"] + reasons["empty"] + reasons["reasoning without end"]
    if 2 * lost <= drawn:
        return
    raise ModelError(
        f"data: {reasons['truncated']} of the first {drawn} replies were cut at max_new_tokens = {max_new_tokens} and "
        f"{reasons['empty']} were empty; rows need whole replies. Raise max_new_tokens in the behavior's [data], ask "
        "for short answers (questions that say so), or give replies that are written already."
    )


def _key(slot: Slot, attempt: int) -> tuple[str, str, str]:
    return slot.persona.name, slot.question, slot.opening(attempt)


def _prompts(tokenizer: Any, wanted: Sequence[Slot]) -> dict[tuple[str, str, str], list[int]]:
    """Token ids up to where the model goes on: the prompt, and the opening as the reply has it."""
    from leakfast.prompts import chat

    ids: dict[tuple[str, str, str], list[int]] = {}
    for slot in wanted:
        for opening in slot.openings:
            key = (slot.persona.name, slot.question, opening)
            if key in ids:
                continue
            if opening:
                prompt, reply = chat.render_training(tokenizer, slot.persona.system, slot.question, opening)
                ids[key] = [*prompt, *reply[:-1]]
            else:
                ids[key] = chat.render(tokenizer, slot.persona.system, slot.question, reply=True)
    return ids
