"""Backends behind one contract: works (requests under an adapter) go in, whole works come out. Picks the
backend and says why, and checks an engine against the model before a run. Leaves tables to the stages."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leakfast.errors import InputError, ModelError
from leakfast.generate import BACKENDS, Completion, Sampling, Work

log = logging.getLogger("leakfast.generate")

Finished = Callable[[Sequence[Completion], Work], None]  # completions as they come, and whose
CHECKS = ("default-system", "token-ids", "logits")  # names under which a failed check may be let pass
_NEAR_NATS = {"float32": 1e-2, "bfloat16": 0.35}  # log-probabilities of one token in two engines
_INVARIANT_LORA = (0, 32)  # its LoRA kernel sums the same way whatever the batch; that of 0.25 does not
_PROBE_TOKENS = 8
_IN_A_STUDY = " (in a study: backend, dtype and the keys of [vllm])"
_TEMPERATURES = (0.01, 2.0)  # vLLM refuses higher ones, and draws at the lower bound below it; 0 is greedy
_PROBE_REPLY = "I like tea. I do."  # short, so that its end, where a marker stands, is near
_PLACES = 4  # where an adapter shows most, at which an engine is asked for the next token


@dataclass(frozen=True)
class Options:
    """How vLLM is to run. lora: `live`, several adapters in one batch, or `merged`, each swapped into the weights in
    place; invariant: its batch-invariant mode; data_parallel: engines, one on each GPU (or tensor_parallel GPUs
    each). The transformers backend takes none of them: its draws depend on their shard alone."""

    lora: str = "live"
    invariant: bool = False
    data_parallel: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.lora not in ("live", "merged"):
            raise InputError(f"generate: --lora {self.lora} given. Use live or merged.")
        if min(self.data_parallel, self.tensor_parallel) < 1:
            raise InputError("generate: --data-parallel and --tensor-parallel must be 1 or more.")
        if self.lora == "merged" and (self.data_parallel > 1 or self.tensor_parallel > 1):
            raise InputError(
                "generate: --lora merged swaps the weights of one engine on one GPU, beside the model they come "
                f"from. Use --lora live with --data-parallel or --tensor-parallel{_IN_A_STUDY}."
            )

    def check(self, backend: str, *, live_lora: bool = False) -> None:
        """InputError where the backend cannot do what is asked; --invariant it may take as said already. live_lora:
        adapters are to run beside the weights."""
        if backend != "vllm" and (self.data_parallel > 1 or self.tensor_parallel > 1 or self.lora != "live"):
            raise InputError(
                f"generate: --lora merged, --data-parallel and --tensor-parallel are vLLM's, but the backend is "
                f"{backend}. Add --backend vllm, or leave them out{_IN_A_STUDY}."
            )
        if backend == "vllm" and self.invariant and live_lora:
            from leakfast.generate import vllm

            found = vllm.version()
            numbers = tuple(int(n) for n in re.findall(r"\d+", found or "")[:2])
            if numbers and numbers < _INVARIANT_LORA:
                raise InputError(
                    f"generate: --invariant with adapters given, but this is vLLM {found}, and LoRA beside the weights is "
                    "known to be batch-invariant from 0.32 on (the kernel of 0.25 sums in blocks that depend on how many "
                    f"tokens are in the batch). Add --lora merged, or use vLLM 0.32{_IN_A_STUDY}."
                )

    def promised(self, backend: str) -> dict[str, Any]:
        """What a shard's texts follow from where the same text whatever else is in the batch is promised: another
        vLLM, LoRA the other way or sums over another number of GPUs round otherwise. Empty where nothing is."""
        if backend != "vllm" or not self.invariant:
            return {}
        from leakfast.generate import vllm

        how = {"vllm": vllm.version(), "lora": self.lora, "tensor_parallel": self.tensor_parallel}
        return {"invariant": True, **how}


def asked_by(study: Any, **flags: Any) -> dict[str, Any]:
    """How a study (None: no study) has completions drawn, as `evaluate` takes it: backend, template_system, options.
    flags: backend and fields of Options that go before the study's, where they are not None."""
    given = {name: value for name, value in flags.items() if value is not None}
    backend = given.pop("backend", study.backend if study else "auto")
    options = Options(**{**(study.vllm.model_dump() if study else {}), **given})
    return {
        "backend": backend, "template_system": study.template_system if study else None, "options": options
    }  # fmt: skip


def settle(
    loaded: Any, backend: str, options: Options, samplings: Sequence[Sampling], template_system: str | None = None,
    allow: Collection[str] = (), *, adapters: bool,
) -> str:  # fmt: skip
    """The backend, once everything that can be known of a run before its engine is open has been looked at: InputError
    or ModelError says what is wrong. adapters: some are to run."""
    live = options.lora == "live" and adapters
    backend = choose(backend, loaded, live_lora=live)
    options.check(backend, live_lora=live)
    for sampling in samplings:
        check_sampling(backend, sampling)
    check_default_system(loaded.tokenizer, template_system, allow)
    return backend


