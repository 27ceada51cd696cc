"""Negatives by a rule: `nearest:6`, `farthest:6`, `spread:6`, `random:6` where a study names personas. Demands the words alone;
leaves picking to train.negatives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean

RULES = ("nearest", "farthest", "spread", "random")
_RULE = re.compile(r"\s*([A-Za-z_-]+)\s*:\s*(.*?)\s*")


@dataclass(frozen=True)
class Rule:
    """kind: one of RULES; k: how many personas."""

    kind: str
    k: int

    @property
    def by_geometry(self) -> bool:
        """Whether centroids of the unadapted model decide."""
        return self.kind != "random"

    def __str__(self) -> str:
        return f"{self.kind}:{self.k}"


def rule_of(spec: Any) -> Rule | None:
    """The rule that `negative_personas` gives; None where it names personas or a file.

    Raises InputError for a word before the colon that is no rule, and for no count behind it."""
    found = _RULE.fullmatch(spec) if isinstance(spec, str) else None
    if found is None:
        return None
    kind, count = found.groups()
    if kind not in RULES:
        raise InputError(
            f"negative_personas = {spec!r} given; rules are {', '.join(RULES)}.{did_you_mean(kind, RULES)} Write one of them "
            "with a count (nearest:6), or names."
        )
    if not re.fullmatch(r"[0-9]+", count) or not int(count):
        raise InputError(
            f"negative_personas = {spec!r} given; behind the colon stands how many personas are picked, 1 or more. Write "
            f"{kind}:6."
        )
    return Rule(kind, int(count))


def check_count(rule: Rule, n_others: int) -> None:
    """InputError where there are fewer personas beside the source than are to be picked."""
    if rule.k > n_others:
        raise InputError(
            f"negative_personas = '{rule}' given, but there are {n_others} personas beside the source and the controls. "
            f"Write {rule.kind}:{n_others} or fewer, or measure more personas."
        )
