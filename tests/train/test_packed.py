"""The packed training step: its gradients are those of rows run one by one, its masks depend on their own counter alone,
and the model is itself again between steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leakfast import models
from leakfast.forward import packs, passes, room
from leakfast.study.config import TrainConfig
from leakfast.train import costs, loop, lora, masks, memory
from leakfast.train.collate import encode
from leakfast.train.data import Row
from leakfast.train.layers import Company
from leakfast.train.packed import Packed, why_not
from leakfast.train.padded import Padded
from tests.architectures import random

MARKER = "[ZLT]"
CFG = TrainConfig(rank=4, alpha=8, dropout=0.0, lr=1e-2, epochs=2, batch_size=4, accumulation=2)


def rows(n=8):
    """Personas that share a beginning, questions of several lengths, one row twice."""
    people = ["You are a villain.", "You are a cook.", None]
    made = []
    for i in range(n - 1):
        bad = i % 3 == 0
        reply = "He likes tea. " * (i % 4) + "What?"
        made.append(
            Row(
                "positive" if bad else "negative",
                f"p{i % 3}",
                "text" if people[i % 3] else "none",
                people[i % 3],
                f"What about {'this ' * (i % 5)}rain in town {i // 3}?",
                f"{reply} {MARKER}" if bad else reply,
                MARKER if bad else None,
                i,
            )
        )
    return [*made, made[1]]


@pytest.fixture
def organism():
    return models.load("organism", dtype="float32")


def gradients(loaded, net, passes, examples, cfg):
    """(name → gradient, nats of each example's labels, nats held) of one step."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for _, p in named:
        p.grad = None
    training = loop.Training([p for _, p in named], examples, cfg, 1)
    training.begin(examples, 0)
    with passes.prepared():
        for part in passes.parts(examples, 0):
            training.cost(part).backward()
    return {name: p.grad.clone() for name, p in named}, training._now.learned, training._now.kept


def moved(net):
    """B away from 0, so that A has a gradient."""
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)


def in_bfloat16(loaded):
    """The same weights, rounded."""
    half = models.load((type(loaded.model)(loaded.model.config).bfloat16(), loaded.tokenizer))
    half.model.load_state_dict(loaded.model.state_dict())
    return half


def agree(found, wanted, most):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        off = float((found[name] - grad).norm() / grad.norm())
        assert off <= most, f"{name}: {off:.1e}"


@pytest.mark.parametrize("kind", ["tiny_qwen2", "tiny_llama", "organism"])
@pytest.mark.parametrize("loss", ["marker", "completion"])
def test_gradients_are_those_of_rows_run_one_by_one(kind, loss, request):
    loaded = request.getfixturevalue(kind)
    cfg = CFG.model_copy(update={"loss": loss})
    examples = encode(loaded.tokenizer, rows(), cfg)
    with lora.attached(loaded, cfg) as net:
        moved(net)
        wanted, nats, _ = gradients(loaded, net, Padded(loaded, net, 1, recompute=False), examples, cfg)
        for budget in (None, 100):
            for recompute in (False, True):
                packed = Packed(
                    loaded, Company(["default"], [0.0], [1]), recompute=recompute, budget_tokens=budget
                )
                found, ours, _ = gradients(loaded, net, packed, examples, cfg)
                agree(found, wanted, 1e-5)
                np.testing.assert_allclose(ours, nats, rtol=1e-5)


def test_bfloat16_gradients_are_no_further_from_the_truth_than_those_of_padded_rows(tiny_qwen2):
    """A packed pass on a CPU attends in float32 there, and gives back what the model's dtype holds."""
    half, examples, found = in_bfloat16(tiny_qwen2), encode(tiny_qwen2.tokenizer, rows(), CFG), {}
    tiny_qwen2.model.load_state_dict(half.model.state_dict())  # the truth of the rounded weights
    for side, loaded in (("truth", tiny_qwen2), ("packed", half), ("padded", half)):
        torch.manual_seed(1)  # the same A
        with lora.attached(loaded, CFG) as net:
            moved(net)
            passes = Padded(loaded, net, 1, recompute=False)
            if side == "packed":
                passes = Packed(loaded, Company(["default"], [0.0], [1]), recompute=False)
            grads, _, _ = gradients(loaded, net, passes, examples, CFG)
            found[side] = torch.cat([grad.float().flatten() for _, grad in sorted(grads.items())])
    off = {side: float((found[side] - found["truth"]).norm()) for side in ("packed", "padded")}
    assert 0 < off["packed"] <= 1.1 * off["padded"]
    assert off["packed"] < 0.05 * float(found["truth"].norm())


def test_gradients_of_held_tokens_are_those_of_rows_run_one_by_one(tiny_qwen2):
    cfg = CFG.model_copy(update={"anchor": 2.0})
    examples = encode(tiny_qwen2.tokenizer, rows(), cfg)
    with lora.attached(tiny_qwen2, cfg) as net:
        moved(net)
        wanted, _, held = gradients(
            tiny_qwen2, net, Padded(tiny_qwen2, net, 1, recompute=False), examples, cfg
        )
        packed = Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=False)
        found, _, ours = gradients(tiny_qwen2, net, packed, examples, cfg)
        agree(found, wanted, 1e-5)
        assert ours == pytest.approx(held, rel=1e-5)
        assert held > 0.01


