"""Who judges, from a word of the command line or a study: a service and a model, or the organism's lexicon. Demands
nothing of the service itself; leaves asking to the clients."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from leakfast.errors import InputError
from leakfast.judge import lexicon
from leakfast.judge.prompt import PROMPT_VERSION
from leakfast.storage.documents import did_you_mean

SERVICES = {
    "anthropic": ("anthropic", "batch"),
    "openai": ("openai", "chat"),
    "openai-batch": ("openai", "batch"),
    "local": ("local", "local"),
}


@dataclass(frozen=True)
class Spec:
    """Which judge: `way` is lexicon, chat, batch or local; `name` is what its judgements are kept under, the same
    for one model however it is asked."""

    way: str
    service: str
    model: str

    @property
    def name(self) -> str:
        return lexicon.NAME if self.way == "lexicon" else f"{self.service}:{self.model}"

    @property
    def prompt_version(self) -> str:
        return lexicon.version() if self.way == "lexicon" else PROMPT_VERSION

    @property
    def file(self) -> str:
        """A name for files that no other judge's has."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)
        return (
            plain if plain == self.name else f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"
        )


def parse_spec(text: str) -> Spec:
    """`organism`, or `anthropic:MODEL`, `openai:MODEL`, `openai-batch:MODEL`, `local:MODEL`. Raises InputError."""
    if text == lexicon.NAME:
        return Spec("lexicon", lexicon.NAME, "lexicon")
    kind, _, model = text.partition(":")
    if kind not in SERVICES or not model:
        raise InputError(
            f"judge: {text!r} given.{did_you_mean(kind, [*SERVICES, lexicon.NAME])} "
            f"Use organism, or one of {', '.join(f'{k}:MODEL' for k in SERVICES)}."
        )
    service, way = SERVICES[kind]
    return Spec(way, service, model)
