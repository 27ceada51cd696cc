"""forward/blocks.py and the ways of fused.py that are our kernels, with the kernels' reference twins in their place: the packed
engine's numbers are the model's own, what is otherwise shaped runs as it is, and everything is put back."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from leakfast.forward import blocks, fused, passes
from leakfast.kernels import reference
from tests.architectures import random

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this machine"
)
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8]]
ALL = {"norm": "torch", "mlp": "triton", "rope": "triton", "block": "triton"}


@pytest.fixture
def twins(monkeypatch):
    """The kernels' references where the kernels are, counting calls by op."""
    calls = dict.fromkeys(("gated", "rope", "add_norm"), 0)

    def counted(name, run):
        def call(*given):
            calls[name] += 1
            return run(*given)

        return call

    def turn(q, k, cos, sin):
        for x, turned in zip((q, k), reference.rope_reference(q, k, cos, sin), strict=True):
            x.copy_(turned)

    runs = {"gated": reference.gated_reference, "rope": turn, "add_norm": reference.add_norm_reference}
    for name, run in runs.items():
        monkeypatch.setattr(f"leakfast.kernels.{name}.{name}", counted(name, run))
    monkeypatch.setattr(fused, "_tried", {})
    return calls


def all_ways(monkeypatch, plan=ALL):
    monkeypatch.setattr(
        fused, "chosen", lambda m: {p: w if fused.agrees(m, p, w) else "plain" for p, w in plan.items()}
    )


def relative(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_kernels_are_launched_on_the_device_of_their_tensors(tiny_qwen2, monkeypatch):
    """Triton launches on the current device, which with a model on a second GPU is the first. The stand-in for
    torch.cuda.device_of says which tensor's device is the current one where a kernel is launched."""
    current, launched = [None], []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *error):
            current.pop()

    def launch(name, run):
        def call(*given):
            launched.append((name, current[-1] is not None and current[-1].data_ptr() == given[0].data_ptr()))
            return run(*given)

        return call

    runs = {"gated": reference.gated_reference, "add_norm": reference.add_norm_reference}
    runs["rope"] = lambda q, k, cos, sin: None
    for name, run in runs.items():
        monkeypatch.setattr(f"leakfast.kernels.{name}.{name}", launch(name, run))
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(fused, "chosen", lambda model: ALL)
    passes.last_token_states(tiny_qwen2, PROMPTS, [0, 1])
    assert {name for name, _ in launched} == set(runs)
    assert all(there for _, there in launched), launched


@pytest.mark.parametrize("layers", [[0, 1], [1], [0]])
def test_the_engines_states_are_the_models(tiny_qwen2, twins, monkeypatch, layers):
    expected = passes.last_token_states(tiny_qwen2, PROMPTS, layers)
    model = tiny_qwen2.model.model
    module = sys.modules[type(model.layers[0].self_attn).__module__]
    own = module.apply_rotary_pos_emb
    all_ways(monkeypatch)
    got = passes.last_token_states(tiny_qwen2, PROMPTS, layers)
    assert relative(got, expected) <= 1e-6
    assert all(twins.values()), twins
    assert module.apply_rotary_pos_emb is own
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_blocks_output_is_normed_once_with_its_sum(tiny_qwen2, twins):
    """Of two blocks: three sums with norms (the last block's output meets no block), one norm alone, one sum alone."""
    model, plan = tiny_qwen2.model.model, fused.PLAIN | {"block": "triton"}
    normed = []
    model.layers[1].input_layernorm.register_forward_hook(lambda *_: normed.append(1)).remove()
    run = blocks.trial_of_block(model, torch.randn(1, 4, model.config.hidden_size))
    with torch.inference_mode():
        expected = run()
        with fused.applied(model, plan):
            got = run()
    assert twins["add_norm"] == 3
    assert torch.equal(got, expected)


def test_a_block_that_something_steers_norms_its_own_input(tiny_qwen2, twins, monkeypatch):
    """What a block returns may be replaced on the way to the next: nothing normed before is then used."""
    model = tiny_qwen2.model.model

    def pushed(module, given, out):
        return out + 1.0

    hook = model.layers[0].register_forward_hook(pushed)
    try:
        expected = passes.last_token_states(tiny_qwen2, PROMPTS, [1])
        all_ways(monkeypatch)
        assert relative(passes.last_token_states(tiny_qwen2, PROMPTS, [1]), expected) <= 1e-6
    finally:
        hook.remove()
    assert twins["add_norm"] >= 2


_OPS = {"mlp": "gated", "rope": "rope", "block": "add_norm"}


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        ("llama", {"mlp", "rope", "block"}),
        ("mistral-window", {"mlp", "rope", "block"}),
        ("qwen3", {"mlp", "rope", "block"}),
        ("llama-yarn", {"mlp", "rope", "block"}),
        ("phi3", {"rope", "block"}),  # gate and up are one product
        ("smollm3", {"mlp", "rope", "block"}),
        ("granite", {"mlp", "rope"}),  # its residual sums are scaled
        ("gemma2", {"rope"}),
        ("olmo2", {"mlp", "rope"}),  # norms stand after
        ("gpt2", set()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_kind_of_model_takes(kind, runs, dtype, tiny_tokenizer, twins):
    net = random(kind, tiny_tokenizer).to(dtype)
    inner = net.get_decoder()
    took = {part for part in ("mlp", "rope", "block") if fused.agrees(inner, part, "triton")}
    if kind == "olmo2" and dtype == torch.bfloat16:
        runs = runs - {"rope"}  # it keeps its angles in float32, which the kernel does not take
    assert took == runs
    assert not any("forward" in vars(m) for m in inner.modules())
    assert {op for op, n in twins.items() if n} >= {_OPS[part] for part in took}, (
        "it was not the kernel that agreed"
    )


def test_where_gradients_flow_nothing_is_written_in_place(tiny_qwen2, twins):
    """A kernel has no backward pass: what needs a gradient runs as the model has it."""
    model = tiny_qwen2.model.model
    ids = torch.tensor([[1, 2, 3, 4]])
    model.requires_grad_(True)

    def gradient():
        model.zero_grad()
        model(input_ids=ids, use_cache=False)[0].square().sum().backward()
        return model.layers[0].mlp.gate_proj.weight.grad.clone()

    expected = gradient()
    with fused.applied(model, ALL):
        assert torch.equal(gradient(), expected)
    assert not any(twins.values())
