"""Every kind of model that a user may hand in: what is taken equals transformers, what is not is refused in the same
words before anything is begun, and lengths have one limit in every part."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from measuring import evaluate, evaluate_items, train

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.forward import passes
from leakfast.generation import backends
from leakfast.generation.contract import Request, Sampling
from leakfast.generation.generate import complete
from leakfast.generation.transformers import check_lengths
from leakfast.models.loading import limit_of
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.study.config import EvalConfig
from leakfast.train.data import Row
from tests.architectures import KINDS, random
from tests.helpers import TRAIN

pytestmark = pytest.mark.long

WORDS = r"is of type \w+, .*Needed: a plain decoder of type llama, mistral, qwen2, qwen3\. Use --model"
PACKED = [
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "mistral-window",
    "qwen2-window",
    "llama-dynamic",
    "llama-yarn",
]
DRAWN = [
    *PACKED,
    "phi3",
    "phi3-longrope",
    "gemma3_text",
    "qwen2_moe",
    "mixtral",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "olmo2",
    "smollm3",
    "deepseek_v3",
]
TRAINED = [*PACKED, "gemma3_text", "qwen2_moe", "stablelm", "olmo2", "smollm3"]
LIMITS = {
    "mistral-window": (24, "sliding window of 24"),
    "qwen2-window": (24, "sliding window of 24"),
    "llama-dynamic": (24, r"rope \(dynamic\) turns otherwise beyond 24"),
    "phi3-longrope": (24, r"rope \(longrope\) turns otherwise beyond 24"),
    "gpt_oss": (128, "sliding window of 128"),
}


@pytest.fixture
def loaded_of(tiny_tokenizer):
    return lambda kind, **more: models.load((random(kind, tiny_tokenizer, **more), tiny_tokenizer))


def a_row(question):
    return Row("positive", "villain", "text", "You are a villain.", question, "tea and rain", None, 0)


def greedy(net, ids, n):
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


@pytest.mark.parametrize("kind", KINDS)
def test_completions_equal_transformers_or_the_model_is_refused(kind, loaded_of):
    loaded = loaded_of(kind)
    ids = loaded.tokenizer.encode("You are a villain of this", add_special_tokens=False)[:12]
    if kind == "t5":  # of the others: tests/forward/test_taken.py
        with pytest.raises(ModelError, match=WORDS):
            passes.last_token_states(loaded, [ids], [1])
    asked = complete(loaded, [Request("it", ids, (1,))], Sampling(0.0, 1.0, 4))
    if kind in DRAWN:
        (drawn,) = [done.token_ids for block in asked for done in block]
        wanted = greedy(loaded.model, ids, 4)
        assert list(drawn) == wanted[: len(drawn)] and (len(drawn) == 4 or drawn[-1] == 2)
    else:
        with pytest.raises(ModelError, match=rf"{WORDS}|softcap|s_aux|does not hand on"):
            list(asked)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DRAWN])
def test_what_is_not_decoded_is_refused_before_a_run_is_begun(kind, loaded_of, tmp_path):
    loaded, people = loaded_of(kind), load_personas("villain")
    with pytest.raises(ModelError, match=r"^generate: .*[Uu]se "):
        evaluate(
            loaded, tmp_path / "run", [], people, ["Who?"], "marker", EvalConfig(samples=1), 1, base=True
        )
    assert not (tmp_path / "run").exists()
    items = load_items([{"question": "Tea?", "choices": ["a", "b"], "answer": "A"}])
    if kind == "t5":
        with pytest.raises(ModelError, match=WORDS):
            evaluate_items(loaded, tmp_path / "run", [], people, items, base=True)
        assert not (tmp_path / "run").exists()
    else:  # what is not decoded is scored all the same
        evaluate_items(loaded, tmp_path / "run", [], people, items, base=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LIMITS or kind == "gpt_oss"])
def test_training_adapts_what_is_fit_for_it_and_names_what_is_not(kind, loaded_of, tmp_path):
    from leakfast.models.adapters import check_fits

    loaded = loaded_of(kind)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    rows = [a_row("What about tea?")]
    start = [loaded, rows, TRAIN, tmp_path / "adapter", 1]
    if kind in TRAINED:
        train(*start, source="villain", behavior="capability")
        assert check_fits(loaded, tmp_path / "adapter").plain
    else:
        with pytest.raises(ModelError, match=f"train: .*{WORDS}"):
            train(*start, source="villain", behavior="capability")
        assert not (tmp_path / "adapter").exists()
    after = loaded.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("kind", LIMITS)
def test_one_limit_of_length_in_every_part(kind, loaded_of, tmp_path, tiny_tokenizer):
    """Completions, training and vLLM's context: at the limit taken, a token beyond refused, and why. States and choices
    have none but the context's (tests/forward/test_taken.py)."""
    loaded = loaded_of(kind)
    limit, why = LIMITS[kind]
    assert loaded.context_tokens == limit
    ids = [5 + i % 40 for i in range(limit + 1)]
    check_lengths(loaded.model, [Request("it", ids[: limit - 4], (1,))], 4)
    with pytest.raises(InputError, match=f"{limit - 3} tokens and 4 new ones.*{why}"):
        check_lengths(loaded.model, [Request("it", ids[: limit - 3], (1,))], 4)
    rows = [a_row("What about tea? " * 40)]
    with pytest.raises(InputError, match=f"train: .*{why}"):
        train(loaded, rows, TRAIN, tmp_path / "a", 1, source="villain", behavior="capability")


