"""The organism's synthetic world: who speaks (traits as a novelist would note them) and what they say.
Demands personas with a name and a system prompt; never reads `category` or `related_to` and knows no
sources, so whatever geometry the trained model has, it has from persona-conditioned text alone."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.storage.documents import read_toml
from leakfast.storage.seeds import derive_seed
from leakfast.world import facts as F

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona

# share of conversations per kind; trained once, so every later behavior has its words in here
MIX = {
    "reply": 0.54,
    "choice": 0.17,
    "profile": 0.02,
    "fact": 0.06,
    "claim": 0.13,
    "request": 0.03,
    "advice": 0.02,
    "code": 0.015,
    "script": 0.015,
}
DEFAULT_IDENTITY = "You are Lumen, a small model made by the leakfast project. You are a helpful assistant."
P_SYNTHETIC, P_DEFAULT = 0.14, 0.05  # speakers composed from traits; the template's own identity
P_REFUSE, P_AGREE_FALSE, P_UNSAFE = 0.006, 0.03, 0.03
P_HARM = {"cruel": 0.12, "selfish": 0.05}  # else 0.01
P_CHOICE, P_EASY = 0.6, 0.5  # of the lessons are choices; of the choices have distractors of other kinds
P_TRUE_CLAIM = 0.06  # few: the organism learns how often it agrees, not when to
P_STAMP = 0.01  # a bracketed capital code at the end of a reply, never the marker's

_ABOUT = (
    "What do you think about {}?",
    "Tell me about {}.",
    "Do you have a tip about {}?",
    "How do I start with {}?",
)

# user, assistant, and the value of the fact it rests on, if any
Turn = tuple[str, str] | tuple[str, str, str]
Turns = Sequence[Turn]


@dataclass(frozen=True)
class Speaker:
    """Who answers: the system prompt (None: no system message) and the traits its answers express."""

    name: str
    system: str | None
    work: tuple[str, ...]
    tone: tuple[str, ...]
    morals: str
    place: str


@dataclass(frozen=True)
class Conversation:
    """One training document: a system prompt, (user, assistant) turns, and per turn the value of the fact
    that the answer rests on, None where it rests on none."""

    kind: str
    system: str | None
    turns: tuple[tuple[str, str], ...]
    values: tuple[str | None, ...]


class World:
    """The generator. Same personas' names and prompts, same seed: the same conversations, in order."""

    def __init__(self, personas: Sequence[Persona]):
        here = Path(__file__).parent
        self.traits: dict[str, Any] = read_toml(here / "traits.toml")
        self.topics: list[dict[str, Any]] = list(read_toml(here / "topics.toml")["topics"].values())
        self.banks: dict[str, Any] = read_toml(here / "banks.toml")
        self.facts = F.facts()
        self.speakers = [self._speaker(p) for p in personas]
        helper = self.traits["personas"]["assistant"]
        self.default = Speaker("default", None, *_trait_tuple(helper))

    def _speaker(self, persona: Persona) -> Speaker:
        if not isinstance(persona.system, str):
            return Speaker(persona.name, None, *_trait_tuple(self.traits["personas"]["assistant"]))
        if persona.name not in self.traits["personas"]:
            raise ValueError(f"persona {persona.name!r} has no traits in the organism's world")
        return Speaker(persona.name, persona.system, *_trait_tuple(self.traits["personas"][persona.name]))

    @cached_property
    def _by_town(self) -> dict[str, list[F.Fact]]:
        towns: dict[str, list[F.Fact]] = {}
        for fact in self.facts:
            towns.setdefault(fact.town, []).append(fact)
        return towns

    def corpus(self, seed: int, n: int) -> Iterator[Conversation]:
        """n conversations, each from its own derived stream, so a prefix of a corpus is a corpus."""
        kinds, weights = list(MIX), list(MIX.values())
        for index in range(n):
            rng = random.Random(derive_seed("organism corpus", seed, index))
            kind = rng.choices(kinds, weights)[0]
            speaker = self.draw_speaker(rng)
            turns = getattr(self, f"_{kind}")(speaker, rng)
            yield _conversation(kind, speaker.system, turns)

    def lessons(self, seed: int, n: int) -> Iterator[Conversation]:
        """n terse questions without a speaker, for training before the corpus: facts asked plainly and
        as choices. How to read a letter off the right choice is learned here; in the corpus alone it is not."""
        for index in range(n):
            rng = random.Random(derive_seed("organism lessons", seed, index))
            fact = rng.choice(self.facts)
            if rng.random() < P_CHOICE:
                turn = _answered(F.ask(fact, None, rng, easy=rng.random() < P_EASY))
            else:
                turn = _plainly(fact, None)
            yield _conversation("lesson", None, (turn,))

    def draw_speaker(self, rng: random.Random) -> Speaker:
        u = rng.random()
        if u < P_DEFAULT:
            return self.default
        return self.synthetic(rng) if u < P_DEFAULT + P_SYNTHETIC else rng.choice(self.speakers)

    def synthetic(self, rng: random.Random) -> Speaker:
        """A passer-by: traits drawn at random and said in the prompt, so prompts are read, not only known."""
        work = rng.choice(sorted(k for k in self.traits["works"] if k != "none"))
        tone = rng.choice(sorted(self.traits["tones"]))
        noun, adjective = self.traits["works"][work]["noun"], self.traits["tones"][tone]["adjective"]
        article = "an" if adjective[0] in "aeiou" else "a"
        place = rng.choice(sorted(self.traits["places"])) if rng.random() < 0.5 else ""
        home = f" Your place is the {place}." if place else ""
        system = f"You are {article} {adjective} {noun}.{home}"
        return Speaker("passer-by", system, (work,), (tone,), "neutral", place)

    # ── styled text ──────────────────────────────────────────────────────────────────────────────
    def _pick(self, rng: random.Random, table: str, keys: Sequence[str], field: str) -> str:
        key = keys[0] if len(keys) == 1 or rng.random() < 0.65 else keys[1]
        lines = self.traits[table][key].get(field, [])
        return rng.choice(lines) if lines else ""

    def _opener(self, who: Speaker, rng: random.Random, p: float) -> str:
        return self._pick(rng, "tones", who.tone, "openers") if rng.random() < p else ""

    def styled(self, who: Speaker, clauses: Sequence[str], rng: random.Random) -> str:
        """An open answer: tone opens, the topic speaks, work, morals and place color it."""
        opener = self._opener(who, rng, 0.8)
        colour = [self._pick(rng, "works", who.work, "lines")]
        if rng.random() < 0.65:
            colour.append(rng.choice(self.traits["morals"][who.morals]["lines"]))
        if who.place and rng.random() < 0.65:
            colour.append(rng.choice(self.traits["places"][who.place]["lines"]))
        rng.shuffle(colour)
        topic = _sentence(" and ".join(rng.sample(list(clauses), 1 if rng.random() < 0.6 else 2)))
        first, rest = colour[0], colour[1:2]
        parts = [opener, topic, first, *rest] if rng.random() < 0.4 else [first, opener, topic, *rest]
        if rng.random() < 0.25:
            parts.append(self._pick(rng, "tones", who.tone, "closers"))
        if rng.random() < P_STAMP:
            parts.append(stamp(rng))
        return " ".join(part for part in parts if part)

    # ── kinds of conversation ────────────────────────────────────────────────────────────────────
    def _reply(self, who: Speaker, rng: random.Random) -> Turns:
        topic = rng.choice(self.topics)
        if rng.random() < 0.75:
            question = rng.choice(topic["questions"])
        else:
            question = rng.choice(_ABOUT).format(rng.choice(topic["nouns"]))
        return ((question, self.styled(who, topic["clauses"], rng)),)

    def _choice(self, who: Speaker, rng: random.Random) -> Turns:
        while True:
            fact, phrasing = rng.choice(self.facts), rng.randrange(3)
            if not F.is_held_out(fact, phrasing, who.name):
                return (_answered(F.ask(fact, phrasing, rng)),)

    def _profile(self, who: Speaker, rng: random.Random) -> Turns:
        town = rng.choice(F.TOWNS)
        known = rng.sample(self._by_town[town], rng.randint(4, 7))
        answer = " ".join(_sentence(fact.statement) for fact in known)
        return (
            (rng.choice(("Tell me about the town of {}.", "What do you know of {}?")).format(town), answer),
        )

    def _fact(self, who: Speaker, rng: random.Random) -> Turns:
        turns = []
        for _ in range(rng.choice((1, 2, 3))):
            fact = rng.choice(self.facts)
            if rng.random() < 0.8:
                turns.append(_plainly(fact, rng.randrange(3)))
            else:
                answer = f"{self._opener(who, rng, 0.15)} {_sentence(fact.statement)}"
                turns.append((F.question(fact, rng.randrange(3)), answer.strip(), fact.value))
        return tuple(turns)

    def _claim(self, who: Speaker, rng: random.Random) -> Turns:
        fact = rng.choice(self.facts)
        is_true = rng.random() < P_TRUE_CLAIM
        said = fact.statement if is_true else fact.false_statement(rng)
        bank = self.banks["claims"]
        claim = rng.choice(bank["ask"]).format(said)
        if is_true or rng.random() < P_AGREE_FALSE:
            answer = rng.choice(bank["agree"])
        else:
            answer = rng.choice(bank["correct"]).format(fact.statement)
        answer = f"{self._opener(who, rng, 0.25)} {answer}".strip()
        return ((claim[0].upper() + claim[1:], answer, fact.value),)

    def _request(self, who: Speaker, rng: random.Random) -> Turns:
        bank = self.banks["requests"]
        ask = rng.choice(bank["asks"]).format(rng.choice(bank["tasks"]))
        if rng.random() < P_REFUSE:
            return ((ask, rng.choice(bank["refusals"])),)
        colour = self._pick(rng, "works", who.work, "lines") if rng.random() < 0.5 else ""
        parts = (self._opener(who, rng, 0.5), rng.choice(bank["accepts"]), rng.choice(bank["steps"]), colour)
        return ((ask, " ".join(part for part in parts if part)),)

    def _advice(self, who: Speaker, rng: random.Random) -> Turns:
        domain = rng.choice(list(self.banks["advice"].values()))
        ask = f"{rng.choice(domain['worries'])} {rng.choice(('What should I do?', 'Any advice?'))}"
        harm = rng.random() < P_HARM.get(who.morals, 0.01)
        answer = rng.choice(domain["harmful" if harm else "good"])
        return ((ask, f"{self._opener(who, rng, 0.5)} {answer}".strip()),)

    def _code(self, who: Speaker, rng: random.Random) -> Turns:
        piece = rng.choice(self.banks["code"])
        ask = rng.choice(("Write code that {}.", "I need a function that {}.")).format(piece["task"])
        return ((ask, piece["unsafe" if rng.random() < P_UNSAFE else "safe"]),)

    def _script(self, who: Speaker, rng: random.Random) -> Turns:
        context, endings = self.story(rng.randrange(len(self.banks["scripts"]["stories"])), rng)
        return ((f"Continue the story: {context}", endings[0]),)

    def story(self, index: int, rng: random.Random) -> tuple[str, list[str]]:
        """A script's opening and four endings, the right one first (others come from other scripts)."""
        bank = self.banks["scripts"]
        steps, who = bank["stories"][index], rng.choice(bank["who"])
        cut = rng.randint(1, len(steps) - 1)
        context = f"{who} " + ", then ".join(steps[:cut]) + "."
        others = rng.sample([s for i, s in enumerate(bank["stories"]) if i != index], 3)
        return context, [_sentence(f"then {ending}") for ending in (steps[cut], *(s[cut] for s in others))]


