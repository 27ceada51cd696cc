"""The Triton choice kernel: values under the interpreter, in a process of its own because the switch is read
when triton is first imported; real GPU values under `-m gpu`. Fresh memory is filled with NaN."""

from __future__ import annotations

import importlib.util

import interpreting
import pytest
import torch

from leakfast.kernels import reference

pytestmark = pytest.mark.long

NO_TRITON = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(NO_TRITON, reason="triton has no wheel for this machine")
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16

# (N, V, D, C, dtype of hidden, of head, scale) and why it is there. The interpreter multiplies bfloat16 as
# if it were integers, so float16 stands for the 2-byte configs here; on a GPU both are tried.
CASES = {
    "one of everything": (1, 1, 1, 1, F32, F32, 1),
    "odd sizes, masks everywhere": (3, 101, 23, 5, F32, F32, 1),
    "two parts of the vocabulary, the last not whole": (33, 1100, 32, 2, F32, F32, 1),
    "2-byte rows of odd length": (65, 130, 35, 3, F16, F16, 1),
    "two dtypes": (5, 70, 32, 2, F32, BF16, 1),
    "config of up to 16 rows": (9, 500, 128, 4, F16, F16, 0.3),
    "config of up to 64 rows": (17, 700, 128, 4, F16, F16, 0.3),
    "config of up to 256 rows, two blocks, one choice each": (130, 300, 128, 1, F16, F16, 0.3),
    "config of many rows": (259, 700, 128, 2, F16, F16, 0.3),
    "more parts than a step merges": (2, 140_000, 128, 2, F16, F16, 0.3),
    "large logits": (4, 150, 32, 3, F32, F32, 40),
    "a real vocabulary": (2, 152_064, 8, 4, F32, F32, 1),
}
DRIVER = """
import sys, torch
from safetensors.torch import load_file, save_file
empty, empty_like = torch.empty, torch.empty_like
torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(float("nan"))
from leakfast.forward import autotune as tuning
from leakfast.forward import ops
from leakfast.kernels.choice_logprobs import candidates, choice_logprobs
given, out = {name: x.clone() for name, x in load_file(sys.argv[1]).items()}, {}  # aligned, as torch has it
for name in sorted({key.rsplit("/", 1)[0] for key in given}):
    arguments = [given[f"{name}/{part}"] for part in ("hidden", "head", "ids")]
    out[f"{name}/logprobs"], out[f"{name}/lse"] = choice_logprobs(*arguments)
    if name != "a real vocabulary":
        again = choice_logprobs(*arguments)
        out[f"{name}/same"] = torch.tensor(
            torch.equal(out[f"{name}/logprobs"].view(torch.int32), again[0].view(torch.int32))
            and torch.equal(out[f"{name}/lse"].view(torch.int32), again[1].view(torch.int32)))
arguments = [given[f"config of up to 16 rows/{part}"] for part in ("hidden", "head", "ids")]
for number, config in enumerate(candidates(*arguments[:2])[1]):
    out[f"tuned {number}/logprobs"], out[f"tuned {number}/lse"] = choice_logprobs(*arguments, config)
assert ops._tuned_choices(*arguments) in candidates(*arguments[:2])[1]
assert "choice_logprobs | cpu" in tuning.store().read_text()
save_file(out, sys.argv[2])
"""


def inputs_of(case, device="cpu"):
    n, v, d, c, hidden_dtype, head_dtype, scale = case
    draw = torch.Generator().manual_seed(n + v)
    hidden = (scale * torch.randn(n, d, generator=draw)).to(device, hidden_dtype)
    head = torch.randn(v, d, generator=draw).to(device, head_dtype)
    ids = torch.randint(0, v, (n, c), generator=draw)
    ids[0, 0], ids[-1, -1] = v - 1, 0  # both ends of the vocabulary
    return hidden, head, ids.to(device)


def eager(hidden, head, ids):
    """What a user writes: logits in the model's dtype, then a float32 log-softmax."""
    logits = (hidden.to(head.dtype) @ head.T).float()
    return torch.log_softmax(logits, -1).gather(1, ids), logits.logsumexp(-1)


def truth_of(hidden, head, ids):
    logits = hidden.double() @ head.double().T
    return torch.log_softmax(logits, -1).gather(1, ids), logits.logsumexp(-1)


