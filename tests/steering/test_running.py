"""steering: strength 0 is no steering to the bit, projecting twice is projecting once, packed equals one at a time, decoding
equals the whole text at once; what never fires, and what does not fit, is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.forward import head, packs, passes, plain
from leakfast.generation import transformers as local
from leakfast.generation.contract import Request, Sampling
from leakfast.steering import directions
from leakfast.steering.arms import Arm
from leakfast.steering.directions import Directions
from leakfast.steering.running import steered

WORDS = ["You are a villain . Tea ?", "You are a villain . Rain today ?", "Who are you ?", "You are"]


@pytest.fixture(scope="module")
def loaded():
    return models.load("organism", dtype="float32")


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded.tokenizer.encode(text, add_special_tokens=False) for text in WORDS]


def direction(loaded, layers=(2, 4), seed=3, length=7.0):
    draw = np.random.default_rng(seed)
    vectors = {layer: draw.standard_normal(loaded.hidden_size).astype(np.float32) for layer in layers}
    vectors = {k: (v * length / np.linalg.norm(v)).astype(np.float32) for k, v in vectors.items()}
    return Directions(vectors, "file", loaded.fingerprint, residual_norms=dict.fromkeys(layers, 20.0))


def by_hand(loaded, prompts, layers, arm):
    """(N, len(layers), D) last-token states and (N, V) logits: each prompt alone, edited by hooks of torch's own."""
    blocks = packs.stack(passes.decoder(loaded))[1]
    v = {layer: torch.from_numpy(arm.directions.vectors[layer]).double() for layer in arm.at}

    def edit(layer, h):
        u, m = v[layer] / v[layer].norm(), float(v[layer].norm())
        h, c = h.double(), (h.double() @ u)[..., None]
        new = {
            "add": h + arm.strength * m * u,
            "project": h - arm.strength * c * u,
            "cap": h - (c - arm.strength * m).clamp(min=0) * u,
        }[arm.mode]
        return new.float()

    caught, states, logits = {}, [], []

    def hook(layer):
        def run(module, given, out):
            whole = out[0] if isinstance(out, tuple) else out
            whole = edit(layer, whole) if layer in v else whole
            caught[layer] = whole[0, -1]
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        return blocks[layer].register_forward_hook(run)

    hooks = [hook(layer) for layer in {*layers, *arm.at}]
    try:
        with torch.inference_mode():
            for ids in prompts:
                logits.append(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
                states.append(torch.stack([caught[layer] for layer in layers]))
    finally:
        for one in hooks:
            one.remove()
    return torch.stack(states).numpy(), torch.stack(logits).float()


def apart(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize(("mode", "strength"), [("add", 1.5), ("add", -0.5), ("project", 1.0), ("cap", 0.1)])
def test_packed_is_one_at_a_time_with_hooks_of_torch(loaded, prompts, mode, strength):
    """At the steered block where it is the deepest (narrowed to the wanted rows), in the midst, and at the end."""
    arm = Arm("one", direction(loaded), mode, strength)
    for layers in ([4], [2, 4, 5]):  # the deepest block is run on the wanted rows alone
        expected, logits = by_hand(loaded, prompts, layers, arm)
        with steered(loaded, arm) as calls:
            got = passes.last_token_states(loaded, prompts, layers)
        assert apart(got, expected) < 1e-5
        assert set(calls) == {2, 4} and min(calls.values()) >= 1
    with steered(loaded, arm), torch.inference_mode():
        one = head.head_of(loaded)
        rows = {}
        for batch in passes.final_states(loaded, prompts):
            found = one.logits(batch.states)
            rows |= {int(s): found[int(r)] for s, r in zip(batch.sequences, batch.rows, strict=True)}
    assert apart(torch.stack([rows[i] for i in range(len(prompts))]), logits) < 1e-5
    plain_logits = by_hand(loaded, prompts, [5], Arm("none", direction(loaded), "add", 0.0))[1]
    assert apart(logits, plain_logits) > 1e-3  # that it did something at all


@pytest.mark.parametrize("mode", ["add", "project"])
def test_strength_0_is_no_steering_to_the_bit(loaded, prompts, mode):
    arm = Arm("one", direction(loaded), mode, 0.0)
    expected = passes.last_token_states(loaded, prompts, [2, 4, 5])
    with steered(loaded, arm):
        assert np.array_equal(passes.last_token_states(loaded, prompts, [2, 4, 5]), expected)
    assert np.array_equal(passes.last_token_states(loaded, prompts, [2, 4, 5]), expected)  # and nothing stays


def test_strength_0_in_bfloat16_is_no_steering_to_the_bit(loaded, prompts):
    low = models.load("organism", dtype="bfloat16")
    arm = Arm("one", direction(low), "add", 0.0)
    expected = passes.last_token_states(low, prompts, [4])
    with steered(low, arm):
        assert np.array_equal(passes.last_token_states(low, prompts, [4]), expected)


def test_projecting_out_twice_is_projecting_out_once(loaded, prompts):
    given = direction(loaded)
    edit = Arm("one", given, "project", 1.0).edits("cpu")[4]
    h = torch.randn(3, 11, loaded.hidden_size, generator=torch.Generator().manual_seed(1)) * 30
    once = edit(h)
    u = torch.from_numpy(given.vectors[4]) / np.linalg.norm(given.vectors[4])
    assert (once @ u).abs().max() < 1e-5 * h.norm(dim=-1).max()
    assert (edit(once) - once).abs().max() < 1e-5 * h.abs().max()
    assert (once - h).abs().max() > 1e-2
    arm = Arm("one", given, "project", 1.0)
    with steered(loaded, arm):
        one = passes.last_token_states(loaded, prompts, [5])
        with steered(loaded, arm):
            assert apart(passes.last_token_states(loaded, prompts, [5]), one) < 1e-5


def test_a_cap_touches_only_what_is_above_it(loaded):
    given = direction(loaded)
    u = torch.from_numpy(given.vectors[4] / np.linalg.norm(given.vectors[4]))
    rest = torch.randn(2, loaded.hidden_size, generator=torch.Generator().manual_seed(2))
    rest -= (rest @ u)[:, None] * u
    h = rest + torch.tensor([[3.0], [30.0]]) * u
    out = Arm("one", given, "cap", 1.0).edits("cpu")[4](h)  # at most 7 along u
    assert torch.equal(out[0], h[0])
    assert torch.allclose(out[1] @ u, torch.tensor(7.0), atol=1e-4)
    assert torch.allclose(out[1] - 7 * u, rest[1], atol=1e-4)


def test_units_of_strength(loaded):
    h = torch.zeros(1, loaded.hidden_size)
    given = direction(loaded)
    by_itself = Arm("one", given, "add", 0.5).edits("cpu")[4](h)
    by_residual = Arm("one", given, "add", 0.5, "residual").edits("cpu")[4](h)
    assert by_itself.norm().item() == pytest.approx(3.5, rel=1e-5)
    assert by_residual.norm().item() == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize("walk", [packs.walk, plain.walk])
def test_neighbours_change_nothing(loaded, prompts, walk):
    """A prompt's steered states do not depend on what else is in the batch, packed or padded."""
    arm, model = Arm("one", direction(loaded), "add", 1.0), passes.decoder(loaded)

    def states(some):
        out = {}

        def run(batch):
            found = {}
            batch.through(model, [4], lambda n, s, rows: found.update({n: packs.wanted(s, rows)}))
            return found[4]

        with torch.inference_mode():
            for batch, got in walk(model, some, np.ones(len(some), np.int64), 4096, run):
                out |= {int(m): got[int(p)] for m, p in zip(batch.members, batch.places, strict=True)}
        return torch.stack([out[i] for i in range(len(some))]).numpy()

    with steered(loaded, arm):
        together = states(prompts)
        for i, ids in enumerate(prompts):
            assert apart(states([ids])[0], together[i]) < 1e-5


def greedy(loaded, ids, n):
    fed = list(ids)
    with torch.inference_mode():
        for _ in range(n):
            logits = loaded.model(input_ids=torch.tensor([fed]), use_cache=False).logits[0, -1]
            fed.append(int(logits.argmax()))
    return fed[len(ids) :]


@pytest.mark.parametrize("mode", ["add", "project"])
def test_decoding_with_a_cache_is_the_whole_text_at_once(loaded, prompts, mode):
    """Prefill of shared prompts and every decoded token are steered: greedy tokens are those of uncached forwards under the
    same arm, and not those of the model as it is."""
    strength = 4.0 if mode == "add" else 1.0
    arm = Arm("one", direction(loaded), mode, strength)
    asked = [Request(str(i), ids, (1,)) for i, ids in enumerate(prompts)]
    sampling = Sampling(0.0, 1.0, 12)

    def drawn():
        return {c.request: c.token_ids for done in local.complete(loaded, asked, sampling) for c in done}

    unsteered = drawn()
    with steered(loaded, arm) as calls:
        got = drawn()
        before = dict(calls)
        for i, ids in enumerate(prompts):
            expected = greedy(loaded, ids, 12)
            assert expected[: len(got[i])] == got[i]
    assert before[4] > 10  # each decoded token passed there
    assert mode == "project" or got != unsteered
    assert drawn() == unsteered


def test_strength_0_draws_the_same_completions(loaded, prompts):
    asked = [Request(str(i), ids, (11, 12)) for i, ids in enumerate(prompts)]
    sampling = Sampling(1.0, 0.95, 16)
    unsteered = [c for done in local.complete(loaded, asked, sampling) for c in done]
    with steered(loaded, Arm("one", direction(loaded), "add", 0.0)):
        assert [c for done in local.complete(loaded, asked, sampling) for c in done] == unsteered


def test_what_never_fires_is_an_error_and_leaves_the_model(loaded, prompts):
    expected = passes.last_token_states(loaded, prompts, [3])
    with (
        pytest.raises(ModelError, match="layer 4, but no token passed"),
        steered(loaded, Arm("one", direction(loaded), "add", 1.0)),
    ):
        passes.last_token_states(loaded, prompts, [3])  # block 4 is not run
    assert np.array_equal(passes.last_token_states(loaded, prompts, [3]), expected)
    blocks = packs.stack(passes.decoder(loaded))[1]
    assert not any("forward" in vars(block) for block in blocks)


def test_an_error_inside_is_the_one_that_is_told(loaded):
    with pytest.raises(KeyError, match="mine"), steered(loaded, Arm("one", direction(loaded))):
        raise KeyError("mine")
    assert not any("forward" in vars(block) for block in packs.stack(passes.decoder(loaded))[1])


def test_a_direction_that_does_not_fit_is_refused(loaded):
    given = direction(loaded)
    wide = Directions({4: np.ones(loaded.hidden_size + 1, np.float32)}, "file", loaded.fingerprint)
    other = Directions(given.vectors, "file", "files:another")
    deep = Directions({99: given.vectors[4]}, "file", loaded.fingerprint)
    for one, said in ((wide, "wide"), (other, "another model"), (deep, "has blocks")):
        with pytest.raises(InputError, match=said), steered(loaded, Arm("one", one)):
            pass
    with pytest.raises(InputError, match="layer 3 asked"):
        Arm("one", given, layers=(3,))
    with pytest.raises(InputError, match="from 0 to 1"):
        Arm("one", given, "project", 2.0)
    with pytest.raises(InputError, match="residual"):
        Arm("one", Directions(given.vectors, "file", "x"), unit="residual")


def test_a_random_direction_is_as_long_and_the_same_from_a_seed(loaded):
    given = direction(loaded)
    one, again, other = (directions.random_like(given, seed) for seed in (5, 5, 6))
    assert one.norms == pytest.approx(given.norms, rel=1e-6)
    assert all(np.array_equal(one.vectors[k], again.vectors[k]) for k in one.layers)
    assert not np.array_equal(one.vectors[4], other.vectors[4])
    assert not np.allclose(one.vectors[2], one.vectors[4])


def test_a_column_of_a_matrix_comes_back_from_its_file(tmp_path):
    """safetensors 0.8 writes memory as it lies, whatever the strides: what is saved is copied first."""
    columns = np.arange(24, dtype=np.float32).reshape(6, 4)
    given = Directions({0: columns[:, 1], 1: columns[::-1, 2]}, "file", "files:0")
    again = directions.load(given.save(tmp_path / "columns.safetensors"))
    for layer in given.layers:
        np.testing.assert_array_equal(again.vectors[layer], given.vectors[layer])
