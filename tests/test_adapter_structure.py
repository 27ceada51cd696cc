"""adapter_structure.py against peft on a model loaded anew: what an adapter holds is measured as peft measures it, or
refused in one message before anything is drawn, and the base is the same after it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from leakfast import centroids, models
from leakfast.adapter_structure import structure_of, unchanged
from leakfast.adapters import check_fits, check_runs
from leakfast.choices import evaluate as choices_evaluate
from leakfast.choices.scores import letters, prompts_of
from leakfast.errors import AdapterError
from leakfast.evaluate import evaluate
from leakfast.generate.adapted import adapted
from leakfast.items import load_items
from leakfast.config import EvalConfig
from leakfast.personas import load_personas
from tests.adapter_makers import ATTENTION, EVERY, by_peft, fresh, refiled, renamed, saved, trained

ORGANISM = models.organism_dir()
PEOPLE = load_personas("villain,comedian")
LABELS = ["A", "B", "C", "D"]


@pytest.fixture(scope="module")
def items():
    return load_items("organism").half("eval").sample(4)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The organism with an output head of its own: same outputs."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bases") / "untied"
    shutil.copytree(ORGANISM, folder)
    tensors = load_file(ORGANISM / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def bases(untied):
    return {
        "tied": models.load("organism", dtype="float32", device="cpu"),
        "untied": models.load(untied, dtype="float32", device="cpu"),
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory, untied):
    """`make(kind, base)`: the adapter of a kind, made once."""
    root = tmp_path_factory.mktemp("adapters")

    def made(kind: str, base: str = "tied") -> Path:
        where = ORGANISM if base == "tied" else untied
        out = root / f"{kind}-{base}"
        if not out.exists():
            saved(KINDS[kind](where), out, "organism" if base == "tied" else str(untied), **HOW.get(kind, {}))
        return out

    return made


def bits(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(net, before):
    after = net.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def moved_rows(where):
    """An adapter beside which the trainer wrote rows of the embedding anew."""
    net = fresh(where)
    wrapped = trained(net, 0.02)
    rows = net.get_input_embeddings().weight
    with torch.no_grad():
        rows[30:60] = 3 * rows.std() * torch.randn(30, rows.shape[1], generator=torch.Generator().manual_seed(7))
    return wrapped


def target_embedding(where, moved):
    net = fresh(where)
    if moved:
        with torch.no_grad():
            net.get_input_embeddings().weight[30:60] *= 3
    return trained(net, 0.02, names=("lora_",), target_modules=[*ATTENTION, "embed_tokens"])


def resized(where, **more):
    net = fresh(where)
    net.resize_token_embeddings(2050)
    return trained(net, **more)


KINDS = {
    "plain": lambda w: trained(fresh(w)),
    "every": lambda w: trained(fresh(w), target_modules=EVERY),
    "rslora": lambda w: trained(fresh(w), use_rslora=True),
    "patterns": lambda w: trained(fresh(w), rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 2}),
    "some-layers": lambda w: trained(fresh(w), target_modules=EVERY, layers_to_transform=[0, 2]),
    "excluded": lambda w: trained(fresh(w), target_modules="all-linear", exclude_modules=["down_proj"]),
    "regex": lambda w: trained(fresh(w), target_modules=r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"),
    "gaussian": lambda w: trained(fresh(w), init_lora_weights="gaussian"),
    "orthogonal": lambda w: trained(fresh(w), init_lora_weights="orthogonal"),
    "mica": lambda w: trained(fresh(w), names=("lora_A",), init_lora_weights="mica"),
    "dora": lambda w: trained(fresh(w), 0.03, use_dora=True, target_modules=EVERY),
    "own-norms": lambda w: trained(fresh(w), modules_to_save=["norm"]),
    "own-head": lambda w: trained(fresh(w), modules_to_save=["lm_head"]),
    "own-both": lambda w: trained(fresh(w), modules_to_save=["lm_head", "embed_tokens"]),
    "lora-head": lambda w: trained(fresh(w), target_modules=[*ATTENTION, "lm_head"]),
    "rows": lambda w: trained(fresh(w), trainable_token_indices=[35, 36, 37, 38]),
    "rows-of-both": lambda w: trained(
        fresh(w), trainable_token_indices={"lm_head": [35, 36, 37, 38], "embed_tokens": [35, 36, 37, 38]}
    ),
    "stored": lambda w: trained(fresh(w)),
    "stored-moved": moved_rows,
    "stored-half": lambda w: trained(fresh(w, torch.float16)),
    "target-embedding": lambda w: target_embedding(w, False),
    "target-embedding-moved": lambda w: target_embedding(w, True),
    "pissa": lambda w: trained(fresh(w), init_lora_weights="pissa", names=("lora_",)),
    "olora": lambda w: trained(fresh(w), init_lora_weights="olora", names=("lora_",)),
    "resized": lambda w: resized(w),
    "resized-own": lambda w: resized(w, modules_to_save=["embed_tokens", "lm_head"]),
    "alora": lambda w: trained(fresh(w), alora_invocation_tokens=[5, 6]),
    "replicated": lambda w: trained(fresh(w), layer_replication=[[0, 2], [1, 3]]),
}
HOW = {kind: {"save_embedding_layers": True} for kind in ("stored", "stored-moved", "stored-half", "resized")}
PLAIN = ["plain", "every", "rslora", "patterns", "some-layers", "excluded", "regex", "gaussian", "orthogonal", "mica"]
MORE = ["dora", "own-norms", "own-head", "own-both", "lora-head", "rows", "rows-of-both", "stored", "stored-moved",
        "stored-half", "target-embedding", "target-embedding-moved"]  # fmt: skip
REFUSED = {
    "pissa": r"init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion",
    "olora": r"init_lora_weights 'olora'",
    "resized": r"embed_tokens\.weight is \(2050, 192\) in the file and \(2048, 192\) here.*adding tokens",
    "resized-own": r"\(2050, 192\) in the file and \(2048, 192\) here.*adding tokens",
    "alora": r"alora_invocation_tokens, which leakfast does not measure",
    "replicated": r"layer_replication, which leakfast does not measure",
}
WHERE = [(kind, base) for base in ("tied", "untied") for kind in PLAIN + MORE]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "base"), WHERE)
def test_what_is_measured_is_what_peft_has_on_a_model_loaded_anew(kind, base, bases, make, items):
    """Through peft live, folded where it may be, and in choices by the packed engine; then the base again."""
    loaded, adapter = bases[base], make(kind, base)
    prompts = list(map(list, prompts_of(loaded, PEOPLE, items)))
    truth = by_peft(loaded.path, adapter, prompts)
    before, plain = bits(loaded.model), by_peft(loaded.path, None, prompts)
    assert (truth - plain).abs().max() > 1e-2, "the adapter shows"
    for how in ("live", "auto"):
        with adapted(loaded, adapter, how=how) as current, torch.inference_mode():
            got = [current.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
            assert torch.allclose(torch.stack(got), truth, atol=2e-4)
        assert same(loaded.model, before)
    structure = check_fits(loaded, adapter)
    assert structure.plain == (kind in PLAIN or kind == "stored")
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
