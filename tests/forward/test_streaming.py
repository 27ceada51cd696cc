"""streaming.py: states of a model that stays on disk are those of the loaded one, bit for bit, for several architectures, in
memory and spilled, in one chunk and in several; and no block beyond the deepest is read."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch

from leakfast import models
from leakfast.errors import ModelError
from leakfast.forward import packs, passes, streaming
from leakfast.forward.head import head_of
from leakfast.measure import asking

KINDS = (
    "qwen2",
    "qwen3",
    "llama",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mistral-window",
    "llama-dynamic",
    "granite",
)
BUDGET = 60  # packed tokens: several batches


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a random model of a kind, its weights in several files, with the organism's tokenizer."""
    found = {}

    def get(kind, **more):
        if kind not in found:
            tokenizer = models.load_tokenizer("organism")
            folder = tmp_path_factory.mktemp(kind)
            net = architectures.random(kind, tokenizer, **{"num_hidden_layers": 4, **more})
            net.save_pretrained(folder, max_shard_size="150KB")
            tokenizer.save_pretrained(folder)
            assert len(list(folder.glob("*.safetensors"))) > 1
            found[kind] = folder
        return found[kind]

    return get


def pair_of(folder, dtype="float32"):
    return models.load(str(folder), dtype=dtype), models.load(str(folder), dtype=dtype, stream="on")


def prompts(n=17, longest=40):
    rng = np.random.default_rng(3)
    root = rng.integers(0, 90, 5).tolist()
    return [root + rng.integers(0, 90, m).tolist() for m in rng.integers(1, longest, n)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_the_loaded_models_bit_for_bit(folder_of, kind, dtype):
    whole, on_disk = pair_of(folder_of(kind), dtype)
    assert on_disk.fingerprint == whole.fingerprint and on_disk.n_layers == whole.n_layers
    given, layers = prompts(), [2, 0]
    expected = passes.last_token_states(whole, given, layers, budget_tokens=BUDGET)
    assert np.array_equal(passes.last_token_states(on_disk, given, layers, budget_tokens=BUDGET), expected)
    segments = np.arange(len(given)) % 4
    for ours, own in zip(
        *(passes.last_token_sums(m, given, layers, segments, budget_tokens=BUDGET) for m in (on_disk, whole)),
        strict=True,
    ):
        assert np.array_equal(ours, own)
    last = [1 + len(one) // 2 for one in given]
    means = [passes.span_means(m, given, last, layers, budget_tokens=BUDGET) for m in (on_disk, whole)]
    assert np.array_equal(*means)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_loaded_models_bit_for_bit(folder_of, kind):
    whole, on_disk = pair_of(folder_of(kind))
    given = [one for one in prompts() if len(one) > 8]
    counts = [3 + len(one) % 3 for one in given]
    ours, own = (asking.continuations(m, given, counts, budget_tokens=BUDGET) for m in (on_disk, whole))
    assert np.array_equal(ours, own) and np.isfinite(own).all()


@pytest.mark.parametrize(("held", "spilled"), [(0, 1 << 30), (12_000, 1 << 30), (0, 12_000)])
def test_spilled_states_and_chunks_change_no_bit(folder_of, monkeypatch, held, spilled):
    whole, on_disk = pair_of(folder_of("qwen2"))
    given = prompts()
    expected = passes.last_token_states(whole, given, [0, 3], budget_tokens=BUDGET)
    monkeypatch.setattr(streaming, "HELD_BYTES", held)
    monkeypatch.setattr(streaming, "SPILLED_BYTES", spilled)
    on_disk.stream.read_blocks.clear()
    got = passes.last_token_states(on_disk, given, [0, 3], budget_tokens=BUDGET)
    assert np.array_equal(got, expected)
    rounds = on_disk.stream.read_blocks.count(1)
    assert rounds == 1 if spilled > 1 << 20 else rounds > 1  # every block once a chunk
    final = [torch.cat([b.states for b in passes.final_states(m, given, 1)]) for m in (on_disk, whole)]
    assert torch.equal(*final)


def test_masks_that_are_made_again_for_each_block_change_no_bit(folder_of, monkeypatch):
    whole, on_disk = pair_of(folder_of("qwen2"))
    expected = passes.last_token_states(whole, prompts(), [3], budget_tokens=BUDGET)
    monkeypatch.setattr(streaming, "MASK_BYTES", 0)
    assert np.array_equal(passes.last_token_states(on_disk, prompts(), [3], budget_tokens=BUDGET), expected)


def test_blocks_beyond_the_deepest_and_the_head_are_never_read(folder_of, monkeypatch):
    _, on_disk = pair_of(folder_of("qwen2"))
    read, own = [], on_disk.stream._read
    monkeypatch.setattr(on_disk.stream, "_read", lambda n, slot: read.append(n) or own(n, slot))
    passes.last_token_states(on_disk, prompts(), [0, 1], budget_tokens=BUDGET)
    assert read == on_disk.stream.read_blocks == [0, 1]
    assert on_disk.stream._head is None
    assert head_of(on_disk).weight is on_disk.stream._head


def test_all_prompts_pass_a_block_before_the_next_is_read(folder_of):
    _, on_disk = pair_of(folder_of("qwen2"))
    told = []
    passes.last_token_states(
        on_disk,
        prompts(),
        [3],
        budget_tokens=BUDGET,
        progress=lambda done, total, what: told.append((done, total)),
    )
    assert on_disk.stream.read_blocks == [0, 1, 2, 3]
    assert told == sorted(told) and told[-1][0] == told[-1][1] == len({tuple(one) for one in prompts()})


def test_the_model_is_as_before_after_a_run(folder_of):
    _, on_disk = pair_of(folder_of("qwen2"))
    blocks = packs.stack(passes.decoder(on_disk))[1]
    before = [vars(block)["forward"] for block in blocks]
    first = passes.last_token_states(on_disk, prompts(), [1])
    assert [vars(block)["forward"] for block in blocks] == before
    assert all(not block._forward_hooks for block in blocks)
    assert np.array_equal(passes.last_token_states(on_disk, prompts(), [1]), first)


def test_a_model_whose_blocks_share_more_than_states_is_refused(folder_of, monkeypatch):
    """Of a type that is tried; here the last block looks at what the first one has kept."""
    _, on_disk = pair_of(folder_of("granite"))
    blocks = packs.stack(passes.decoder(on_disk))[1]
    kept = []
    own = [vars(block)["forward"] for block in blocks]

    def first(hidden, *more, **named):
        kept.append(hidden.mean())
        return own[0](hidden, *more, **named)

    def last(hidden, *more, **named):
        return own[-1](hidden + kept.pop(), *more, **named) if kept else own[-1](hidden, *more, **named)

    blocks[0].forward, blocks[-1].forward = first, last
    one_block = streaming._Run.step

    def step(self, *given):
        kept.clear()
        return one_block(self, *given)  # nothing is left of the block before

    monkeypatch.setattr(streaming._Run, "step", step)
    with pytest.raises(ModelError, match="block after block"):
        passes.last_token_states(on_disk, prompts(), [len(blocks) - 1])


def test_fp8_is_refused_for_a_model_on_disk(folder_of, monkeypatch):
    from leakfast.forward import fp8

    _, on_disk = pair_of(folder_of("qwen2"))
    monkeypatch.setattr(fp8, "check_precision", lambda *_: None)
    with pytest.raises(ModelError, match="stay on disk"), fp8.running(on_disk, "fp8", prompts(), [0]):
        pass