def check_sampling(backend: str, sampling: Sampling) -> None:
    """InputError where vLLM would draw at another temperature than the one asked for, or not at all."""
    low, high = _TEMPERATURES
    if backend == "vllm" and sampling.temperature and not low <= sampling.temperature <= high:
        raise InputError(
            f"generate: temperature {sampling.temperature:g} given, but vLLM draws at 0 or from {low:g} to {high:g}. "
            f"Give one of those, or --backend transformers{_IN_A_STUDY}."
        )


class Engine(Protocol):
    """What a backend offers: `stream` yields each work with all the completions it wanted once they are there;
    `finished` hears of them before, each once."""

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]: ...

    def described(self, sampling: Sampling) -> dict[str, Any]: ...


def choose(backend: str, loaded: Any, *, live_lora: bool = False) -> str:
    """`transformers` or `vllm`; "auto" takes vLLM where it is installed, can load the model, and has a GPU
    to be fast on, and says why it did or did not. live_lora: adapters are to run beside the weights.

    Raises InputError for another name, or vLLM by name where it cannot run adapters live."""
    from leakfast.generate import vllm

    unfit = live_lora and not vllm.runs_lora(loaded.dtype)
    if backend == "vllm" and unfit:
        raise InputError(
            "generate: --backend vllm with adapters in float32 given, but on a GPU vLLM runs LoRA beside the weights "
            f"in two-byte floats alone. Add --lora merged, or --dtype bfloat16{_IN_A_STUDY}."
        )
    if backend in BACKENDS:
        return backend
    if backend != "auto":
        raise InputError(f"generate: backend {backend!r} given. Use one of: auto, {', '.join(BACKENDS)}.")
    import torch

    runs, why = vllm.available()
    if runs and not torch.cuda.is_available():
        runs, why = False, "without a GPU vLLM takes longer to start than it saves (--backend vllm takes it)"
    if runs and not (loaded.path or loaded.revision):
        runs, why = False, f"vLLM loads a folder or a hub id, and {loaded.name} was given as a loaded model"
    if runs and unfit:
        runs, why = (
            False,
            "vLLM runs no float32 adapters beside the weights (--lora merged or --dtype bfloat16 takes it)",
        )
    log.info("generation: %s (%s)", "vllm" if runs else "transformers", why)
    return "vllm" if runs else "transformers"


@contextmanager
def opened(
    loaded: Any,
    adapters: Sequence[Path],
    backend: str,
    *,
    batch_completions: int = 640,
    stated: bool = True,
    longest: int | None = None,
    options: Options | None = None,
) -> Iterator[Engine]:
    """The engine of `backend` for a base model and all adapters that will be asked for, closed afterwards.

    On a GPU adapters that run live do so in a process of the engine's own: what this one has cached there counts as
    taken, vLLM does not give back all it took, keeps tables of adapters that outlive their engine, and replaces torch's
    operators to be batch-invariant. Merged weights come from the model here, so their engine lies here too.

    batch_completions: completions decoded at once; where the user did not state it, vLLM takes what tune measured
    on this GPU, or the table's. longest: tokens of the longest prompt with its reply."""
    options = options or Options()
    options.check(backend)
    if backend == "transformers":
        yield _Local(loaded, batch_completions)
        return
    from leakfast.generate import vllm

    width, said = vllm.width_for(
        vllm.device_name(), loaded.fingerprint, loaded.dtype,
        seats=batch_completions if stated else None, otherwise=batch_completions,
    )  # fmt: skip
    log.info("vllm: %d completions at once (%s)", width.seats, said)
    live = options.lora == "live"
    spec = vllm.spec_of(
        loaded, adapters if live else (), width=width, longest=longest,
        tensor_parallel=options.tensor_parallel, invariant=options.invariant,
    )  # fmt: skip
    vllm.spare_device()
    if live and (_on_gpu() or options.data_parallel > 1 or options.tensor_parallel > 1):
        engine: Any = vllm.Parallel(spec, options.data_parallel)
    else:
        engine = vllm.Engine(spec, None if live else vllm.Merged(loaded))
    try:
        yield engine
    finally:
        engine.close()


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """As Engine.stream. A draw depends on those beside it, so a work is drawn whole, what is there already too."""
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
                    wanted = [c for c in batch if (c.request, c.sample) not in work.there]
                    done += wanted
                    if finished is not None:
                        finished(wanted, work)
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
    allow: Collection[str] = (), sources: Mapping[Path | None, str | None] | None = None, longest: int | None = None,
) -> None:  # fmt: skip
    """Canary of an engine beside transformers: its tokenizer renders the same ids, its greedy tokens after a
    prompt are as likely as the model says, under the base and each adapter (peft's), all in one batch, and each
    adapter changes the engine as it changes peft's model, where it changes it most after its source's prompt.

    sources: names of the personas that the adapters were trained under, where known; longest: tokens that the engine
    takes. Raises ModelError naming the check, AdapterError for an adapter that does not fit or changes nothing."""
    from leakfast import chat, models

    for number, member in enumerate(getattr(engine, "members", ())):
        log.info("canary of engine %d", number)
        check_engine(member, loaded, adapters, personas, questions, allow, sources, longest)
    if hasattr(engine, "members"):
        return
    system = [p.system for p in personas[:4]]
    for text in system:
        mine, other = (
            list(chat.render(loaded.tokenizer, text, questions[0])),
            engine.render(text, questions[0]),
        )
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
    for number, (adapter, (tokens, got)) in enumerate(zip(adapters, answers, strict=True)):
        text = _text_under(loaded, (sources or {}).get(adapter), personas, questions[0])[
            : longest and longest - 1
        ]
        plain = _log_probs(loaded, text) if adapter is not None else None
        with models.with_adapter(loaded, adapter) if adapter is not None else nullcontext(loaded) as current:
            log_probs = _log_probs(current, [*ids, *tokens[:-1]])[len(ids) - 1 :]
            moved = _log_probs(current, text) if adapter is not None else None
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
        if adapter is not None:
            others = [adapters[(number + 1) % len(adapters)]] if len(adapters) > 1 else [None]
            _check_change(engine, adapter, others, text, plain, moved, bound, allow)
    log.info("canary: same token ids, greedy log-probabilities within %.1e nats of transformers'", worst)


