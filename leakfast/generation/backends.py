"""Backends behind one contract: works (requests under an adapter) go in, whole works come out. Picks the
backend and says why. Leaves looking at an open engine to the canary, tables to the stages."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakfast.errors import InputError
from leakfast.generation.contract import BACKENDS, Completion, Engine, Finished, Sampling, Work
from leakfast.models import threads
from leakfast.prompts.rendering import rendering_of

log = logging.getLogger("leakfast.generate")

_INVARIANT_LORA = (0, 32)  # its LoRA kernel sums the same way whatever the batch; that of 0.25 does not
_IN_A_STUDY = " (in a study: backend, dtype and the keys of [vllm])"
_TEMPERATURES = (0.01, 2.0)  # vLLM refuses higher ones, and draws at the lower bound below it; 0 is greedy


@dataclass(frozen=True)
class Options:
    """How vLLM is to run. lora: `live`, several adapters in one batch, or `merged`, each swapped into the weights in
    place; invariant: its batch-invariant mode; data_parallel: engines, one on each GPU (or tensor_parallel GPUs
    each). The transformers backend takes none of them: its draws depend on their shard alone. of_study: a study says so
    for wherever vLLM draws, nobody has typed it."""

    lora: str = "live"
    invariant: bool = False
    data_parallel: int = 1
    tensor_parallel: int = 1
    of_study: bool = field(default=False, compare=False)

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
            if not self.of_study:
                raise InputError(
                    f"generate: --lora merged, --data-parallel and --tensor-parallel are vLLM's, but the backend is "
                    f"{backend}. Add --backend vllm, or leave them out."
                )
            log.warning("generation: what the study says under [vllm] is not used, as %s draws", backend)
        if backend == "vllm" and self.invariant and live_lora:
            from leakfast.generation import vllm

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
        from leakfast.generation import vllm

        how = {"vllm": vllm.version(), "lora": self.lora, "tensor_parallel": self.tensor_parallel}
        return {"invariant": True, **how}


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn. backend: transformers, vllm or auto; template_system: what the chat template is to say by
    itself; allow: names of checks (canary.CHECKS) whose failure is a warning; options: how vLLM is to run. letters: who
    computes letters of multiple choice, `packed` or `vllm` (letters_engine: another way to them)."""

    backend: str = "transformers"
    template_system: str | None = None
    allow: tuple[str, ...] = ()
    options: Options = Options()
    letters: str = "packed"
    letters_engine: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, study: Any, **flags: Any) -> Drawing:
        """As a study (None: no study) says. flags: backend, allow, letters and fields of Options that go before the
        study's, where they are not None."""
        given = {name: value for name, value in flags.items() if value is not None}
        letters = given.pop("letters", "packed")
        backend = given.pop("backend", study.backend if study else "auto")
        allow = given.pop("allow", ()) or (study.allow if study else ())
        options = Options(**{**(study.vllm.model_dump() if study else {}), **given}, of_study=not given)
        return cls(backend, study.template_system if study else None, tuple(allow), options, letters)


def settle(
    loaded: Any, drawing: Drawing, samplings: Sequence[Sampling], *, adapters: bool, opens: bool = False
) -> str:
    """The backend, once everything that can be known of a run before its engine is open has been looked at: InputError
    or ModelError says what is wrong. adapters: some are to run; opens: an engine is sure to be opened on this machine."""
    from leakfast.generation import canary

    options = drawing.options
    live = options.lora == "live" and adapters
    backend = choose(drawing.backend, loaded, live_lora=live)
    options.check(backend, live_lora=live)
    for sampling in samplings:
        check_sampling(backend, sampling)
        if sampling.stop and rendering_of(loaded.tokenizer).reasoning == "open":
            raise InputError(
                "generate: replies are to end at the marker, and reasoning is open, where a marker in a thought would end "
                "them. Give --whole-replies (in a study: stop_at_marker = false), or --reasoning closed."
            )
    if backend == "vllm" and opens:
        from leakfast.generation import vllm

        vllm.check_machine(
            data_parallel=options.data_parallel,
            tensor_parallel=options.tensor_parallel,
            invariant=options.invariant,
        )
    canary.check_default_system(loaded.tokenizer, drawing.template_system, drawing.allow)
    if backend == "transformers":
        from leakfast.generation import transformers as local

        local.check_model(loaded)
    return backend


