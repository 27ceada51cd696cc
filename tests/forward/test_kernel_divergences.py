"""The Triton divergences kernel: values under the interpreter, in a process of its own because the switch is read
when triton is first imported; real GPU values under `-m gpu`. Fresh memory is filled with NaN."""

from __future__ import annotations

import importlib.util
import math

import interpreting
import pytest
import torch
from divergence_pairs import check_errors, pairs_of, plain

pytestmark = pytest.mark.long

NO_TRITON = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(NO_TRITON, reason="triton has no wheel for this machine")
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16

# (N, V, D, dtype, scale) and why it is there. The interpreter multiplies bfloat16 as if it were integers, so float16
# stands for the 2-byte configs here; on a GPU both are tried.
CASES = {
    "one of everything": (1, 1, 1, F32, 1),
    "odd sizes, masks everywhere": (3, 101, 23, F32, 0.3),
    "two parts of V, the last not whole": (33, 1100, 32, F32, 0.3),
    "2-byte rows of odd length": (65, 130, 35, F16, 0.3),
    "config of up to 16 rows": (9, 500, 128, F16, 0.1),
    "config of many rows, two blocks": (70, 700, 128, F16, 0.1),
    "SmolLM2's vocabulary": (2, 49_152, 128, F16, 0.1),
    "Qwen2.5's vocabulary, more parts than a step merges": (2, 151_936, 128, F16, 0.1),
}
DRIVER = """
import sys, torch
from safetensors.torch import load_file, save_file
empty = torch.empty
torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
from leakfast.forward import autotune as tuning
from leakfast.forward import ops
from leakfast.kernels.divergences import candidates, divergences
given, out = {name: x.clone() for name, x in load_file(sys.argv[1]).items()}, {}  # aligned, as torch has it
arguments_of = lambda name: [given[f"{name}/{part}"] for part in ("p", "q", "head")]
for name in sorted({key.rsplit("/", 1)[0] for key in given}):
    out[f"{name}/found"] = torch.stack(divergences(*arguments_of(name)))
    if "vocabulary" not in name:
        again = torch.stack(divergences(*arguments_of(name)))
        out[f"{name}/same"] = torch.tensor(
            torch.equal(out[f"{name}/found"].view(torch.int32), again.view(torch.int32)))
arguments = arguments_of("config of up to 16 rows")
for number, config in enumerate(candidates(*arguments)[1]):
    out[f"tuned {number}/found"] = torch.stack(divergences(*arguments, config))
assert ops._tuned_divergences(arguments) in candidates(*arguments)[1]
assert "divergences | cpu" in tuning.store().read_text()
save_file(out, sys.argv[2])
"""


def inputs_of(case, device="cpu"):
    n, v, d, dtype, scale = case
    return tuple(x.to(device) for x in pairs_of(n, v, d, dtype, scale=scale, seed=n + v))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Every case, and a few special ones, through the interpreter in one process of one thread."""
    given = {}

    def add(name, *tensors):
        given.update({f"{name}/{part}": x for part, x in zip(("p", "q", "head"), tensors, strict=True)})

    for name, case in CASES.items():
        add(name, *inputs_of(case))
    p, q, head = inputs_of((6, 150, 32, F32, 0.3))
    add("clean", p.clone(), q.clone(), head.clone())
    add("equal", p.clone(), p.clone(), head.clone())
    add("nearly equal", p.clone(), p * (1 + 2**-14), head.clone())
    p[2, 5] = q[4, 0] = float("nan")
    add("nan", p, q, head)
    one_hot = torch.zeros(2, 2, 32)
    one_hot[0, :, 3], one_hot[1, :, 20] = torch.tensor([100.0, 9000.0]), torch.tensor([100.0, 9000.0])
    add("one hot", *one_hot, torch.eye(90, 32))
    return interpreting.interpreted(DRIVER, given, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(interpreted, name):
    check_errors(interpreted[f"{name}/found"], *inputs_of(CASES[name]))


@needs_triton
def test_every_config_that_tuning_may_take_errs_no_more(interpreted):
    found = [x for name, x in interpreted.items() if name.startswith("tuned")]
    assert len(found) == 2  # the shipped configs of 2-byte elements
    for got in found:
        check_errors(got, *inputs_of(CASES["config of up to 16 rows"]))


@needs_triton
def test_the_same_bits_twice(interpreted):
    same = {name: bool(x) for name, x in interpreted.items() if name.endswith("/same")}
    assert len(same) >= 9 and all(same.values())


@needs_triton
def test_equal_states_are_exactly_0_apart_and_near_ones_keep_their_digits(interpreted):
    assert torch.equal(interpreted["equal/found"], torch.zeros(3, 6))
    p, _, head = inputs_of((6, 150, 32, F32, 0.3))
    truth = plain(p.double(), (p * (1 + 2**-14)).double(), head.double())
    assert truth.max() < 1e-7
    torch.testing.assert_close(interpreted["nearly equal/found"].double(), truth, rtol=1e-2, atol=1e-12)


@needs_triton
def test_one_hot_distributions_are_finite_and_right(interpreted):
    found = interpreted["one hot/found"]
    torch.testing.assert_close(found[:2], torch.tensor([100.0, 9000.0]).expand(2, 2))
    torch.testing.assert_close(found[2], torch.full((2,), math.log(2)))


@needs_triton
def test_nan_stays_in_its_pair(interpreted):
    clean, poisoned = interpreted["clean/found"], interpreted["nan/found"]
    assert poisoned[:, [2, 4]].isnan().all()
    others = [0, 1, 3, 5]
    assert torch.equal(poisoned[:, others], clean[:, others])


@needs_triton
def test_stages_shrink_to_the_shared_memory_of_the_device():
    from leakfast.kernels.divergences import CONFIGS, fitted

    for (_, size), config in CONFIGS.items():
        assert fitted(config, size, 227 << 10) == config
        small = fitted(config, size, 99 << 10)
        stage = (2 * small.block_n + small.block_v) * small.block_d * size
        assert stage * small.num_stages <= 99 << 10


@needs_triton
def test_what_does_not_fit_is_refused():
    from leakfast.kernels.divergences import divergences

    p, q, head = inputs_of((3, 10, 4, F32, 1))
    for wrong in [(p, q, head[:, :3]), (p, q, head[:0]), (p, q[:2], head), (p.double(), q, head)]:
        with pytest.raises(ValueError, match="must be"):
            divergences(*wrong)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [
        (16, 151_936, 896),  # few rows of the 0.5B shape
        (64, 152_064, 3584),  # the 7B shape
        (300, 4_097, 896),  # many rows, a tile and a bit
        (70, 1_001, 77),  # nothing aligned
    ],
)
def test_on_a_gpu(n, v, d, dtype):
    from leakfast.kernels.divergences import divergences

    p, q, head = inputs_of((n, v, d, dtype, d**-0.5), "cuda")
    poison = [torch.full((n, v // 8 + 1), float("nan"), device="cuda") for _ in range(4)]
    del poison  # freed blocks that the kernel's own buffers are cut from
    got = torch.stack(divergences(p, q, head))
    check_errors(got, p, q, head)
    assert torch.equal(got, torch.stack(divergences(p, q, head)))
    assert torch.equal(torch.stack(divergences(p, p, head)), torch.zeros_like(got))
    q[0] = float("nan")
    after = torch.stack(divergences(p, q, head))
    assert after[:, 0].isnan().all() and torch.equal(after[:, 1:], got[:, 1:])
