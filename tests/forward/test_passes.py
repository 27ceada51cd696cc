"""engine.py: the packed forward equals one prompt at a time through transformers, for every
architecture it claims, whatever is packed together; what it cannot run is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast import models
from leakfast.errors import ModelError
from leakfast.forward import forest, passes

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
V = 97  # odd, so that no width is a round number by accident


def tiny(architecture, seed=0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": V,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if architecture == "mistral":
        shape["sliding_window"] = None
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**shape, **changes})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in net.named_parameters():  # norms and biases start as ones and zeros: move them
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def loaded_of(request):
    cache = {}

    def get(architecture):
        if architecture not in cache:
            cache[architecture] = models.load((tiny(architecture), lambda text: text))
        return cache[architecture]

    return get


def one_at_a_time(net, sequences, layers):
    """(N, len(layers), D): raw block outputs at the last token, caught by hooks."""
    caught = {}
    decoder = net.get_base_model().model if hasattr(net, "get_base_model") else net.model
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out[0, -1].float()))
        for i, block in enumerate(decoder.layers)
    ]
    rows = []
    with torch.inference_mode():
        for sequence in sequences:
            net(input_ids=torch.tensor([sequence]))
            rows.append(torch.stack([caught[layer] for layer in layers]))
    for hook in hooks:
        hook.remove()
    return torch.stack(rows).numpy()


def relative_error(got, truth):
    """Largest ‖got − truth‖ / ‖truth‖ over prompts and layers."""
    return float((np.linalg.norm(got - truth, axis=-1) / np.linalg.norm(truth, axis=-1)).max())


def prompts(seed=0, n_prefixes=4, n_tails=5):
    """Prompts that share prefixes of several lengths, one that is a prefix of others, one alone."""
    rng = np.random.default_rng(seed)
    root = rng.integers(0, V, 3).tolist()
    heads = [root + rng.integers(0, V, length).tolist() for length in rng.integers(1, 20, n_prefixes)]
    tails = [rng.integers(0, V, length).tolist() for length in rng.integers(1, 12, n_tails)]
    return [h + t for h in heads for t in tails] + [heads[0], rng.integers(0, V, 40).tolist(), [5]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 37, 100_000])  # no sharing, splits inside trees, one batch
def test_packed_equals_one_at_a_time(loaded_of, architecture, budget):
    loaded, sequences, layers = loaded_of(architecture), prompts(), [0, 2, 3]
    got = passes.last_token_states(loaded, sequences, layers, budget_tokens=budget)
    assert (got.shape, got.dtype) == ((len(sequences), 3, 48), np.float32)
    assert relative_error(got, one_at_a_time(loaded.model, sequences, layers)) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_l_is_hidden_states_l_plus_1_but_raw_at_the_last(loaded_of, architecture):
    loaded, sequence = loaded_of(architecture), prompts()[0]
    got = passes.last_token_states(loaded, [sequence], [0, 1, 2, 3])[0]
    with torch.inference_mode():
        out = loaded.model(input_ids=torch.tensor([sequence]), output_hidden_states=True)
        normed = loaded.model.model.norm(torch.from_numpy(got[3]))
    for layer in (0, 1, 2):
        assert relative_error(got[layer], out.hidden_states[layer + 1][0, -1].numpy()) <= 1e-5
    assert relative_error(normed.numpy(), out.hidden_states[4][0, -1].numpy()) <= 1e-5
    assert relative_error(got[3], normed.numpy()) > 1e-2


@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 6}, {"num_key_value_heads": 1}, {"head_dim": 32}]
)
def test_head_layouts(changes):
    loaded = models.load((tiny("llama", **changes), lambda text: text))
    got = passes.last_token_states(loaded, prompts(), [3])
    assert relative_error(got, one_at_a_time(loaded.model, prompts(), [3])) <= 1e-5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_scalings(rope):
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **rope}
    loaded = models.load((tiny("llama", rope_parameters=rope), lambda text: text))
    got = passes.last_token_states(loaded, prompts(), [3])
    assert relative_error(got, one_at_a_time(loaded.model, prompts(), [3])) <= 1e-5


def test_bfloat16_is_no_further_from_the_truth_than_transformers(loaded_of):
    sequences = prompts()
    truth = one_at_a_time(loaded_of("qwen2").model, sequences, [3])
    half = models.load((tiny("qwen2").bfloat16(), lambda text: text))
    got = passes.last_token_states(half, sequences, [3])
    theirs = one_at_a_time(half.model, sequences, [3])
    assert np.linalg.norm(got - truth) <= 1.1 * np.linalg.norm(theirs - truth)


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)
properties = settings(max_examples=25, deadline=None)


@properties
@given(sequences=SEQUENCES, budget=st.sampled_from([1, 9, 1000]))
def test_any_packing_equals_one_at_a_time(loaded_of, sequences, budget):
    loaded = loaded_of("qwen3")
    got = passes.last_token_states(loaded, sequences, [1], budget_tokens=budget)
    assert relative_error(got, one_at_a_time(loaded.model, sequences, [1])) <= 1e-5


@properties
@given(sequences=SEQUENCES, random=st.randoms(use_true_random=False))
def test_order_of_the_input_changes_no_bit(loaded_of, sequences, random):
    order = list(range(len(sequences)))
    random.shuffle(order)
    loaded = loaded_of("qwen2")
    straight = passes.last_token_states(loaded, sequences, [3], budget_tokens=20)
    shuffled = passes.last_token_states(loaded, [sequences[i] for i in order], [3], budget_tokens=20)
    np.testing.assert_array_equal(straight[order], shuffled)


@properties
@given(sequences=SEQUENCES, at=st.integers(0, 11), new=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_changing_one_prompt_leaves_its_neighbours_unchanged(loaded_of, sequences, at, new):
    at %= len(sequences)
    changed = [*sequences[:at], new, *sequences[at + 1 :]]
    loaded = loaded_of("llama")
    before = passes.last_token_states(loaded, sequences, [3])
    after = passes.last_token_states(loaded, changed, [3])
    others = [i for i in range(len(sequences)) if i != at]
    if others:
        assert relative_error(after[others], before[others]) <= 1e-5


def count_rows(net, block):
    """Tokens that went through a block's MLP."""
    seen = []
    hook = net.model.layers[block].mlp.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[1])
    )
    return seen, hook