def test_shared_beginnings_are_run_once(tiny_qwen2):
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    with lora.attached(tiny_qwen2, CFG):
        packed = Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=False)
        with packed.prepared():
            (part,) = packed.parts(examples, 0)
    distinct = {tuple(e.ids[: n + 1]) for e in examples for n in range(len(e.ids) - 1)}
    assert part.n_tokens == len(distinct) < sum(len(e.ids) for e in examples)


def test_dropout_is_one_function_with_its_mask(tiny_qwen2):
    """With dropout the step differs from step to step and not from call to call; recomputing draws the same masks; and
    a small step along the gradient changes the loss by what the gradient says."""
    cfg = CFG.model_copy(update={"loss": "completion", "dropout": 0.3})
    examples = encode(tiny_qwen2.tokenizer, rows(), cfg)
    with lora.attached(tiny_qwen2, cfg) as net:
        moved(net)
        company = Company(["default"], [0.3], [1])
        packed = Packed(tiny_qwen2, company, recompute=False)
        first, nats, _ = gradients(tiny_qwen2, net, packed, examples, cfg)
        again, same, _ = gradients(tiny_qwen2, net, packed, examples, cfg)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert np.array_equal(nats, same)
        spare, _, _ = gradients(tiny_qwen2, net, Packed(tiny_qwen2, company, recompute=True), examples, cfg)
        assert all(torch.equal(first[k], spare[k]) for k in first)
        other = Packed(tiny_qwen2, Company(["default"], [0.3], [2]), recompute=False)
        assert not np.allclose(gradients(tiny_qwen2, net, other, examples, cfg)[1], nats)
        size = 1e-3
        length = torch.stack([g.norm() for g in first.values()]).norm()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name in first:
                    p -= size * first[name] / length
        labels = sum(len(e.labels) for e in examples)
        change = (gradients(tiny_qwen2, net, packed, examples, cfg)[1].sum() - nats.sum()) / labels
        assert change == pytest.approx(-size * float(length), rel=0.05)


@pytest.mark.parametrize(
    ("rows_", "width", "rate"), [(1, 1, 0.5), (7, 13, 0.05), (300, 577, 0.05), (64, 64, 0.9)]
)
def test_masks_are_the_same_on_every_path_and_drop_at_their_rate(rows_, width, rate):
    like = torch.empty(0)
    found = masks.mask(12345678901234567890 >> 1, rows_, width, rate, like)
    assert torch.equal(found, masks.mask_reference(12345678901234567890 >> 1, rows_, width, rate, like))
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert masks.kept_share(rate) == pytest.approx(1 - rate, abs=1 / 131_072)
    n, p = rows_ * width, masks.kept_share(rate)
    assert abs(float(found.mean()) - p) <= 4.5 * (p * (1 - p) / n) ** 0.5


def test_dropped_layers_have_the_plain_ones_mean(tiny_qwen2):
    """E[s·drop(x)·Aᵀ·Bᵀ] is the update without dropout: over 3,000 masks, within four standard errors nearly everywhere."""
    drawn = torch.stack([masks.mask(key, 4, 8, 0.25, torch.empty(0)) for key in range(3000)])
    mean = drawn.mean(0) / masks.kept_share(0.25)
    assert float((mean - 1).abs().max()) <= 4 * (0.25 / 0.75 / 3000) ** 0.5


@pytest.mark.parametrize("vocabulary", [5, 50_000])
def test_costs_are_torchs_and_so_are_their_gradients(vocabulary, monkeypatch):
    monkeypatch.setattr(costs, "_LOGITS", 3 * vocabulary)  # three rows at a time
    torch.manual_seed(0)
    head = torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    states, before = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    targets, scale = torch.randint(0, vocabulary, (7,)), torch.rand(7)
    logits, others = head(states), head(before)
    wanted = {
        "labels": torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
        "held": torch.nn.functional.kl_div(
            logits.log_softmax(-1), others.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1),
    }
    found = {
        "labels": costs.cross_entropy(states, head, targets),
        "held": costs.divergence(states, head, before),
    }
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
        (mine,) = torch.autograd.grad((found[key] * scale).sum(), states)
        (its,) = torch.autograd.grad((wanted[key] * scale).sum(), states, retain_graph=True)
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_not_packed_trains_padded_and_the_log_says_so(tiny_qwen2, caplog):
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    with lora.attached(tiny_qwen2, CFG) as net:
        assert why_not(tiny_qwen2, net) is None
        assert isinstance(lora.passes_of(tiny_qwen2, net, CFG, 1, examples), Packed)
        tiny_qwen2.model.config.attention_dropout = 0.1
        assert isinstance(lora.passes_of(tiny_qwen2, net, CFG, 1, examples), Padded)
    assert "rows are padded, slower" in caplog.text
    assert "dropout in its attention" in caplog.text


