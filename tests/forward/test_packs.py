"""The engine's inner parts: states for the head, the variable-length path against attention written out
here, what happens out of memory, and how large a batch is made."""

from __future__ import annotations

import gc
import logging

import numpy as np
import pytest
import torch
from gathering import PROMPTS, gathered, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast import models
from leakfast.forward import attention, forest, packs, passes
from leakfast.prompts.grid import PromptGrid

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=10)
properties = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def loaded(tiny_qwen3):
    return tiny_qwen3


def truth(loaded, sequence, last):
    """transformers' own last_hidden_state of one sequence alone: (last, D)."""
    with torch.inference_mode():
        return loaded.model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -last:]


def plain_attention(calls=None, top_left=False):
    """Variable-length attention written out, span by span, in float32: what flash-attn promises."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        if calls is not None:
            calls.append((len(q), len(k)))
        share = q.shape[1] // k.shape[1]
        out = torch.full_like(q, torch.nan)
        for s in range(len(cu_q) - 1):
            a, b, c, d = int(cu_q[s]), int(cu_q[s + 1]), int(cu_k[s]), int(cu_k[s + 1])
            keys, values = (x[c:d].float().repeat_interleave(share, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * scale
            shift = 0 if top_left else (d - c) - (b - a)
            later = torch.ones(b - a, d - c, dtype=torch.bool).triu(shift + 1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            out[a:b] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        return out

    return varlen


@pytest.mark.parametrize("last", [1, 2, [3, 1, 6, 2, 1, 4]])
@pytest.mark.parametrize("budget", [1, 9, 1000])
def test_final_states_equal_the_last_hidden_state(loaded, last, budget):
    counts = [last] * len(PROMPTS) if isinstance(last, int) else last
    found = gathered(loaded, PROMPTS, last, budget_tokens=budget)
    assert len(found) == sum(counts)
    for i, (sequence, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        got = torch.stack([found[i, p] for p in range(len(sequence) - count, len(sequence))])
        assert relative(got, truth(loaded, sequence, count)) <= 1e-5


@properties
@given(sequences=SEQUENCES, budget=st.sampled_from([1, 7, 1000]), random=st.randoms(use_true_random=False))
def test_any_packing_any_order_any_count(loaded, sequences, budget, random):
    counts = [random.randint(1, len(s)) for s in sequences]
    found = gathered(loaded, sequences, counts, budget_tokens=budget)
    assert len(found) == sum(counts)
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        got = torch.stack([found[i, p] for p in range(len(sequence) - count, len(sequence))])
        assert relative(got, truth(loaded, sequence, count)) <= 1e-5


def test_a_state_that_sequences_share_is_there_once(loaded):
    (batch,) = passes.final_states(loaded, [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]], 2)
    assert batch.states.shape == (3, 32)
    assert batch.states.dtype == torch.float32
    assert batch.sequences.tolist() == [0, 0, 2, 2, 1, 1]
    assert batch.positions.tolist() == [2, 3] * 3
    assert batch.rows[0] == batch.rows[2] == batch.rows[4]
    assert batch.rows[1] == batch.rows[3] != batch.rows[5]


def test_where_many_rows_are_asked_the_last_block_runs_whole(loaded, monkeypatch):
    narrow = gathered(loaded, PROMPTS, [len(s) for s in PROMPTS])
    monkeypatch.setattr(packs, "_WIDE_KEYS", 0)
    wide = gathered(loaded, PROMPTS, [len(s) for s in PROMPTS])
    assert narrow.keys() == wide.keys()
    assert max(relative(wide[key], narrow[key]) for key in wide) <= 1e-5


@pytest.mark.parametrize("last", [0, -1, [1, 3], 4])
def test_a_last_that_does_not_fit_is_a_mistake(loaded, last):
    with pytest.raises(ValueError, match=r"last must lie|broadcast"):
        next(passes.final_states(loaded, [[1, 2, 3], [1, 2], [1]], last))


def test_the_model_is_as_it_was_between_batches(loaded):
    before = loaded.model.config._attn_implementation
    for _ in passes.final_states(loaded, PROMPTS, budget_tokens=1):
        assert loaded.model.config._attn_implementation == before
        assert truth(loaded, [1, 2], 1).shape == (1, 32)


def test_bfloat16_final_states_are_no_further_from_the_truth_than_transformers(loaded):
    half = models.load((type(loaded.model)(loaded.model.config).bfloat16(), loaded.tokenizer))
    half.model.load_state_dict(loaded.model.state_dict())
    whole = models.load((type(loaded.model)(loaded.model.config), loaded.tokenizer))
    whole.model.load_state_dict(half.model.state_dict())  # the truth of the rounded weights
    rng = np.random.default_rng(0)
    sequences = [[1, 2, 3, *rng.integers(0, 300, 12).tolist()] for _ in range(24)]
    found = gathered(half, sequences)
    ours = torch.stack([found[i, 14] for i in range(24)]).float()
    theirs = torch.cat([truth(half, s, 1) for s in sequences]).float()
    exact = torch.cat([truth(whole, s, 1) for s in sequences])
    assert torch.linalg.norm(ours - exact) <= 1.1 * torch.linalg.norm(theirs - exact)


def test_pieces_give_the_states_of_what_they_join_into(loaded):
    joined = PromptGrid([[1, 2, 3], [1, 4]], [[5], [6, 7, 8], [5, 9]])
    np.testing.assert_array_equal(
        passes.last_token_states(loaded, joined, [0, 2]),
        passes.last_token_states(loaded, list(joined), [0, 2]),
    )


def test_the_variable_length_path_equals_the_grouped_one(loaded, monkeypatch):
    """The host side of the GPU path: gathered keys, offsets, the longest query and key, one call a block."""
    expected = passes.last_token_states(loaded, PROMPTS, [0, 2], budget_tokens=12)
    calls = []
    monkeypatch.setattr(attention, "variable_length", lambda *_: plain_attention(calls))
    got = passes.last_token_states(loaded, PROMPTS, [0, 2], budget_tokens=12)
    batches = list(forest.plan(PROMPTS, 12))
    assert len(calls) == 3 * len(batches) and len(batches) > 1
    assert calls[0] == (len(batches[0].tokens), len(batches[0].k_rows))
    assert calls[2][0] == len(batches[0].leaf_rows)  # the deepest block asks for last tokens alone
    assert relative(torch.from_numpy(got), torch.from_numpy(expected)) <= 1e-5
    found = gathered(loaded, PROMPTS, 2)
    for i, sequence in enumerate(PROMPTS):
        got = torch.stack([found[i, p] for p in (len(sequence) - 2, len(sequence) - 1)])
        assert relative(got, truth(loaded, sequence, 2)) <= 1e-5


def test_a_candidate_is_tried_on_a_small_case_before_it_is_taken():
    where = (torch.device("cpu"), torch.bfloat16, 32)
    assert attention.trial(plain_attention(), *where) is None
    assert "bottom-right" in attention.trial(plain_attention(top_left=True), *where)

    def broken(*_):
        raise RuntimeError("no kernel image\nmore")

    assert attention.trial(broken, *where) == "RuntimeError: no kernel image"


def test_on_a_cpu_and_in_float32_attention_runs_in_groups(caplog):
    attention.variable_length.cache_clear()
    with caplog.at_level(logging.INFO, "leakfast.forward.attention"):
        assert attention.variable_length("cpu", None, torch.bfloat16, 64) is None
        assert attention.variable_length("cuda", 0, torch.float32, 64) is None
    assert "SDPA per group" in caplog.text
    attention.variable_length.cache_clear()


@pytest.mark.parametrize("segments", [[0], [0, -1], [[0, 1]]])
def test_segments_that_do_not_fit_are_a_mistake(loaded, segments):
    with pytest.raises(ValueError, match="segments must"):
        passes.last_token_sums(loaded, [[1], [2]], [0], segments)


@pytest.mark.skipif(not packs._has_onednn(), reason="this torch has no oneDNN")
def test_float32_linear_layers_run_in_onednn_with_and_without_a_bias(loaded, monkeypatch):
    w, b, x = torch.randn(7, 32), torch.randn(7), torch.randn(1, 5, 32)
    for bias in (None, b):
        with torch.inference_mode(), torch.profiler.profile() as seen, packs.measuring(loaded.model.model):
            got = torch.nn.functional.linear(x, w, bias)
        assert any("mkldnn::_linear_pointwise" in event.key for event in seen.key_averages())
        torch.testing.assert_close(got, x @ w.T + (0 if bias is None else bias), rtol=1e-5, atol=1e-5)
    ours = passes.last_token_states(loaded, PROMPTS, [2])
    monkeypatch.setattr(packs, "_has_onednn", lambda: False)
    plain = passes.last_token_states(loaded, PROMPTS, [2])
    assert relative(torch.from_numpy(ours), torch.from_numpy(plain)) <= 1e-5


def test_the_calls_of_a_gpu_are_bound_to_what_this_torch_knows(monkeypatch):
    """Words that a version of torch does not know are a reason in the log, not a crash on the device."""
    from torch.nn.attention import varlen as theirs

    told = {}

    def newest(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        num_splits=None,
    ):
        told.update(locals())
        return query

    def oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        told.update(locals())
        return query

    q = torch.ones(2, 4, 16)
    monkeypatch.setattr(theirs, "varlen_attn", newest)
    attention._torch_varlen(num_splits=1)(q, q, q, "cu_q", "cu_k", 2, 3, 0.5)
    assert (told["scale"], told["window_size"]) == (0.5, (-1, 0))
    assert (told["enable_gqa"], told["num_splits"]) == (True, 1)
    assert (told["cu_seq_q"], told["cu_seq_k"], told["max_q"], told["max_k"]) == ("cu_q", "cu_k", 2, 3)
    monkeypatch.setattr(theirs, "varlen_attn", oldest)
    assert "num_splits" in attention._torch_varlen(num_splits=1)
    attention._torch_varlen()(q, q, q, "cu_q", "cu_k", 2, 3, 0.5)
    assert told["is_causal"] is True
    assert float(told["query"][0, 0, 0]) == 2.0  # 0.5 against the kernel's own 1/4


def test_this_torchs_own_call_is_bound():
    assert callable(attention._torch_varlen())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(loaded, dtype):
    net = type(loaded.model)(loaded.model.config)
    net.load_state_dict(loaded.model.state_dict())
    return models.load((net.to("cuda", dtype).requires_grad_(False), loaded.tokenizer))


@gpu
@pytest.mark.gpu
def test_gpu_float32_equals_the_cpu(loaded):
    got = passes.last_token_states(on_gpu(loaded, torch.float32), PROMPTS, [0, 2], budget_tokens=12)
    expected = passes.last_token_states(loaded, PROMPTS, [0, 2])
    assert relative(torch.from_numpy(got), torch.from_numpy(expected)) <= 1e-5


@gpu
@pytest.mark.gpu
def test_gpu_sums_equal_the_cpus(loaded):
    segments = [0, 2, 1, 0, 2, 2]
    settings = {"layers": [0, 2], "segments": segments, "budget_tokens": 12}
    expected = passes.last_token_sums(loaded, PROMPTS, **settings)
    got = passes.last_token_sums(on_gpu(loaded, torch.float32), PROMPTS, **settings)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative(torch.from_numpy(ours), torch.from_numpy(theirs)) <= 1e-5


@gpu
@pytest.mark.gpu
def test_gpu_bfloat16_takes_one_call_a_block_and_is_as_true_as_transformers(loaded):
    half = on_gpu(loaded, torch.bfloat16)
    assert attention.variable_length("cuda", 0, torch.bfloat16, 64) is not None
    rng = np.random.default_rng(0)
    sequences = [[1, 2, 3, *rng.integers(0, 300, 12).tolist()] for _ in range(64)]
    exact = passes.last_token_states(loaded, sequences, [2])[:, 0]
    ours = passes.last_token_states(half, sequences, [2], budget_tokens=100)[:, 0]
    caught = []
    hook = half.model.model.layers[2].register_forward_hook(lambda _m, _a, out: caught.append(out[0, -1]))
    with torch.inference_mode():
        for sequence in sequences:
            half.model(input_ids=torch.tensor([sequence], device="cuda"))
    hook.remove()
    theirs = torch.stack(caught).float().cpu().numpy()
    assert np.linalg.norm(ours - exact) <= 1.1 * np.linalg.norm(theirs - exact)


@gpu
@pytest.mark.gpu
def test_gpu_out_of_memory_is_survived(loaded):
    half = on_gpu(loaded, torch.bfloat16)
    sequences = [np.random.default_rng(i).integers(0, 300, 100).tolist() for i in range(512)]
    expected = passes.last_token_states(half, sequences, [2], budget_tokens=1024)
    gc.collect()
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_reserved() + (24 << 20)) / torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(share)
        got = passes.last_token_states(half, sequences, [2], budget_tokens=1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.linalg.norm(got - expected) <= 0.02 * np.linalg.norm(expected)
