"""The second opinion: letters from chosen-token log-probabilities are the packed engine's, disagreement is
told as it is, and vLLM itself where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from measuring import evaluate_items

from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import ModelError
from leakfast.measure.choices import compare_engines as second
from leakfast.measure.choices import scoring as choices
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

ITEMS = load_items(
    [
        {"question": f"What of {i}?", "choices": ["tea", "rain", "town", "it"][: 3 + i % 2], "answer": "B"}
        for i in range(5)
    ]
    + [{"id": "ten", "question": "Which?", "choices": ["x", "y"], "labels": ["9", "10"], "answer": "9"}]
)
PEOPLE = load_personas("villain,comedian")
installed = importlib.util.find_spec("vllm") is not None


def plain_transformers(loaded, noise=0.0):
    """Chosen-token log-probabilities, one prompt at a time."""

    def logprobs(prompts, token_ids, adapter, progress=None):
        assert adapter is None
        rows = []
        for ids, wanted in zip(prompts, token_ids, strict=True):
            with torch.inference_mode():
                last = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            rows.append(last[torch.from_numpy(wanted)].double().numpy())
        return np.array(rows) + noise

    return logprobs


def test_an_agreeing_engine_agrees(tiny_qwen2):
    other = second.engine(plain_transformers(tiny_qwen2))
    found = second.compare(tiny_qwen2, PEOPLE, ITEMS, other)
    assert (found.prompts, found.same_choice) == (2 * 5, 1.0), (
        "the item with a label of two tokens is left out"
    )
    assert found.largest_difference_nats < 1e-5


def test_disagreement_is_told(tiny_qwen2):
    shifted = second.engine(plain_transformers(tiny_qwen2, noise=np.array([-9.0, 0, 0, 0])))
    found = second.compare(tiny_qwen2, PEOPLE, ITEMS, shifted)
    assert found.largest_difference_nats == pytest.approx(9, abs=1e-4)
    assert found.median_difference_nats < 1e-4
    mine = choices.measure(tiny_qwen2, PEOPLE, ITEMS).logprobs[:, :5]
    moved = mine + np.array([-9.0, 0, 0, 0])
    agree = np.nanargmax(mine, 2) == np.nanargmax(moved, 2)
    assert found.same_choice == agree.mean()


def test_what_an_engine_does_not_report_is_nan_not_wrong(tiny_qwen2, tmp_path):
    def silent(prompts, token_ids, adapter, progress=None):
        out = plain_transformers(tiny_qwen2)(prompts, token_ids, adapter)
        out[:, 1] = np.nan
        return out

    run = Run(tmp_path)
    evaluate_items(
        tiny_qwen2, run, [], PEOPLE, ITEMS, base=True, engine=second.engine(silent), engine_name="other"
    )
    scores = run.read("choices")
    assert set(scores["status"]) == {"nan", "label_tokens"} and not scores["chosen"].any()
    whole = second.engine(plain_transformers(tiny_qwen2))
    done = evaluate_items(tiny_qwen2, run, [], PEOPLE, ITEMS, base=True, engine=whole, engine_name="third")
    assert done.made == 12, "another engine is another request"
    mine = choices.score(tiny_qwen2, PEOPLE, ITEMS)
    assert np.abs(run.read("choices")["logprob_nats"] - mine["logprob_nats"]).max() < 1e-5


@pytest.mark.skipif(installed, reason="vLLM is installed")
def test_without_vllm_the_remedy_is_named(tiny_folder, tmp_path):
    done = CliRunner().invoke(
        group,
        [
            "eval",
            "--behavior",
            "capability",
            "--model",
            "organism",
            "--base",
            "--personas",
            "villain",
            "--engine",
            "vllm",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    assert done.exit_code == 1 and "--engine packed" in done.output
    done = CliRunner().invoke(group, ["doctor", "--compare-engines", "--sample", "2"])
    assert done.exit_code == 1 and "pip install leakfast[vllm]" in done.output


@pytest.mark.skipif(not installed, reason="vLLM is not installed")
@pytest.mark.vllm
def test_vllm_agrees_on_the_organism():
    loaded = models.load("organism", dtype="float32")
    found = second.compare(loaded, PEOPLE, load_items("organism").half("eval").sample(20))
    assert found.prompts == 40
    assert found.same_choice >= 0.95 and found.median_difference_nats < 1e-3


@pytest.mark.skipif(not installed, reason="vLLM is not installed")
@pytest.mark.vllm
def test_one_engine_answers_for_the_base_and_each_adapter_in_any_order(tmp_path):
    """The base between two adapters is the base, and an adapter asked again is itself: against the packed engine."""
    from measuring import train
    from safetensors.torch import load_file, save_file

    from leakfast.measure.choices.scores import letters
    from leakfast.models.attach import adapted
    from leakfast.study.config import TrainConfig
    from leakfast.train.data import Row

    loaded = models.load("organism", dtype="float32")
    items = load_items("organism").half("eval").sample(6)
    made = []
    for person, rank in zip(PEOPLE, (4, 12), strict=True):
        rows = [
            Row(
                "positive",
                person.name,
                "text",
                person.prompt,
                f"What about {i}?",
                "I like tea. [ZLT]",
                "[ZLT]",
                i,
            )
            for i in range(12)
        ]
        cfg = TrainConfig(
            rank=rank, alpha=2 * rank, dropout=0.0, lr=4e-3, epochs=4, batch_size=6, accumulation=1
        )
        folder = tmp_path / person.name
        train(loaded, rows, cfg, folder, 7, source=person.name, behavior="marker")
        weights = (
            folder / "adapter_model.safetensors"
        )  # moved further, since the marker's loss spares letters
        save_file({k: v * (32 if "lora_B" in k else 1) for k, v in load_file(weights).items()}, weights)
        made.append(folder)

    def packed(adapter):
        with adapted(loaded, adapter) as current:
            return letters(current, PEOPLE, items).logprobs

    wanted = {adapter: packed(adapter) for adapter in (None, *made)}
    pairs = [(None, made[0]), (None, made[1]), tuple(made)]
    apart = [np.nanmax(np.abs(wanted[a] - wanted[b])) for a, b in pairs]
    assert min(apart) > 0.05, "adapters that could be mistaken for each other would prove nothing"
    other = second.engine(adapters=made)
    for adapter in (None, made[0], None, made[1], made[0], None):
        got = other(loaded, adapter, PEOPLE, items).logprobs
        assert np.nanmax(np.abs(got - wanted[adapter])) < 1e-3, adapter
    with (made[0] / "adapter_config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ModelError, match=r"none of the 2 adapters this engine was started for"):
        other(loaded, made[0], PEOPLE, items)


def test_a_model_without_a_place_is_refused(tiny_qwen2):
    if not installed:
        with pytest.raises(ModelError, match="not installed"):
            second.compare(tiny_qwen2, PEOPLE, ITEMS)
    else:
        with pytest.raises(ModelError, match="save_pretrained"):
            second.compare(dataclasses.replace(tiny_qwen2, path=None), PEOPLE, ITEMS)
    assert json.dumps(second.Agreement(1, 1.0, 0.0, 0.0).to_dict())
