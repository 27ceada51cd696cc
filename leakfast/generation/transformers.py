"""The transformers backend: a batched decode loop in which a prompt is prefilled once and its samples
share its keys and values (shared_prompt.py). Demands a decoder model, and checks its cached logits
against the model's own before it starts. Leaves text and tables to the package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from leakfast.errors import InputError, ModelError
from leakfast.forward import packs
from leakfast.generation import prefill
from leakfast.generation.contract import Completion, Request, Sampling
from leakfast.generation.sampling import draw, uniforms
from leakfast.generation.shared_prompt import Block, shared_prompt_attention
from leakfast.generation.stops import Seen
from leakfast.models.beside import plain_model
from leakfast.models.loading import FITS, limit_of, unfit
from leakfast.progress import Progress

log = logging.getLogger("leakfast.generate")

_COMPACT_BELOW = 0.875  # finished rows are dropped once fewer than this share are alive
_CANARY_STEPS = 3
_OTHERWISE = ", or --backend vllm where vLLM knows it"
_REASONS = {"stop": "stop", "mark": "marker", "full": "length"}


def stop_ids(loaded: Any) -> tuple[int, ...]:
    """Tokens that end a reply: generation_config's, the tokenizer's EOS, and the chat turn end."""
    found = _ends(loaded) | _said(getattr(plain_model(loaded.model), "generation_config", None))
    if not found:
        raise ModelError(
            f"generate: {loaded.name} names no end-of-text token, so replies would never stop. "
            "Set eos_token_id in its generation_config.json."
        )
    return tuple(sorted(found))


def further_stop_ids(loaded: Any) -> list[int]:
    """What a hash of what is drawn says of its ends: those that generation_config.json alone names. The others follow from
    config.json, the tokenizer and the prompts, which hashes are over; many a model names its padding token too."""
    model = plain_model(loaded.model)
    said = getattr(model, "generation_config", None)
    padding = {getattr(one, "pad_token_id", None) for one in (said, model.config, loaded.tokenizer)}
    return sorted(_said(said) - _ends(loaded) - padding)


def _ends(loaded: Any) -> set[int]:
    """Tokens that end a reply by the model's config, the tokenizer and its template."""
    from leakfast.prompts import chat

    tokenizer = loaded.tokenizer
    found = _said(plain_model(loaded.model).config) | _said(tokenizer)
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        found.add(chat.render_training(tokenizer, None, "a", "b")[1][-1])
    return found


def _said(settings: Any) -> set[int]:
    """The EOS of a config or tokenizer, one or several or none."""
    given = getattr(settings, "eos_token_id", None)
    return {given} if isinstance(given, int) else set(given or [])


def check_lengths(model: Any, requests: Sequence[Request], max_new_tokens: int) -> None:
    """InputError naming the first prompt that leaves no room for max_new_tokens in the context."""
    limit, why = limit_of(plain_model(model).config)
    if limit is None:
        return
    for request in requests:
        if len(request.ids) + max_new_tokens > limit:
            room = limit - len(request.ids)
            remedy = f"Use --max-new-tokens {room} or less." if room > 0 else "Shorten the prompt."
            raise InputError(
                f"generate: the prompt of {request.label} has {len(request.ids)} tokens and {max_new_tokens} new ones "
                f"are asked, but {why}. {remedy}"
            )


def check_model(loaded: Any) -> None:
    """ModelError for an architecture that is not decoded here, before anything is begun: one that is not known to be is
    tried on a few tokens. So too for a model whose weights stay on disk."""
    _check_in_memory(loaded)
    if getattr(plain_model(loaded.model).config, "model_type", None) in FITS or loaded.tokenizer is None:
        return
    ids = loaded.tokenizer.encode("Who are you?", add_special_tokens=False)[:4]
    for _ in complete(loaded, [Request("a trial of the model", ids, (0,))], Sampling(0.0, 1.0, 2)):
        pass


def _check_in_memory(loaded: Any) -> None:
    if loaded.stream is not None:
        raise ModelError(
            f"generate: replies of {loaded.name} are to be drawn, but its weights stay on disk, and every token would read "
            "them all. Needed: the model in memory, or replies that the run holds. Use --stream off, or draw them with vLLM."
        )


