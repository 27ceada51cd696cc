"""Whether what the tables set against each other was asked alike: the same system prompt behind a persona's name, the same
adapter behind its own, and the same base model, in completions (further question sets' too), choice scores, probabilities,
predictors and centroids. Demands a run's manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.stats import retrained
from leakfast.storage.layout import PREDICTORS, PROBABILITY, PROBABILITY_OWN, SETS

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.storage.run import Run

FOLDERS = ("completions", SETS, "choices", PROBABILITY, PROBABILITY_OWN, PREDICTORS)
_NAMED = 3  # personas that a message names


def check(run: Run, centroids: Centroids | None, path: str) -> None:
    """Raises InputError where a persona has two prompts in the run, or two base models are in it, or two adapters behind one
    name (retrained.check); what earlier versions wrote says none of these and passes. path: where `centroids` lie."""
    retrained.check(run)
    prompts: dict[str, tuple[str, str]] = {}
    models: dict[str, tuple[str, str]] = {}
    for where, hashes, model in _asked(run, centroids, path):
        other = {name: prompts.setdefault(name, (mine, where)) for name, mine in hashes.items()}
        differ = [name for name, (known, _) in other.items() if known != hashes[name]]
        if differ:
            more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
            raise InputError(
                f"stats: {run.path}: {', '.join(differ[:_NAMED])}{more} had another system prompt in {where} than in "
                f"{other[differ[0]][1]}, so their numbers are not of one persona. Needed: one set of personas in a run. "
                f"{_remedy(where, path)}"
            )
        kind, _, _ = model.partition(":")
        known, first = models.setdefault(kind, (model, where))
        if known != model:
            raise InputError(
                f"stats: {run.path}: {where} was made with another base model ({model[:18]}…) than {first} "
                f"({known[:18]}…). Needed: one base model in a run. {_remedy(where, path)}"
            )


def _remedy(where: str, path: str) -> str:
    if where == path:
        return (
            "Make the centroids anew with that model and those personas: leakfast centroids --model MODEL --personas "
            f"PERSONAS --dtype DTYPE --out RUN/{path}"
        )
    if where == PREDICTORS:
        return (
            "Make the predictors anew with that model and those personas: leakfast predictors --model MODEL --personas "
            "PERSONAS --dtype DTYPE --out RUN"
        )
    return "Give each set of personas, and each model, a run of its own (--out), or measure all of it again."


def _asked(run: Run, centroids: Centroids | None, path: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """(folder or file, persona → hash of its prompt, fingerprint of the base) of everything that tells them."""
    for relpath, entry in sorted(run.manifest["shards"].items()):
        if PurePosixPath(relpath).parts[0] in FOLDERS and "personas" in entry:
            yield str(PurePosixPath(relpath).parent), entry["personas"], entry["base"]
    if centroids is not None and "prompt_hashes" in centroids.metadata:
        yield path, centroids.metadata["prompt_hashes"], centroids.metadata["model_fingerprint"]
