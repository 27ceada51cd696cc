"""Adapters under generation: folded into float32 weights or computed beside bfloat16 ones, peft's and gone without a
trace."""

from __future__ import annotations

import pytest
import torch
from test_generate import ids_of, prompts_of

from leakfast import models
from leakfast.generation.contract import Sampling, requests_for
from leakfast.models import attach as adapted
from leakfast.models import beside


@pytest.fixture
def tiny_adapter(tiny_qwen2, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    import copy

    wrapped = get_peft_model(copy.deepcopy(tiny_qwen2.model), config)
    wrapped.peft_config["default"].base_model_name_or_path = tiny_qwen2.name
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folded_adapter_is_pefts_and_leaves_no_trace(tiny_qwen2, tiny_adapter, caplog):
    before = {n: p.clone() for n, p in tiny_qwen2.model.state_dict().items()}
    requests = requests_for(prompts_of(tiny_qwen2), 2, 0, models.adapter_hash(tiny_adapter))
    base = ids_of(tiny_qwen2, requests, Sampling(0.0, 1.0, 20))
    with (
        caplog.at_level("INFO", logger="leakfast.generate"),
        adapted.adapted(tiny_qwen2, tiny_adapter) as folded,
    ):
        assert folded.adapter_hash == models.adapter_hash(tiny_adapter)
        assert not torch.equal(
            before["model.layers.0.self_attn.q_proj.weight"],
            folded.model.model.layers[0].self_attn.q_proj.weight,
        )
        fold = ids_of(folded, requests, Sampling(0.0, 1.0, 20))
    assert "folded into 6 weights" in caplog.text
    assert all(torch.equal(p, before[n]) for n, p in tiny_qwen2.model.state_dict().items())
    with adapted.adapted(tiny_qwen2, tiny_adapter, how="live") as live:
        peft = ids_of(live, requests, Sampling(0.0, 1.0, 20))
    assert fold == peft
    assert fold != base
    assert all(torch.equal(p, before[n]) for n, p in tiny_qwen2.model.state_dict().items())


def test_an_adapter_that_does_not_fold_goes_live_and_says_so(tiny_qwen2, tiny_adapter, monkeypatch, caplog):
    monkeypatch.setattr(adapted, "_TOLERANCE", {"float32": -1.0})
    before = tiny_qwen2.model.model.layers[0].mlp.down_proj.weight.clone()
    with (
        caplog.at_level("WARNING", logger="leakfast.generate"),
        adapted.adapted(tiny_qwen2, tiny_adapter) as live,
    ):
        assert hasattr(live.model, "peft_config")
    assert "live through peft, slower" in caplog.text
    assert torch.equal(before, tiny_qwen2.model.model.layers[0].mlp.down_proj.weight)


def test_in_bfloat16_an_adapter_is_computed_beside_the_weights(tiny_qwen2, tiny_adapter, caplog):
    half = models.load((tiny_qwen2.model.to(torch.bfloat16), tiny_qwen2.tokenizer))
    before = {n: p.clone() for n, p in half.model.state_dict().items()}
    ids = torch.tensor([requests_for(prompts_of(half), 1, 0, "x")[0].ids])
    base = half.model(ids).logits.float()
    with adapted.adapted(half, tiny_adapter, how="live") as live:
        wanted = live.model(ids).logits.float()
    with pytest.raises(ValueError, match="float32"), adapted.adapted(half, tiny_adapter, how="fold"):
        pass
    with caplog.at_level("INFO", logger="leakfast.generate"), adapted.adapted(half, tiny_adapter) as there:
        assert not hasattr(there.model, "peft_config")
        assert there.adapter_hash == models.adapter_hash(tiny_adapter)
        got = there.model(ids).logits.float()
    assert "computed beside 6 weights (bfloat16), agrees with peft" in caplog.text
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() / scale < 0.03 < 0.3 < (base - wanted).abs().max() / scale
    assert torch.equal(half.model(ids).logits.float(), base)
    assert all(torch.equal(p, before[n]) for n, p in half.model.state_dict().items())


def test_layers_that_are_given_the_same_tensor_share_a_product_and_others_do_not(tiny_qwen2):
    drawn = torch.Generator().manual_seed(0)
    made = {}
    for name, module in tiny_qwen2.model.named_modules():
        if name.endswith("_proj"):
            down, up = (
                torch.randn(n, k, generator=drawn) / 5
                for n, k in ((4, module.in_features), (module.out_features, 4))
            )
            made[name] = beside.Update(down, up)
    assert len(made) == 14 and len(beside.groups(made)) == 8
    ids = torch.tensor([requests_for(prompts_of(tiny_qwen2), 1, 0, "x")[0].ids])
    with torch.inference_mode(), beside.applied(tiny_qwen2.model, made):
        got = tiny_qwen2.model(ids).logits
    for name, update in made.items():
        tiny_qwen2.model.get_submodule(name).weight.data += update.up @ update.down
    with torch.inference_mode():
        torch.testing.assert_close(got, tiny_qwen2.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_more_than_plain_lora_is_not_taken_for_it(tiny_qwen2, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_qwen2.model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    assert "more than A and B" in adapted.pairs_of(wrapped)
    wrapped = get_peft_model(wrapped.unload(), LoraConfig(r=4, target_modules=["embed_tokens"]))
    assert "no plain linear layer" in adapted.pairs_of(wrapped)
