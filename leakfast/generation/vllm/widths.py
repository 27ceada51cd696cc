"""How wide an engine runs on a GPU: completions at once, tokens a step, memory, CUDA-graph sizes. A small table
by GPU, and in its place what `leakfast tune` measured on the user's own card. Demands neither vLLM nor a GPU."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leakfast.storage.disk import atomic_write

log = logging.getLogger("leakfast.generate")


@dataclass(frozen=True)
class Width:
    """seats: completions decoded at once (max_num_seqs); batched_tokens: of one step, prompts included
    (max_num_batched_tokens; None: vLLM's own); memory: share of the device's it may take; graphs: tokens of a step
    with a CUDA graph of their own, because a step above them all runs without one."""

    seats: int
    batched_tokens: int | None = None
    memory: float = 0.94
    graphs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.graphs:
            object.__setattr__(self, "graphs", graph_sizes(self.seats))


def graph_sizes(seats: int) -> tuple[int, ...]:
    """1, 2, 4, every 8th to 128, every 32nd to 512, every 64th above, `seats` itself, and every 32nd from there to a
    quarter more.

    The last ones are for steps that decode at most seats and read newcomers' prompts at the others: more tokens than
    seats. vLLM (0.25 and 0.32) runs such steps up to the largest size by graphs of the pieces between attention, and
    larger ones without. That it helps is reasoned, not measured."""
    found = {1, 2, 4, *range(8, 129, 8), *range(160, 513, 32), *range(576, seats + 1, 64), seats}
    mixed = range(seats + 32, seats + seats // 4 + 1, 32)
    return tuple(sorted({*(size for size in found if size <= seats), *mixed}))


# By a part of the GPU's name, the first that fits. Stated from memory sizes, not measured: a 7B model in bfloat16 with
# 600 tokens a completion (57 KB of keys and values a token) fits with room to spare. `leakfast tune` goes before them.
_TABLE = {
    "H200": Width(1024, 16_384, 0.94),
    "B200": Width(1024, 16_384, 0.94),
    "H100": Width(768, 8192, 0.94),
    "A100-SXM4-80GB": Width(640, 8192, 0.94),
    "L40S": Width(256, 8192, 0.92),
    "A100": Width(256, 8192, 0.92),
    "RTX": Width(96, 4096, 0.90),
}
_STORE = "vllm.json"


def width_for(
    device: str, fingerprint: str, dtype: str, *, seats: int | None = None, otherwise: int = 640
) -> tuple[Width, str]:
    """The width of an engine on `device` (a GPU's name, or `cpu`), and where it comes from, in words.

    What tune measured for the device, model and dtype goes before the table, which goes before `otherwise` seats;
    seats, where the user states them, before all."""
    measured = _read().get(_key(device, fingerprint, dtype))
    if measured is not None:
        width, said = measured, f"measured on this {device} by leakfast tune"
    else:
        name = next((name for name in _TABLE if name in device), None)
        width = _TABLE[name] if name else Width(otherwise)
        said = f"the table's for {name}" if name else f"the settings', {device} stands in no table"
        said += " (not measured here: leakfast tune)"
    if seats is not None and seats != width.seats:
        return Width(seats, width.batched_tokens, width.memory), "--batch-completions as given"
    return width, said


def rate_for(device: str, fingerprint: str, dtype: str, seats: int | None = None) -> float | None:
    """Output tokens a second that tune measured at its best width, for the device, model and dtype; None where it did
    not, or where the user states other seats than those."""
    entry, measured = (
        _load().get(_key(device, fingerprint, dtype)),
        _read().get(_key(device, fingerprint, dtype)),
    )
    if measured is None or seats not in (None, measured.seats):
        return None
    rate = entry.get("tokens_per_s")
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def remember(device: str, fingerprint: str, dtype: str, width: Width, **measured: Any) -> Path:
    """Keep a width for later runs on this device; returns the file. Raises StoreError."""
    path = _path()
    kept = {**_load(), _key(device, fingerprint, dtype): {"width": asdict(width), **measured}}
    atomic_write(path, (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())
    return path


def device_name() -> str:
    """The GPU's name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _path() -> Path:
    from leakfast.forward.autotune import store

    return store().with_name(_STORE)


def _key(device: str, fingerprint: str, dtype: str) -> str:
    return " | ".join((device, fingerprint, dtype))


def _load() -> dict[str, Any]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read() -> dict[str, Width]:
    """What was measured; an entry that is no width is left out and said."""
    widths = {}
    for key, entry in _load().items():
        try:
            given = dict(entry["width"])
            widths[key] = Width(**{**given, "graphs": tuple(given.get("graphs", ()))})
        except (TypeError, KeyError, ValueError) as error:
            log.warning("%s: %s is no width (%s); run leakfast tune again", _path(), key, error)
    return widths
