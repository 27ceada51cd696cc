"""KL and JS between next-token distributions on a CPU: C++ for every instruction set of this processor and the
reference, under the same rules as the GPU kernel."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import torch
from divergence_pairs import NAMES, check_errors, pairs_of, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from warm import said_by

from leakfast.forward import ops

try:
    from leakfast import _native
except ImportError:
    _native = None

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
PATHS = [
    (dtype, path)
    for dtype in (F32, BF16)
    for path in (_native.choice_paths(dtype == BF16) if _native else [])
]
needs_native = pytest.mark.skipif(_native is None, reason="leakfast._native is not built here")
every_path = pytest.mark.parametrize(("dtype", "path"), PATHS)

# (N, V, D) and why it is there
SHAPES = {
    "one of everything": (1, 1, 1),
    "two words": (3, 2, 5),
    "odd everywhere; bfloat16 pairs end in half a pair": (3, 101, 23),
    "half a vector and a pair": (5, 640, 128),
    "more pairs than a block of the widest set": (33, 333, 129),
    "more pairs than go together": (150, 97, 64),
}


def native(states_p, states_q, head, path="", threads=1, of=None):
    arrays = [(x.view(torch.uint16) if x.dtype == BF16 else x).numpy() for x in (states_p, states_q, head)]
    return torch.from_numpy(_native.divergences(*arrays, threads, path, of))


@needs_native
@every_path
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set_errs_no_more_than_torch(shape, dtype, path):
    given = pairs_of(*shape, dtype, scale=shape[2] ** -0.5)
    check_errors(native(*given, path), *given)


@needs_native
@pytest.mark.parametrize("v", [49_152, 151_936])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_real_vocabularies(v, dtype):
    given = pairs_of(18, v, 32, dtype, scale=0.3)
    check_errors(ops.divergences(*given, impl="native"), *given)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_against_scipy(impl):
    if impl == "native" and _native is None:
        pytest.skip("leakfast._native is not built here")
    given = pairs_of(4, 50, 8, scale=0.5)
    p, q = ((s.double() @ given[2].double().T).softmax(-1).numpy() for s in given[:2])
    wanted = entropy(p, q, axis=1), entropy(q, p, axis=1), jensenshannon(p, q, axis=1) ** 2
    for got, want in zip(ops.divergences(*given, impl=impl), wanted, strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-5, atol=1e-6)


@needs_native
@every_path
def test_equal_states_are_exactly_0_apart(dtype, path):
    states, _, head = pairs_of(21, 700, 33, dtype)
    assert torch.equal(native(states, states.clone(), head, path), torch.zeros(3, 21))


@needs_native
@every_path
def test_nearly_equal_states_keep_their_digits(dtype, path):
    """Where eager float32 has noise alone: divergences of 1e-9 within a hundredth."""
    states, _, head = pairs_of(20, 500, 32, dtype, scale=0.2)
    moved = (states.float() * (1 + 2**-7)).to(dtype) if dtype == BF16 else states * (1 + 2**-14)
    got, truth = (
        native(states, moved, head, path).double(),
        plain(states.double(), moved.double(), head.double()),
    )
    assert (got >= 0).all() and truth[2].max() < (1e-4 if dtype == BF16 else 1e-8)
    torch.testing.assert_close(got, truth, rtol=1e-2, atol=1e-12)


@needs_native
@every_path
def test_one_hot_distributions_are_finite_and_right(dtype, path):
    """Each puts all its mass on a word of its own: KL is the distance of the logits, JS is log 2."""
    head = torch.eye(300, 64, dtype=dtype)
    p, q = torch.zeros(2, 64, dtype=dtype), torch.zeros(2, 64, dtype=dtype)
    p[:, 3], q[:, 40] = torch.tensor([128.0, 8192.0]), torch.tensor([128.0, 8192.0])
    found = native(p, q, head, path)
    torch.testing.assert_close(found[:2], torch.tensor([128.0, 8192.0]).expand(2, 2))
    torch.testing.assert_close(found[2], torch.full((2,), math.log(2)))


@needs_native
@every_path
def test_large_logits(dtype, path):
    given = pairs_of(20, 150, 32, dtype, scale=40)
    found = native(*given, path)
    assert found.isfinite().all() and (found >= 0).all() and (found[2] <= math.log(2) + 1e-6).all()
    truth = plain(*(x.double() for x in given))
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@needs_native
@every_path
def test_bits_depend_on_neither_threads_nor_neighbours(dtype, path):
    p, q, head = pairs_of(70, 5_000, 129, dtype)
    whole = native(p, q, head, path)
    for threads in (2, 3, 500):
        assert torch.equal(whole, native(p, q, head, path, threads))
    for rows in ([0], [69], [3, 64, 12], list(range(20, 60))):
        assert torch.equal(native(p[rows], q[rows], head, path), whole[:, rows])


STARS = {
    "one for all": [0] * 150,
    "two in a block": [0] * 20 + [1] * 30,
    "all lengths, some twice": [k for k in range(12) for _ in range(k)] + [3] * 70 + [0],
    "never twice in a row": [k % 5 for k in range(90)],
    "each its own": list(range(70)),
}


@needs_native
@every_path
@pytest.mark.parametrize("of", STARS.values(), ids=STARS)
def test_a_row_that_several_are_compared_with_gives_the_bits_of_its_copies(of, dtype, path):
    of = np.array(of)
    p, q, head = pairs_of(len(of), 400, 33, dtype)
    copied = native(p[of], q, head, path)
    for threads in (1, 3):
        assert torch.equal(native(p, q, head, path, threads, of), copied)
    truth = plain(*(x.double() for x in (p[of], q, head)))
    torch.testing.assert_close(copied.double(), truth, rtol=1e-4, atol=1e-5)
    p[of[0]] = float("nan")
    found = native(p, q, head, path, of=of)
    assert torch.equal(found.isnan().all(0), torch.from_numpy(of == of[0]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_of_is_what_copies_are(impl):
    p, q, head = pairs_of(7, 60, 9)
    of = np.array([2, 2, 0, 1, 1, 1, 2])
    found = ops.divergences(p[:3], q, head, impl=impl, of=of)
    assert all(map(torch.equal, found, ops.divergences(p[of], q, head, impl=impl)))
    for wrong in (of[:5], of + 1, of - 1):
        with pytest.raises(ValueError, match="pairs are needed|of names rows"):
            ops.divergences(p[:3], q, head, impl=impl, of=wrong)


@needs_native
@every_path
def test_the_other_way_round(dtype, path):
    p, q, head = pairs_of(9, 800, 40, dtype, scale=0.3)
    there, back = native(p, q, head, path), native(q, p, head, path)
    assert (
        torch.equal(there[0], back[1]) and torch.equal(there[1], back[0]) and torch.equal(there[2], back[2])
    )


@needs_native
@every_path
def test_nan_stays_in_its_pair_and_is_never_lost(dtype, path):
    p, q, head = pairs_of(20, 200, 33, dtype)
    clean = native(p, q, head, path)
    p[7, 32] = q[11, 0] = float("nan")
    poisoned = native(p, q, head, path)
    others = [i for i in range(20) if i not in (7, 11)]
    assert poisoned[:, [7, 11]].isnan().all() and torch.equal(poisoned[:, others], clean[:, others])
    head[150, 0] = float("nan")
    assert native(p, q, head, path).isnan().all()


@needs_native
def test_mixed_dtypes_and_strided_rows():
    p, q, head = pairs_of(8, 300, 40)
    given = p[::2, 3:], q.to(BF16)[::2, 3:], head.to(BF16)[::3, 3:]
    got = ops.divergences(*given, impl="native")
    check_errors(got, *given)
    columns = ops.divergences(*(x.T.contiguous().T for x in given), impl="native")
    assert all(map(torch.equal, got, columns))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 70),
    st.sampled_from([F32, BF16, F16]),
    st.integers(0, 99),
)
def test_auto_and_reference_agree_with_float64(n, v, d, dtype, seed):
    given = pairs_of(n, v, d, dtype, scale=d**-0.5, seed=seed)
    truth = plain(*(x.double() for x in given))
    for impl in ("auto", "reference"):
        got = torch.stack(ops.divergences(*given, impl=impl)).double()
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=3e-6)


def test_no_pairs_and_what_does_not_fit():
    p, q, head = pairs_of(3, 10, 4)
    for impl in ("auto", "reference"):
        assert [x.shape for x in ops.divergences(p[:0], q[:0], head, impl=impl)] == [(0,)] * len(NAMES)
    for wrong in [
        (p, q, head[:, :3]),
        (p, q, head[:0]),
        (p[:, :0], q[:, :0], head[:, :0]),
        (p[0], q[0], head),
    ]:
        with pytest.raises(ValueError, match="states must be"):
            ops.divergences(*wrong)
    with pytest.raises(ValueError, match="pairs are needed"):
        ops.divergences(p, q[:2], head)
    with pytest.raises(ValueError, match="implementation 'tiled' asked"):
        ops.divergences(p, q, head, impl="tiled")


@needs_native
def test_what_native_cannot_take_is_refused():
    p, q, head = (x.numpy() for x in pairs_of(3, 10, 4))
    with pytest.raises(ValueError, match="does not run"):
        _native.divergences(p, q, head, 1, "abacus")
    with pytest.raises(ValueError, match="must be"):
        _native.divergences(p, q[:2], head, 1)
    with pytest.raises(ValueError, match="threads"):
        _native.divergences(p, q, head, 0)
    with pytest.raises(ValueError, match="states_q must be rows"):
        _native.divergences(p, q.astype("float64"), head, 1)


PEAK = """
import resource, sys, torch
from leakfast.forward import ops
torch.set_num_threads(2)
p, q, head = (torch.randn(n, 64).to(getattr(torch, sys.argv[1])) for n in (64, 64, 151_936))
ops.divergences(p[:1], q[:1], head[:100], impl="native")
spare = torch.ones(40 << 20, dtype=torch.uint8); del spare  # freed peaks must not hide ours
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")
peak = lambda: next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = resident()
ops.divergences(p, q, head, impl="native")
print(peak() - before)
"""


@needs_native
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_takes_at_most_16_mb_beside_the_inputs(dtype):
    peak = int(said_by([sys.executable, "-c", PEAK, dtype]))
    assert peak <= 16_000_000  # the logits of all pairs would be 78 MB
