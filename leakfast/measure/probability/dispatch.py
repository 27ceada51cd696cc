"""What of a behavior its probability is asked of: words on replies, beginnings of a reply, or given pairs of replies. Demands a
loaded model and, for replies, a run that holds them; leaves scoring to each, and shards to the measurer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.measure.probability.contract import Asking
from leakfast.measure.probability.openings import Beginnings
from leakfast.measure.probability.pairs import PairsAsked
from leakfast.measure.probability.words import OnReplies
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.request import Asked, Target
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


def check_asked(behavior: str) -> None:
    """Raises InputError for a behavior of which nothing says what its probability is asked of."""
    if get(behavior).probable_by is None:
        raise InputError(
            f"eval: the probability of {behavior} asked, but nothing says which words or beginnings show it. Needed: a "
            "behavior with a continuation, openings, or pairs for a judge. Leave --measure out for its own measurement."
        )


def askings(
    run: Run,
    loaded: Loaded,
    one: Asked,
    personas: Sequence[Persona],
    targets: Sequence[Target],
    stops: Collection[int],
    series: bool,
) -> list[tuple[Target, Asking, bool]]:
    """(target, what it is asked, whether on its own replies) of a behavior, targets in order, those on their own replies
    last. Raises InputError where replies, beginnings or pairs cannot be asked."""
    kind = get(one.behavior).probable_by
    if kind != "words":
        asking = (Beginnings if kind == "openings" else PairsAsked)(loaded, one, personas)
        return [(target, asking, False) for target in targets]
    found: list[tuple[Target, Asking, bool]] = []
    if one.config.probability_replies != "own":
        shared = OnReplies(run, loaded, one, personas, stops)
        found += [(target, shared, False) for target in targets]
    if one.config.probability_replies != "base":
        mine = [target for target in targets if target.name != BASE]
        found += [(t, OnReplies(run, loaded, one, personas, stops, t.name, series), True) for t in mine]
    return found
