"""A second opinion on letters: vLLM's chosen-token log-probabilities as another engine of the measurement, and how
far it agrees with the packed engine. Demands vLLM only when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.measure.choices.scores import OK, Scores, letters, letters_by
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.items import Item
    from leakfast.prompts.personas import Persona

# (prompts (N lists), token ids (N, C), adapter or None, progress) → (N, C) log-probabilities in nats
NextTokens = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """Two engines on the same N prompts: the share on which they choose the same label (ties and prompts
    without numbers count as different), and the differences of label log-probabilities in nats."""

    prompts: int
    same_choice: float
    largest_difference_nats: float
    median_difference_nats: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def engine(next_tokens: NextTokens | None = None, adapters: Sequence[Path] = ()) -> Callable[..., Scores]:
    """What a Drawing takes as letters_engine: letters by vLLM, whose engine is started at the first call and
    kept. adapters: all that will be asked for; next_tokens: another source of chosen-token log-probabilities."""
    started: list[NextTokens] = [next_tokens] if next_tokens else []

    def score(
        loaded: Loaded,
        adapter: Path | None,
        personas: Sequence[Persona],
        items: Sequence[Item],
        progress: Progress | None = None,
    ) -> Scores:
        if not started:
            from leakfast.generation.vllm.letters import NextTokens as Engine

            started.append(Engine(loaded, adapters).logprobs)
        return by_next_tokens(started[0], loaded, adapter, personas, items, progress)

    return score


def by_next_tokens(
    next_tokens: NextTokens,
    loaded: Loaded,
    adapter: Path | None,
    personas: Sequence[Persona],
    items: Sequence[Item],
    progress: Progress | None = None,
) -> Scores:
    """Scores of the letters from chosen-token log-probabilities: same prompts, ids and reasons as `letters`,
    but for the one generated token that has to fit too."""
    return letters_by(
        lambda sequences, wanted: next_tokens(list(sequences), wanted, adapter, progress),
        loaded,
        personas,
        items,
        room=1,
    )


def compare(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    other: Callable[..., Scores] | None = None,
) -> Agreement:
    """The packed engine beside `other` (default: vLLM) on personas × items of the unadapted model.

    Raises ModelError where vLLM is not installed, ValueError for nothing to compare."""
    mine = letters(loaded, personas, items)
    theirs = (other or engine())(loaded, None, personas, items)
    both = (mine.reason == OK) & (theirs.reason == OK)
    if not both.any():
        raise ValueError("no prompt has numbers from both engines")
    a, b = mine.logprobs[both], theirs.logprobs[both]
    there = np.isfinite(a)
    difference = np.abs(a - b)[there]
    same = [_choice(one) is not None and _choice(one) == _choice(two) for one, two in zip(a, b, strict=True)]
    finite = difference[np.isfinite(difference)]
    return Agreement(
        int(both.sum()),
        float(np.mean(same)),
        float(finite.max()) if len(finite) == len(difference) else float("nan"),
        float(np.median(finite)) if len(finite) else float("nan"),
    )


def _choice(logprobs: np.ndarray) -> int | None:
    """The label with the highest log-probability; None in a tie or without numbers."""
    if not np.isfinite(logprobs).any():
        return None
    top = np.flatnonzero(logprobs == np.nanmax(logprobs))
    return int(top[0]) if len(top) == 1 else None
