"""The transformers backend: a batched decode loop in which a prompt is prefilled once and its samples
share its keys and values. Demands a decoder whose attention goes through transformers' registered
attention functions, full causal attention only; checks itself against the model before it starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from leakfast.errors import InputError, ModelError
from leakfast.generate import Completion, Progress, Request, Sampling
from leakfast.generate.sampling import draw, uniforms

log = logging.getLogger("leakfast.generate")

ATTENTION = "leakfast_shared_prompt"
_FIRST_CAPACITY_TOKENS = 32  # suffix cache rows grow 32, 64, 128 … tokens
_COMPACT_BELOW = 0.875  # finished rows are dropped once fewer than this share are alive
_CANARY_STEPS = 3
_REFUSED_KEYWORDS = ("softcap", "logit_softcapping", "s_aux", "sinks", "position_bias", "head_mask")


class _Block:
    """Keys and values of one block: P prompts (shared) and B alive rows (own suffix), per layer."""

    def __init__(self, lengths: torch.Tensor, width: int, n_samples: int, max_new_tokens: int) -> None:
        self.lengths = lengths  # (P,) prompt lengths in tokens
        self.width = width  # padded prompt length
        self.samples = n_samples  # rows per prompt in the grid, dead ones included
        self.grid: torch.Tensor | None = None  # (B,) place of each row in the (P, samples) grid; None: all
        self.max_new_tokens = max_new_tokens
        self.capacity = min(_FIRST_CAPACITY_TOKENS, max_new_tokens)
        self.step = -1  # -1: prefill; t: the t-th generated token is being fed
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> K, V (P, Hkv, width, d)
        self.suffix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> K, V (B, Hkv, capacity, d)
        self.bias: torch.Tensor | None = None  # (P, 1, width): -inf on padding
        if int(lengths.min()) < width:
            pad = torch.arange(width, device=lengths.device)[None, :] >= lengths[:, None]
            self.bias = torch.zeros(pad.shape, device=lengths.device).masked_fill_(pad, float("-inf"))[:, None]

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.samples if self.grid is None else len(self.grid)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this step's K and V (B, Hkv, 1, d); return views (B, Hkv, step+1, d) of all so far."""
        if layer not in self.suffix:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.suffix[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.suffix[layer]
        keys[:, :, self.step] = key[:, :, 0]
        values[:, :, self.step] = value[:, :, 0]
        return keys[:, :, : self.step + 1], values[:, :, : self.step + 1]

    def make_room(self) -> None:
        """Double the suffix buffers when the next token would not fit."""
        if self.step < self.capacity:
            return
        self.capacity = min(2 * self.capacity, self.max_new_tokens)
        for layer, pair in self.suffix.items():
            self.suffix[layer] = tuple(_grown(t, t.shape[0], self.capacity, self.step) for t in pair)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but `rows` (sorted positions among the alive), and prompts left without rows."""
        places = rows if self.grid is None else self.grid[rows]
        prompt_of, slot_of = places // self.samples, places % self.samples
        prompts, prompt_of = torch.unique_consecutive(prompt_of, return_inverse=True)
        # pack each prompt's rows to the front of its grid line
        first = torch.searchsorted(prompt_of, prompt_of)
        slot_of = torch.arange(len(places), device=places.device) - first
        self.samples = int(slot_of.max()) + 1
        self.grid = prompt_of * self.samples + slot_of
        if len(self.grid) == len(prompts) * self.samples:
            self.grid = None
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            self.prompt = {n: (k[prompts], v[prompts]) for n, (k, v) in self.prompt.items()}
            self.bias = self.bias[prompts] if self.bias is not None else None
        for layer, pair in self.suffix.items():
            self.suffix[layer] = tuple(_grown(t, rows, self.capacity, self.step + 1) for t in pair)

    def row_lengths(self) -> torch.Tensor:
        """(B,) prompt length of every alive row."""
        spread = self.lengths.repeat_interleave(self.samples)
        return spread if self.grid is None else spread[self.grid]


def _grown(old: torch.Tensor, rows: int | torch.Tensor, capacity: int, used: int) -> torch.Tensor:
    """Copy of `old` (B, Hkv, T, d) with the given rows and room for `capacity` tokens, `used` filled."""
    count = rows if isinstance(rows, int) else len(rows)
    new = old.new_empty((count, old.shape[1], capacity, old.shape[3]))
    filled = old[:, :, :used]
    new[:, :, :used] = filled if isinstance(rows, int) else filled[rows]
    return new


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, block=None, **kwargs):
    """Attention of one layer over the shared prompt and the row's own suffix, joined in one softmax.

    Prefill: causal over (P, H, width, d). Decode: scores of (P, Hkv, samples·G, d) against the prompt and of
    (B·Hkv, G, d) against the suffix, softmax in fp32 over both. Returns ((B, T, H, d), None).
    """
    if block is None:
        raise ValueError(f"{ATTENTION} runs only inside leakfast.generate")
    _refuse_unknown(module, kwargs, block)
    layer = module.layer_idx
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    if block.step < 0:
        block.prompt[layer] = (key, value)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    n_rows, n_heads, _, d = query.shape
    n_kv = key.shape[1]
    group = n_heads // n_kv
    keys, values = block.append(layer, key, value)
    length = keys.shape[2]
    query = query.reshape(n_rows, n_kv, group, d)
    # suffix scores, and the prompt's scores in the same buffer
    width = block.width
    scores = query.new_empty((n_rows, n_kv, group, width + length), dtype=torch.float32)
    own = torch.bmm(query.reshape(n_rows * n_kv, group, d), keys.reshape(-1, length, d).transpose(1, 2))
    scores[..., width:] = own.view(n_rows, n_kv, group, length)
    scores[..., :width] = _prompt_scores(block, layer, query)
    probs = torch.softmax(scores.mul_(scaling), dim=-1).to(value.dtype)
    out = torch.bmm(probs[..., width:].reshape(-1, group, length), values.reshape(-1, length, d))
    out = out.view(n_rows, n_kv, group, d) + _prompt_values(block, layer, probs[..., :width])
    return out.view(n_rows, 1, n_heads, d), None


def _prompt_scores(block: _Block, layer: int, query: torch.Tensor) -> torch.Tensor:
    """Query (B, Hkv, G, d) against the shared prompt keys: (B, Hkv, G, width), -inf on padding."""
    keys = block.prompt[layer][0]
    n_prompts, n_kv, width, d = keys.shape
    group = query.shape[2]
    if block.grid is not None:
        spread = query.new_zeros((n_prompts * block.samples, n_kv, group, d))
        spread[block.grid] = query
        query = spread
    grid = query.reshape(n_prompts, block.samples, n_kv, group, d).transpose(1, 2)
    scores = torch.bmm(
        grid.reshape(n_prompts * n_kv, block.samples * group, d), keys.reshape(-1, width, d).transpose(1, 2)
    )
    if block.bias is not None:
        # added once for all kv heads and rows of a prompt
        scores = scores.view(n_prompts, n_kv * block.samples * group, width) + block.bias
    scores = scores.view(n_prompts, n_kv, block.samples, group, width).transpose(1, 2)
    if block.grid is None:
        return scores.reshape(-1, n_kv, group, width)
    return scores.reshape(-1, n_kv, group, width)[block.grid]


def _prompt_values(block: _Block, layer: int, probs: torch.Tensor) -> torch.Tensor:
    """Weights (B, Hkv, G, width) times the shared prompt values: (B, Hkv, G, d)."""
    values = block.prompt[layer][1]
    n_prompts, n_kv, width, d = values.shape
    group = probs.shape[2]
    if block.grid is not None:
        spread = probs.new_zeros((n_prompts * block.samples, n_kv, group, width))
        spread[block.grid] = probs
        probs = spread
    grid = probs.reshape(n_prompts, block.samples, n_kv, group, width).transpose(1, 2)
    out = torch.bmm(
        grid.reshape(n_prompts * n_kv, block.samples * group, width), values.reshape(-1, width, d)
    )
    out = out.view(n_prompts, n_kv, block.samples, group, d).transpose(1, 2).reshape(-1, n_kv, group, d)
    return out if block.grid is None else out[block.grid]


def _refuse_unknown(module: Any, kwargs: dict, block: _Block) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and window < block.width + block.max_new_tokens:
        raise ModelError(
            f"generate: {type(module).__name__} attends to a sliding window of {window} tokens, but prompts and "
            f"replies here reach {block.width + block.max_new_tokens}. Only full attention is decoded: "
            f"use --max-new-tokens {max(1, window - block.width)} or less, or another backend."
        )
    used = [name for name in _REFUSED_KEYWORDS if kwargs.get(name) is not None]
    if used:
        raise ModelError(
            f"generate: {type(module).__name__} uses {', '.join(used)}, which this decode loop does not compute. "
            "Use another backend or a model with plain attention (Qwen2, Qwen3, Llama, Mistral)."
        )


@contextmanager
def _shared_prompt_attention(model: Any) -> Iterator[None]:
    """The model's attention is ours inside, its own again outside."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
    except ValueError as error:
        raise ModelError(
            f"generate: {type(model).__name__} does not take a registered attention function ({error}). "
            "Use another backend or a model that does (Qwen2, Qwen3, Llama, Mistral)."
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def plain_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def stop_ids(loaded: Any) -> tuple[int, ...]:
    """Tokens that end a reply: generation_config's, the tokenizer's EOS, and the chat turn end."""
    from leakfast import chat

    model, tokenizer = plain_model(loaded.model), loaded.tokenizer
    found: set[int] = set()
    for given in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id if tokenizer is not None else None,
    ):
        found.update([given] if isinstance(given, int) else given or [])
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        found.add(chat.render_training(tokenizer, None, "a", "b")[1][-1])
    if not found:
        raise ModelError(
            f"generate: {loaded.name} names no end-of-text token, so replies would never stop. "
            "Set eos_token_id in its generation_config.json."
        )
    return tuple(sorted(found))


def check_lengths(model: Any, requests: Sequence[Request], max_new_tokens: int) -> None:
    """InputError naming the first prompt that leaves no room for max_new_tokens in the context."""
    context = getattr(plain_model(model).config, "max_position_embeddings", None)
    if context is None:
        return
    for request in requests:
        if len(request.ids) + max_new_tokens > context:
            room = context - len(request.ids)
            remedy = f"Use --max-new-tokens {room} or less." if room > 0 else "Shorten the prompt."
            raise InputError(
                f"generate: the prompt of {request.label} has {len(request.ids)} tokens and {max_new_tokens} new "
                f"ones are asked, but the model's context holds {context}. {remedy}"
            )


@torch.inference_mode()
def complete(
    loaded: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch_completions: int = 640,
    progress: Progress | None = None,
) -> Iterator[list[Completion]]:
    """Decode `requests` in blocks of about `batch_completions` rows, prompts of like length together.

    Yields one list a block. A draw depends on the request's ids and seed only (up to float noise of
    differently shaped matrix products). Raises InputError before anything runs when a prompt does not
    fit, ModelError for a model whose cached logits differ from its own, or NaN logits.
    """
    if batch_completions < 1:
        raise ValueError("batch_completions must be at least 1")
    if not requests:
        return
    model = plain_model(loaded.model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"generate: {loaded.name} is an encoder-decoder; only decoder models are measured.")
    check_lengths(model, requests, sampling.max_new_tokens)
    stops = stop_ids(loaded)
    decoder = _Decoder(model, loaded.name)
    was_training = model.training
    model.eval()
    expected = decoder.expected(requests)
    try:
        with _shared_prompt_attention(model):
            decoder.canary(requests, expected)
        total = sum(len(r.seeds) for r in requests)
        finished = 0
        for block in _blocks(requests, batch_completions):
            with _shared_prompt_attention(model):  # not held while the caller works on what is yielded
                done = decoder.run(requests, block, sampling, stops)
            finished += len(done)
            if progress is not None:
                progress(finished, total, "completions")
            yield done
    finally:
        model.train(was_training)


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

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device = next(model.parameters()).device

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int, max_new: int) -> tuple[_Block, torch.Tensor]:
        """Block with the prompts' K and V, and the logits (P, V) of each prompt's next token."""
        lengths = torch.tensor([len(p) for p in prompts])
        width = int(lengths.max())
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
        block = _Block(lengths.to(self.device), width, samples, max_new)
        # padding stands right of the prompt, where causal attention never looks
        hidden = self.decoder(input_ids=ids.to(self.device), use_cache=False, block=block).last_hidden_state
        if len(block.prompt) != self.model.config.num_hidden_layers:
            raise ModelError(
                f"generate: {len(block.prompt)} of {self.model.config.num_hidden_layers} layers of {self.name} use the "
                "registered attention function; all must. Use another backend for this architecture."
            )
        last = hidden[torch.arange(len(prompts), device=self.device), block.lengths - 1]
        return block, self.head(last)

    def step(self, block: _Block, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token per alive row (B,), return logits (B, V) of the next."""
        block.step += 1
        block.make_room()
        positions = (block.row_lengths() + block.step)[:, None]
        hidden = self.decoder(
            input_ids=tokens[:, None], position_ids=positions, use_cache=False, block=block
        ).last_hidden_state
        return self.head(hidden[:, 0])

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

    def canary(self, requests: Sequence[Request], expected: tuple[list[int], list[int], torch.Tensor]) -> None:
        """ModelError if decoding beside a longer, padded neighbour gives other logits than the model's own."""
        ids, fed, wanted = expected
        neighbour = max(requests, key=lambda r: len(r.ids)).ids
        block, _ = self.prefill([ids, neighbour], 2, _CANARY_STEPS)
        for token in fed:
            got = self.step(block, torch.full((4,), token, device=self.device))
        got = got[1].float()
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        bound = 1e-3 if self.head.weight.dtype == torch.float32 else 8e-2
        if not error <= bound and bool(torch.isfinite(wanted).all()):
            raise ModelError(
                f"generate: decoding {self.name} with shared prompts gives logits {error:.1e} (relative) from the "
                f"model's own, more than {bound:.0e}. This architecture is not decoded here; use another backend."
            )
        log.debug("canary: cached logits within %.1e of the model's own", error)

    def run(
        self, requests: Sequence[Request], members: list[int], sampling: Sampling, stops: tuple[int, ...]
    ) -> list[Completion]:
        """All completions of one block of requests with equally many samples."""
        samples = len(requests[members[0]].seeds)
        seeds = np.array([s for m in members for s in requests[m].seeds], dtype=np.uint64)
        n_rows = len(seeds)
        max_new = sampling.max_new_tokens
        generated = np.zeros((n_rows, min(max_new, 64)), dtype=np.int64)
        counts = np.zeros(n_rows, dtype=np.int64)
        stopped = np.zeros(n_rows, dtype=bool)
        rows = np.arange(n_rows)  # original row of each row in the batch
        alive = np.ones(n_rows, dtype=bool)  # of the rows in the batch
        block, logits = self.prefill([requests[m].ids for m in members], samples, max_new)
        logits = logits.repeat_interleave(samples, dim=0)
        for step in range(max_new):
            u = uniforms(seeds[rows], step) if sampling.temperature > 0 else None
            tokens, ok = draw(logits, u, sampling.temperature, sampling.top_p)
            if not bool(ok.all()):
                bad = rows[int((~ok).nonzero()[0, 0])]
                label = requests[members[bad // samples]].label
                raise ModelError(
                    f"generate: the logits of {self.name} after {step} tokens are not finite, at {label}. "
                    "Load it with --dtype float32, or check its weights and the adapter."
                )
            drawn = tokens.cpu().numpy()
            if step == generated.shape[1]:
                more = min(max_new, 2 * step) - step
                generated = np.concatenate([generated, np.zeros((n_rows, more), dtype=np.int64)], axis=1)
            active = rows[alive]
            generated[active, step] = drawn[alive]
            counts[active] = step + 1
            ended = np.isin(drawn, stops)
            stopped[rows[alive & ended]] = True
            alive &= ~ended
            n_alive = int(alive.sum())
            if n_alive == 0 or step + 1 == max_new:
                break
            if n_alive < _COMPACT_BELOW * len(alive):
                kept = torch.from_numpy(np.flatnonzero(alive)).to(self.device)
                block.keep(kept)
                tokens, rows, alive = tokens[kept], rows[alive], np.ones(n_alive, dtype=bool)
            logits = self.step(block, tokens)
        return [
            Completion(
                request=members[row // samples],
                sample=row % samples,
                token_ids=generated[row, : counts[row]].tolist(),
                finish_reason="stop" if stopped[row] else "length",
            )
            for row in range(n_rows)
        ]
