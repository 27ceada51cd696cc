"""The Triton centroid kernel: values under the interpreter, in a process of its own because the switch is
read when triton is first imported; real GPU values under `-m gpu`. Fresh memory is filled with NaN."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import interpreting
import pytest
import torch

from leakfast.kernels import reference

pytestmark = pytest.mark.long

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this machine"
)
# (T, D, rows of each persona, dtype) and why it is there
CASES = {
    "one of everything": (1, 1, [1], torch.float32),
    "odd sizes, an empty persona": (90, 33, [3, 0, 1, 40], torch.float32),
    "the published 20 questions": (300, 128, [20, 20, 20], torch.bfloat16),
    "wide, three column blocks": (70, 1100, [17, 5], torch.bfloat16),
    "float16": (70, 200, [33, 32], torch.float16),
}
DRIVER = """
import sys, torch
from safetensors.torch import load_file, save_file
empty, empty_like = torch.empty, torch.empty_like
torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(float("nan"))
from leakfast.forward import ops
from leakfast.kernels.last_token_centroids import CONFIGS, last_token_centroids
given, out = {name: x.clone() for name, x in load_file(sys.argv[1]).items()}, {}  # aligned, as torch has it
for name in sorted({key.rsplit("/", 1)[0] for key in given}):
    arguments = [given[f"{name}/{part}"] for part in ("states", "rows", "offsets")]
    sums, squares = last_token_centroids(*arguments)
    again = last_token_centroids(*arguments)
    out[f"{name}/same"] = torch.tensor(torch.equal(sums, again[0]) and torch.equal(squares, again[1]))
    out[f"{name}/sums"], out[f"{name}/squares"] = sums.clone(), squares.clone()
    added = last_token_centroids(*arguments, out=(sums, squares))
    assert added[0] is sums and added[1] is squares
    out[f"{name}/sums twice"], out[f"{name}/squares twice"] = sums, squares
arguments = [given[f"wide, three column blocks/{part}"] for part in ("states", "rows", "offsets")]
for number, config in enumerate(CONFIGS.values()):
    out[f"tuned {number}/sums"], out[f"tuned {number}/squares"] = last_token_centroids(*arguments, None, config)
assert ops._tuned_centroids(arguments) in CONFIGS.values()
save_file(out, sys.argv[2])
"""


def inputs_of(case, device="cpu"):
    t, d, sizes, dtype = case
    draw = torch.Generator().manual_seed(t + d)
    states = (torch.randn(t, d, generator=draw) + 0.5).to(dtype)
    rows = torch.randperm(t, generator=draw)[: sum(sizes)]
    unread = torch.ones(t, dtype=torch.bool)
    unread[rows] = False
    states[unread] = float("nan")  # whoever reads another row shows it
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)])
    return states.to(device), rows.to(device), offsets.to(device)


def truth_of(states, rows, offsets):
    segments = [states[rows[a:b]].double() for a, b in pairwise(offsets.tolist())]
    return torch.stack([s.sum(0) for s in segments]), torch.stack([s.square().sum(0) for s in segments])


def check_errors(got, states, rows, offsets, times=1):
    same = reference.last_token_centroids_reference(states, rows, offsets)
    for ours, theirs, true in zip(got, same, truth_of(states, rows, offsets), strict=True):
        error = (ours.double() - times * true).square().mean().sqrt()
        torchs = times * (theirs.double() - true).square().mean().sqrt()
        assert error <= max(torchs, 2.0**-23 * times * true.abs().max()), (error, torchs)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    given = {}
    for name, case in CASES.items():
        parts = zip(("states", "rows", "offsets"), inputs_of(case), strict=True)
        given |= {f"{name}/{part}": x for part, x in parts}
    states, rows, offsets = inputs_of(CASES["odd sizes, an empty persona"])
    alone = {"states": states, "rows": rows[4:].clone(), "offsets": torch.tensor([0, 40])}
    given |= {f"alone/{part}": x for part, x in alone.items()}
    poisoned = states.clone()
    poisoned[rows[0], 7] = float("nan")
    given |= {"one nan/states": poisoned, "one nan/rows": rows.clone(), "one nan/offsets": offsets.clone()}
    return interpreting.interpreted(DRIVER, given, folder)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(interpreted, name):
    given = inputs_of(CASES[name])
    check_errors((interpreted[f"{name}/sums"], interpreted[f"{name}/squares"]), *given)
    check_errors((interpreted[f"{name}/sums twice"], interpreted[f"{name}/squares twice"]), *given, times=2)


@needs_triton
def test_every_config_that_tuning_may_take_errs_no_more(interpreted):
    for number in range(2):
        got = interpreted[f"tuned {number}/sums"], interpreted[f"tuned {number}/squares"]
        check_errors(got, *inputs_of(CASES["wide, three column blocks"]))


@needs_triton
def test_the_same_bits_twice_and_whoever_stands_beside(interpreted):
    assert all(bool(interpreted[f"{name}/same"]) for name in CASES)
    for part in ("sums", "squares"):
        assert torch.equal(
            interpreted[f"alone/{part}"][0], interpreted[f"odd sizes, an empty persona/{part}"][3]
        )


@needs_triton
def test_nan_stays_in_its_persona_and_column(interpreted):
    for part in ("sums", "squares"):
        clean, poisoned = interpreted[f"odd sizes, an empty persona/{part}"], interpreted[f"one nan/{part}"]
        assert poisoned[0, 7].isnan()
        poisoned[0, 7] = clean[0, 7]
        assert torch.equal(poisoned, clean)


@needs_triton
def test_what_does_not_fit_is_refused():
    from leakfast.kernels.last_token_centroids import last_token_centroids

    states, rows, offsets = torch.zeros(4, 3), torch.tensor([0, 1]), torch.tensor([0, 2])
    for wrong in [(states[0], rows, offsets), (states, rows.int(), offsets), (states, rows, offsets[:0])]:
        with pytest.raises(ValueError, match="must be"):
            last_token_centroids(*wrong)
    with pytest.raises(ValueError, match="out must be"):
        last_token_centroids(states, rows, offsets, out=(torch.zeros(1, 3), torch.zeros(2, 3)))


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("t", "d", "sizes"), [(9_000, 3584, [20] * 111), (700, 77, [1, 0, 33, 512])])
def test_on_a_gpu(t, d, sizes, dtype):
    from leakfast.kernels.last_token_centroids import last_token_centroids

    given = inputs_of((t, d, sizes, dtype), "cuda")
    poison = torch.full((4, len(sizes), d), float("nan"), device="cuda")
    del poison  # a freed block that the kernel's own outputs are cut from
    got = last_token_centroids(*given)
    check_errors(got, *given)
    again = last_token_centroids(*given)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
