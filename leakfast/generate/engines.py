"""Backends behind one contract: works (requests under an adapter) go in, whole works come out. Picks the
backend and says why, and checks an engine against the model before a run. Leaves tables to the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leakfast.errors import InputError, ModelError
from leakfast.generate import BACKENDS, Completion, Sampling, Work

log = logging.getLogger("leakfast.generate")

Progress = Callable[[int, Work], None]  # completions just finished, and whose
CHECKS = ("default-system", "token-ids", "logits")  # names under which a failed check may be let pass
_NEAR_NATS = {"float32": 1e-2, "bfloat16": 0.35}  # log-probabilities of one token in two engines
_PROBE_TOKENS = 8


class Engine(Protocol):
    """What a backend offers: `stream` yields each work with all its completions once it is whole."""

    def stream(
        self, works: Iterable[Work], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]: ...

    def described(self, sampling: Sampling) -> dict[str, Any]: ...


def choose(backend: str, loaded: Any) -> str:
    """`transformers` or `vllm`; "auto" takes vLLM where it is installed, can load the model, and has a GPU
    to be fast on, and says why it did or did not. Raises InputError for another name."""
    if backend in BACKENDS:
        return backend
    if backend != "auto":
        raise InputError(f"generate: backend {backend!r} given. Use one of: auto, {', '.join(BACKENDS)}.")
    import torch

    from leakfast.generate import vllm

    runs, why = vllm.available()
    if runs and not torch.cuda.is_available():
        runs, why = False, "without a GPU vLLM takes longer to start than it saves (--backend vllm takes it)"
    if runs and not (loaded.path or loaded.revision):
        runs, why = False, f"vLLM loads a folder or a hub id, and {loaded.name} was given as a loaded model"
    log.info("generation: %s (%s)", "vllm" if runs else "transformers", why)
    return "vllm" if runs else "transformers"


@contextmanager
def opened(
    loaded: Any,
    adapters: Sequence[Path],
    backend: str,
    *,
    batch_completions: int = 640,
    longest: int | None = None,
) -> Iterator[Engine]:
    """The engine of `backend` for a base model and all adapters that will be asked for, closed afterwards.

    batch_completions: completions decoded at once; longest: tokens of the longest prompt with its reply."""
    if backend == "transformers":
        yield _Local(loaded, batch_completions)
        return
    from leakfast.generate import vllm

    engine = vllm.Engine(loaded, adapters, seats=batch_completions, longest=longest)
    try:
        yield engine
    finally:
        engine.close()


class _Local:
    """The transformers backend: one work after the other, an adapter kept on while works ask for it."""

    def __init__(self, loaded: Any, batch_completions: int) -> None:
        self.loaded, self.batch = loaded, batch_completions

    def described(self, sampling: Sampling) -> dict[str, Any]:
        import transformers

        return {
            "backend": "transformers",
            "version": transformers.__version__,
            "settings": {"dtype": self.loaded.dtype, "batch_completions": self.batch},
            "sampling": {
                "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
                "seed": "per completion",
            },
        }  # fmt: skip

    def stream(
        self, works: Iterable[Work], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        from leakfast.generate import transformers as local
        from leakfast.generate.adapted import adapted

        with ExitStack() as stack:
            current, under = None, None
            for work in works:
                if current is None or work.adapter != under:
                    stack.close()
                    current, under = stack.enter_context(adapted(self.loaded, work.adapter)), work.adapter
                done: list[Completion] = []
                for batch in local.complete(current, work.requests, sampling, batch_completions=self.batch):
                    done += batch
                    if progress is not None:
                        progress(len(batch), work)
                yield work, done


# ── checks before anything is drawn ──────────────────────────────────────────────────────────────────
def check_default_system(tokenizer: Any, wanted: str | None, allow: Collection[str] = ()) -> None:
    """The template's default system prompt is what the study says; None as `wanted`: nothing is said."""
    if wanted is None:
        return
    from leakfast import chat

    found = chat.default_system(tokenizer)
    if found != wanted:
        _fail(
            "default-system",
            f"the study says that the chat template's default system prompt is {wanted!r}, but this model's is "
            f"{found!r}. Needed: the model and template the study was written for. Correct template_system or model",
            allow,
        )


def check_engine(
    engine: Any, loaded: Any, adapters: Sequence[Path | None], personas: Sequence[Any], questions: Sequence[str],
    allow: Collection[str] = (),
) -> None:  # fmt: skip
    """Canary of an engine beside transformers: its tokenizer renders the same ids, and its greedy tokens after a
    prompt are as likely as the model says, under the base and each adapter (peft's), all in one batch.

    Raises ModelError naming the check, AdapterError for an adapter that does not fit or changes nothing."""
    from leakfast import chat, models

    system = [p.system for p in personas[:4]]
    for text in system:
        mine, other = (chat.render(t, text, questions[0]) for t in (loaded.tokenizer, engine.tokenizer))
        if mine != other:
            _fail(
                "token-ids",
                f"{loaded.name} has other token ids in vLLM ({len(other)} tokens) than in transformers ({len(mine)}) "
                "for the same prompt. Needed: one tokenizer. Use --backend transformers",
                allow,
            )
    ids = chat.render(loaded.tokenizer, system[0], questions[0])
    bound = _NEAR_NATS.get(loaded.dtype, 0.35)
    worst = 0.0
    answers = engine.probe(ids, adapters, _PROBE_TOKENS)
    for adapter, (tokens, got) in zip(adapters, answers, strict=True):
        with models.with_adapter(loaded, adapter) if adapter is not None else nullcontext(loaded) as current:
            log_probs = _log_probs(current, [*ids, *tokens[:-1]])[len(ids) - 1 :]
        wanted = log_probs[np.arange(len(tokens)), tokens]
        # as likely as transformers says, and as likely as its likeliest token: greedy, up to rounding
        apart = float(max(np.abs(got - wanted).max(), (log_probs.max(axis=1) - wanted).max()))
        worst = max(worst, apart)
        if not apart <= bound:
            _fail(
                "logits",
                f"under {adapter or 'no adapter'} vLLM's greedy tokens are {apart:.2g} nats from transformers' "
                f"(at most {bound:g}). Needed: the same model in both. Use --backend transformers",
                allow,
            )
    log.info("canary: same token ids, greedy log-probabilities within %.1e nats of transformers'", worst)


def _log_probs(loaded: Any, ids: Sequence[int]) -> np.ndarray:
    """(T, V) float64 nats of the token after each of `ids`."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device)).logits[0]
        return logits.float().log_softmax(-1).double().cpu().numpy()


def _fail(check: str, what: str, allow: Collection[str]) -> None:
    if check in allow:
        log.warning("canary: %s; let pass by --allow %s", what, check)
        return
    raise ModelError(f"canary: {what}, or let it pass: --allow {check}.")
