"""Which implementation runs where, and the values of those that a CPU has: C++ for every instruction set of
this processor, tiled torch, and the references, under the same rules as the GPU kernels."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from warm import said_by

from leakfast.forward import ops

try:
    from leakfast import _native
except ImportError:
    _native = None

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
PATHS = {dtype: _native.choice_paths(dtype == BF16) if _native else [] for dtype in (F32, BF16)}
needs_native = pytest.mark.skipif(_native is None, reason="leakfast._native is not built here")


def draw(n, v, d, c, dtype, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=generator)).to(dtype)
    head = torch.randn(v, d, generator=generator).to(dtype)
    ids = torch.randint(0, v, (n, c), generator=generator)
    if c:
        ids[0, 0], ids[-1, -1] = v - 1, 0
    return hidden, head, ids


def native(hidden, head, ids, path, threads=1):
    arrays = [(x.view(torch.uint16) if x.dtype == BF16 else x).numpy() for x in (hidden, head)]
    return tuple(map(torch.from_numpy, _native.choice_logprobs(*arrays, ids.numpy(), threads, path)))


def check_errors(got, hidden, head, ids):
    """Against float64: no more error than torch's in float32, nor than one unit in the last place of the
    sums of |h|·|w| and of the result: with few numbers to average, chance decides below that."""
    exact = hidden.double() @ head.double().T
    single = hidden.float() @ head.float().T
    sums = hidden.double().abs() @ head.double().abs().T
    truth = torch.log_softmax(exact, -1).gather(1, ids), exact.logsumexp(-1)
    eager = torch.log_softmax(single, -1).gather(1, ids), single.logsumexp(-1)
    for ours, torchs, true in zip(got, eager, truth, strict=True):
        if not true.numel():
            continue
        assert ours.dtype == F32 and ours.shape == true.shape
        error, allowed = ((x.double() - true).square().mean().sqrt() for x in (ours, torchs))
        floor = 2.0**-23 * (sums.max() + true.abs().max())
        assert error <= max(allowed, floor), (float(error), float(allowed))


SHAPES = [
    (1, 1, 1, 1),  # one of everything
    (3, 101, 23, 5),  # odd everywhere; bfloat16 pairs end in half a pair
    (17, 640, 128, 2),  # a vector and a lane more
    (65, 333, 129, 1),  # a block and a row more, a partial sum of one unit
    (300, 97, 300, 1),  # two chunks of rows, three partial sums
    (4, 50, 16, 0),  # no choices: the log-sum-exp alone
]


@needs_native
@pytest.mark.parametrize(("dtype", "path"), [(dtype, path) for dtype in PATHS for path in PATHS[dtype]])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_errs_no_more_than_torch(shape, dtype, path):
    arguments = draw(*shape, dtype)
    check_errors(native(*arguments, path), *arguments)


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("impl", ["native", "tiled"])
def test_a_real_vocabulary(dtype, impl):
    arguments = draw(5, 152_064, 64, 4, dtype, scale=0.2)
    check_errors(ops.choice_logprobs(*arguments, impl=impl), *arguments)


@needs_native
@pytest.mark.parametrize(("dtype", "path"), [(dtype, path) for dtype in PATHS for path in PATHS[dtype]])
def test_large_logits_and_ties(dtype, path):
    arguments = draw(4, 150, 32, 3, dtype, scale=40)
    check_errors(native(*arguments, path), *arguments)
    hidden, head = torch.full((2, 32), 3.0, dtype=dtype), torch.ones(90, 32, dtype=dtype)
    logprobs, lse = native(hidden, head, torch.tensor([[0], [89]]), path)
    torch.testing.assert_close(logprobs, torch.full((2, 1), 1 / 90).log())
    torch.testing.assert_close(lse, torch.full((2,), 90.0).log() + 96)


@needs_native
@pytest.mark.parametrize(("dtype", "path"), [(dtype, path) for dtype in PATHS for path in PATHS[dtype]])
def test_bits_depend_on_neither_threads_nor_neighbours(dtype, path):
    hidden, head, ids = draw(70, 5_000, 129, 2, dtype)
    whole = native(hidden, head, ids, path)
    for threads in (2, 3, 500):
        assert all(map(torch.equal, whole, native(hidden, head, ids, path, threads)))
    for rows in ([0], [69], [3, 64, 12], range(20, 60)):
        some = native(hidden[list(rows)], head, ids[list(rows)], path)
        assert torch.equal(some[0], whole[0][list(rows)]) and torch.equal(some[1], whole[1][list(rows)])


@needs_native
@pytest.mark.parametrize(("dtype", "path"), [(dtype, path) for dtype in PATHS for path in PATHS[dtype]])
def test_nan_stays_in_its_row_and_is_never_lost(dtype, path):
    hidden, head, ids = draw(20, 200, 33, 2, dtype)
    clean = native(hidden, head, ids, path)
    hidden[7, 32] = float("nan")
    poisoned = native(hidden, head, ids, path)
    assert poisoned[0][7].isnan().all() and poisoned[1][7].isnan()
    others = [i for i in range(20) if i != 7]
    assert torch.equal(poisoned[0][others], clean[0][others]) and torch.equal(
        poisoned[1][others], clean[1][others]
    )
    head[150, 0] = float("nan")
    assert native(hidden, head, ids, path)[1].isnan().all()


@needs_native
@pytest.mark.parametrize("hidden_dtype", [F32, BF16])
@pytest.mark.parametrize("head_dtype", [F32, BF16])
def test_mixed_dtypes_and_strided_rows(hidden_dtype, head_dtype):
    hidden, head, ids = draw(6, 300, 40, 2, F32)
    wide_hidden, wide_head = hidden.to(hidden_dtype)[::2, 3:], head.to(head_dtype)[::3, 3:]
    ids = ids[::2] % len(wide_head)
    got = ops.choice_logprobs(wide_hidden, wide_head, ids, impl="native")
    check_errors(got, wide_hidden, wide_head, ids)
    columns = ops.choice_logprobs(wide_hidden, wide_head.T.contiguous().T, ids, impl="native")
    assert torch.equal(columns[0], got[0])


@needs_native
def test_what_native_cannot_take_is_refused():
    hidden, head, ids = (x.numpy() for x in draw(3, 10, 4, 2, F32))
    with pytest.raises(ValueError, match="does not run"):
        _native.choice_logprobs(hidden, head, ids, 1, "abacus")
    with pytest.raises(ValueError, match="token ids"):
        _native.choice_logprobs(hidden, head, ids + 10, 1)
    with pytest.raises(ValueError, match="threads"):
        _native.choice_logprobs(hidden, head, ids, 0)
    with pytest.raises(ValueError, match="head must be rows"):
        _native.choice_logprobs(hidden, head.astype("float64"), ids, 1)


PEAK = """
import resource, sys, torch
from leakfast.forward import ops
torch.set_num_threads(2)
hidden, head = torch.randn(64, 64), torch.randn(152_064, 64)
hidden, head = hidden.to(getattr(torch, sys.argv[1])), head.to(getattr(torch, sys.argv[1]))
ids = torch.randint(0, 152_064, (64, 4))
ops.choice_logprobs(hidden[:1], head[:100], ids[:1, :1] % 100, impl=sys.argv[2])
spare = torch.ones(40 << 20, dtype=torch.uint8); del spare  # freed peaks must not hide ours
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")
peak = lambda: next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = resident()
ops.choice_logprobs(hidden, head, ids, impl=sys.argv[2])
print(peak() - before)
"""


@needs_native
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_takes_at_most_8_mb_beside_the_inputs(dtype):
    peak = int(said_by([sys.executable, "-c", PEAK, dtype, "native"]))
    assert peak <= 8 << 20  # the logits alone would be 39 MB


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 70),
    st.integers(1, 4),
    st.sampled_from([F32, BF16]),
    st.integers(0, 99),
)
@example(1, 42, 51, 1, F32, 97)  # one number: torch's error happens to be small
def test_auto_and_tiled_and_reference_agree(n, v, d, c, dtype, seed):
    arguments = draw(n, v, d, c, dtype, seed=seed)
    for impl in ("auto", "tiled", "reference"):
        check_errors(ops.choice_logprobs(*arguments, impl=impl), *arguments)


def test_half_and_double_precision_go_to_tiled_torch(caplog):
    hidden, head, ids = draw(3, 40, 8, 2, F16)
    with caplog.at_level(logging.INFO, "leakfast.forward.ops"):
        ops._decide.cache_clear()
        got = ops.choice_logprobs(hidden, head, ids)
    check_errors(got, hidden, head, ids)
    assert (
        "runs as tiled on cpu" in caplog.text and "native not: it takes float32 and bfloat16" in caplog.text
    )


def test_the_choice_is_logged_once(caplog):
    arguments = draw(2, 30, 8, 1, F32)
    with caplog.at_level(logging.INFO, "leakfast.forward.ops"):
        ops._decide.cache_clear()
        for _ in range(3):
            ops.choice_logprobs(*arguments)
    assert caplog.text.count("choice_logprobs runs as") == 1
    assert f"runs as {ops.chosen_paths('cpu')['choice_logprobs']} on cpu" in caplog.text


def test_paths_of_a_cpu():
    paths = ops.explained_paths("cpu")
    assert set(paths) == set(ops.IMPLEMENTATIONS)
    fast = _native is not None and PATHS[F32][0] != "portable"
    assert paths["choice_logprobs"][0] == ("native" if fast else "tiled")
    assert paths["centroid_sums"][0] == "reference" and "CUDA" in paths["centroid_sums"][1]
    assert all(why for _, why in paths.values())


@pytest.mark.parametrize("impl", ["triton", "cuda-graph"])
def test_a_name_that_cannot_run_raises(impl):
    hidden, head, ids = draw(2, 30, 8, 1, F32)
    with pytest.raises(ValueError, match=f"choice_logprobs: implementation '{impl}' asked"):
        ops.choice_logprobs(hidden, head, ids, impl=impl)
    with pytest.raises(ValueError, match=f"centroid_sums: implementation '{impl}' asked"):
        ops.centroid_sums(hidden, torch.tensor([0]), torch.tensor([0, 1]), impl=impl)


def test_what_does_not_fit_is_refused():
    hidden, head, ids = draw(3, 10, 4, 2, F32)
    for wrong in [(hidden, head[:, :3], ids), (hidden, head[:0], ids), (hidden[:, :0], head[:, :0], ids)]:
        with pytest.raises(ValueError, match="hidden must be"):
            ops.choice_logprobs(*wrong)
    with pytest.raises(ValueError, match="token_ids must be"):
        ops.choice_logprobs(hidden, head, ids[:2])
    for wrong in (ids + 10, ids - 10):
        with pytest.raises(ValueError, match="token ids must lie in 0…9"):
            ops.choice_logprobs(hidden, head, wrong)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
def test_centroid_sums(dtype):
    states = torch.randn(30, 7).to(dtype)
    rows, offsets = torch.tensor([3, 9, 29, 0]), torch.tensor([0, 2, 2, 4])
    sums, squares = ops.centroid_sums(states, rows, offsets)
    want = states.double()[rows]
    for got, of in ((sums, want), (squares, want.square())):
        assert got.dtype == F32
        truth = torch.stack([of[:2].sum(0), torch.zeros(7, dtype=torch.float64), of[2:].sum(0)])
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
    into = torch.ones(3, 7), torch.zeros(3, 7)
    assert ops.centroid_sums(states, rows, offsets, out=into)[0] is into[0]
    torch.testing.assert_close(into[0], sums + 1)
    torch.testing.assert_close(into[1], squares)


def test_centroid_sums_that_do_not_fit_are_refused():
    states = torch.zeros(4, 2)
    for rows, offsets in [([0, 1], [0, 1]), ([0, 1], [0, 2, 1, 2]), ([4], [0, 1]), ([-1], [0, 1])]:
        with pytest.raises(ValueError, match="offsets|leaf_rows"):
            ops.centroid_sums(states, torch.tensor(rows), torch.tensor(offsets))