def test_duplicates_and_shared_prefixes_are_computed_once(loaded_of):
    loaded = loaded_of("qwen2")
    seen, hook = count_rows(loaded.model, 0)
    got = passes.last_token_states(loaded, [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2]], [0, 1])
    hook.remove()
    assert seen == [4]
    np.testing.assert_array_equal(got[0], got[2])


def test_the_deepest_block_is_run_for_last_tokens_alone(loaded_of):
    loaded = loaded_of("qwen3")
    counts = [count_rows(loaded.model, block) for block in (1, 2)]
    passes.last_token_states(loaded, [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8]], [0, 2])
    for _, hook in counts:
        hook.remove()
    assert [seen for seen, _ in counts] == [[8], [3]]


def test_blocks_beyond_the_deepest_layer_and_the_head_are_not_run(loaded_of):
    loaded = loaded_of("qwen2")
    counts = [count_rows(loaded.model, block) for block in range(4)]
    heads = []
    head = loaded.model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    passes.last_token_states(loaded, prompts(), [1, 0])
    for _, hook in counts:
        hook.remove()
    head.remove()
    assert [len(seen) > 0 for seen, _ in counts] == [True, True, False, False]
    assert heads == []


def test_layers_come_in_the_order_asked(loaded_of):
    loaded = loaded_of("qwen2")
    up = passes.last_token_states(loaded, prompts(), [0, 2])
    np.testing.assert_array_equal(passes.last_token_states(loaded, prompts(), [2, 0, 2]), up[:, [1, 0, 1]])