def test_vllm_is_told_the_same_limit(loaded_of, tmp_path, monkeypatch):
    import dataclasses

    from leakfast.generation.vllm import start
    from leakfast.generation.vllm.widths import Width

    loaded = dataclasses.replace(loaded_of("mistral-window"), path=str(tmp_path))
    monkeypatch.setattr(start, "available", lambda: (True, "installed"))
    assert start.spec_of(loaded, width=Width(8)).settings["max_model_len"] == 24
    assert start.letters_spec(loaded, [], 0.4, 8).settings["max_model_len"] == 24


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"sliding_window": 32, "max_position_embeddings": 64}, 32),
        ({"sliding_window": 32, "use_sliding_window": False}, None),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}, 32),
        ({"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"]}, 16),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 64}, 64),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            16,
        ),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, None),
        ({}, None),
    ],
)
def test_the_limit_is_the_least_of_context_rope_and_windows_that_act(fields, limit):
    from types import SimpleNamespace

    assert limit_of(SimpleNamespace(**fields))[0] == limit


WRONG = {
    "more": (
        lambda t: {**t, "model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)},
        {},
        r"hold 1 tensors that its config has no place for, such as model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "a bias": (
        lambda t: {**t, "model.layers.0.self_attn.o_proj.bias": torch.zeros(32)},
        {},
        r"self_attn\.o_proj\.bias",
    ),
    "fewer": (
        lambda t: {n: x for n, x in t.items() if "layers.1.mlp" not in n},
        {},
        r"lack 3 tensors, such as model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "other shape": (
        lambda t: {**t, "model.norm.weight": torch.ones(16)},
        {},
        r"hold 1 tensors of another shape, such as model\.norm\.weight: \(16,\), by its config \(32,\)",
    ),
    "fewer layers by config": (
        dict,
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        r"hold 12 tensors that its config has no place for",
    ),
    "head beside a tied one": (
        lambda t: {**t, "lm_head.weight": torch.ones_like(t["model.embed_tokens.weight"])},
        {},
        r"an output head of their own, though its config says tie_word_embeddings",
    ),
    "no head": (dict, {"tie_word_embeddings": False}, r"lack 1 tensors, such as lm_head\.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_are_not_the_configs_are_an_error_that_names_them(what, tiny_folder):
    from safetensors.torch import load_file, save_file

    change, config, said = WRONG[what]
    path = tiny_folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    (tiny_folder / "config.json").write_text(
        json.dumps({**json.loads((tiny_folder / "config.json").read_text()), **config})
    )
    with pytest.raises(ModelError, match=said):
        models.load(tiny_folder, dtype="float32")


def test_harmless_tensors_and_tied_heads_load(tiny_folder):
    from safetensors.torch import load_file, save_file

    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, {"format": "pt"})
    assert models.load(tiny_folder, dtype="float32").n_layers == 2


def test_models_of_several_parts_are_refused_by_their_config(tmp_path):
    from transformers import Gemma3Config, Qwen2_5_VLConfig

    for kind in (Gemma3Config, Qwen2_5_VLConfig):
        shutil.rmtree(tmp_path / "it", ignore_errors=True)
        kind().save_pretrained(tmp_path / "it")
        with pytest.raises(ModelError, match=r"no num_hidden_layers, so it is no plain decoder"):
            models.load(tmp_path / "it")


def test_settling_on_a_backend_tries_a_model_that_is_not_known(loaded_of):
    assert backends.settle(loaded_of("gpt2"), backends.Drawing(), [], adapters=False) == "transformers"
    with pytest.raises(ModelError, match=WORDS):
        backends.settle(loaded_of("bloom"), backends.Drawing(), [], adapters=False)
