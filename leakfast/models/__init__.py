"""Models and adapters: names to weights and tokenizers (loading.py, the only place that loads either), other formats
made into folders, and LoRA adapters: their card, their hash, what attaching one does, and attaching it for a while.
Demands safetensors and a causal language model that transformers knows itself; remote code is never run. Leaves the
forward pass to leakfast.forward."""

from leakfast.models.adapters import AdapterCard as AdapterCard
from leakfast.models.adapters import adapter_hash as adapter_hash
from leakfast.models.adapters import read_card as read_card
from leakfast.models.adapters import with_adapter as with_adapter
from leakfast.models.adapters import write_card as write_card
from leakfast.models.loading import Loaded as Loaded
from leakfast.models.loading import load as load
from leakfast.models.loading import load_config as load_config
from leakfast.models.loading import load_tokenizer as load_tokenizer
from leakfast.models.names import DEFAULT_MODEL as DEFAULT_MODEL
from leakfast.models.names import organism_dir as organism_dir
