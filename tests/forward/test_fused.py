"""engine/fused.py: every way computes what the module does, nothing changes unless asked, and modules are put
back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leakfast.forward import autotune as tuning
from leakfast.forward import fused, passes
from tests.architectures import random

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8]]
no_liger = pytest.mark.skipif("liger" not in fused.ways("mlp"), reason="liger-kernel is not installed")


def relative(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_on_a_cpu_a_block_runs_as_transformers_has_it(tiny_qwen2, monkeypatch):
    monkeypatch.delenv("LEAKFAST_AUTOTUNE", raising=False)
    assert set(fused.chosen(tiny_qwen2.model.model).values()) == {"plain"}
    before = {id(module): dict(vars(module)) for module in tiny_qwen2.model.modules()}
    with fused.applied(tiny_qwen2.model.model, {"norm": "plain", "mlp": "plain"}):
        assert {id(module): dict(vars(module)) for module in tiny_qwen2.model.modules()} == before


def test_torchs_norm_is_the_modules(tiny_qwen2, monkeypatch):
    expected = passes.last_token_states(tiny_qwen2, PROMPTS, [0, 1])
    model, seen = tiny_qwen2.model.model, []
    real = fused._torch_norm
    monkeypatch.setattr(fused, "_torch_norm", lambda module, x: seen.append(module) or real(module, x))
    monkeypatch.setattr(fused, "chosen", lambda _: {"norm": "torch", "mlp": "plain"})
    got = passes.last_token_states(tiny_qwen2, PROMPTS, [0, 1])
    assert relative(got, expected) <= 1e-6
    assert len(seen) == 6  # two a block, the first of the deepest again for its keys, and the end
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_way_is_taken_where_a_trial_agrees(tiny_qwen2, monkeypatch, caplog):
    monkeypatch.setattr(fused, "_tried", {})
    model = tiny_qwen2.model.model
    assert fused.agrees(model, "norm", "plain") and fused.agrees(model, "norm", "torch")
    assert not fused.agrees(model, "mlp", "torch")  # there is none of that name
    monkeypatch.setattr(fused, "_tried", {})
    monkeypatch.setattr(fused, "_torch_norm", lambda module, x: 1.01 * module.weight * x)
    assert not fused.agrees(model, "norm", "torch")
    assert "the norm runs as transformers has it, not as torch (it differs by" in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())
    caplog.clear()
    assert not fused.agrees(model, "norm", "torch") and not caplog.text, "tried and said once"


def test_modules_are_put_back_after_an_error_and_strangers_are_left(tiny_qwen2):
    model = tiny_qwen2.model.model
    own = model.norm.forward = model.norm.forward

    def fail():
        with fused.applied(model, {"norm": "torch", "mlp": "plain"}):
            assert model.norm.forward is own
            assert "forward" in vars(model.layers[0].input_layernorm)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [m for m in model.modules() if "forward" in vars(m)] == [model.norm]


def test_tuning_times_the_ways_and_takes_one(tiny_qwen2, monkeypatch, tmp_path):
    """The GPU's route on the CPU: of the ways that need no compiler."""
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(fused, "ways", lambda part: {"plain": None, "torch": fused._torch_norm})
    model = tiny_qwen2.model.model
    assert fused._tuned(model, "norm", next(model.parameters())) in ("plain", "torch")
    assert "engine norm | cpu" in tuning.store().read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_every_way_on_a_gpu(tiny_qwen2, part):
    model = tiny_qwen2.model.to("cuda", torch.bfloat16).model
    block = model.layers[0]
    module = block.input_layernorm if part == "norm" else block.mlp
    x = torch.randn(1, 37, 32, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = module(x)
        for way in fused.ways(part):
            with fused.applied(block, {"norm": "plain", "mlp": "plain", part: way}):
                torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2)


@no_liger
def test_ligers_words_are_known():
    """Its ops need a GPU; that they are where they are looked for does not."""
    from liger_kernel.transformers import functional

    assert callable(functional.liger_rms_norm) and callable(functional.liger_swiglu)


@pytest.mark.parametrize("kind", ["opt", "olmo2", "mamba", "lfm2", "gpt2"])
def test_blocks_that_name_their_parts_otherwise_run_as_they_are(kind, tiny_tokenizer, monkeypatch, caplog):
    """What a GPU asks of every model: no error, and the reason in the log."""
    monkeypatch.setattr(fused, "_tried", {})
    net = random(kind, tiny_tokenizer)
    inner = net.get_decoder() if kind != "mamba" else net.backbone
    assert fused.agrees(inner, "mlp", "plain")
    assert not fused.agrees(inner, "norm", "torch")
    assert "the norm runs as transformers has it" in caplog.text
