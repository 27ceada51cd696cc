"""adapter_structure.py against peft on a model loaded anew: what an adapter holds is measured as peft measures it, or
refused in one message before anything is drawn, and the base is the same after it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from measuring import evaluate, evaluate_items

from leakfast import models
from leakfast.errors import AdapterError
from leakfast.measure import centroids
from leakfast.measure.choices.scores import letters, prompts_of
from leakfast.models.adapter_structure import unchanged
from leakfast.models.adapters import check_fits, check_runs
from leakfast.models.attach import adapted
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.study.config import EvalConfig
from tests.adapter_makers import MORE, PLAIN, by_peft, fresh, refiled, renamed

pytestmark = pytest.mark.long

ORGANISM = models.organism_dir()
PEOPLE = load_personas("villain,comedian")
LABELS = ["A", "B", "C", "D"]


@pytest.fixture(scope="module")
def items():
    return load_items("organism").half("eval").sample(2)


def bits(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(net, before):
    after = net.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


REFUSED = {
    "pissa": r"init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion",
    "olora": r"init_lora_weights 'olora'",
    "resized": r"embed_tokens\.weight is \(2050, 192\) in the file and \(2048, 192\) here.*adding tokens",
    "resized-own": r"\(2050, 192\) in the file and \(2048, 192\) here.*adding tokens",
    "alora": r"alora_invocation_tokens, which leakfast does not measure",
    "replicated": r"layer_replication, which leakfast does not measure",
}
WHERE = [(kind, base) for base, kinds in (("tied", PLAIN + MORE), ("untied", MORE)) for kind in kinds]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "base"), WHERE)
def test_what_is_measured_is_what_peft_has_on_a_model_loaded_anew(kind, base, bases, make, items):
    """Through peft live, folded where it may be, and in choices by the packed engine; then the base again."""
    loaded, adapter = bases[base], make(kind, base)
    prompts = list(map(list, prompts_of(loaded, PEOPLE, items)))
    truth = by_peft(loaded.path, adapter, prompts)
    before, plain = bits(loaded.model), by_peft(loaded.path, None, prompts)
    assert (truth - plain).abs().max() > 1e-2, "the adapter shows"
    structure = check_fits(loaded, adapter)
    assert structure.plain == (kind in PLAIN or kind == "stored")
    for how in ("live", "fold") if structure.plain else ("auto",):
        with adapted(loaded, adapter, how=how) as current, torch.inference_mode():
            got = [
                current.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts
            ]
            assert torch.allclose(torch.stack(got), truth, atol=2e-4)
        assert same(loaded.model, before)
    if structure.head_lora:
        with pytest.raises(AdapterError, match="LoRA matrices on the output head"):
            check_runs(structure, adapter, "choices")
        return
    with models.with_adapter(loaded, adapter) as current:
        scores = letters(current, PEOPLE, items).logprobs.reshape(-1, 4)
    ids = [loaded.tokenizer.convert_tokens_to_ids(label) for label in LABELS]
    np.testing.assert_allclose(scores, truth[:, ids].numpy(), atol=2e-4)
    again = letters(loaded, PEOPLE, items).logprobs.reshape(-1, 4)
    np.testing.assert_allclose(again, plain[:, ids].numpy(), atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "said"), REFUSED.items())
def test_what_is_not_measured_is_refused_before_anything_is_written(kind, said, bases, make, items, tmp_path):
    loaded, adapter = bases["tied"], make(kind)
    before, run = bits(loaded.model), tmp_path / "run"
    cfg = EvalConfig(samples=1, max_new_tokens=2)
    for measure in (
        lambda: evaluate_items(loaded, run, [adapter], PEOPLE, items, base=True, source="villain"),
        lambda: evaluate(
            loaded, run, [adapter], PEOPLE, ["Who are you?"], "marker", cfg, 1, base=True, source="villain"
        ),
        lambda: centroids.measure(loaded, PEOPLE, ["Who are you?"], [0], adapter=adapter),
    ):
        with pytest.raises(AdapterError, match=said):
            measure()
    assert not run.exists() and same(loaded.model, before)


RENAMED = {
    "adapter-name": (".weight", ".default.weight"),
    "other-model": ("model.model.layers", "model.model.language_model.layers"),
    "no-prefix": ("base_model.model.", ""),
    "wrapped": ("base_model.model.", "module.base_model.model."),
    "decoder-alone": ("base_model.model.model.", "base_model.model."),
    "compiled": (".self_attn.", ".self_attn._orig_mod."),
}


def cut(tensors, kept):
    return {name: tensor for name, tensor in tensors.items() if kept(name)}


FILES = {
    "half-the-layers": (
        lambda w: cut(w, lambda k: int(k.split("layers.")[1].split(".")[0]) < 3),
        r"lacks 42 of the 84 tensors.*layers\.3\.mlp\.down_proj\.lora_A",
    ),
    "no-lora_B": (
        lambda w: cut(w, lambda k: ".mlp." not in k or "lora_B" not in k),
        r"lacks 18 of the 84 tensors.*layers\.0\.mlp\.down_proj\.lora_B",
    ),
    "mlp-under-adapter-name": (
        lambda w: {(k.replace(".weight", ".default.weight") if ".mlp." in k else k): t for k, t in w.items()},
        r"lacks 36 of the 84 tensors.*holds 36 tensors that its config does not name",
    ),
    "stray": (
        lambda w: {**w, "base_model.model.model.layers.0.mlp.up_proj.bias": torch.zeros(512)},
        r"holds 1 tensors that its config does not name.*up_proj\.bias",
    ),
    "empty": (lambda w: {}, r"lacks 84 of the 84 tensors"),
}
FILES |= {
    name: (
        lambda w, a=a, b=b: {k.replace(a, b): t for k, t in w.items()},
        r"lacks \d+ of the 84 .*holds \d+ tensors",
    )
    for name, (a, b) in RENAMED.items()
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lacks_what_its_config_asks_for_is_refused_by_name(name, bases, make, tmp_path):
    change, said = FILES[name]
    adapter = refiled(make("every"), tmp_path / name, change)
    with pytest.raises(AdapterError, match=said) as caught:
        check_fits(bases["tied"], adapter)
    assert "Needed: an adapter of this model whose" in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"},
        {"layers_to_transform": [0, 1, 2]},
        {"exclude_modules": ["down_proj"]},
    ],
)
def test_a_file_that_holds_more_than_its_config_says_is_refused_for_every_engine(
    config, bases, make, items, tmp_path
):
    """peft leaves the rest out, vLLM applies it."""
    loaded = bases["tied"]
    adapter = refiled(make("every"), tmp_path / "adapter", dict, **config)
    said = r"holds \d+ tensors that its config does not name, such as base_model.*peft would leave them out, vLLM"
    for engine in ("packed", "vllm"):
        with pytest.raises(AdapterError, match=said):
            evaluate_items(
                loaded, tmp_path / "run", [adapter], PEOPLE, items, source="villain", engine_name=engine
            )
    with pytest.raises(AdapterError, match=said):
        evaluate(
            loaded,
            tmp_path / "run",
            [adapter],
            PEOPLE,
            ["Who are you?"],
            "marker",
            EvalConfig(samples=1),
            1,
            source="villain",
            backend="vllm",
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(AdapterError, match=said):
        adapted(loaded, adapter).__enter__()


@pytest.mark.parametrize("target", ["all-linear", r".*(?:self_attn|mlp)\..*(?:q|k|v|o|gate|up|down)_proj"])
def test_other_ways_of_naming_the_same_modules_fit(target, bases, make, tmp_path):
    adapter = refiled(make("every"), tmp_path / "adapter", dict, target_modules=target)
    structure = check_fits(bases["tied"], adapter)
    assert structure.plain and len(structure.ranks) == 42 and set(structure.ranks.values()) == {4}


def test_keys_that_nobody_here_knows_are_refused_where_they_say_something(bases, make, tmp_path):
    adapter = refiled(make("plain"), tmp_path / "adapter", dict, use_next_years_lora=None, something=[])
    assert check_fits(bases["tied"], adapter).plain
    renamed(adapter, use_next_years_lora=True)
    with pytest.raises(AdapterError, match=r"use_next_years_lora, which this peft does not know.*newer peft"):
        check_fits(bases["tied"], adapter)
    renamed(adapter, use_next_years_lora=False, task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="task SEQ_CLS"):
        check_fits(bases["tied"], adapter)
    renamed(adapter, task_type=None, target_modules="nothing_of_the_kind")
    with pytest.raises(AdapterError, match=r"peft cannot make the layers.*not found in the base model"):
        check_fits(bases["tied"], adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", ["live", "merged"])
@pytest.mark.parametrize("kind", [kind for kind in MORE if kind != "stored"])
def test_vllm_is_given_plain_lora_alone(kind, lora, bases, make, items, tmp_path):
    """Refused before an engine is started, or anything written; peft's magnitudes or rows are never left out."""
    from leakfast.generation.backends import Options, opened

    loaded, adapter = bases["tied"], make(kind)
    said = r"which vLLM does not apply, live or merged.*--backend transformers \(letters: --engine packed\)"
    options = Options(lora=lora)
    with pytest.raises(AdapterError, match=said), opened(loaded, [adapter], "vllm", options=options):
        pass
    with pytest.raises(AdapterError, match=said):
        evaluate(
            loaded,
            tmp_path / "run",
            [adapter],
            PEOPLE,
            ["Who are you?"],
            "marker",
            EvalConfig(samples=1),
            1,
            source="villain",
            backend="vllm",
            options=options,
        )
    with pytest.raises(AdapterError, match=said):
        evaluate_items(
            loaded, tmp_path / "run", [adapter], PEOPLE, items, source="villain", engine_name="vllm"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_overwrites_the_embedding_leaves_the_next_ones_alone(bases, make, items, tmp_path):
    """One call that measures it, then the base and another adapter, in both orders of what is written."""
    import polars as pl

    loaded = bases["untied"]
    moved, plain = make("stored-moved", "untied"), make("plain", "untied")
    evaluate_items(loaded, tmp_path / "run", [moved, plain], PEOPLE, items, base=True, source="villain")
    prompts = list(map(list, prompts_of(loaded, PEOPLE, items)))
    ids = [loaded.tokenizer.convert_tokens_to_ids(label) for label in LABELS]
    for name, adapter in ((moved.name, moved), (plain.name, plain), ("base", None)):
        frame = pl.read_parquet(tmp_path / "run" / "choices" / name / "*" / "*.parquet")
        got = frame.sort(pl.Series(range(len(frame))))["logprob_nats"].to_numpy().reshape(-1, 4)
        np.testing.assert_allclose(got, by_peft(loaded.path, adapter, prompts)[:, ids].numpy(), atol=2e-4)


def test_dora_is_left_to_peft_and_what_is_folded_is_said(bases, make, caplog):
    with caplog.at_level(logging.INFO, logger="leakfast.generate"), adapted(bases["tied"], make("dora")):
        pass
    assert "live through peft, slower, because it has DoRA" in caplog.text
    with pytest.raises(AdapterError, match=r"cannot be folded \(it has DoRA\)"):
        adapted(bases["tied"], make("dora"), how="fold").__enter__()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.model.layers[2].mlp.up_proj.weight.data.neg_(),
        lambda net: net.model.norm.weight.data[3:4].add_(1),
        lambda net: setattr(
            net.lm_head, "weight", torch.nn.Parameter(net.lm_head.weight * 2, requires_grad=False)
        ),
        lambda net: net.model.embed_tokens.weight.data[7:9].copy_(net.model.embed_tokens.weight[7:9].flip(0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_another_one_afterwards_is_an_error(change, dtype):
    net = fresh(ORGANISM, dtype)
    with unchanged(net):
        pass
    with pytest.raises(AdapterError, match=r"changed \d+ weights of the base for good"), unchanged(net):
        change(net)


def test_peft_failing_half_way_leaves_no_layer_behind(bases, make, monkeypatch):
    import peft

    loaded = bases["tied"]
    modules = {name: type(module) for name, module in loaded.model.named_modules()}
    monkeypatch.setattr(peft.PeftModel, "load_adapter", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError), models.with_adapter(loaded, make("every")):
        pass
    assert {name: type(module) for name, module in loaded.model.named_modules()} == modules