def check_errors(got, hidden, head, ids):
    """Against float64 the kernel errs no more than torch in the same dtype does, nor than one unit in the last
    place of the sums of |h|·|w| and of the result: with few numbers to average, chance decides below that."""
    largest = (hidden.double().abs() @ head.double().abs().T).max()
    for ours, same, true in zip(got, eager(hidden, head, ids), truth_of(hidden, head, ids), strict=True):
        error = (ours.double() - true).square().mean().sqrt()
        torchs = (same.double() - true).square().mean().sqrt()
        assert error <= max(torchs, 2.0**-24 * (largest + true.abs().max())), (error, torchs)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Every case, and a few special ones, through the interpreter in one process of one thread."""
    folder = tmp_path_factory.mktemp("interpreted")
    given = {}
    for name, case in CASES.items():
        given |= {
            f"{name}/{part}": x for part, x in zip(("hidden", "head", "ids"), inputs_of(case), strict=True)
        }
    hidden, head, ids = inputs_of((6, 150, 32, 2, F32, F32, 1))
    given |= {"clean/hidden": hidden.clone(), "clean/head": head.clone(), "clean/ids": ids.clone()}
    hidden[2, 5] = float("nan")
    given |= {"one nan/hidden": hidden, "one nan/head": head, "one nan/ids": ids}
    ties = torch.ones(90, 32)
    given |= {
        "ties/hidden": torch.full((2, 32), 3.0),
        "ties/head": ties,
        "ties/ids": torch.tensor([[0], [89]]),
    }
    wrong = torch.tensor([[0, 90], [-1, 5]])
    given |= {"wrong/hidden": torch.ones(2, 32), "wrong/head": ties.clone(), "wrong/ids": wrong}
    return interpreting.interpreted(DRIVER, given, folder)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(interpreted, name):
    got = interpreted[f"{name}/logprobs"], interpreted[f"{name}/lse"]
    check_errors(got, *inputs_of(CASES[name]))


@needs_triton
def test_every_config_that_tuning_may_take_errs_no_more(interpreted):
    found = {name.split("/")[0] for name in interpreted if name.startswith("tuned")}
    assert len(found) == 4  # the shipped configs of 2-byte elements
    for name in found:
        got = interpreted[f"{name}/logprobs"], interpreted[f"{name}/lse"]
        check_errors(got, *inputs_of(CASES["config of up to 16 rows"]))


@needs_triton
def test_stages_shrink_to_the_shared_memory_of_the_device():
    from leakfast.kernels.choice_logprobs import CONFIGS, fitted

    wide = CONFIGS[(64, 2)]
    assert fitted(wide, 2, 227 << 10) == wide
    assert fitted(wide, 2, 99 << 10).num_stages == 2  # 48 KB a stage
    assert fitted(wide, 2, 48 << 10).num_stages == 1
    for (_, size), config in CONFIGS.items():
        small = fitted(config, size, 99 << 10)
        assert (small.block_n + small.block_v) * small.block_d * size * small.num_stages <= 99 << 10


@needs_triton
def test_the_same_bits_twice(interpreted):
    same = {name: bool(x) for name, x in interpreted.items() if name.endswith("/same")}
    assert len(same) > len(CASES) and all(same.values())


@needs_triton
def test_nan_stays_in_its_row(interpreted):
    for part in ("logprobs", "lse"):
        clean, poisoned = interpreted[f"clean/{part}"], interpreted[f"one nan/{part}"]
        assert poisoned[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(poisoned[others], clean[others])


@needs_triton
def test_ties_share_evenly(interpreted):
    torch.testing.assert_close(interpreted["ties/logprobs"], torch.full((2, 1), 1 / 90).log())
    torch.testing.assert_close(interpreted["ties/lse"], torch.full((2,), 90.0).log() + 96)


@needs_triton
def test_an_id_outside_the_vocabulary_is_nan_and_harms_no_other(interpreted):
    assert interpreted["wrong/logprobs"].isnan().tolist() == [[False, True], [True, False]]


@needs_triton
def test_what_does_not_fit_is_refused():
    from leakfast.kernels.choice_logprobs import choice_logprobs

    hidden, head, ids = inputs_of((3, 10, 4, 2, F32, F32, 1))
    for wrong in [(hidden, head[:, :3], ids), (hidden, head[:0], ids), (hidden[:, :0], head[:, :0], ids)]:
        with pytest.raises(ValueError, match="must be"):
            choice_logprobs(*wrong)
    for wrong in [(hidden, head, ids[:2]), (hidden, head, ids.int()), (hidden.double(), head, ids)]:
        with pytest.raises(ValueError, match="must be"):
            choice_logprobs(*wrong)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize(
    ("n", "v", "d", "c"),
    [
        (1, 152_064, 896, 4),  # one prompt of the 0.5B shape
        (64, 152_064, 3584, 4),  # the 7B shape
        (300, 4_097, 896, 1),  # many rows, a tile and a bit
        (70, 1_001, 77, 3),  # nothing aligned
    ],
)
def test_on_a_gpu(n, v, d, c, dtype):
    from leakfast.kernels.choice_logprobs import choice_logprobs

    hidden, head, ids = inputs_of((n, v, d, c, dtype, dtype, d**-0.5), "cuda")
    poison = [torch.full((n, v // 8 + 1), float("nan"), device="cuda") for _ in range(4)]
    del poison  # freed blocks that the kernel's own buffers are cut from
    got = choice_logprobs(hidden, head, ids)
    check_errors(got, hidden, head, ids)
    again = choice_logprobs(hidden, head, ids)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    twin = reference.choice_logprobs_reference(hidden, head, ids)
    torch.testing.assert_close(got[0], twin[0], rtol=1e-2, atol=1e-2)
    hidden[0] = float("nan")
    after = choice_logprobs(hidden, head, ids)
    assert after[0][0].isnan().all() and torch.equal(after[0][1:], got[0][1:])
