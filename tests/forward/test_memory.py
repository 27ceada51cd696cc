"""The engine's memory: what happens where it runs out, that freed memory is used again, and how large a batch
is made."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gathering import PROMPTS, gathered, relative

from leakfast.errors import ModelError
from leakfast.forward import packs, passes, room


@pytest.fixture(scope="module")
def loaded(tiny_qwen3):
    return tiny_qwen3


def failing_beyond(monkeypatch, most):
    """A device that holds `most` packed rows: more raise what torch raises."""
    real, seen = packs.Pack.through, []

    def through(pack, *more):
        seen.append(pack.tokens.shape[1])
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(pack, *more)

    monkeypatch.setattr(packs.Pack, "through", through)
    return seen


def test_out_of_memory_halves_the_batch_says_so_and_changes_no_result(loaded, monkeypatch, caplog):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 300, n).tolist() for n in rng.integers(4, 12, 40)] * 2
    expected = passes.last_token_states(loaded, sequences, [0, 2])
    states = gathered(loaded, sequences)
    seen, told = failing_beyond(monkeypatch, 40), []
    got = passes.last_token_states(
        loaded, sequences, [0, 2], budget_tokens=100, progress=lambda *a: told.append(a)
    )
    assert max(seen) > 40 and seen[-1] <= 40
    assert "out of memory at" in caplog.text and "Tried to allocate 2 GiB." in caplog.text
    assert relative(torch.from_numpy(got), torch.from_numpy(expected)) <= 1e-5
    assert told[-1] == (40, 40, "states")
    assert [t[0] for t in told] == sorted(t[0] for t in told)
    again = gathered(loaded, sequences, budget_tokens=100)
    assert again.keys() == states.keys()
    assert max(relative(again[key], states[key]) for key in again) <= 1e-5


def test_out_of_memory_half_way_through_a_batch_counts_nothing_twice(loaded, monkeypatch):
    """The first layer's sums of a batch exist when its last block fails."""
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 300, n).tolist() for n in rng.integers(4, 12, 30)]
    segments = np.arange(30) % 4
    states = passes.last_token_states(loaded, sequences, [0, 2])
    real, failed = packs.Pack.through, []

    def through(pack, model, layers, take):
        def takes(layer, *more):
            if layer and pack.tokens.shape[1] > 40:
                failed.append(pack.tokens.shape[1])
                raise torch.OutOfMemoryError("CUDA out of memory.")
            take(layer, *more)

        return real(pack, model, layers, takes)

    monkeypatch.setattr(packs.Pack, "through", through)
    sums, squares = passes.last_token_sums(loaded, sequences, [2, 0], segments, budget_tokens=100)
    assert failed
    for column, at in ((0, 1), (1, 0)):  # layers in the order asked
        for p in range(4):
            rows = states[segments == p, at].astype(np.float64)
            np.testing.assert_allclose(sums[column, p], rows.sum(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(squares[column, p], np.square(rows).sum(0), rtol=1e-4, atol=1e-4)


def test_what_says_out_of_memory_in_words_alone_counts_and_other_errors_do_not(loaded, monkeypatch, caplog):
    expected = passes.last_token_states(loaded, PROMPTS, [0])
    real, words = (
        packs.Pack.through,
        ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
    )

    def through(pack, *more):
        if pack.tokens.shape[1] > 12:
            raise RuntimeError(words[0])
        return real(pack, *more)

    monkeypatch.setattr(packs.Pack, "through", through)
    got = passes.last_token_states(loaded, PROMPTS, [0], budget_tokens=100)
    assert "CUBLAS_STATUS_ALLOC_FAILED" in caplog.text
    assert relative(torch.from_numpy(got), torch.from_numpy(expected)) <= 1e-5
    words[0] = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        passes.last_token_states(loaded, PROMPTS, [0], budget_tokens=100)


def test_out_of_memory_for_one_prompt_is_the_users_to_solve(loaded, monkeypatch):
    failing_beyond(monkeypatch, 2)
    with pytest.raises(ModelError, match="prompt of 3 tokens does not fit in the memory.*Free the device"):
        passes.last_token_states(loaded, [[1, 2, 3], [4, 5]], [0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_block_works_in_memory_that_it_was_given_before():
    """Page faults of a second run over 40 tensors of 8 MB, in a fresh process: none but a few."""
    code = """
import resource, torch
from leakfast.forward.passes import packs
print(packs.keep_memory())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
    for _ in range(40):
        tensors = [torch.zeros(2 << 20) for _ in range(4)]
        del tensors
run(); before = faults(); run(); print(faults() - before)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    ).stdout.split()
    if done[0] == "False":
        pytest.skip("this C library has no mallopt")
    assert int(done[1]) < 1000  # 40 × 4 × 2048 pages where every tensor is new memory


def test_a_batch_on_a_cpu_is_fixed_and_a_token_weighs_what_its_tensors_do(loaded):
    assert passes.budget_tokens(loaded) == 2048
    config = loaded.model.config
    assert room.bytes_a_token(config, 4) > 4 * 3 * config.intermediate_size
    assert room.bytes_a_token(config, 4) == 2 * room.bytes_a_token(config, 2) - 8 * config.hidden_size


def test_a_batch_on_a_gpu_is_what_half_of_its_free_memory_holds():
    from transformers import Qwen2Config

    config = Qwen2Config(  # Qwen2.5-7B
        hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4
    )
    assert room.tokens_that_fit(config, 2, 120 << 30) == 32_768
    assert room.tokens_that_fit(config, 2, 0) == 512
    fitting = room.tokens_that_fit(config, 2, 4 << 30)
    assert 512 < fitting < 32_768
    assert fitting * room.bytes_a_token(config, 2) <= 2 << 30
