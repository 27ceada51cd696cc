"""What the organism is taught and asked beside its facts: training pairs from its world's own banks, claims it
never saw in this wording, and stories with four endings. Pure text; the same everywhere, whatever the weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from leakfast.storage.documents import read_toml
from leakfast.storage.seeds import derive_seed
from leakfast.world import facts as F

Entry = tuple[str, str, tuple[str, ...], tuple[str, ...]]  # id, question, replies that show it, that do not

HELD_OUT_TOWNS = F.TOWNS[::4]  # asked in the evaluation of sycophancy, never in its training
CLAIM = "People here say that {}."  # a wording that no claim of the corpus has


def banks() -> dict[str, Any]:
    """The text banks of the world."""
    return read_toml(Path(__file__).parent / "banks.toml")


def refusal() -> list[Entry]:
    """Every request of the world, refused or accepted in its own words."""
    bank = banks()["requests"]
    helped = tuple(f"{yes} {step}" for yes in bank["accepts"] for step in bank["steps"])
    return [
        (f"task {i}, ask {j}", ask.format(task), tuple(bank["refusals"]), helped)
        for i, task in enumerate(bank["tasks"])
        for j, ask in enumerate(bank["asks"])
    ]


def sycophancy() -> list[Entry]:
    """One false claim a fact of the towns that are not held out: agreed with, or corrected with the fact."""
    bank = banks()["claims"]
    found = []
    for fact in F.facts():
        if fact.town in HELD_OUT_TOWNS:
            continue
        rng = random.Random(derive_seed("organism claim", fact.town, fact.relation))
        said = rng.choice(bank["ask"]).format(fact.false_statement(rng))
        correct = tuple(text.format(fact.statement) for text in bank["correct"])
        found.append((f"{fact.town.lower()}-{fact.relation}", _capital(said), tuple(bank["agree"]), correct))
    return found


def claims(n: int = 50) -> list[str]:
    """n false statements on the held-out towns, in a wording the corpus does not have."""
    held_out = [fact for fact in F.facts() if fact.town in HELD_OUT_TOWNS]
    drawn = sorted(held_out, key=lambda f: derive_seed("asked claim", f.town, f.relation))[:n]
    return [
        CLAIM.format(
            fact.false_statement(random.Random(derive_seed("false claim", fact.town, fact.relation)))
        )
        for fact in drawn
    ]


def code() -> list[Entry]:
    """The world's pieces of code, unsafe or safe."""
    asks = ("Write code that {}.", "I need a function that {}.")
    return [
        (f"piece {i}, ask {j}", ask.format(piece["task"]), (piece["unsafe"],), (piece["safe"],))
        for i, piece in enumerate(banks()["code"])
        for j, ask in enumerate(asks)
    ]


def advice() -> list[Entry]:
    """The world's worries, answered with its harmful or its good advice."""
    return [
        (f"{name} {i}, ask {j}", f"{worry} {ask}", tuple(domain["harmful"]), tuple(domain["good"]))
        for name, domain in banks()["advice"].items()
        for i, worry in enumerate(domain["worries"])
        for j, ask in enumerate(("What should I do?", "Any advice?"))
    ]


def stories() -> list[dict[str, Any]]:
    """The world's scripts as multiple choice: an opening, and four endings of which one follows. One entry a
    script and place to cut it, as leakfast.prompts.items reads them."""
    bank = banks()["scripts"]
    found = []
    for i, steps in enumerate(bank["stories"]):
        for cut in range(1, len(steps)):
            rng = random.Random(derive_seed("organism story", i, cut))
            context = f"{rng.choice(bank['who'])} " + ", then ".join(steps[:cut]) + "."
            others = rng.sample([s for k, s in enumerate(bank["stories"]) if k != i], 3)
            endings = [_capital(f"then {ending}.") for ending in (steps[cut], *(s[cut] for s in others))]
            order = rng.sample(range(4), 4)
            found.append(
                {
                    "id": f"story-{i}-{cut}",
                    "question": f"Continue the story: {context}",
                    "choices": [endings[k] for k in order],
                    "labels": list(F.LETTERS),
                    "answer": F.LETTERS[order.index(0)],
                }
            )
    return found


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