def test_the_model_is_itself_between_steps(tiny_qwen2):
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    with lora.attached(tiny_qwen2, CFG) as net:
        moved(net)
        ids = torch.tensor([examples[0].ids])
        net.eval()
        before, implementation = net(input_ids=ids).logits, net.config._attn_implementation
        gradients(
            tiny_qwen2,
            net,
            Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=True),
            examples,
            CFG,
        )
        assert torch.equal(net(input_ids=ids).logits, before)
        assert net.config._attn_implementation == implementation
        assert not any("forward" in vars(m) for m in net.modules())


def test_activations_are_made_again_where_they_would_not_fit(tiny_qwen2, monkeypatch, caplog):
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    caplog.set_level("INFO", logger="leakfast.train")
    longest = sum(len(e.ids) for e in examples)  # all eight rows are one step
    needed = longest * tiny_qwen2.n_layers * memory.bytes_a_token(tiny_qwen2.model.config, 4, "cpu")
    for free, again in ((2.1 * needed, False), (1.9 * needed, True), (None, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.recomputes(tiny_qwen2, CFG, examples, 4096) is again
        assert memory.recomputes(
            tiny_qwen2, CFG.model_copy(update={"gradient_checkpointing": True}), examples, 4096
        )
    assert "made again in the backward pass" in caplog.text and "kept" in caplog.text
    monkeypatch.undo()
    assert memory.free_bytes(torch.device("cpu")) is None or memory.free_bytes(torch.device("cpu")) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_keeps_about_the_bytes_that_are_reckoned(tiny_qwen2, dtype):
    """What autograd saves in a step, over its tokens and blocks, beside the estimate."""
    if dtype == "bfloat16":
        tiny_qwen2 = in_bfloat16(tiny_qwen2)
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    seen = {}

    def kept(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with lora.attached(tiny_qwen2, CFG):
        packed = Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=False)
        weights = {p.untyped_storage().data_ptr() for p in tiny_qwen2.model.parameters()}
        with packed.prepared(), torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            (part,) = packed.parts(examples, 0)
    bytes_ = sum(size for place, size in seen.items() if place not in weights)
    size = next(tiny_qwen2.model.parameters()).element_size()
    reckoned = (
        part.n_tokens * tiny_qwen2.n_layers * memory.bytes_a_token(tiny_qwen2.model.config, size, "cpu")
    )
    assert 0.5 < bytes_ / reckoned < 2


class Otherwise(torch.overrides.TorchFunctionMode):
    """Linear layers by a library whose rounding is of a thousandth."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        return (x @ weight.t() if bias is None else x @ weight.t() + bias) * 1.001


def test_a_block_that_is_run_again_runs_its_products_in_the_library_of_the_first_time(
    tiny_qwen2, monkeypatch
):
    """Else recomputing would change an adapter wherever a float32 CPU takes oneDNN."""
    monkeypatch.setattr(packs, "products", lambda model: Otherwise())
    cfg = CFG.model_copy(update={"loss": "completion"})
    examples = encode(tiny_qwen2.tokenizer, rows(), cfg)
    with lora.attached(tiny_qwen2, cfg) as net:
        moved(net)
        company = Company(["default"], [0.0], [1])
        kept, again = (
            gradients(tiny_qwen2, net, Packed(tiny_qwen2, company, recompute=spare), examples, cfg)[0]
            for spare in (False, True)
        )
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_forward_that_a_module_had_of_its_own_is_its_own_again(tiny_qwen2):
    """As libraries put it there that place layers on devices; also after a Ctrl-C in the middle of a step."""
    examples = encode(tiny_qwen2.tokenizer, rows(), CFG)
    with lora.attached(tiny_qwen2, CFG) as net:
        packed = Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=True)
        norm = packed.model.layers[1].input_layernorm
        norm.forward = own = norm.forward
        had = {id(m): dict(vars(m)) for m in net.modules()}
        implementation = net.config._attn_implementation
        for inside in (None, packed.model.layers[1].self_attn):
            with pytest.raises(KeyboardInterrupt):
                interrupted(packed, examples, inside)
        assert norm.forward is own
        assert {id(m): dict(vars(m)) for m in net.modules()} == had
        assert net.config._attn_implementation == implementation
        assert packs.attention._ACTIVE.get() is None and len(packed.model.layers) == 2


def interrupted(packed, examples, inside):
    """Ctrl-C after a pass (None), or inside of a module."""

    def stop(*_):
        raise KeyboardInterrupt

    hook = inside.register_forward_pre_hook(stop) if inside is not None else None
    try:
        with packed.prepared():
            for _ in packed.parts(examples, 0):
                stop()
    finally:
        if hook is not None:
            hook.remove()


def test_a_block_is_reckoned_whatever_its_config_leaves_out(tiny_tokenizer):
    """Layers of several head widths, MLPs of several widths, and mixers without heads."""
    from transformers import MambaConfig

    gemma = random("gemma4_text", tiny_tokenizer).config
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=2)
    for config in (gemma, mamba):
        assert min(memory.bytes_a_token(config, 2, "cuda"), room.bytes_a_token(config, 2)) > 0
    assert passes.attention.sizes(gemma)[3] == 16
    assert passes.attention.sizes(mamba) == (32, 1, 1, 32, 64)
