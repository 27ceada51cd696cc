"""What every backend takes and gives: sampling, requests, completions, works. Demands token ids, never text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leakfast.errors import InputError

BACKENDS = ("transformers", "vllm")


BATCH_COMPLETIONS = 640  # decoded at once where nobody says otherwise


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p in (0, 1]; max_new_tokens ≥ 1. stop: texts that end a
    reply once one of them stands in it whole (finish_reason `marker`); what stands before is not changed by it."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"sampling: temperature {self.temperature} given, but it must be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling: top_p {self.top_p} given, but it must lie in (0, 1].")
        if self.max_new_tokens < 1:
            raise InputError(
                f"sampling: max_new_tokens {self.max_new_tokens} given, but at least 1 is needed."
            )
        if not all(self.stop):
            raise InputError("sampling: an empty text to stop at given. Leave it out.")


@dataclass(frozen=True)
class Request:
    """One prompt and the seeds of the completions wanted from it (one per sample).

    label names the prompt in messages; ids are its token ids; seeds are 64-bit.
    """

    label: str
    ids: Sequence[int]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise ValueError(f"request {self.label!r} has no tokens")
        if not len(self.seeds):
            raise ValueError(f"request {self.label!r} asks for no completion")


@dataclass(frozen=True)
class Completion:
    """What came back for sample `sample` of request number `request`.

    token_ids hold every generated token, the stop token included when finish_reason is "stop", all tokens of the
    text that ended it when it is "marker".
    """

    request: int
    sample: int
    token_ids: list[int]
    finish_reason: str  # stop | length | marker


@dataclass(frozen=True)
class Work:
    """Requests to be completed under one adapter (None: the base), and whatever the asker knows them by.

    there: (request, sample) of completions that the asker has already; they are not drawn, and one at least is not
    among them. steer: an intervention (leakfast.steering.arms.Arm) that the model runs under."""

    key: Any
    adapter: Path | None
    requests: Sequence[Request]
    there: frozenset[tuple[int, int]] = frozenset()
    steer: Any = None

    @property
    def wanted(self) -> int:
        """How many completions are to be drawn."""
        return sum(len(request.seeds) for request in self.requests) - len(self.there)


def completion_seed(seed: int, adapter_hash: str, persona: str, question: str, sample: int) -> int:
    """Seed of one completion: SHA-256 of (run seed, adapter, persona, question text, sample index)."""
    from leakfast.storage.seeds import derive_seed

    return derive_seed("completion", seed, adapter_hash, persona, question, sample)


def requests_for(prompts: Iterable[Any], samples: int, seed: int, adapter_hash: str) -> list[Request]:
    """chat.Prompt objects → requests of `samples` completions each, seeds derived as above."""
    if samples < 1:
        raise InputError(f"generate: {samples} samples asked, but at least 1 is needed.")
    return [
        Request(
            label=f"persona {p.persona}, question {p.question_index}",
            ids=p.ids,
            seeds=[completion_seed(seed, adapter_hash, p.persona, p.question, s) for s in range(samples)],
        )
        for p in prompts
    ]


Finished = Callable[[Sequence[Completion], Work], None]  # completions as they come, and whose


class Engine(Protocol):
    """What a backend offers: `stream` yields each work with all the completions it wanted once they are there;
    `finished` hears of them before, each once."""

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]: ...

    def described(self, sampling: Sampling) -> dict[str, Any]: ...