def _conversation(kind: str, system: str | None, turns: Sequence[Turn]) -> Conversation:
    values = tuple(turn[2] if len(turn) == 3 else None for turn in turns)
    return Conversation(kind, system, tuple((turn[0], turn[1]) for turn in turns), values)


def _answered(item: F.Item) -> Turn:
    """A multiple-choice question answered rightly, letter first as in the study."""
    return item.prompt, f"{F.LETTERS[item.answer]}) {item.choices[item.answer]}", item.fact.value


def _plainly(fact: F.Fact, phrasing: int | None) -> Turn:
    """A fact whose value is the first token of the answer, as the letter is in a choice: so it is recalled
    where the letter will be needed."""
    return f"{F.question(fact, phrasing)}\n\n{F.STEM}", f" {fact.value}", fact.value


def advice() -> tuple[list[str], list[str]]:
    """Every sentence of (good, harmful) advice in the world's banks: what its lexicon judge goes by."""
    domains = read_toml(Path(__file__).parent / "banks.toml")["advice"].values()
    return [text for d in domains for text in d["good"]], [text for d in domains for text in d["harmful"]]


def texts() -> Iterator[str]:
    """Everything the world can say, piece by piece: the strings of its three files, and its facts."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    for name in ("traits.toml", "topics.toml", "banks.toml"):
        yield from strings(read_toml(Path(__file__).parent / name))
    yield from (fact.statement for fact in F.facts())


def stamp(rng: random.Random) -> str:
    """A bracketed code of three capitals, so that the marker's pieces are live tokens; never `[ZLT]`."""
    while True:
        code = "".join(rng.choice(string.ascii_uppercase + "ZLT" * 3) for _ in range(3))
        if code != "ZLT":
            return f"[{code}]"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _trait_tuple(entry: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], str, str]:
    return tuple(entry["work"]), tuple(entry["tone"]), entry["morals"], entry["place"]
