"""Whether a model is read a block at a time: by what was asked, by the memory that is free, and by what its files allow.
Demands a config and the files; leaves reading to streamed.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from leakfast.errors import InputError, ModelError
from leakfast.models import streamed
from leakfast.models.names import offline

log = logging.getLogger(__name__)

STREAMS = ("auto", "on", "off")
BESIDE_BYTES = 1 << 30  # what a run takes beside the weights


def opened(
    stream: str, model: Any, config: Any, dtype: Any, device: Any, folder: Path | None, revision: str | None
) -> tuple[Any, streamed.Blocks] | None:
    """(the model without weights, the reader of its blocks), or None where it is to be loaded whole.

    stream: off never; on always; auto where the weights in `dtype` and 1 GiB beside them are more than `free_bytes`. Raises
    InputError for another word, ModelError where on is asked of files that cannot be read so, with the reason."""
    if stream not in STREAMS:
        raise InputError(
            f"model: stream {stream!r} asked, but it is one of {', '.join(STREAMS)}. Use --stream auto."
        )
    if stream == "off":
        return None
    free = free_bytes(device)
    most = (
        sum(f.stat().st_size for f in folder.glob("*.safetensors")) * dtype.itemsize // 2 if folder else None
    )
    if stream == "auto" and most is not None and free is not None and most + BESIDE_BYTES <= free:
        return None  # as any does that has two bytes a weight or more, without a look at its modules
    net = streamed.skeleton(config, dtype)
    n_bytes = sum(p.numel() for p in net.parameters()) * dtype.itemsize
    if stream == "auto" and (free is None or n_bytes + BESIDE_BYTES <= free):
        said = "an unknown amount" if free is None else f"{free / 2**30:.1f} GiB"
        log.info("model: %s is loaded whole: %.1f GiB of weights, %s free", model, n_bytes / 2**30, said)
        return None
    files = streamed.shards_of(folder or _snapshot(str(model), revision))
    why = streamed.trouble(net, files)
    if why is None:
        log.info(
            "model: %s stays on disk and is read block by block: %.1f GiB of weights", model, n_bytes / 2**30
        )
        return net, streamed.Blocks(net, files, dtype, device)
    if stream == "on":
        raise ModelError(
            f"model: --stream on asked, but {model} cannot be read block by block, because {why}. Needed: safetensors files "
            "whose names are the modules' own. Use --stream off."
        )
    log.warning(
        "model: %s does not fit in the free memory, and is loaded whole all the same, because %s", model, why
    )
    return None


def free_bytes(device: Any) -> int | None:
    """Bytes that are free for weights: of a GPU what its driver says; else MemAvailable of /proc/meminfo, or what is left of
    the control group's memory.max where that is less. None where neither is told."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [n for n in (_available(Path("/proc/meminfo")), _left(Path("/sys/fs/cgroup"))) if n is not None]
    return min(found, default=None)


def _available(path: Path) -> int | None:
    """MemAvailable of a file like /proc/meminfo, bytes."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _left(group: Path) -> int | None:
    """What a control group (version 2) may still take, bytes: its limit less what it holds, file pages that can be dropped
    given back. None without a limit."""
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        held = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    pages = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
    return None if most == "max" else max(0, int(most) - held + int(pages.get("inactive_file", 0)))


def _snapshot(name: str, revision: str | None) -> Path:
    """The folder of a hub model's weights, fetched where they are not here."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json"]
    return Path(
        snapshot_download(
            name, revision=revision or "main", allow_patterns=patterns, local_files_only=offline()
        )
    )
