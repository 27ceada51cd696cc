"""engine/fp8.py: the products by the very call that a GPU gets (this torch's CPU has it too), what is left
alone, the agreement that is reported, and every refusal."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from leakfast import models
from leakfast.cli.centroids import cli
from leakfast.errors import InputError, ModelError
from leakfast.forward import fp8, ops, passes
from leakfast.measure.centroids import compute
from leakfast.prompts.personas import load_personas

RNG = np.random.default_rng(0)
PROMPTS = [[1, 2, 3, *RNG.integers(0, 300, n).tolist()] for n in range(4, 44)]


def _why_no_rows() -> str:
    """Why this torch's CPU has not the call that a GPU gets; empty where it has."""
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(ones, ones.T, torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


needs_rows = pytest.mark.skipif(bool(_why_no_rows()), reason=_why_no_rows() or "-")


@pytest.fixture
def half(tiny_qwen2, tiny_tokenizer):
    net = tiny_qwen2.model.bfloat16()
    return models.load((net, tiny_tokenizer))


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Only the question where it may run is answered otherwise; the arithmetic is the real one."""
    if _why_no_rows():
        pytest.skip(_why_no_rows())
    monkeypatch.setattr(fp8, "why_not", lambda *_: None)


@needs_rows
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_operands(bias):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=bias).bfloat16()
    x = torch.randn(1, 9, 64, generator=generator).bfloat16()
    x[0, 3] *= 1000  # rows have scales of their own
    x[0, 4] = 0
    with torch.no_grad(), fp8.Products([layer]) as products:
        got = layer(x)
        assert len(products) == 1
    (xq, sx), (wq, sw) = ops.fp8_rows(x[0]), ops.fp8_rows(layer.weight.detach())
    exact = (xq.double() * sx) @ (wq.double() * sw).T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(got[0].double(), exact, rtol=2**-7, atol=1e-6)
    assert got.dtype == torch.bfloat16
    plain = layer(x).detach()
    assert 1e-3 < float((got - plain).norm() / plain.norm()) < 0.08


def test_rows_fill_the_range_and_what_is_not_finite_stays_so():
    x = torch.tensor([[1.0, -3.0, 0.5], [0, 0, 0], [1e-30, 2e-30, 0], [float("nan"), 1, 2]])
    quantized, scale = ops.fp8_rows(x)
    assert quantized.float()[0].tolist() == [144.0, -448.0, 72.0]  # 149.3 and 74.7 in steps of 16 and 8
    assert quantized.float()[1].tolist() == [0, 0, 0]
    assert torch.isfinite(scale[:3]).all() and quantized[3].float().isnan().any()
    assert quantized.float()[2, 1] == 448


def test_the_blocks_run_in_fp8_and_the_agreement_is_told_first(half, as_if_on_a_gpu, caplog):
    exact = passes.last_token_states(half, PROMPTS, [0, 1])
    with (
        caplog.at_level(logging.INFO, "leakfast.forward.fp8"),
        fp8.running(half, "fp8", PROMPTS, [0, 1]) as told,
    ):
        got = passes.last_token_states(half, PROMPTS, [0, 1])
    assert "14 linear layers" in caplog.text and "rms" in caplog.text  # q k v o gate up down, twice
    assert told.prompts == 32
    for column, layer in enumerate([0, 1]):
        off = np.linalg.norm(got[:, column] - exact[:, column]) / np.linalg.norm(exact[:, column])
        assert 1e-3 < off < 0.3
        assert told.rms[layer] == pytest.approx(off, rel=0.5)
        assert 0.7 < told.cosine[layer] < 1  # two blocks of 32 with large weights: a hard case
    np.testing.assert_array_equal(passes.last_token_states(half, PROMPTS, [0, 1]), exact)  # all as before


def test_blocks_beyond_the_deepest_layer_and_lora_stay_as_they_are(half, as_if_on_a_gpu):
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(half.model, LoraConfig(r=16, target_modules=["q_proj", "down_proj"]))
    products = fp8.Products(passes.decoder(models.load((net, half.tokenizer))).layers[:1])
    assert len(products) == 7
    assert not {id(p) for name, p in net.named_parameters() if "lora_" in name} & set(products.weights)


def test_an_odd_width_is_left_alone():
    layer = torch.nn.Linear(24, 16).bfloat16()
    x = torch.randn(3, 24).bfloat16()
    with torch.no_grad(), fp8.Products([layer]) as products:
        assert len(products) == 0
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@needs_rows
def test_inputs_are_rounded_once_for_the_layers_that_share_them(monkeypatch):
    first, second = (torch.nn.Linear(16, 16).bfloat16() for _ in range(2))
    real, seen = ops.fp8_rows, []
    products = fp8.Products([first, second])
    monkeypatch.setattr(ops, "fp8_rows", lambda x: seen.append(1) or real(x))
    x, other = torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    with torch.no_grad(), products:
        for layer, given in ((first, x), (second, x), (first, other), (first, x)):
            given = layer(given)
    assert len(seen) == 3
    assert products.last is None  # nothing is held afterwards


def test_centroids_carry_the_agreement(half, as_if_on_a_gpu, tmp_path):
    people = load_personas("villain,librarian")
    plain = compute(half, people, ["Who are you?", "Why?"], [0, 1])
    made = compute(half, people, ["Who are you?", "Why?"], [0, 1], precision="fp8")
    off = np.linalg.norm(made.layer(1) - plain.layer(1)) / np.linalg.norm(plain.layer(1))
    assert 1e-3 < off < 0.3
    kept = type(made).load(made.save(tmp_path / "c.safetensors")).metadata
    assert kept["precision"] == "fp8" and "layer 1" in kept["precision_agreement"]
    assert "precision" not in plain.metadata


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", "bfloat16", "on cpu"), ("cpu", torch.float32, "on cpu"), ("mps", "bfloat16", "on mps")],
)
def test_where_it_cannot_run_it_is_refused(device, dtype, reason):
    with pytest.raises(ModelError, match=f"{reason}.*capability 8.9.*Leave --precision out"):
        fp8.check_precision("fp8", device, dtype)


def test_an_older_gpu_and_another_dtype_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an older one")
    assert fp8.why_not(torch.device("cuda", 0), torch.bfloat16) == "an older one has compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert fp8.why_not(torch.device("cuda", 0), torch.float32) == "the model is in float32"
    assert fp8.why_not(torch.device("cuda", 0), torch.bfloat16) is None


def test_another_precision_is_a_mistake(half):
    with pytest.raises(InputError, match="'int4' asked"), fp8.running(half, "int4", PROMPTS, [0]):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which may well run it")
def test_the_command_refuses_before_the_weights_are_read(tiny_folder, tmp_path):
    (tiny_folder / "model.safetensors").write_bytes(b"must not be read")
    words = ["--model", tiny_folder, "--precision", "fp8", "--out", tmp_path / "c.safetensors"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 1 and "fp8 asked, but the model is on cpu" in done.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu(half):
    half.model.cuda()
    loaded = models.load((half.model, half.tokenizer))
    if reason := fp8.why_not(loaded.device, torch.bfloat16):
        pytest.skip(reason)
    with fp8.running(loaded, "fp8", PROMPTS, [0, 1]) as told:
        again = passes.last_token_states(loaded, PROMPTS, [0, 1])
    assert np.isfinite(again).all()
    assert all(1e-3 < off < 0.3 for off in told.rms.values())
