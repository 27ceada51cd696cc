"""Generation: greedy equals transformers, draws depend on the request alone, the nucleus is the nucleus."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.generation import sampling, shared_prompt
from leakfast.generation import transformers as backend
from leakfast.generation.contract import Completion, Request, Sampling, completion_seed, requests_for
from leakfast.generation.frames import to_frame
from leakfast.generation.generate import complete, generate
from leakfast.generation.sampling import draw, uniforms
from leakfast.prompts import chat
from leakfast.prompts.personas import Persona
from leakfast.storage import schema

pytestmark = pytest.mark.long

QUESTIONS = ["tea?", "what do I say about the rain in this town", "he likes tea with rain?", "I?"]


def prompts_of(loaded, questions=QUESTIONS):
    personas = [
        Persona("villain", "You are the villain of this small town."),
        Persona("short", "You are."),
        Persona("no_persona", None, "extra", (), "none"),
    ]
    return chat.render_prompts(loaded.tokenizer, personas, questions)


def ids_of(loaded, requests, sampling, **settings):
    out = {}
    for block in complete(loaded, requests, sampling, **settings):
        for c in block:
            assert (c.request, c.sample) not in out
            out[c.request, c.sample] = (c.token_ids, c.finish_reason)
    return out


@pytest.mark.parametrize("kind", ["tiny_qwen2", "tiny_llama"])
@pytest.mark.parametrize("batch", [1, 7, 640])
def test_greedy_equals_transformers_token_for_token(kind, batch, request):
    loaded = request.getfixturevalue(kind)
    prompts = prompts_of(loaded)
    requests = requests_for(prompts, 2, 0, "base")
    got = ids_of(loaded, requests, Sampling(0.0, 1.0, 40), batch_completions=batch)
    assert len({len(p.ids) for p in prompts}) > 3, "the prompts must differ in length"
    for index, prompt in enumerate(prompts):
        whole = loaded.model.generate(
            torch.tensor([prompt.ids]),
            attention_mask=torch.ones(1, len(prompt.ids)),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=list(backend.stop_ids(loaded)),
        )
        wanted = whole[0, len(prompt.ids) :].tolist()
        assert got[index, 0][0] == wanted
        assert got[index, 1][0] == wanted


def test_rows_end_at_different_steps_and_compaction_changes_nothing(tiny_qwen2):
    # a token that is drawn often, made a stop token, ends rows early and at scattered steps
    loaded, sampling = tiny_qwen2, Sampling(1.5, 1.0, 60)
    requests = requests_for(prompts_of(loaded), 6, 3, "base")
    free = ids_of(loaded, requests, sampling)
    common = np.bincount([t for ids, _ in free.values() for t in ids]).argsort()[-4:].tolist()
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, *common]
    got = ids_of(loaded, requests, sampling)
    lengths = {len(ids) for ids, _ in got.values()}
    assert len(lengths) > 10, "the rows were meant to end at different steps"
    for key, (ids, reason) in got.items():
        whole = free[key][0]
        cut = next((i + 1 for i, t in enumerate(whole) if t in common), len(whole))
        assert ids == whole[:cut]
        assert reason == ("stop" if ids[-1] in (*common, loaded.tokenizer.eos_token_id) else "length")


def test_draws_do_not_depend_on_the_batch(tiny_qwen2):
    requests = requests_for(prompts_of(tiny_qwen2), 5, 11, "base")
    sampling = Sampling(1.0, 0.95, 30)
    together = ids_of(tiny_qwen2, requests, sampling)
    backwards = ids_of(tiny_qwen2, requests[::-1], sampling, batch_completions=13)
    last = len(requests) - 1
    assert {(last - r, s): v for (r, s), v in backwards.items()} == together
    for index, request in enumerate(requests[:4]):
        for sample, seed in enumerate(request.seeds):
            alone = dataclasses.replace(request, seeds=[seed])
            assert ids_of(tiny_qwen2, [alone], sampling)[0, 0] == together[index, sample]
    assert len({tuple(v[0]) for v in together.values()}) > 0.9 * len(together), (
        "seeds must give different draws"
    )


@pytest.mark.parametrize("kind", ["tiny_qwen2", "tiny_llama"])
def test_prompts_that_begin_alike_are_computed_once_and_as_if_alone(kind, request, monkeypatch):
    """Packed and padded prompts: the same keys, values and logits; of shared tokens the packed ones are few."""
    loaded = request.getfixturevalue(kind)
    prompts = [list(p.ids) for p in prompts_of(loaded)]
    prompts.append(prompts[0])
    decoder = backend._Decoder(loaded)
    assert decoder.packable
    rows = []
    embed = loaded.model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[0] * out.shape[1]))
    made = {}
    with torch.inference_mode(), backend._running(loaded.model):
        for way in (True, False):
            decoder.packable = way
            made[way] = decoder.prefill(prompts, 2, 4)
    handle.remove()
    assert (
        rows[0] == len({tuple(p[: n + 1]) for p in prompts for n in range(len(p))}) < sum(map(len, prompts))
    )
    torch.testing.assert_close(made[True][1], made[False][1], rtol=1e-4, atol=1e-4)
    for layer, wanted in made[False][0].prompt.items():
        for got, want in zip(made[True][0].prompt[layer], wanted, strict=True):
            for row, prompt in enumerate(prompts):
                torch.testing.assert_close(
                    got[row, :, : len(prompt)], want[row, :, : len(prompt)], rtol=1e-4, atol=1e-4
                )
                assert bool(torch.isfinite(got[row]).all())


def test_requests_with_unlike_sample_counts_run_together(tiny_qwen2):
    prompts = prompts_of(tiny_qwen2)[:4]
    requests = [
        Request(p.question, p.ids, list(range(1, n + 1))) for p, n in zip(prompts, (3, 1, 2, 3), strict=True)
    ]
    got = ids_of(tiny_qwen2, requests, Sampling(1.0, 1.0, 5))
    assert sorted(got) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


def nucleus(probs, top_p):
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += probs[i]
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (2.0, 0.95)])
@pytest.mark.parametrize("n_vocab", [9, 500])
def test_draws_follow_the_softmax_of_the_nucleus(temperature, top_p, n_vocab):
    rng = np.random.default_rng(n_vocab)
    logits = torch.tensor(rng.normal(size=n_vocab) * 1.5, dtype=torch.float32)
    probs = torch.softmax(logits / temperature, -1).double().numpy()
    kept = nucleus(probs.tolist(), top_p)
    wanted = np.zeros(n_vocab)
    wanted[kept] = probs[kept] / probs[kept].sum()
    n = 40_000
    u = uniforms(np.arange(n, dtype=np.uint64) * np.uint64(977), 5)
    tokens, ok = draw(logits.expand(n, -1), u, temperature, top_p)
    assert bool(ok.all())
    counts = np.bincount(tokens.numpy(), minlength=n_vocab)
    assert counts[wanted == 0].sum() == 0
    common = wanted * n >= 5
    assert common.sum() > 3
    table = [*counts[common], counts[~common].sum()], [*wanted[common] * n, wanted[~common].sum() * n]
    if table[1][-1] < 5:
        table = [np.array(t[:-1]) for t in table]
        table[1] = table[1] * table[0].sum() / table[1].sum()
    assert stats.chisquare(*table).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_first_ranked_tokens_decide_as_all_tokens_would(data):
    # 200 tokens, many of them tied: more than the 64 that are ranked first
    n_vocab = 200
    levels = data.draw(st.lists(st.integers(-6, 6), min_size=n_vocab, max_size=n_vocab))
    u = data.draw(st.floats(0, 1, exclude_max=True))
    top_p = data.draw(st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]))
    logits = torch.tensor([levels], dtype=torch.float32) * data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    token = int(draw(logits, np.array([u]), 1.0, top_p)[0])
    probs = torch.softmax(logits, -1)[0].double().numpy()
    order = np.lexsort((np.arange(n_vocab), -probs))
    mass = probs[order].cumsum()
    end = min(int((mass < top_p).sum()), n_vocab - 1) if top_p < 1 else n_vocab - 1
    total = mass[end] if top_p < 1 else 1.0
    rank = min(int((mass <= u * total).sum()), end)
    # a draw within rounding of a boundary may fall on either side
    near = {order[min(int((mass <= u * total + d).sum()), end)] for d in (-1e-7, 0.0, 1e-7)}
    assert token == order[rank] or token in near


@pytest.mark.parametrize("n_vocab", [32 * 300, 32 * 300 + 31])
def test_the_likeliest_found_by_runs_are_the_likeliest(n_vocab):
    drawn = torch.Generator().manual_seed(n_vocab)
    sharp, flat = torch.randn(3, n_vocab, generator=drawn) * 4, torch.zeros(1, n_vocab)
    crowded = torch.full((1, n_vocab), -20.0)
    crowded[0, 64:160] = torch.arange(96.0) / 96  # all of them side by side
    at_the_end = torch.arange(n_vocab)[None] / 1000.0
    probs = torch.softmax(torch.cat([sharp, flat, crowded, at_the_end]), -1)
    for k in (1, 64):
        values, ids = sampling._likeliest(probs, k)
        assert torch.equal(values, torch.topk(probs, k, -1).values)
        assert torch.equal(probs.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())


def test_a_token_of_probability_zero_is_never_drawn():
    # in fp32 a softmax over many tokens may sum to less than a uniform close to one
    logits = torch.full((2000, 3000), -200.0)
    logits[:, 7:1200] = torch.randn(2000, 1193, generator=torch.Generator().manual_seed(0)) * 0.01
    u = np.full(2000, 1 - 2.0**-53)
    for top_p in (1.0, 0.9999999):
        tokens, ok = draw(logits, u, 1.0, top_p)
        assert bool(ok.all())
        assert int(tokens.min()) >= 7
        assert int(tokens.max()) < 1200


def test_uniforms_are_a_function_of_seed_and_step_alone():
    seeds = np.array([0, 1, 2**63 - 1, 0x9E3779B97F4A7C15], dtype=np.uint64)
    first = uniforms(seeds, 0)
    assert np.array_equal(first[::-1], uniforms(seeds[::-1].copy(), 0))
    assert not np.array_equal(first, uniforms(seeds, 1))
    many = np.concatenate([uniforms(np.arange(500, dtype=np.uint64), step) for step in range(40)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3
    assert len(np.unique(many)) == len(many)
    grid = many.reshape(40, 500)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


def test_frames_have_the_schema_and_honest_statuses(tiny_qwen2):
    prompts = prompts_of(tiny_qwen2)
    frames = list(
        generate(tiny_qwen2, prompts, samples=2, max_new_tokens=8, temperature=3.0, behavior="marker")
    )
    import polars as pl

    frame = schema.check(pl.concat(frames), "completions")
    assert frame.height == 2 * len(prompts)
    assert set(frame["adapter"]) == {"base"}
    assert frame.select("persona", "question", "sample").is_unique().all()
    row = frame.row(
        by_predicate=(pl.col("persona") == "short") & (pl.col("question") == 1) & (pl.col("sample") == 1),
        named=True,
    )
    assert row["seed"] == completion_seed(42, "base", "short", QUESTIONS[1], 1)
    assert set(frame["status"]) <= {"ok", "empty", "truncated"}
    assert (frame.filter(pl.col("finish_reason") == "length")["n_tokens"] == 8).all()
    # a reply that is only the turn end is empty, not a number
    only_end = Completion(0, 0, [tiny_qwen2.tokenizer.eos_token_id], "stop")
    requests = requests_for(prompts, 1, 0, "base")
    shown = to_frame(
        tiny_qwen2, prompts, requests, [only_end], behavior="marker", adapter="base", source=None
    )
    assert shown["status"].to_list() == ["empty"]
    assert shown["text"].to_list() == [""]


def test_a_prompt_that_does_not_fit_stops_before_anything_runs(tiny_qwen2):
    requests = requests_for(prompts_of(tiny_qwen2), 1, 0, "base")
    seen = []
    with pytest.raises(InputError, match=r"persona villain, question 1.*context holds 512.*--max-new-tokens"):
        list(complete(tiny_qwen2, requests[1:2], Sampling(1.0, 1.0, 500), progress=lambda *a: seen.append(a)))
    assert not seen


def test_nan_logits_name_the_prompt(tiny_qwen2):
    requests = requests_for(prompts_of(tiny_qwen2), 1, 0, "base")
    tiny_qwen2.model.model.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"not finite, at persona \w+, question \d"):
        list(complete(tiny_qwen2, requests, Sampling(1.0, 1.0, 4)))


def test_a_model_that_is_not_decoded_here_is_refused(tiny_tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    size = {
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    narrow = models.load((MistralForCausalLM(MistralConfig(sliding_window=16, **size)), tiny_tokenizer))
    requests = requests_for(prompts_of(narrow), 1, 0, "base")
    with pytest.raises(InputError, match="sliding window of 16"):
        list(complete(narrow, requests, Sampling(0.0, 1.0, 4)))
    assert narrow.model.config._attn_implementation == "sdpa"
    capped = Gemma2ForCausalLM(Gemma2Config(bos_token_id=0, **size))
    with pytest.raises(ModelError, match=r"softcap|sliding window"):
        list(complete(models.load((capped, tiny_tokenizer)), requests, Sampling(0.0, 1.0, 4)))


def test_other_attention_than_the_models_own_is_caught(tiny_qwen2, monkeypatch):
    honest = shared_prompt._prompt_scores
    monkeypatch.setattr(shared_prompt, "_prompt_scores", lambda *a: honest(*a) * 0.5)
    with pytest.raises(ModelError, match="relative"):
        list(complete(tiny_qwen2, requests_for(prompts_of(tiny_qwen2), 1, 0, "base"), Sampling(0.0, 1.0, 4)))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
)
def test_sampling_refuses_what_cannot_be_meant(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)