def test_a_live_adapter_is_seen_and_training_goes_on_as_before():
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(
        tiny("qwen2"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.5)
    )
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    loaded = models.load((net, lambda text: text))
    net.train()
    net.base_model.model.model.layers[1].eval()
    modes = [module.training for module in net.modules()]
    attention = net.config._attn_implementation
    got = passes.last_token_states(loaded, prompts(), [3])
    assert [module.training for module in net.modules()] == modes
    assert net.config._attn_implementation == attention
    net.eval()
    assert relative_error(got, one_at_a_time(net, prompts(), [3])) <= 1e-5
    with net.disable_adapter():
        base = one_at_a_time(net, prompts(), [3])
    assert relative_error(got, base) > 1e-2


def test_the_model_is_put_back_after_an_error(loaded_of):
    net = loaded_of("qwen2").model
    before = net.config._attn_implementation

    def explode(*_):
        raise RuntimeError("inside")

    hook = net.model.layers[1].register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="inside"):
        passes.last_token_states(loaded_of("qwen2"), prompts(), [3])
    hook.remove()
    assert net.config._attn_implementation == before
    assert (
        relative_error(
            passes.last_token_states(loaded_of("qwen2"), prompts(), [3]), one_at_a_time(net, prompts(), [3])
        )
        <= 1e-5
    )


def test_progress_counts_every_distinct_prompt(loaded_of):
    told = []
    passes.last_token_states(
        loaded_of("qwen2"),
        [[1, 2], [1, 3], [1, 2], [4]],
        [0],
        budget_tokens=2,
        progress=lambda *a: told.append(a),
    )
    assert told[0] == (0, 3, "states")
    assert told[-1] == (3, 3, "states")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 9]])
def test_layers_the_model_does_not_have_are_a_mistake(loaded_of, layers):
    with pytest.raises(ValueError, match="0…3"):
        passes.last_token_states(loaded_of("qwen2"), [[1]], layers)


def test_a_sliding_window_is_kept():
    loaded = models.load((tiny("mistral", sliding_window=16), lambda text: text))
    given = [list(range(16)), list(range(40)), [*range(20), 50, 51, 3]]
    got = passes.last_token_states(loaded, given, [3])
    assert relative_error(got, one_at_a_time(loaded.model, given, [3])) <= 1e-5
    free = models.load((tiny("mistral"), lambda text: text))
    assert relative_error(got[1:], one_at_a_time(free.model, given[1:], [3])) > 1e-3


def test_a_prompt_longer_than_the_context_is_refused(loaded_of):
    with pytest.raises(ModelError, match="holds 256"):
        passes.last_token_states(loaded_of("qwen2"), [[1] * 257], [0])


def test_scores_are_split_when_a_group_is_large(loaded_of, monkeypatch):
    sequences = prompts(n_prefixes=3, n_tails=9)
    whole = passes.last_token_states(loaded_of("qwen2"), sequences, [3])
    monkeypatch.setattr(passes.packs.attention.grouped, "_SCORES", 1)
    assert relative_error(passes.last_token_states(loaded_of("qwen2"), sequences, [3]), whole) <= 1e-6


def test_organism_equals_one_at_a_time():
    if not (models.organism_dir() / "model.safetensors").is_file():
        pytest.skip("the organism's weights have not been built in this checkout")
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas, load_questions

    loaded = models.load("organism", dtype="float32", device="cpu")
    rendered = chat.render_prompts(
        loaded.tokenizer, load_personas("all")[::10], load_questions("eval").questions[:4]
    )
    sequences = [prompt.ids for prompt in rendered]
    layers = list(range(loaded.n_layers))
    got = passes.last_token_states(loaded, sequences, layers)
    assert relative_error(got, one_at_a_time(loaded.model, sequences, layers)) <= 1e-5
    assert len(forest.plan(sequences, 10**6).tokens) < 0.7 * sum(map(len, sequences))