def check_sampling(backend: str, sampling: Sampling) -> None:
    """InputError where vLLM would draw at another temperature than the one asked for, or not at all."""
    low, high = _TEMPERATURES
    if backend == "vllm" and sampling.temperature and not low <= sampling.temperature <= high:
        raise InputError(
            f"generate: temperature {sampling.temperature:g} given, but vLLM draws at 0 or from {low:g} to {high:g}. "
            f"Give one of those, or --backend transformers{_IN_A_STUDY}."
        )


def choose(backend: str, loaded: Any, *, live_lora: bool = False) -> str:
    """`transformers` or `vllm`; "auto" takes vLLM where it is installed, can load the model, and has a GPU
    to be fast on, and says why it did or did not. live_lora: adapters are to run beside the weights.

    Raises InputError for another name, or vLLM by name where it cannot run adapters live."""
    from leakfast.generation import vllm

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
        runs, why = False, "without a GPU vLLM takes longer to start than it saves; --backend vllm takes it"
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
    steered: bool = False,
) -> Iterator[Engine]:
    """The engine of `backend` for a base model and all adapters that will be asked for, closed afterwards.

    On a GPU adapters that run live do so in a process of the engine's own: what this one has cached there counts as
    taken, vLLM does not give back all it took, keeps tables of adapters that outlive their engine, and replaces torch's
    operators to be batch-invariant. Merged weights come from the model here, so their engine lies here too.

    batch_completions: completions decoded at once; where the user did not state it, vLLM takes what tune measured
    on this GPU, or the table's. longest: tokens of the longest prompt with its reply. steered: works under an
    intervention will come, for which vLLM runs its blocks eagerly."""
    options = options or Options()
    options.check(backend)
    if backend == "transformers":
        yield _Local(loaded, batch_completions)
        return
    from leakfast.generation import vllm
    from leakfast.models.adapters import check_fits, check_runs

    for adapter in adapters:
        check_runs(check_fits(loaded, adapter), adapter, backend)
    width, said = vllm.width_for(
        vllm.device_name(),
        loaded.fingerprint,
        loaded.dtype,
        seats=batch_completions if stated else None,
        otherwise=batch_completions,
    )
    log.info("vllm: %d completions at once (%s)", width.seats, said)
    live = options.lora == "live"
    spec = vllm.spec_of(
        loaded,
        adapters if live else (),
        width=width,
        longest=longest,
        tensor_parallel=options.tensor_parallel,
        invariant=options.invariant,
        eager=steered,
    )
    if steered:
        log.info("vllm: eager blocks, because what they return is steered; one arm after the other")
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
            "settings": {
                "dtype": self.loaded.dtype,
                "batch_completions": self.batch,
                "threads": threads.in_use(),
            },
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": "per completion",
            },
        }

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """As Engine.stream. A draw depends on those beside it, so a work is drawn whole, what is there already too."""
        from leakfast.generation import transformers as local
        from leakfast.models.attach import adapted
        from leakfast.steering.running import steered

        with ExitStack() as stack:
            current, under = None, (None, None)
            for work in works:
                if current is None or (work.adapter, work.steer) != under:
                    stack.close()
                    current = stack.enter_context(adapted(self.loaded, work.adapter))
                    stack.enter_context(steered(current, work.steer))
                    under = work.adapter, work.steer
                done: list[Completion] = []

                def ended(
                    some: Sequence[Completion], work: Work = work, done: list[Completion] = done
                ) -> None:
                    wanted = [c for c in some if (c.request, c.sample) not in work.there]
                    done += wanted
                    if finished is not None:
                        finished(wanted, work)  # after every step, so that a long block is heard of

                for _ in local.complete(
                    current, work.requests, sampling, batch_completions=self.batch, ended=ended
                ):
                    pass
                yield work, done
