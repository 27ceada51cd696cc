"""Any decoder: packed where a trial agrees, in padded batches elsewhere, equal to transformers either way, and said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from leakfast import models
from leakfast.errors import ModelError
from leakfast.forward import head, ops, packs, passes, taken
from leakfast.measure.asking import continuations
from tests.architectures import KINDS, MORE, random

PLAIN = {
    "bloom",
    "falcon",
    "mamba",
    "lfm2",
    "qwen3_next",
    "qwen3_5",
}  # alibi, or layers that mix tokens otherwise
TURNING = {"llama-dynamic", "phi3-longrope"}  # rope of another angle beyond 24 tokens
ENCODERS = {"t5"}
DECODERS = [kind for kind in {**KINDS, **MORE} if kind not in ENCODERS]


@pytest.fixture
def loaded_of(tiny_tokenizer):
    def make(kind, **more):
        net = random(kind, tiny_tokenizer, **more)
        if getattr(net.config, "attn_logit_softcapping", None):
            net.set_attn_implementation("eager")  # as models.load does: SDPA leaves the cap out
        return models.load((net, tiny_tokenizer))

    return make


def prompts(longest=None):
    """A forest with prompts of up to 59 tokens, one the beginning of others, one twice."""
    rng = np.random.default_rng(3)
    root = rng.integers(5, 250, 19).tolist()
    every = [root + rng.integers(5, 250, n).tolist() for n in (1, 4, 13, 40)]
    every += [root[:7], rng.integers(5, 250, 30).tolist(), every[1]]
    return [one[:longest] for one in every]


def own(loaded, sequences, last=1):
    """Of each sequence alone by transformers: blocks' outputs at the last token (N, layers, D), the decoder's end at the
    last tokens [(last, D)]."""
    inner = passes.decoder(loaded)
    caught, states, ends = {}, [], []
    hooks = [
        block.register_forward_hook(
            lambda _m, _a, out, n=n: caught.__setitem__(n, out[0] if isinstance(out, tuple) else out)
        )
        for n, block in enumerate(packs.stack(inner)[1])
    ]
    with torch.inference_mode():
        for one in sequences:
            ended = inner(input_ids=torch.tensor([one]), use_cache=False)[0][0]
            states.append(torch.stack([caught[n][0, -1] for n in sorted(caught)]))
            ends.append(ended[-last:])
    for hook in hooks:
        hook.remove()
    return torch.stack(states), ends


def apart(got, truth):
    got, truth = torch.as_tensor(got).double(), torch.as_tensor(truth).double()
    return float(((got - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.mark.parametrize("kind", DECODERS)
def test_states_equal_one_prompt_at_a_time(kind, loaded_of, caplog):
    """Whatever the way, the budget, the length beyond windows and original ropes; and the log says which way. Models that sum
    along the prompt in chunks round otherwise beside padding: alone 8e-6 from float64, in a batch 2e-5 (AVX-512)."""
    caplog.set_level(logging.INFO, "leakfast")
    loaded, given = loaded_of(kind), prompts()
    rounding = 5e-5 if kind in PLAIN else 1e-5
    states, ends = own(loaded, given, 3)
    for budget in (None, 70):
        got = passes.last_token_states(loaded, given, [1, 0], budget_tokens=budget)
        assert apart(got, states[:, [1, 0]]) <= rounding
    found = taken.way(passes.decoder(loaded), kind, 59)
    assert found.packed == (kind not in PLAIN)
    assert found.reach == (24 if kind in TURNING else 0 if kind in PLAIN else None)
    if kind in PLAIN:
        assert "in padded batches, nothing shared: " in caplog.text
    elif kind in TURNING:
        assert "prompts plain" in caplog.text and "turns otherwise beyond 24" in caplog.text
    elif loaded.model.config.model_type not in models.loading.FITS:
        assert "goes packed" in caplog.text
    sums, squares = passes.last_token_sums(loaded, given, [1], [0, 1, 0, 1, 0, 1, 0])
    np.testing.assert_allclose(sums[0, 1], states[1::2, 1].sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(squares[0, 1], states[1::2, 1].square().sum(0), rtol=1e-4, atol=1e-4)
    seen = {}
    for batch in passes.final_states(loaded, given, 3):
        for row, sequence, position in zip(batch.rows, batch.sequences, batch.positions, strict=True):
            seen[int(sequence), int(position)] = batch.states[row]
    assert len(seen) == 3 * len(given)
    for index, one in enumerate(given):
        assert apart(torch.stack([seen[index, len(one) - 3 + k] for k in range(3)]), ends[index]) <= rounding


@pytest.mark.parametrize("kind", DECODERS)
def test_log_probabilities_equal_the_models_own_logits(kind, loaded_of):
    """Scaled, capped and biased heads among them."""
    loaded, given = loaded_of(kind), prompts()
    got = continuations(loaded, given, [2] * len(given))
    for one, found in zip(given, got, strict=True):
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([one])).logits[0].float()
        wanted = logits[:-1].log_softmax(-1).gather(1, torch.tensor(one[1:])[:, None])[-2:].sum()
        assert abs(float(wanted) - found) <= 1e-4


def test_a_head_with_a_bias_or_a_cap_is_read_in_parts_and_a_scale_by_the_kernel(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(9, 8, generator=draw), torch.randn(31, 8, generator=draw)
    bias, asked = torch.randn(31, generator=draw), torch.randint(0, 31, (9, 3), generator=draw)
    monkeypatch.setattr(head, "_LOGITS", 62)  # two rows at once
    told = []
    monkeypatch.setattr(head, "choice_logprobs", lambda *a: told.append(1) or ops.choice_logprobs(*a))
    for one in (head.Head(weight), head.Head(weight, None, 0.5), head.Head(weight, bias, 2.0, 3.0)):
        x = (states @ weight.T + (0 if one.bias is None else bias)) * one.scale
        x = x if one.cap is None else 3 * torch.tanh(x / 3)
        wanted = x.log_softmax(-1).gather(1, asked)
        torch.testing.assert_close(one.logprobs(states, asked), wanted, rtol=1e-5, atol=1e-5)
    assert len(told) == 2


@pytest.mark.parametrize("kind", ["mistral-window", "qwen2-window", "gemma3_text", "gemma4_text", "gpt_oss"])
def test_a_window_is_kept_inside_the_packed_pass(kind, loaded_of, monkeypatch):
    """Not by going plain: a prompt of 59 tokens in windows of 24, and of 12 where the config's is longer."""
    more = {} if "window" in kind or kind == "gemma4_text" else {"sliding_window": 12}
    loaded, given = loaded_of(kind, **more), prompts()
    monkeypatch.setattr(passes.plain, "walk", None)
    monkeypatch.setattr(taken, "_trouble", lambda *_: None)
    assert apart(passes.last_token_states(loaded, given, [0, 1]), own(loaded, given)[0]) <= 1e-5


