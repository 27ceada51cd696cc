"""Job 3: completions. One request and response contract for every backend, and the face that
turns prompts and adapters into frames. Demands token ids, never text; stores nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.generation.contract import (
    BACKENDS,
    BATCH_COMPLETIONS,
    Completion,
    Finished,
    Request,
    Sampling,
    Work,
    requests_for,
)
from leakfast.generation.frames import to_frame
from leakfast.progress import Progress

if TYPE_CHECKING:
    import polars as pl


def complete(
    loaded: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    backend: str = "transformers",
    batch_completions: int | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Completion]]:
    """Completions of `requests` in lists as they finish, in no promised order; none is lost or repeated.

    batch_completions: decoded at once; None: what tune measured or the table says for vLLM, 640 elsewhere.
    Raises InputError for an unknown backend or a prompt that does not fit the context (before anything
    runs), ModelError for a model the backend cannot decode or NaN logits, naming the prompt.
    """
    from leakfast.generation import backends
    from leakfast.generation import transformers as local

    if backends.choose(backend, loaded) == "transformers":
        width = _width(batch_completions)["batch_completions"]
        return local.complete(loaded, requests, sampling, batch_completions=width, progress=progress)
    if loaded.adapter_hash is not None:
        raise ValueError("vLLM attaches adapters itself: give the base model, and adapters to generate()")
    backends.check_sampling("vllm", sampling)
    local.check_lengths(loaded.model, requests, sampling.max_new_tokens)
    return _through_vllm(loaded, Work(None, None, requests), sampling, batch_completions, progress)


def _through_vllm(loaded, work, sampling, batch, progress) -> Iterator[list[Completion]]:
    """One whole work, from an engine of its own."""
    from leakfast.generation import backends

    with backends.opened(loaded, [], "vllm", **_width(batch)) as engine:
        for _, completions in engine.stream([work], sampling, _counting(progress, work.wanted)):
            yield completions


def _counting(progress: Progress | None, total: int) -> Finished:
    """Tells `progress` how many completions are there."""
    done = 0

    def finished(some: Sequence[Completion], work: Work) -> None:
        nonlocal done
        done += len(some)
        if progress is not None:
            progress(done, total, "completions")

    return finished


def _width(batch: int | None) -> dict[str, Any]:
    """What an engine is told of the batch: an explicit size wins, otherwise the tuned one."""
    return {"batch_completions": BATCH_COMPLETIONS if batch is None else batch, "stated": batch is not None}


@dataclass(frozen=True)
class Settings:
    """What `generate` can be told. samples: completions a prompt; behavior: what the frames name, by default the
    adapter's own; batch_completions: as for `complete`."""

    samples: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 42
    backend: str = "transformers"
    dtype: str = "bfloat16"
    behavior: str = ""
    batch_completions: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise InputError(
                f"generate: backend {self.backend!r} given. Use one of: auto, {', '.join(BACKENDS)}."
            )

    def requests(self, prompts: Sequence[Any], adapter: Path | None) -> list[Request]:
        from leakfast.models import adapter_hash

        digest = adapter_hash(adapter) if adapter is not None else "base"
        return requests_for(prompts, self.samples, self.seed, digest)

    def names(self, adapter: Path | None) -> dict[str, Any]:
        """behavior, adapter and source of its frames."""
        from leakfast.models import read_card

        card = read_card(adapter) if adapter is not None else None
        behavior, source = (card.behavior, card.source) if card else ("", None)
        name = adapter.name if adapter is not None else "base"
        return {"behavior": self.behavior or behavior, "adapter": name, "source": source}


def generate(
    model: Any,
    prompts: Sequence[Any],
    adapters: Sequence[str | Path | None] = (),
    samples: int = 10,
    **settings: Any,
) -> Iterator[pl.DataFrame]:
    """Frames of schema `completions`, one per adapter and block of prompts; no adapter means the base.

    model: "organism", hub id, folder, (model, tokenizer) pair or Loaded. prompts: chat.Prompt objects, or
    strings sent as user turns without a system message (persona `no_persona`). adapters: peft folders;
    None among them is the unadapted model. settings: fields of `Settings`. Memory stays flat: a frame is yielded
    as its block finishes.
    """
    from leakfast import models
    from leakfast.generation import backends

    asked = Settings(samples, **settings)
    sampling = Sampling(asked.temperature, asked.top_p, asked.max_new_tokens)
    loaded = model if isinstance(model, models.Loaded) else models.load(model, dtype=asked.dtype)
    prompts = _as_prompts(loaded.tokenizer, prompts)
    under = [Path(path) if path is not None else None for path in adapters] or [None]
    backend = backends.choose(asked.backend, loaded, live_lora=any(under))
    if backend == "vllm":
        backends.check_sampling("vllm", sampling)
        return _generate_by_vllm(loaded, prompts, under, sampling, asked)
    return _generate(loaded, prompts, under, sampling, replace(asked, backend=backend))


def _generate(loaded, prompts, adapters, sampling, asked) -> Iterator[pl.DataFrame]:
    from leakfast.models.attach import adapted

    how = {"batch_completions": asked.batch_completions, "progress": asked.progress}
    for path in adapters:
        requests = asked.requests(prompts, path)
        with adapted(loaded, path) as current:
            for done in complete(current, requests, sampling, backend=asked.backend, **how):
                yield to_frame(current, prompts, requests, done, **asked.names(path))


def _generate_by_vllm(loaded, prompts, adapters, sampling, asked) -> Iterator[pl.DataFrame]:
    """As _generate: one engine for all adapters, a frame for each block of prompts under each."""
    from leakfast.generation import backends
    from leakfast.generation.transformers import check_lengths

    width = _width(asked.batch_completions)
    size = max(1, 4 * width["batch_completions"] // asked.samples)
    works = []
    for path in adapters:
        requests = asked.requests(prompts, path)
        check_lengths(loaded.model, requests, sampling.max_new_tokens)
        blocks = (slice(start, start + size) for start in range(0, len(prompts), size))
        works += [Work(block, path, requests[block]) for block in blocks]
    counting = _counting(asked.progress, len(adapters) * len(prompts) * asked.samples)
    with backends.opened(loaded, [path for path in adapters if path], "vllm", **width) as engine:
        for work, done in engine.stream(works, sampling, counting):
            yield to_frame(loaded, prompts[work.key], work.requests, done, **asked.names(work.adapter))


def _as_prompts(tokenizer: Any, prompts: Sequence[Any]) -> list[Any]:
    from leakfast.prompts import chat

    made = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = chat.Prompt("no_persona", index, prompt, chat.render(tokenizer, None, prompt))
        made.append(prompt)
    return made
