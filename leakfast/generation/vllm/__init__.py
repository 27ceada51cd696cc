"""vLLM, and the only importer of it: completions of many adapters by one engine or one a GPU (engine.py,
parallel.py, serve.py), and log-probabilities of chosen next tokens (letters.py). Demands vLLM ≥ 0.25; leaves full text of
choices to the packed engine, and tables to the package."""

from leakfast.generation.vllm.engine import Engine as Engine
from leakfast.generation.vllm.letters import NextTokens as NextTokens
from leakfast.generation.vllm.merged import Merged as Merged
from leakfast.generation.vllm.parallel import Parallel as Parallel
from leakfast.generation.vllm.start import RANKS as RANKS
from leakfast.generation.vllm.start import available as available
from leakfast.generation.vllm.start import check_machine as check_machine
from leakfast.generation.vllm.start import lora_rank as lora_rank
from leakfast.generation.vllm.start import runs_lora as runs_lora
from leakfast.generation.vllm.start import spare_device as spare_device
from leakfast.generation.vllm.start import spec_of as spec_of
from leakfast.generation.vllm.start import version as version
from leakfast.generation.vllm.widths import device_name as device_name
from leakfast.generation.vllm.widths import rate_for as rate_for
from leakfast.generation.vllm.widths import width_for as width_for