def test_a_window_that_is_not_kept_sends_longer_prompts_the_plain_way(loaded_of, monkeypatch, caplog):
    """The trial of a prompt beyond the window finds it, when the first such prompt comes."""
    caplog.set_level(logging.INFO, "leakfast")
    loaded = loaded_of("phi3", sliding_window=100)
    real = packs.attention.Reach
    monkeypatch.setattr(packs.attention, "Reach", lambda *_: real())
    short = prompts()
    passes.last_token_states(loaded, short, [1])
    model = passes.decoder(loaded)
    assert taken.way(model, "it", 59).reach is None
    long = [[5 + (7 * i + k) % 200 for i in range(120)] for k in range(2)]
    got = passes.last_token_states(loaded, [*short, *long], [1])
    assert taken.way(model, "it", 120).reach == 100
    assert "prompts beyond 100 tokens go plain" in caplog.text
    assert apart(got[:, 0], own(loaded, [*short, *long])[0][:, 1]) <= 1e-5


def test_the_trial_finds_attention_that_looks_elsewhere(loaded_of, monkeypatch):
    loaded = loaded_of("granite")  # whose blocks do not norm what attention gives, which would hide a factor
    real = packs.attention.grouped._grouped
    monkeypatch.setattr(packs.attention.grouped, "_grouped", lambda *a: real(*a) * 1.01)
    found = taken.way(passes.decoder(loaded), "it", 10)
    assert not found.packed and "from its own, more than" in found.why


def test_in_half_precision_the_trial_allows_its_rounding_alone(loaded_of):
    for kind in ("gemma3_text", "qwen2_moe", "olmo2", "gpt_oss"):
        loaded = loaded_of(kind)
        loaded.model.to(torch.bfloat16)
        assert taken.way(passes.decoder(loaded), kind, 10).packed