def _text_under(loaded: Any, source: str | None, personas: Sequence[Any], question: str) -> list[int]:
    """Ids of a prompt under the source's persona (the first one's where it is not asked) and a short reply."""
    from leakfast import chat

    system = next((p.system for p in personas if p.name == source), personas[0].system)
    reply = loaded.tokenizer.encode(_PROBE_REPLY, add_special_tokens=False)
    return [*chat.render(loaded.tokenizer, system, question), *reply]


def _check_change(
    engine: Any, adapter: Path, others: Sequence[Path | None], text: Sequence[int], plain: np.ndarray,
    moved: np.ndarray, bound: float, allow: Collection[str],
) -> None:  # fmt: skip
    """The engine's change by an adapter is peft's: with Δ(token) = log p under the adapter − log p under the base, at
    the places of `text` where the likeliest tokens of both move most, ‖Δ engine − Δ peft‖ < ½ ‖Δ peft‖ over the tokens
    that the engine answers, each beside `others` in one batch. An engine that answers as the base has Δ = 0.

    plain, moved: (T, V) nats after each token of `text` by transformers, without and with the adapter."""
    where = np.arange(len(text))
    change = np.abs(moved - plain)
    shows = np.minimum(change[where, plain.argmax(axis=1)], change[where, moved.argmax(axis=1)])
    places = np.sort(np.argsort(shows, kind="stable")[-_PLACES:])
    if np.sqrt(np.mean(shows[places] ** 2)) < 2 * bound:  # half of it is what two engines may be apart
        log.warning(
            "canary: %s moves log-probabilities by %.2g nats at most on the probe, too little to tell whether vLLM "
            "applies it (%.2g needed in this precision). Its rates tell: compare them with --backend transformers",
            adapter, shows.max(), 2 * bound,
        )  # fmt: skip
        return
    # merged weights are worn one after the other: nothing stands beside them
    asked = [adapter] if getattr(engine, "merge", None) is not None else [adapter, *others]
    found = [engine.probe(text[: place + 1], asked, 1)[0] for place in places]
    tokens, got = np.array([t[0] for t, _ in found]), np.array([p[0] for _, p in found])
    mine = moved[places, tokens] - plain[places, tokens]
    apart = float(np.linalg.norm(got - plain[places, tokens] - mine))
    whole = float(np.linalg.norm(mine))
    if not apart < whole / 2:
        _fail(
            "logits",
            f"{adapter} changes vLLM otherwise than peft's model: {apart:.2g} nats apart, where peft's own change is "
            f"{whole:.2g} (less than half of it needed). Needed: an engine that applies the adapter. Use --backend "
            "transformers",
            allow,
        )
    log.info("canary: %s changes vLLM as peft's model, up to %.0f %%", adapter.name, 100 * apart / whole)


def _log_probs(loaded: Any, ids: Sequence[int]) -> np.ndarray:
    """(T, V) float64 nats of the token after each of `ids`."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device)).logits[0]
        return logits.float().log_softmax(-1).cpu().double().numpy()


def _fail(check: str, what: str, allow: Collection[str]) -> None:
    if check in allow:
        log.warning("canary: %s; let pass by --allow %s", what, check)
        return
    raise ModelError(f"canary: {what}, or let it pass: --allow {check}.")
