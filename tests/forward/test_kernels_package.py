"""The folder kernels/ must never be taken for the package of that name that transformers looks for,
and leakfast.kernels must be found in a checkout and in an installed copy. References are checked too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import leakfast
from leakfast.forward import ops
from leakfast.kernels import reference

pytestmark = pytest.mark.long

PACKAGE = Path(leakfast.__file__).resolve().parent
ROOT = PACKAGE.parent

FIND = "import leakfast.kernels.reference as r; print(r.__file__)"
SPEC = "import importlib.util as u; s = u.find_spec('kernels'); print(bool(s and s.origin))"
TRANSFORMERS = f"""
from transformers.utils import is_kernels_available
from transformers.models.qwen2 import modeling_qwen2
print(is_kernels_available())
{SPEC}
"""


def run_python(code, cwd, *paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture
def installed(tmp_path):
    """A copy laid out as an installed wheel: kernels/ inside the package, beside its shim."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(PACKAGE, site / "leakfast", ignore=ignored)
    folder = Path(reference.__file__).parent
    shutil.copytree(folder, site / "leakfast" / "kernels", ignore=ignored, dirs_exist_ok=True)
    return site


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="runs in a checkout")
def test_nothing_in_the_checkout_makes_kernels_a_package():
    for stray in (
        "kernels/__init__.py",
        "conftest.py",
        "tests/__init__.py",
        "tests/kernels",
        "tests/kernels.py",
    ):
        assert not (ROOT / stray).exists(), stray


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="runs in a checkout")
def test_transformers_works_from_the_checkout_root(tmp_path):
    real_one_there = run_python(SPEC, tmp_path, tmp_path)[-1]
    available, found = run_python(TRANSFORMERS, ROOT, ROOT)
    assert found == real_one_there  # our folder adds no package of that name
    assert real_one_there == "True" or available == "False"


def test_the_checkout_is_found_from_elsewhere(tmp_path):
    assert Path(run_python(FIND, tmp_path, ROOT)[-1]) == Path(reference.__file__)


def test_the_installed_copy_is_found_outside_the_checkout(installed, tmp_path):
    assert (
        Path(run_python(FIND, tmp_path, installed)[-1]) == installed / "leakfast" / "kernels" / "reference.py"
    )


def test_the_real_kernels_package_and_ours_live_side_by_side(installed, tmp_path):
    real = tmp_path / "real"
    (real / "kernels").mkdir(parents=True)
    (real / "kernels" / "__init__.py").write_text("name = 'the real one'\n")
    name, place = run_python(f"import kernels; print(kernels.name); {FIND}", tmp_path, installed, real)
    assert name == "the real one"
    assert Path(place).parent == installed / "leakfast" / "kernels"


def test_a_missing_folder_is_an_error_that_says_so(installed, tmp_path):
    shutil.rmtree(installed / "leakfast" / "kernels")
    code = """
try:
    import leakfast.kernels
except ImportError as error:
    print(error)
"""
    assert "neither installed" in run_python(code, tmp_path, installed)[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "width"), [([1], 1), ([20, 20, 20], 64), ([3, 1, 7], 33)])
def test_segment_means_against_float64(dtype, sizes, width):
    torch.manual_seed(0)
    states = torch.randn(sum(sizes), width).to(dtype)
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)])
    got = ops.segment_means(states, offsets)
    truth = torch.stack([states[a:b].double().mean(0) for a, b in pairwise(offsets.tolist())])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(got, ops.segment_means(states, offsets))


def test_a_segment_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    states = torch.randn(40, 17)
    alone = ops.segment_means(states[:20], torch.tensor([0, 20]))
    states[20:] = float("nan")
    assert torch.equal(ops.segment_means(states, torch.tensor([0, 20, 40]))[:1], alone)


@pytest.mark.parametrize("offsets", [[0, 2, 2, 4], [0, 3], [1, 4], [0]])
def test_segments_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match=r"empty|offsets"):
        ops.segment_means(torch.zeros(4, 2), torch.tensor(offsets))


def test_an_implementation_asked_for_by_name_runs_or_raises():
    assert ops.chosen_paths()["segment_means"] == "reference"
    with pytest.raises(ValueError, match="'cuda-graph' asked"):
        ops.segment_means(torch.zeros(4, 2), torch.tensor([0, 4]), impl="cuda-graph")


@pytest.mark.parametrize(("n", "v", "c"), [(1, 1, 1), (3, 101, 4), (7, 513, 2)])
def test_choice_logprobs_against_float64(n, v, c):
    torch.manual_seed(0)
    hidden, head = 4 * torch.randn(n, 24), torch.randn(v, 24)
    ids = torch.randint(0, v, (n, c))
    logprobs, lse = reference.choice_logprobs_reference(hidden, head, ids)
    logits = hidden.double() @ head.double().T
    torch.testing.assert_close(
        logprobs.double(), torch.log_softmax(logits, -1).gather(1, ids), rtol=1e-5, atol=2e-5
    )
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="token ids"):
        reference.choice_logprobs_reference(hidden, head, ids + v)
