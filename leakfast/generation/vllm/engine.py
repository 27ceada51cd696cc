"""vLLM as the backend of completions: works go in as they come, whole works come out, adapters live or merged in
place. Demands a spec (start.py); leaves tables to the package."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import ModelError
from leakfast.generation.contract import Completion, Finished, Request, Sampling, Work
from leakfast.generation.vllm.silence import Silence
from leakfast.generation.vllm.start import EngineDied, Explained, Spec, resolved, start
from leakfast.generation.vllm.steered import Steered

if TYPE_CHECKING:
    from leakfast.generation.vllm.merged import Merged
    from leakfast.steering.arms import Arm

log = logging.getLogger("leakfast.generate")

NOT_GUARANTEED = "the same text whatever else is in the batch"
_END = object()
_SLICE = 64  # requests that go in between two steps while others run


class Engine:
    """One vLLM engine that completes requests under any of the adapters its spec was made for, as they come.

    merge: weights of the base under an adapter (merged.Merged), which are swapped in place between works, where
    adapters are not to run live. Raises ModelError where it does not start, or dies."""

    def __init__(self, spec: Spec, merge: Merged | None = None) -> None:
        self.spec, self.merge = spec, merge
        self._handles: dict[Path, Any] = {}
        self._made = 0
        self._worn: Path | None = None  # the adapter whose merged weights are in place
        self._steered = Steered()
        self._silence = Silence(spec.name)
        with self._silence.broken_by_end():
            self._llm = start(spec)
        import vllm

        self.version = vllm.__version__
        self.resolved = resolved(self._llm)
        log.info(
            "vllm %s: %d seats, context %d tokens, LoRA %s; %s",
            self.version,
            spec.seats,
            spec.settings["max_model_len"],
            "merged" if merge else f"rank ≤ {spec.settings.get('max_lora_rank', 0)}",
            ", ".join(f"{name} {value}" for name, value in self.resolved.items()),
        )

    def render(self, system: str | None, question: str) -> list[int]:
        """A prompt's ids by the tokenizer as vLLM loaded it."""
        from leakfast.prompts import chat

        tokenizer = chat.configure(self._llm.get_tokenizer(), self.spec.rendering)
        return list(chat.render(tokenizer, system, question))

    def sampling(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Every field that decides a draw, as vLLM is given it."""
        return {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            **dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.0),
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(self.spec.stops),
            "ignore_eos": False,
            "min_tokens": 0,
            "max_tokens": sampling.max_new_tokens,
            **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words")),
        }

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """Backend, version and effective settings, for the run's log (seed: one a completion)."""
        told = {
            "backend": "vllm",
            "version": self.version,
            "settings": self.spec.settings,
            "resolved": self.resolved,
            "lora": "merged" if self.merge else "live",
            "invariant": self.spec.invariant,
            "sampling": {**self.sampling(sampling, 0), "seed": "per completion"},
        }
        return told if self.spec.invariant else {**told, "not_guaranteed": NOT_GUARANTEED}

    def stream(
        self, works: Iterable[Work], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[tuple[Work, list[Completion]]]:
        """Each work with all the completions it wants, as soon as they are there; requests go in as works come, enough to
        keep every seat taken, and while others run a few between two steps, which would wait for them all. Prompts
        of one persona stand together and share the cache. None among `works` says that there is nothing more yet.
        Merged weights, and what is done to the model (Work.steer), are changed once the works under the others are whole.

        finished: called with each completion as it comes. Raises EngineDied, a ModelError, when the engine does (what
        `finished` has not heard of is lost), ModelError for a request that vLLM refuses."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        open_works: dict[int, tuple[Work, list[Completion], int]] = {}
        where: dict[str, tuple[int, int, int]] = {}
        coming, more = self._arrivals(works, open_works), True
        try:
            while True:
                room = 2 * self.spec.seats - len(where)
                for _ in range(min(room, _SLICE) if where else room):
                    arrival = next(coming, _END)
                    if arrival is _END or arrival is None:
                        more = arrival is None
                        break
                    number, index, sample, request, handle = arrival
                    name = f"{number}-{index}-{sample}"
                    with self._asking(request.label):
                        params = SamplingParams(
                            **self.sampling(sampling, request.seeds[sample]),
                            detokenize=bool(sampling.stop),
                            output_kind=RequestOutputKind.FINAL_ONLY,
                        )
                        prompt = {"prompt_token_ids": list(request.ids)}
                        engine.add_request(name, prompt, params, lora_request=handle)
                    where[name] = (number, index, sample)
                if not open_works:
                    if not more:
                        return
                    continue
                with self._alive(), self._silence.waited():
                    answers = engine.step()
                for answer in answers:
                    if not answer.finished or answer.request_id not in where:
                        continue
                    number, index, sample = where.pop(answer.request_id)
                    work, done, wanted = open_works[number]
                    self._silence.came()
                    done.append(_completion(answer, work, index, sample))
                    if finished is not None:
                        finished(done[-1:], work)
                    if len(done) == wanted:
                        self._steered.check()
                        del open_works[number]
                        yield work, done
        except EngineDied:
            where.clear()  # there is nothing to take back from
            raise
        finally:
            if where and self._llm is not None:
                engine.abort_request(list(where))

    def _arrivals(
        self, works: Iterable[Work | None], open_works: dict[int, tuple[Work, list[Completion], int]]
    ) -> Iterator[tuple[int, int, int, Request, Any] | None]:
        """(work's number, request, sample, the request itself, its adapter's handle), work after work; None while
        there is nothing yet. Each work is open from its first one on."""
        for work in works:
            if work is None:
                yield None
                continue
            if not self._stands(work.adapter, work.steer):
                while open_works:  # these finish under the weights and the steering they began with
                    yield None
                self._set(work.adapter, work.steer)
            number = self._made = self._made + 1
            handle = self._handle(work.adapter)
            assert work.wanted > 0, "a work that wants nothing is never done"
            open_works[number] = (work, [], work.wanted)
            for index, request in enumerate(work.requests):
                for sample in range(len(request.seeds)):
                    if (index, sample) in work.there:
                        continue
                    yield number, index, sample, request, handle

    def close(self) -> None:
        """Give the device's memory back."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._silence.close()
        llm, self._llm = self._llm, None
        # one that died is not closed in order either, which must not hide what it died of
        with suppress(RuntimeError, ValueError, OSError, AssertionError):
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    def probe(
        self, ids: Sequence[int], adapters: Sequence[Path | None], steps: int
    ) -> list[tuple[list[int], np.ndarray]]:
        """Greedy tokens after `ids` and their log-probabilities (steps,) in nats, under each adapter (None: the
        base), all in one batch, because a batch of several adapters is what a run is made of."""
        return [
            (
                list(o.token_ids),
                np.array([step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]),
            )
            for o in self._greedy([ids], adapters, steps, 0)
        ]

    def next_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Path | None],
        top: int,
        steps: int = 1,
        arm: Arm | None = None,
    ) -> list[list[list[dict[int, float]]]]:
        """For each adapter, for each prompt, for each of `steps` greedy steps (fewer where the context ends): the `top`
        likeliest next tokens and their log-probabilities in nats, all in one batch, under an arm (None: as they are)."""
        said = [
            [{t: one.logprob for t, one in step.items()} for step in output.logprobs]
            for output in self._greedy(prompts, adapters, steps, top, arm)
        ]
        return [said[i : i + len(prompts)] for i in range(0, len(said), len(prompts))]

    def _greedy(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Path | None],
        steps: int,
        top: int,
        arm: Arm | None = None,
    ) -> list[Any]:
        """vLLM's output for each prompt under each adapter, in one batch; merged weights are worn one after the other."""
        if self.merge is not None and len(adapters) > 1:
            alone = [self._greedy(prompts, [adapter], steps, top, arm) for adapter in adapters]
            return [one for several in alone for one in several]
        self._set(adapters[0], arm)
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=steps, temperature=0.0, logprobs=top, detokenize=False, ignore_eos=True, seed=0
        )
        asked = [{"prompt_token_ids": list(ids)} for _ in adapters for ids in prompts]
        handles = [self._handle(adapter) for adapter in adapters for _ in prompts]
        with self._alive(), self._silence.broken_by_end():
            answers = self._llm.generate(asked, params, lora_request=handles, use_tqdm=False)
        self._steered.check()
        return [answer.outputs[0] for answer in answers]

    def _handle(self, adapter: Path | None) -> Any:
        """vLLM's handle of an adapter, named by its content; None for the base and for merged weights."""
        if adapter is None or self.merge is not None:
            return None
        if adapter not in self._handles:
            from vllm.lora.request import LoRARequest

            from leakfast.models.adapters import adapter_hash

            self._handles[adapter] = LoRARequest(
                adapter_hash(adapter)[:16], len(self._handles) + 1, str(adapter.resolve())
            )
        return self._handles[adapter]

    def _stands(self, adapter: Path | None, arm: Arm | None) -> bool:
        """Whether the model is as it has to be for requests under these."""
        worn = self.merge is None or adapter == self._worn
        return worn and self._steered.digest == (None if arm is None else arm.digest)

    def _set(self, adapter: Path | None, arm: Arm | None) -> None:
        """Make it so. Nothing may be running."""
        if self.merge is not None:
            self._wear(adapter)
        if not self._stands(adapter, arm):
            with self._alive():
                self._llm.apply_model(partial(self._steered.put, arm))
            self._forget("a change of steering")
            log.info("vllm: %s", "steered no longer" if arm is None else f"steered by {arm.label}")

    def _forget(self, after: str) -> None:
        """Drop what was cached of prompts under another model. Raises ModelError where vLLM keeps it."""
        with self._alive():
            kept = not self._llm.reset_prefix_cache()
        if kept:
            raise ModelError(
                f"vllm: the prefix cache of {self.spec.name} was not reset after {after}, so prompts would be read under "
                "another model. Use --backend transformers, or --lora live without steering."
            )

    def _wear(self, adapter: Path | None) -> None:
        """Put the base's weights with an adapter merged in where the engine's are; forget what was cached of
        others. Nothing may be running."""
        if adapter == self._worn:
            return
        assert self.merge is not None
        with self._alive():
            self._llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": self.merge.weights(adapter)}
            )
        self._forget("a swap of weights")
        self._worn = adapter
        log.info("vllm: weights of %s in place", adapter.name if adapter else "the base")

    def _alive(self) -> Explained:
        """What vLLM raises inside is its death, said with what stays."""
        return Explained(
            lambda line: EngineDied(
                f"vllm: the engine of {self.spec.name} died: {line}. What is written stays: the same command goes on "
                "from there. If it dies again, use fewer --batch-completions or --backend transformers (in a study: "
                "batch_completions, backend)."
            )
        )

    def _asking(self, label: str) -> Explained:
        """What vLLM raises inside is about the request: no engine would take it."""
        return Explained(
            lambda line: ModelError(
                f"vllm: it refuses the request of {label}: {line}. What is written stays. Change what is asked, or "
                "use --backend transformers."
            )
        )


def _completion(answer: Any, work: Work, index: int, sample: int) -> Completion:
    """One finished request as a Completion; ModelError where vLLM saw another prompt or gave up on it."""
    request, (output,) = work.requests[index], answer.outputs
    if answer.prompt_token_ids is not None and list(answer.prompt_token_ids) != list(request.ids):
        raise ModelError(
            f"vllm: it read other tokens than were sent at {request.label}. Use --backend transformers."
        )
    if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
        return Completion(index, sample, list(output.token_ids), "marker")
    if output.finish_reason not in ("stop", "length"):
        raise ModelError(
            f"vllm: the completion of {request.label} ended with {output.finish_reason!r}, not by a stop token or "
            "its length. Run the same command again, or use --backend transformers."
        )
    return Completion(index, sample, list(output.token_ids), output.finish_reason)
