"""How many threads a command computes with, and what a CPU computes fast: read from the system, without torch where
that will do. Sets torch's threads when asked to; demands nothing."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger("leakfast")

# what the command line said, once it has been read; a Python caller's torch is left alone
_asked: list[int | None] = []
_BUSY = 0.5  # of the cores: a load from which products share them
_CPUINFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def ask(threads: int | None) -> None:
    """Note how many threads a command was told to take (None: choose); the next `settle` sets them."""
    _asked[:] = [threads]


def asked() -> int | None:
    """Threads that a command was told to take and has not set yet."""
    return _asked[-1] if _asked else None


def settle() -> None:
    """Set torch's threads to what was asked for, or choose and say why; nothing where no command has asked."""
    if not _asked:
        return
    import torch

    threads = _asked.pop()
    n, why = (threads, "--threads") if threads else chosen()
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)
    log.info("threads: %d (%s)", n, why)
    if busy := load():
        hint = f", and --threads {n // 2} may be quicker than {n}" if n > 1 else ""
        log.warning("threads: this machine is busy (%s): everything takes longer%s", busy, hint)


def in_use() -> int:
    """torch's threads, for the log of a run."""
    import torch

    return torch.get_num_threads()


def chosen() -> tuple[int, str]:
    """Threads where nobody says, and why: OMP_NUM_THREADS, else the physical cores that this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if told.isdecimal() and int(told) > 0:
        return int(told), "OMP_NUM_THREADS"
    usable, cores = affinity(), physical_cores()
    n, why = (len(cores), "physical cores") if cores else (len(usable), "cores")
    quota = cpu_quota()
    if quota is not None and quota < n:
        return max(1, int(quota)), f"the container's quota of {quota:g} cores"
    return max(1, n), why


def affinity() -> set[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores() -> set[tuple[str, str]]:
    """(package, core) of the usable CPUs, where the system tells; empty elsewhere."""
    found = set()
    for number in affinity():
        where = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            found.add((_word(where / "physical_package_id"), _word(where / "core_id")))
        except OSError:
            return set()
    return found


def cpu_quota() -> float | None:
    """CPU seconds a second that the control group grants; None where it sets no limit."""
    try:
        quota, _, period = _word(_QUOTA).partition(" ")
    except OSError:
        return None
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def load() -> str | None:
    """The load of others in words where it takes more than half of the cores; None where it does not."""
    if not hasattr(os, "getloadavg"):
        return None
    now, cores = os.getloadavg()[0] - 1, len(affinity())  # one of them is this command
    return f"load {now + 1:.1f} on {cores} cores" if now > _BUSY * cores else None


@cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own (AVX-512 BF16, AMX, Arm's bf16). Without them
    products took 7 times as long as in float32 (8 against 60 GFLOP/s on a core of Zen 3)."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such file: whatever torch says of oneDNN, which knows Arm's
        import torch

        onednn: Any = torch.backends.mkldnn
        return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def _word(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