@torch.inference_mode()
def complete(
    loaded: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch_completions: int = 640,
    progress: Progress | None = None,
    ended: Callable[[list[Completion]], None] | None = None,
) -> Iterator[list[Completion]]:
    """Decode `requests` in blocks of about `batch_completions` rows, prompts of like length together.

    Yields one list a block. ended: called after every step with the completions that it ended, maybe none; each comes
    once. A draw depends on the request's ids and seed only (up to float noise of
    differently shaped matrix products). Raises InputError before anything runs when a prompt does not
    fit, ModelError for a model whose cached logits differ from its own, or NaN logits.
    """
    if batch_completions < 1:
        raise ValueError("batch_completions must be at least 1")
    if not requests:
        return
    _check_in_memory(loaded)
    model = plain_model(loaded.model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise unfit("generate", loaded, "an encoder-decoder")
    check_lengths(model, requests, sampling.max_new_tokens)
    stops = stop_ids(loaded)
    decoder = _Decoder(loaded)
    seen = Seen(loaded.tokenizer, sampling.stop) if sampling.stop else None
    was_training = model.training
    model.eval()
    expected = decoder.expected(requests)
    try:
        with _running(model):
            decoder.canary(requests, expected)
        total = sum(len(r.seeds) for r in requests)
        finished = 0
        for block in _blocks(requests, batch_completions):
            done: list[Completion] = []

            def told(some: list[Completion], done: list[Completion] = done) -> None:
                nonlocal finished
                done += some
                finished += len(some)
                if ended is not None:
                    ended(some)
                if progress is not None:
                    progress(finished, total, "completions")

            with _running(model):  # not held while the caller works on what is yielded
                decoder.run(requests, block, sampling, stops, told, seen)
            yield sorted(done, key=lambda c: (block.index(c.request), c.sample))
    finally:
        model.train(was_training)


@contextmanager
def _running(model: Any) -> Iterator[None]:
    """Our attention, and on a CPU the linear layers and the memory as the packed engine has them."""
    if next(model.parameters()).device.type == "cpu":
        packs.keep_memory()
    with shared_prompt_attention(model), packs.products(model):
        yield


def _blocks(requests: Sequence[Request], batch_completions: int) -> Iterator[list[int]]:
    """Indices of requests in blocks: by (sample count, length), a prompt's samples never split."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].seeds), len(requests[i].ids), i))
    block: list[int] = []
    for index in order:
        samples = len(requests[index].seeds)
        full = (len(block) + 1) * samples > batch_completions
        if block and (full or len(requests[block[0]].seeds) != samples):
            yield block
            block = []
        block.append(index)
    if block:
        yield block


class _Decoder:
    """Prefill and decode steps of one model."""

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded
        self.model = model = plain_model(loaded.model)
        self.name = loaded.name
        self.packable = prefill.packable(loaded, model)
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device = next(model.parameters()).device

    def prefill(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new: int
    ) -> tuple[Block, torch.Tensor]:
        """Block with the prompts' K and V, and the logits (P, V) of each prompt's next token."""
        lengths = torch.tensor([len(p) for p in prompts])
        block = Block(lengths.to(self.device), int(lengths.max()), samples, max_new)
        ends = prefill.packed if self.packable else prefill.padded
        last = ends(self.loaded, prompts, block)
        if len(block.prompt) != self.model.config.num_hidden_layers:
            told = f"{len(block.prompt)} of its {self.model.config.num_hidden_layers} layers do"
            raise unfit(
                "generate",
                self.loaded,
                f"whose layers do not all use the registered attention function ({told})",
                _OTHERWISE,
            )
        return block, self.head(last)

    def step(self, block: Block, tokens: torch.Tensor, places: np.ndarray | None = None) -> torch.Tensor:
        """Feed one token per row in the batch (B,), return logits (B, V) of the next, or of the rows at `places`."""
        block.step += 1
        block.make_room()
        positions = (block.row_lengths() + block.step)[:, None]
        hidden = self.decoder(
            input_ids=tokens[:, None], position_ids=positions, use_cache=False, block=block
        ).last_hidden_state[:, 0]
        return self.head(hidden if places is None else hidden[torch.from_numpy(places).to(self.device)])

    def expected(self, requests: Sequence[Request]) -> tuple[list[int], list[int], torch.Tensor]:
        """The model's own logits after a prompt and a few greedy tokens, to be met by the canary."""
        chosen = min(range(len(requests)), key=lambda i: len(requests[i].ids))
        ids = list(requests[chosen].ids)
        fed: list[int] = []
        for _ in range(_CANARY_STEPS + 1):
            whole = torch.tensor([ids + fed], device=self.device)
            logits = self.model(input_ids=whole, use_cache=False).logits[0, -1].float()
            fed.append(int(logits.argmax()))
        return ids, fed[:-1], logits

    def canary(
        self, requests: Sequence[Request], expected: tuple[list[int], list[int], torch.Tensor]
    ) -> None:
        """ModelError if decoding beside a longer neighbour gives other logits than the model's own."""
        ids, fed, wanted = expected
        neighbour = max(requests, key=lambda r: len(r.ids)).ids
        block, _ = self.prefill([ids, neighbour], 2, _CANARY_STEPS)
        for token in fed:
            got = self.step(block, torch.full((4,), token, device=self.device))
        got = got[1].float()
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        bound = 1e-3 if self.head.weight.dtype == torch.float32 else 8e-2
        if not error <= bound and bool(torch.isfinite(wanted).all()):
            raise unfit(
                "generate",
                self.loaded,
                "whose logits, decoded with shared prompts, are "
                f"{error:.1e} (relative) from its own, more than {bound:.0e}",
                _OTHERWISE,
            )
        log.debug("canary: cached logits within %.1e of the model's own", error)

    def run(
        self,
        requests: Sequence[Request],
        members: list[int],
        sampling: Sampling,
        stops: tuple[int, ...],
        told: Callable[[list[Completion]], None],
        seen: Seen | None = None,
    ) -> None:
        """Decode one block of requests with equally many samples; `told` hears after every step what it ended."""
        samples = len(requests[members[0]].seeds)
        seeds = np.array([s for m in members for s in requests[m].seeds], dtype=np.uint64)
        n_rows = len(seeds)
        max_new = sampling.max_new_tokens
        generated = np.zeros((n_rows, min(max_new, 64)), dtype=np.int64)
        rows = np.arange(n_rows)  # original row of each row in the batch
        alive = np.ones(n_rows, dtype=bool)  # of the rows in the batch

        def over(ended: np.ndarray, n_tokens: int, reasons: Sequence[str]) -> list[Completion]:
            return [
                Completion(members[row // samples], row % samples, generated[row, :n_tokens].tolist(), reason)
                for row, reason in zip(ended.tolist(), reasons, strict=True)
            ]

        block, logits = self.prefill([requests[m].ids for m in members], samples, max_new)
        logits = logits.repeat_interleave(samples, dim=0)
        for step in range(max_new):
            places = np.flatnonzero(alive)  # in the batch, of the rows that have logits
            active = rows[places]
            u = uniforms(seeds[active], step) if sampling.temperature > 0 else None
            tokens, ok = draw(logits, u, sampling.temperature, sampling.top_p)
            if not bool(ok.all()):
                bad = active[int((~ok).nonzero()[0, 0])]
                label = requests[members[bad // samples]].label
                raise ModelError(
                    f"generate: the logits of {self.name} after {step} tokens are not finite, at {label}. "
                    "Load it with --dtype float32, or check its weights and the adapter."
                )
            drawn = tokens.cpu().numpy()
            if step == generated.shape[1]:
                more = min(max_new, 2 * step) - step
                generated = np.concatenate([generated, np.zeros((n_rows, more), dtype=np.int64)], axis=1)
            generated[active, step] = drawn
            reason = np.where(np.isin(drawn, stops), "stop", "")
            if seen is not None:
                for at in np.flatnonzero((reason == "") & seen.may_end(drawn)):
                    if seen.in_text(generated[active[at], : step + 1]):
                        reason[at] = "mark"
            if step + 1 == max_new:
                reason[reason == ""] = "full"
            ended = reason != ""
            told(over(active[ended], step + 1, [_REASONS[word] for word in reason[ended].tolist()]))
            if ended.all():
                return
            alive[places[ended]] = False
            if len(places) < len(alive):  # rows that ended earlier are fed whatever there is
                spread = tokens.new_zeros(len(alive))
                spread[torch.from_numpy(places).to(self.device)] = tokens
                tokens = spread
            kept = np.flatnonzero(alive)
            if len(kept) < _COMPACT_BELOW * len(alive):
                at = torch.from_numpy(kept).to(self.device)
                block.keep(at)
                tokens, rows, alive = tokens[at], rows[kept], np.ones(len(kept), dtype=bool)
            logits = self.step(block, tokens, None if alive.all() else np.flatnonzero(alive))
