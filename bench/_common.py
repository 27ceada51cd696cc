"""What the benches share: models of a real shape with random weights, interleaved timing, the card and
the last JSON line. Run beside a bench (its folder is on the path); measures nothing by itself."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import _rows
import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "tiny": {  # for rehearsals: whether a bench runs to its end, nothing about speed
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
PEAK_TFLOPS = 790.0  # bf16 matrix rate of an H200, as measured with large square products
ROOT = Path(__file__).resolve().parent.parent


def parser(description: str) -> argparse.ArgumentParser:
    """The options every bench has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--shape", choices=tuple(SHAPES), help="default: qwen2.5-0.5b on cpu, qwen2.5-7b on cuda"
    )
    made.add_argument("--repeats", type=int, default=5, help="at least 5, for a median and quartiles")
    made.add_argument("--threads", type=int, help="CPU threads (default: what torch takes)")
    made.add_argument("--seed", type=int, default=0)
    return made


def loaded(net: Any, dtype: str) -> Any:
    """The model as the engine takes it, without the fingerprint that a real one gets."""
    from leakfast.models.loading import Loaded

    config = net.config
    return Loaded(net, None, "random", "none", config.num_hidden_layers, config.hidden_size, dtype)


def make_model(shape: str, dtype: str, device: str, seed: int = 0) -> Any:
    """A Qwen2 causal LM of the real shape, N(0, 0.02²) weights, norms and biases as a new model has them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32_768,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    with torch.device(device):
        net = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return net.eval().requires_grad_(False)


def engine_flops(shape: str, tokens: int, rows: int, blocks: int, head: bool = False) -> float:
    """FLOPs of the matrix products that the engine runs: `tokens` through blocks 0…blocks-1, of which
    the last makes keys and values of every token (see engine/packs.py) and the rest of `rows` alone; then the
    head for the rows if asked. Attention itself is left out (below 1 %)."""
    s = SHAPES[shape]
    d, wide = s["hidden_size"], s["intermediate_size"]
    keys = 2 * d * (d // s["num_attention_heads"] * s["num_key_value_heads"])
    block = 2 * d * d + keys + 3 * d * wide
    whole = tokens * ((blocks - 1) * block + keys) + rows * (block - keys)
    return 2.0 * (whole + (rows * d * s["vocab_size"] if head else 0))


def lengths(low: int, high: int, n: int, rng: np.random.Generator) -> list[int]:
    """n lengths spread evenly over low…high, shuffled: their mean is the same for every seed."""
    return rng.permutation(np.linspace(low, high, n).round().astype(int)).tolist()


def interleaved(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    sync: Callable[[], None],
    say: Callable[[str], None],
    bench: str | None = None,
    about: dict[str, Any] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Any]]:
    """Each run `repeats` times, in turn: (wall seconds, CPU seconds, first results), by name. bench: after each
    turn a line of JSON under this name says what there is so far, and `about` (on what it is), for a run that is cut
    off."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    first: dict[str, Any] = {}
    for turn in range(repeats):
        for name, run in runs.items():
            gc.collect()
            sync()
            began, began_busy = time.perf_counter(), time.process_time()
            result = run()
            sync()
            wall[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - began_busy)
            first.setdefault(name, result)
            del result
        say(f"repeat {turn + 1}/{repeats}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in wall.items()))
        if bench:
            so_far = {name: spread(times) for name, times in wall.items()}
            tell({"bench": bench, "partial": turn + 1, "seconds": so_far, **(about or {})})
    return wall, busy, first


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high), "n": len(values)}


def shown(values: dict[str, float], unit: str = "×") -> str:
    """A `spread` for the card."""
    return f"{values['median']:.2f}{unit} (IQR {values['q25']:.2f}–{values['q75']:.2f}, n={values['n']})"


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times the time of `fast` a run of `slow` takes: quartiles of the ratios within a turn."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def sync_of(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_memory_gb(device: str) -> float:
    """Device memory at its highest on cuda, resident memory of the process elsewhere."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_rss() / 1e9


def peak_rss(pid: int | str = "self") -> int:
    """Resident memory of a process at its highest, bytes; 0 of one that is gone. getrusage's ru_maxrss is not that on Linux: a
    process that another started has at least the other's peak."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        if pid != "self" or sys.platform == "linux":
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def surroundings(device: str) -> dict[str, Any]:
    """Versions, hardware and commit."""
    import torch
    import transformers

    import leakfast

    optional = {}
    for package in ("triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "torchao"):
        with suppress(importlib.metadata.PackageNotFoundError):
            optional[package] = importlib.metadata.version(package)

    def git(*words: str) -> str:
        with suppress(OSError):  # no git there
            return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True).stdout.strip()
        return ""

    commit = git("rev-parse", "--short=12", "HEAD") or os.environ.get("LEAKFAST_COMMIT", "unknown")

    names = [w.split(":")[1].strip() for w in _cpuinfo() if w.startswith("model name")]
    return {
        "leakfast": leakfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **optional,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else (names or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "commit": commit + ("+changes" if git("status", "--porcelain") else ""),
    }


def where(record: dict[str, Any]) -> tuple[str, str]:
    """The card's line about `surroundings`."""
    on = f"{record['device']}, {record['threads']} threads, torch {record['torch']}, {record['commit']}"
    return "on", on


def rate(tflops: float) -> tuple[str, str]:
    """The card's line about the matrix rate on a GPU."""
    return "rate", f"{tflops:.0f} TFLOP/s, {tflops / PEAK_TFLOPS:.0%} of {PEAK_TFLOPS:.0f}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def card(title: str, lines: list[tuple[str, str]], record: dict[str, Any]) -> None:
    """The card for people, then one line of JSON."""
    width = max(len(left) for left, _ in lines)
    print(f"\n{title}\n{'-' * len(title)}")
    for left, right in lines:
        print(f"{left:<{width}}  {right}")
    tell(record)


def skipped(bench: str, why: str, device: str) -> None:
    """The line of a bench that has nothing to do here."""
    print(f"bench_{bench}: {why}")
    tell({"bench": bench, "skipped": why, **surroundings(device)})


def failed(bench: str, why: str, device: str) -> None:
    """The line of a bench that reports no ratio, and why."""
    print(f"bench_{bench}: {why}; no ratio is reported", file=sys.stderr)
    tell({"bench": bench, "failed": why, **surroundings("cpu" if not _has(device) else device)})


@contextmanager
def ending_with_json(bench: str, device: str) -> Iterator[None]:
    """The last line of a bench is JSON, also where it breaks: then it says with what, and the error goes on."""
    if not _has(device):
        failed(bench, f"--device {device} asked, but torch sees no such device here", device)
        sys.exit(1)
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        code = getattr(error, "code", None) if isinstance(error, SystemExit) else None
        if isinstance(code, str) or (error is not None and not isinstance(error, SystemExit)):
            words = (str(error).splitlines() or [""])[0]
            failed(bench, f"{type(error).__name__}: {words}" if code is None else code, device)


def _has(device: str) -> bool:
    if device != "cuda":
        return True
    import torch

    return torch.cuda.is_available()


def tell(record: dict[str, Any]) -> None:
    """A line of JSON, as a bench ends with one; in a GPU run it is in the file of rows first."""
    print(_rows.told(json.dumps(record, sort_keys=True)), flush=True)
