"""Measuring how wide vLLM runs best on the device at hand: engines of candidate widths, one after the other in
processes of their own, draw the same completions of the unadapted model. Leaves keeping the best to its caller."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, ModelError
from leakfast.generation.backends import check_sampling
from leakfast.generation.contract import Request, Sampling, Work, requests_for
from leakfast.generation.vllm.parallel import Parallel
from leakfast.generation.vllm.start import spec_of
from leakfast.generation.vllm.widths import Width
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger("leakfast.generate")


@dataclass(frozen=True)
class Trial:
    """A width and what came of it: output tokens a second, or why there are none."""

    width: Width
    tokens_per_s: float | None
    output_tokens: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Candidates:
    """Values of a Width's fields to be tried."""

    seats: Sequence[int]
    batched_tokens: Sequence[int | None] = (None,)
    memory: Sequence[float] = (0.94,)


def tune(
    loaded: Loaded,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    completions: int = 2048,
    seed: int = 42,
    progress: Progress | None = None,
    **candidates: Any,
) -> tuple[Trial, list[Trial]]:
    """The fastest width and all that were tried, one setting after the other: seats, then tokens a step, then
    memory, then fewer CUDA-graph sizes (a GPU alone), each with the best found of those before. candidates: fields of
    `Candidates`.

    `completions` of `prompts` in turn, timed from the first request to the last completion, after a tenth as many
    to warm up. The model serves for its tokenizer and config; it may lie on the CPU. Raises ModelError where no
    width runs, InputError for nothing to try."""
    import torch

    given = Candidates(**candidates)
    fields = (given.seats, given.batched_tokens, given.memory)
    if not (all(fields) and prompts and completions > 0):
        raise InputError("tune: at least one value each, one prompt and one completion are needed.")
    check_sampling("vllm", sampling)
    each, more = divmod(completions, len(prompts))
    asked = requests_for(prompts, each, seed, "tune") if each else []
    asked += requests_for(prompts[:more], 1, seed + 1, "tune") if more else []
    longest = max(len(request.ids) for request in asked) + sampling.max_new_tokens
    trials: dict[Width, Trial] = {}

    def run(width: Width) -> Trial:
        if width not in trials:
            if progress is not None:
                progress(len(trials), sum(map(len, fields)), f"{width.seats} seats")
            trials[width] = _tried(loaded, width, asked, sampling, longest)
            log.info("tune: %s", trials[width])
        return trials[width]

    def best() -> Trial:
        ran = [trial for trial in trials.values() if trial.tokens_per_s is not None]
        if not ran:
            raise ModelError(
                f"tune: no engine of {loaded.name} ran: {next(iter(trials.values())).failed} Needed: a width that "
                "fits. Give fewer --seats."
            )
        return max(ran, key=lambda trial: trial.tokens_per_s or 0.0)

    for seats in given.seats:
        run(Width(seats, given.batched_tokens[0], given.memory[0]))
    for tokens in given.batched_tokens[1:]:
        run(replace(best().width, batched_tokens=tokens))
    for share in given.memory[1:]:
        run(replace(best().width, memory=share))
    if torch.cuda.is_available():
        few = best().width
        powers = {2**i for i in range(12) if 2**i <= few.seats}
        run(replace(few, graphs=tuple(sorted({*powers, few.seats}))))
    return best(), list(trials.values())


def _tried(loaded: Loaded, width: Width, asked: Sequence[Request], sampling: Sampling, longest: int) -> Trial:
    """One engine of this width: its rate, or the words it failed with."""
    try:
        engine = Parallel(spec_of(loaded, width=width, longest=longest), 1, again=0)
    except ModelError as error:
        return Trial(width, None, failed=error.message)
    try:
        for _ in engine.stream(_works(asked[: max(1, len(asked) // 10)], width), sampling):
            pass
        began, tokens = time.perf_counter(), 0
        for _, done in engine.stream(_works(asked, width), sampling):
            tokens += sum(len(completion.token_ids) for completion in done)
        return Trial(width, tokens / (time.perf_counter() - began), tokens)
    except ModelError as error:
        return Trial(width, None, failed=error.message)
    finally:
        engine.close()


def _works(asked: Sequence[Request], width: Width) -> Iterator[Work]:
    """The requests in works of about a tenth of them, as a run's shards would be."""
    size = max(1, min(len(asked) // 10, width.seats) or 1)
    for start in range(0, len(asked), size):
        yield Work(start, None, asked[start : start + size])
