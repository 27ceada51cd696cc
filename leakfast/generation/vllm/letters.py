"""Log-probabilities of chosen next tokens by vLLM: a second opinion on the letters of multiple choice. Demands
the adapters to be asked for when it starts; leaves prompts and labels to choices/second.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import InputError, ModelError
from leakfast.generation.vllm.silence import Silence
from leakfast.generation.vllm.start import EngineDied, Explained, letters_spec, runs_lora, start
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger("leakfast.generate")


_TOP = 64  # most likely tokens asked for where this vLLM cannot name the ones it returns
_PROMPTS = 1024  # prompts a call, so that progress moves
_GPU_SHARE = 0.45  # of the device's memory: the packed engine's copy of the model lies beside


class NextTokens:
    """One vLLM engine of a base model and `adapters`, each known by its content hash.

    Raises ModelError (vLLM is not installed, or does not start), AdapterError (rank), InputError (adapters in float32
    on a GPU)."""

    def __init__(self, loaded: Loaded, adapters: Sequence[Path] = ()) -> None:
        from leakfast.models.adapters import adapter_hash, check_fits, check_runs

        if adapters and not runs_lora(loaded.dtype):
            raise InputError(
                "vllm: --engine vllm with adapters in float32 given, but on a GPU vLLM runs LoRA in two-byte floats "
                "alone. Use --engine packed, or --dtype bfloat16."
            )
        for adapter in adapters:
            check_runs(check_fits(loaded, adapter), adapter, "vllm")
        self._ids: dict[str, int] = {}
        for adapter in adapters:
            self._ids.setdefault(adapter_hash(adapter), len(self._ids) + 1)
        spec = letters_spec(loaded, adapters, _GPU_SHARE, _TOP)
        self._longest = spec.settings["max_model_len"] - 1  # tokens; the one that is asked for is another
        self._silence = Silence(spec.name)
        with self._silence.broken_by_end():
            self._llm = start(spec)

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        token_ids: np.ndarray,
        adapter: Path | None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, C) float64: log-probabilities (nats) of `token_ids` (N, C) int64 after each of N prompts, of
        the model's own distribution (no temperature). NaN where vLLM did not report one. Raises InputError for a prompt
        that is longer than the engine's context."""
        longest = max(map(len, prompts), default=0)
        if longest > self._longest:
            raise InputError(
                f"vllm: a prompt of {longest} tokens given, but --engine vllm reads up to {self._longest}. Use --engine packed."
            )
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
        for start_at in range(0, len(prompts), _PROMPTS):
            block = range(start_at, min(start_at + _PROMPTS, len(prompts)))
            settings = [
                SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    detokenize=False,
                    **(
                        {"logprob_token_ids": sorted(set(token_ids[i].tolist()))}
                        if by_name
                        else {"logprobs": _TOP}
                    ),
                )
                for i in block
            ]
            asked = [{"prompt_token_ids": list(prompts[i])} for i in block]
            with Explained(_died), self._silence.broken_by_end():
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
        from vllm.lora.request import LoRARequest

        from leakfast.models.adapters import adapter_hash

        digest = adapter_hash(adapter)
        if digest not in self._ids:
            raise ModelError(
                f"vllm: {adapter} is none of the {len(self._ids)} adapters this engine was started for, or was "
                "changed since. Run the same command again, or use --engine packed."
            )
        return LoRARequest(digest[:16], self._ids[digest], str(adapter.resolve()))


def _died(line: str) -> EngineDied:
    return EngineDied(f"vllm: the engine died: {line}. Run the same command again, or use --engine packed.")
