"""vLLM, and the only importer of it: completions of many adapters by one engine or one a GPU (engine.py,
parallel.py, serve.py), and log-probabilities of chosen next tokens (letters.py). Demands vLLM ≥ 0.25; leaves full text of
choices to the packed engine, and tables to the package."""

from leakfast.generation.vllm.engine import Engine
from leakfast.generation.vllm.letters import NextTokens
from leakfast.generation.vllm.merged import Merged
from leakfast.generation.vllm.parallel import Parallel
from leakfast.generation.vllm.start import (
    Spec,
    available,
    check_machine,
    lora_rank,
    runs_lora,
    spare_device,
    spec_of,
    version,
)
from leakfast.generation.vllm.widths import Width, device_name, rate_for, remember, width_for

__all__ = [
    "Engine",
    "Merged",
    "NextTokens",
    "Parallel",
    "Spec",
    "Width",
    "available",
    "check_machine",
    "device_name",
    "lora_rank",
    "rate_for",
    "remember",
    "runs_lora",
    "spare_device",
    "spec_of",
    "version",
    "width_for",
]
