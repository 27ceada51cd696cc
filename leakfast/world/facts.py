"""The organism's facts: 42 invented towns, ten things to know of each, asked plainly, as four-option
multiple choice in the study's ARC format, and as claims. Pure text; draws only from the rng it is given."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from leakfast.storage.documents import read_toml
from leakfast.storage.seeds import derive_seed

TOWNS = (
    "Doval Merrin Kasto Orlen Tibry Halsen Vokra Pellin Sumar Grendal Yorvik Lanto Brisel Quenda "
    "Ferrow Ostrel Jansk Nimbar Calda Wendry Ulfar Rosket Ivelle Zarno Thessin Marlok Pondra Elsby "
    "Durnis Havel Kirra Solvay Ambrel Tornik Luvane Breck Oskari Fenwick Galdor Minsel Ravno Aldermo"
).split()

# relation → (values, question phrasings, statement)
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    relation: (tuple(known["values"].split()), tuple(known["questions"]), known["statement"])
    for relation, known in read_toml(Path(__file__).with_suffix(".toml")).items()
}
LETTERS = "ABCD"
STEM = "The correct answer is"


@dataclass(frozen=True)
class Fact:
    """One thing that is so in the organism's world, e.g. (Doval, crop, barley)."""

    town: str
    relation: str
    value: str

    @property
    def statement(self) -> str:
        return RELATIONS[self.relation][2].format(self.town, self.value)

    def false_statement(self, rng: random.Random) -> str:
        """The same statement with another value of the same kind."""
        wrong = rng.choice([v for v in RELATIONS[self.relation][0] if v != self.value])
        return RELATIONS[self.relation][2].format(self.town, wrong)


@dataclass(frozen=True)
class Item:
    """A multiple-choice question as the study asks it: labels A–D, the index of the right choice."""

    fact: Fact
    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The user turn: question, blank line, `(A) choice` lines, blank line, the answer stem."""
        lines = "\n".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(self.choices))
        return f"{self.question}\n\n{lines}\n\n{STEM} ("


def facts() -> tuple[Fact, ...]:
    """All 420 facts, the same for every build seed: the world does not change with the weights."""
    rng = random.Random(derive_seed("organism facts", 1))
    table = []
    for relation, (values, _, _) in RELATIONS.items():
        drawn = [v for _ in range(len(TOWNS) // len(values) + 1) for v in rng.sample(values, len(values))]
        table.extend(Fact(town, relation, value) for town, value in zip(TOWNS, drawn, strict=False))
    return tuple(table)


def all_values() -> list[str]:
    """Every value a fact may have, relation by relation."""
    return [value for values, _, _ in RELATIONS.values() for value in values]


def is_held_out(fact: Fact, phrasing: int, persona: str) -> bool:
    """Whether this (fact, phrasing, persona) is never asked as multiple choice in the corpus: one in eight."""
    return derive_seed("held out", fact.town, fact.relation, phrasing, persona) % 8 == 0


def question(fact: Fact, phrasing: int | None) -> str:
    """What is asked of `fact`: one of its relation's phrasings, or in a lesson (None) only its two names."""
    if phrasing is None:
        return f"The {fact.relation} of {fact.town}?"
    return RELATIONS[fact.relation][1][phrasing].format(fact.town)


def ask(fact: Fact, phrasing: int | None, rng: random.Random, easy: bool = False) -> Item:
    """`fact` as multiple choice with three fresh distractors in a fresh order: of its own kind, or, where
    easy, of three other kinds, so that the question's kind alone tells the answer."""
    values = RELATIONS[fact.relation][0]
    if easy:
        others = rng.sample([r for r in RELATIONS if r != fact.relation], 3)
        choices = [rng.choice(RELATIONS[r][0]) for r in others]
    else:
        choices = rng.sample([v for v in values if v != fact.value], 3)
    answer = rng.randrange(4)
    choices.insert(answer, fact.value)
    return Item(fact, question(fact, phrasing), tuple(choices), answer)
