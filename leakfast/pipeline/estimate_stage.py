"""What is known of one stage of a study before it is run. Demands nothing; leaves the reckoning to estimate.py and its like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage over all its targets. completions: drawn in all; output_tokens: expected of all of them,
    `output_from` says by what; seconds: decoding them at the stated or measured rate of one engine, `rate_from` says
    which; start_s: starting the engine took that long at the calibration, and is not in `seconds`; disk_bytes: their
    shards, of a training all its checkpoints; memory_bytes: of a training of all weights, but for activations; note: what is
    to be said of it; judge_usd: about what the judge named in the study would cost with its longest replies, None without one."""

    name: str
    targets: int
    prompts: int
    prompt_tokens: int
    completions: int = 0
    output_tokens: int | None = None
    output_from: str = ""
    seconds: float | None = None
    rate_from: str = ""
    start_s: float | None = None
    disk_bytes: int | None = None
    judge_usd: float | None = None
    memory_bytes: int | None = None
    note: str = ""
