"""Job 3: completions. One request and response contract for every backend, and the face that
turns prompts and adapters into frames. Demands token ids, never text; stores nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from leakfast.prompts.reasoning import Read

Progress = Callable[[int, int, str], None]

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
    among them."""

    key: Any
    adapter: Path | None
    requests: Sequence[Request]
    there: frozenset[tuple[int, int]] = frozenset()

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
    from leakfast.generate import engines
    from leakfast.generate import transformers as local

    if engines.choose(backend, loaded) == "transformers":
        return local.complete(
            loaded, requests, sampling, batch_completions=_width(batch_completions)["batch_completions"],
            progress=progress,
        )  # fmt: skip
    if loaded.adapter_hash is not None:
        raise ValueError("vLLM attaches adapters itself: give the base model, and adapters to generate()")
    engines.check_sampling("vllm", sampling)
    local.check_lengths(loaded.model, requests, sampling.max_new_tokens)
    return _through_vllm(loaded, [Work(None, None, requests)], sampling, batch_completions, progress)


def _through_vllm(loaded, works, sampling, batch, progress) -> Iterator[list[Completion]]:
    """Whole works, one after the other, from an engine of their own."""
    from leakfast.generate import engines

    adapters = [work.adapter for work in works if work.adapter is not None]
    total, done = sum(work.wanted for work in works), 0

    def shown(some: Sequence[Completion], work: Work) -> None:
        nonlocal done
        done += len(some)
        if progress is not None:
            progress(done, total, "completions")

    with engines.opened(loaded, adapters, "vllm", **_width(batch)) as engine:
        for _, completions in engine.stream(works, sampling, shown):
            yield completions


def _width(batch: int | None) -> dict[str, Any]:
    """What an engine is told of the batch: one that nobody stated goes behind what was measured."""
    return {"batch_completions": BATCH_COMPLETIONS if batch is None else batch, "stated": batch is not None}


def to_frame(
    loaded: Any,
    prompts: Sequence[Any],
    requests: Sequence[Request],
    completions: Iterable[Completion],
    *,
    behavior: str,
    adapter: str,
    source: str | None,
    answer_tokens: int | None = None,
) -> pl.DataFrame:
    """Completions as a frame of schema `completions` (+ source, n_prompt_tokens, token_ids; + reasoning and
    n_reasoning_tokens where a model reasoned), by request and sample.

    text: the answer, which follows the last closed reasoning block. status: "unclosed-reasoning" when a block was open
    at the end (text is then the whole, an opener before it), else "empty" when only whitespace came back, else
    "truncated" when max_new_tokens ended it, else "ok". answer_tokens: longest answer, where more may be drawn for
    reasoning; a longer one is cut there, as if max_new_tokens had ended it.
    """
    import polars as pl

    from leakfast.storage import schema

    done = sorted(completions, key=lambda c: (c.request, c.sample))
    done, reads = _read(loaded.tokenizer, done, answer_tokens)
    status = [_status(one, c) for one, c in zip(reads, done, strict=True)]
    chosen = [prompts[c.request] for c in done]
    frame = pl.DataFrame(
        {
            "behavior": [behavior] * len(done),
            "adapter": [adapter] * len(done),
            "persona": [p.persona for p in chosen],
            "question": [p.question_index for p in chosen],
            "sample": [c.sample for c in done],
            "seed": [requests[c.request].seeds[c.sample] for c in done],
            "text": [one.text for one in reads],
            "n_tokens": [len(c.token_ids) for c in done],
            "finish_reason": [c.finish_reason for c in done],
            "status": status,
            "source": [source] * len(done),
            "n_prompt_tokens": [len(requests[c.request].ids) for c in done],
            "token_ids": [c.token_ids for c in done],
        },
        schema={
            **schema.columns("completions"),
            "source": pl.String(),
            "n_prompt_tokens": pl.Int32(),
            "token_ids": pl.List(pl.Int32()),
        },
    )
    if any(one.reasoning is not None for one in reads):
        frame = frame.with_columns(
            pl.Series("reasoning", [one.reasoning for one in reads], pl.String()),
            pl.Series("n_reasoning_tokens", [one.n_tokens for one in reads], pl.Int32()),
        )
    return schema.check(frame, "completions")


