"""Models and adapters: names to weights and tokenizers (loading.py, the only place that loads either), other formats
made into folders, and LoRA adapters: their card, their hash, what attaching one does, and attaching it for a while.
Demands safetensors and a causal language model that transformers knows itself; remote code is never run. Leaves the
forward pass to leakfast.forward."""

from leakfast.models.adapters import AdapterCard, adapter_hash, read_card, with_adapter, write_card
from leakfast.models.loading import (
    AUTO,
    DTYPES,
    FITS,
    Loaded,
    folder_fingerprint,
    limit_of,
    load,
    load_config,
    load_tokenizer,
    unfit,
)
from leakfast.models.names import DEFAULT_MODEL, organism_dir

__all__ = [
    "AUTO",
    "DEFAULT_MODEL",
    "DTYPES",
    "FITS",
    "AdapterCard",
    "Loaded",
    "adapter_hash",
    "folder_fingerprint",
    "limit_of",
    "load",
    "load_config",
    "load_tokenizer",
    "organism_dir",
    "read_card",
    "unfit",
    "with_adapter",
    "write_card",
]
