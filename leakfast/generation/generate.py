"""Job 3: completions. One request and response contract for every backend, and the face that
turns prompts and adapters into frames. Demands token ids, never text; stores nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.generation.contract import (
    BACKENDS,
    BATCH_COMPLETIONS,
    Completion,
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
        return local.complete(
            loaded,
            requests,
            sampling,
            batch_completions=_width(batch_completions)["batch_completions"],
            progress=progress,
        )
    if loaded.adapter_hash is not None:
        raise ValueError("vLLM attaches adapters itself: give the base model, and adapters to generate()")
    backends.check_sampling("vllm", sampling)
    local.check_lengths(loaded.model, requests, sampling.max_new_tokens)
    return _through_vllm(loaded, [Work(None, None, requests)], sampling, batch_completions, progress)


def _through_vllm(loaded, works, sampling, batch, progress) -> Iterator[list[Completion]]:
    """Whole works, one after the other, from an engine of their own."""
    from leakfast.generation import backends

    adapters = [work.adapter for work in works if work.adapter is not None]
    total, done = sum(work.wanted for work in works), 0

    def shown(some: Sequence[Completion], work: Work) -> None:
        nonlocal done
        done += len(some)
        if progress is not None:
            progress(done, total, "completions")

    with backends.opened(loaded, adapters, "vllm", **_width(batch)) as engine:
        for _, completions in engine.stream(works, sampling, shown):
            yield completions


def _width(batch: int | None) -> dict[str, Any]:
    """What an engine is told of the batch: one that nobody stated goes behind what was measured."""
    return {"batch_completions": BATCH_COMPLETIONS if batch is None else batch, "stated": batch is not None}


def generate(
    model: Any,
    prompts: Sequence[Any],
    adapters: Sequence[str | Path] = (),
    samples: int = 10,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 42,
    backend: str = "transformers",
    dtype: str = "bfloat16",
    behavior: str = "",
    batch_completions: int | None = None,
    progress: Progress | None = None,
) -> Iterator[pl.DataFrame]:
    """Frames of schema `completions`, one per adapter and block of prompts; no adapter means the base.

    model: "organism", hub id, folder, (model, tokenizer) pair or Loaded. prompts: chat.Prompt objects, or
    strings sent as user turns without a system message (persona `no_persona`). adapters: peft folders;
    None among them is the unadapted model. batch_completions: as for complete. Memory stays flat: a frame is yielded
    as its block finishes.
    """
    from leakfast import models
    from leakfast.generation import backends
    from leakfast.models.attach import adapted

    sampling = Sampling(temperature, top_p, max_new_tokens)
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"generate: backend {backend!r} given. Use one of: auto, {', '.join(BACKENDS)}.")
    loaded = model if isinstance(model, models.Loaded) else models.load(model, dtype=dtype)
    prompts = _as_prompts(loaded.tokenizer, prompts)
    live = any(path is not None for path in adapters)
    backend = backends.choose(backend, loaded, live_lora=live)
    if backend == "vllm":
        backends.check_sampling("vllm", sampling)
        return _generate_by_vllm(
            loaded,
            prompts,
            list(adapters) or [None],
            samples,
            sampling,
            seed,
            behavior,
            batch_completions,
            progress,
        )
    return _generate(
        loaded,
        prompts,
        list(adapters) or [None],
        samples,
        sampling,
        seed,
        backend,
        behavior,
        batch_completions,
        progress,
        adapted,
    )


def _generate(
    loaded, prompts, adapters, samples, sampling, seed, backend, behavior, batch, progress, adapted
) -> Iterator[pl.DataFrame]:
    from leakfast import models

    for path in adapters:
        card = models.read_card(path) if path is not None else None
        digest = models.adapter_hash(path) if path is not None else "base"
        requests = requests_for(prompts, samples, seed, digest)
        with adapted(loaded, path) as current:
            for done in complete(
                current, requests, sampling, backend=backend, batch_completions=batch, progress=progress
            ):
                yield to_frame(
                    current,
                    prompts,
                    requests,
                    done,
                    behavior=behavior or (card.behavior if card else ""),
                    adapter=Path(path).name if path is not None else "base",
                    source=card.source if card else None,
                )


def _generate_by_vllm(
    loaded, prompts, adapters, samples, sampling, seed, behavior, batch, progress
) -> Iterator[pl.DataFrame]:
    """As _generate: one engine for all adapters, a frame for each block of prompts under each."""
    from leakfast import models
    from leakfast.generation import backends
    from leakfast.generation.transformers import check_lengths

    size = max(1, 4 * _width(batch)["batch_completions"] // samples)
    works = []
    for path in adapters:
        digest = models.adapter_hash(path) if path is not None else "base"
        requests = requests_for(prompts, samples, seed, digest)
        check_lengths(loaded.model, requests, sampling.max_new_tokens)
        for start in range(0, len(prompts), size):
            block = slice(start, start + size)
            works.append(Work(block, Path(path) if path is not None else None, requests[block]))
    total, finished = len(adapters) * len(prompts) * samples, 0

    def shown(some: Sequence[Completion], work: Work) -> None:
        nonlocal finished
        finished += len(some)
        if progress is not None:
            progress(finished, total, "completions")

    named = [Path(path) for path in adapters if path is not None]
    with backends.opened(loaded, named, "vllm", **_width(batch)) as engine:
        for work, done in engine.stream(works, sampling, shown):
            card = models.read_card(work.adapter) if work.adapter is not None else None
            yield to_frame(
                loaded,
                prompts[work.key],
                work.requests,
                done,
                behavior=behavior or (card.behavior if card else ""),
                adapter=work.adapter.name if work.adapter is not None else "base",
                source=card.source if card else None,
            )


def _as_prompts(tokenizer: Any, prompts: Sequence[Any]) -> list[Any]:
    from leakfast.prompts import chat

    made = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = chat.Prompt("no_persona", index, prompt, chat.render(tokenizer, None, prompt))
        made.append(prompt)
    return made