def _read(
    tokenizer: Any, done: list[Completion], answer_tokens: int | None
) -> tuple[list[Completion], list[Read]]:
    """Completions and what they are read as, answers that are too long cut."""
    from leakfast.prompts import reasoning, templates

    opened = bool(getattr(tokenizer, "chat_template", None)) and templates.opens_reasoning(tokenizer)

    def read(some: list[Completion]) -> list[Read]:
        ids = [c.token_ids for c in some]
        return reasoning.read(tokenizer, ids, decode(tokenizer, ids), opened=opened)

    reads = read(done)
    if answer_tokens is None:
        return done, reads
    long = [
        i for i, (c, one) in enumerate(zip(done, reads, strict=True))
        if not one.is_open and len(c.token_ids) - one.n_tokens > answer_tokens
    ]  # fmt: skip
    for i in long:
        ids = done[i].token_ids[: reads[i].n_tokens + answer_tokens]
        done[i] = replace(done[i], token_ids=ids, finish_reason="length")
    for i, one in zip(long, read([done[i] for i in long]), strict=True):
        reads[i] = one
    return done, reads


def _status(one: Read, completion: Completion) -> str:
    from leakfast.prompts.reasoning import UNCLOSED

    if one.is_open:
        return UNCLOSED
    if not one.text.strip():
        return "empty"
    return "truncated" if completion.finish_reason == "length" else "ok"


def decode(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of generated ids, special tokens (turn ends among them) left out, spacing untouched."""
    if not len(token_ids):
        return []
    return tokenizer.batch_decode(
        [list(ids) for ids in token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


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
    from leakfast.generate import engines
    from leakfast.models.attach import adapted

    sampling = Sampling(temperature, top_p, max_new_tokens)
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"generate: backend {backend!r} given. Use one of: auto, {', '.join(BACKENDS)}.")
    loaded = model if isinstance(model, models.Loaded) else models.load(model, dtype=dtype)
    prompts = _as_prompts(loaded.tokenizer, prompts)
    live = any(path is not None for path in adapters)
    backend = engines.choose(backend, loaded, live_lora=live)
    if backend == "vllm":
        engines.check_sampling("vllm", sampling)
        return _generate_by_vllm(
            loaded, prompts, list(adapters) or [None], samples, sampling, seed, behavior, batch_completions, progress
        )  # fmt: skip
    return _generate(
        loaded, prompts, list(adapters) or [None], samples, sampling, seed, backend, behavior,
        batch_completions, progress, adapted,
    )  # fmt: skip


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
                    current, prompts, requests, done,
                    behavior=behavior or (card.behavior if card else ""),
                    adapter=Path(path).name if path is not None else "base",
                    source=card.source if card else None,
                )  # fmt: skip


def _generate_by_vllm(
    loaded, prompts, adapters, samples, sampling, seed, behavior, batch, progress
) -> Iterator[pl.DataFrame]:
    """As _generate: one engine for all adapters, a frame for each block of prompts under each."""
    from leakfast import models
    from leakfast.generate import engines
    from leakfast.generate.transformers import check_lengths

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
    with engines.opened(loaded, named, "vllm", **_width(batch)) as engine:
        for work, done in engine.stream(works, sampling, shown):
            card = models.read_card(work.adapter) if work.adapter is not None else None
            yield to_frame(
                loaded, prompts[work.key], work.requests, done,
                behavior=behavior or (card.behavior if card else ""),
                adapter=work.adapter.name if work.adapter is not None else "base",
                source=card.source if card else None,
            )  # fmt: skip


def _as_prompts(tokenizer: Any, prompts: Sequence[Any]) -> list[Any]:
    from leakfast.prompts import chat

    made = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = chat.Prompt("no_persona", index, prompt, chat.render(tokenizer, None, prompt))
        made.append(prompt)
    return made