def test_out_of_memory_halves_a_plain_batch(loaded_of, monkeypatch, caplog):
    loaded, given = loaded_of("bloom"), prompts()
    states = own(loaded, given)[0]
    real = passes.plain.Padded.through

    def through(self, *more):
        if self.tokens.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *more)

    monkeypatch.setattr(taken, "_trouble", lambda *_: "bloom")
    monkeypatch.setattr(passes.plain.Padded, "through", through)
    assert apart(passes.last_token_states(loaded, given, [0, 1]), states) <= 1e-5
    assert "going on with at most" in caplog.text
    with pytest.raises(ModelError, match="prompt of 80 tokens does not fit"):
        passes.last_token_states(loaded, [list(range(5, 85))], [0])


def test_an_encoder_decoder_is_refused_before_anything_runs(loaded_of):
    for call in (head.check, passes.decoder):
        with pytest.raises(ModelError, match="an encoder-decoder"):
            call(loaded_of("t5"))


def many(length=50, n=30):
    """Prompts that share nothing: a pack of 1,500 tokens."""
    return np.random.default_rng(5).integers(5, 250, (n, length)).tolist()


def test_what_goes_by_the_place_in_the_pack_is_found(loaded_of, caplog):
    """Llama 4 scales queries by a token's place in the batch, from floor_scale on: a small forest agrees, a full pack not."""
    caplog.set_level(logging.INFO, "leakfast")
    loaded = loaded_of("llama4_text", no_rope_layers=[0, 0], floor_scale=200, attn_scale=2.0)
    short = prompts()
    assert apart(passes.last_token_states(loaded, short, [0, 1]), own(loaded, short)[0]) <= 1e-5
    assert apart(passes.last_token_states(loaded, many(), [0, 1]), own(loaded, many())[0]) <= 1e-5
    assert "at 50 tokens" in caplog.text or "at 59 tokens" in caplog.text
    assert not taken.way(passes.decoder(loaded), "it", 50).packed


def test_prompts_that_grow_are_tried_once_a_doubling(loaded_of, monkeypatch):
    """Not with every longer shard; and never beyond the context."""
    loaded = loaded_of("granite", max_position_embeddings=150)
    model, seen = passes.decoder(loaded), []
    real = taken._try_size
    monkeypatch.setattr(taken, "_try_size", lambda *a: seen.append(a[3:]) or real(*a))
    for longest in (50, 51, 60, 64, 65, 100, 128, 129, 140, 150):
        assert taken.way(model, "it", longest, 256).packed
    assert seen == [(50, 256), (64, 256), (128, 256), (150, 256)]


def test_what_changes_at_a_length_that_no_config_names_is_found(loaded_of, monkeypatch):
    """Attention that looks back to the last 70 tokens only where a prompt is longer: as sparse attention's top tokens."""
    loaded = loaded_of("granite")
    model = passes.decoder(loaded)
    short, long = prompts(), many(100, 6)
    passes.last_token_states(loaded, short, [1])
    assert taken.way(model, "it", 59).packed
    real = packs.attention.Reach
    monkeypatch.setattr(packs.attention, "Reach", lambda *_: real(70))
    assert apart(passes.last_token_states(loaded, long, [0, 1]), own(loaded, long)[0]) <= 1e-5
    assert not taken.way(model, "it", 100).packed


def test_rounding_of_padded_prompts_excuses_no_more_than_a_rounding(loaded_of, monkeypatch):
    """A model that padding moves, whose packed states are wrong: neither is packed nor padded beside other lengths."""
    loaded = loaded_of("granite")
    model = passes.decoder(loaded)
    block = packs.stack(model)[1][0]

    def moved(module, given):
        return (given[0] * (1 + given[0].shape[1] / 50), *given[1:])

    hook = block.register_forward_pre_hook(moved)
    assert apart(passes.last_token_states(loaded, prompts(), [0, 1]), own(loaded, prompts())[0]) <= 1e-5
    found = taken.way(model, "it", 59)
    assert not found.packed and found.alone
    hook.remove()


def test_states_that_are_no_numbers_are_no_agreement(loaded_of):
    loaded = loaded_of("granite")
    model = passes.decoder(loaded)
    packs.stack(model)[1][0].register_forward_pre_hook(lambda m, given: (given[0] * torch.inf, *given[1:]))
    assert not taken.way(model, "it", 59).packed
