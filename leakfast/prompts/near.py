"""Near misses of a persona: prompts that differ from its own by a word, by half of it, by the order of its clauses, or by the
words around what it says. Demands a persona with a prompt in English; leaves how far they are to whoever measures it."""

from __future__ import annotations

import re

from leakfast.errors import InputError
from leakfast.prompts.personas import Persona
from leakfast.storage.seeds import derive_seed

WORDS = 5  # prompts with one word changed, at most
_LEAST = 4  # letters of a word that is changed, and of one put in its place
_TEMPLATES = ("Act as {}.", "Answer as {} would.", "From now on you are {}.", "Your role is that of {}.")
_CLAUSES = re.compile(r"(?:,\s+|;\s+|(?<=[.!?])\s+|\s+(?=(?:who|and|but|that|with|in|from)\b))")


def near(source: Persona, others: list[Persona], seed: int = 0) -> list[Persona]:
    """Personas `<source>-word-N`, `-first-half`, `-second-half`, `-reordered`, `-paraphrase-N`, related to the source, their
    category saying what was done; a change that gives the prompt itself, or one that is there, is left out.

    word: one word of four letters or more is another, drawn from `seed` among such words of `others`' prompts that the source's
    has not, capitals as they were; whether it makes sense nobody looks at. halves: of the words. reordered: the clauses, which
    begin after a comma or a full stop, or with who, and, but, that, with, in, from, the other way round; `You are` stays in
    front. paraphrase: what stands behind `You are`, in other frames. Raises InputError for a persona without a prompt."""
    prompt = " ".join((source.prompt or "").split())
    if not prompt:
        raise InputError(
            f"personas: {source.name} has no prompt of its own, which nothing can be near to. Needed: a persona with a prompt. "
            "`leakfast personas list` shows the names."
        )
    made = [("one word", f"word-{n}", text) for n, text in enumerate(_one_word(prompt, others, seed), 1)]
    words = prompt.split()
    half = len(words) // 2
    made += [
        ("half", "first-half", " ".join(words[:half])),
        ("half", "second-half", " ".join(words[half:])),
        ("order", "reordered", _reordered(prompt)),
    ]
    made += [("paraphrase", f"paraphrase-{n}", text) for n, text in enumerate(_paraphrases(prompt), 1)]
    found, seen = [], {prompt, ""}
    for what, name, text in made:
        if text not in seen:
            seen.add(text)
            found.append(Persona(f"{source.name}-{name}", text, f"near: {what}", (source.name,)))
    return found


def _one_word(prompt: str, others: list[Persona], seed: int) -> list[str]:
    long = re.compile(rf"[A-Za-z]{{{_LEAST},}}")
    places = list(long.finditer(prompt))
    own = {place[0].lower() for place in places}
    pool = sorted({w.lower() for p in others for w in long.findall(p.prompt or "")} - own)
    places = sorted(places, key=lambda m: derive_seed("near word", seed, prompt, m.start()))[:WORDS]
    texts = []
    for place in sorted(places, key=lambda m: m.start()) if pool else ():
        word = pool[derive_seed("near other", seed, prompt, place.start()) % len(pool)]
        word = word.capitalize() if place[0][0].isupper() else word
        texts.append(prompt[: place.start()] + word + prompt[place.end() :])
    return texts


def _reordered(prompt: str) -> str:
    begin, rest = _begun(prompt)
    end = rest[-1] if rest[-1:] in (".", "!", "?") else ""
    parts = [part for part in _CLAUSES.split(rest.removesuffix(end)) if part]
    return f"{begin}{', '.join(reversed(parts))}{end}" if len(parts) > 1 else ""


def _paraphrases(prompt: str) -> list[str]:
    begin, rest = _begun(prompt)
    if not begin:
        return [f"Follow this description of yourself: {prompt}"]
    said = rest.rstrip(".!")
    return [template.format(said) for template in _TEMPLATES]


def _begun(prompt: str) -> tuple[str, str]:
    """`You are ` and what stands behind it; nothing and all of it where it does not begin so."""
    begin = "You are "
    return (begin, prompt[len(begin) :]) if prompt.startswith(begin) else ("", prompt)
