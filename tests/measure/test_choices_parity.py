"""Parity with lm-evaluation-harness 0.4.13 on real ARC questions: its HFLM, a local task, the same model and the
same chat prompts; which choice each takes, and the log-probabilities. Run with -m parity."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from leakfast import models
from leakfast.measure.choices import scoring as choices
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas

ARC = Path(__file__).resolve().parents[3] / "shared" / "data" / "arc" / "arc_challenge_test.jsonl"
PERSONA = "villain"
N_ITEMS = 300
needs = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not installed: pip install -e '.[parity]'",
    ),
    pytest.mark.skipif(not ARC.is_file(), reason="the stored ARC items lie beside the project, not here"),
]


def random_qwen2(tokenizer, seed: int = 0):
    """A Qwen2 of some million random weights, wide enough in scale that choices differ clearly."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["organism", "random"])
def loaded(request):
    organism = models.load("organism", dtype="float32")
    if request.param == "organism":
        return organism
    return models.load((random_qwen2(organism.tokenizer), organism.tokenizer))


@pytest.fixture(scope="module")
def items():
    """300 of the stored questions, those with labels 1–4 and with three or five choices among them."""
    arc = load_items(ARC)
    odd = [item for item in arc if item.labels != tuple("ABCD")]
    plain = [item for item in arc if item.labels == tuple("ABCD")]
    return load_items([*odd, *plain[: N_ITEMS - len(odd)]])


def harness(loaded, items, persona, scoring, monkeypatch):
    """Per item: lm-evaluation-harness' log-probabilities of the choices, and its acc, acc_norm, acc_bytes."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    letters = scoring == "letters"
    rows = [
        {
            "user": i.letters_prompt if letters else i.question,
            "texts": list(i.labels if letters else i.choices),
            "gold": i.labels.index(i.answer),
        }
        for i in items
    ]
    dataset = datasets.Dataset.from_list(rows)
    task = ConfigurableTask(
        config={
            "task": "local_choices",
            "custom_dataset": lambda **_: {"test": dataset},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{user}}",
            "doc_to_choice": "texts",
            "doc_to_target": "gold",
            "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_bytes")],
        }
    )
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=16, dtype="float32")
    # its report of the environment asks pip for every package, which takes a minute and says nothing here
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    done = evaluator.simple_evaluate(
        model=lm,
        tasks=[task],
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=True,
        system_instruction=persona.prompt,
        confirm_run_unsafe_code=False,
    )
    samples = sorted(done["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    return [
        {
            "logprobs": np.array([float(one[0][0]) for one in sample["resps"]]),
            "acc": sample["acc"],
            "acc_norm": sample["acc_norm"],
            "acc_bytes": sample["acc_bytes"],
        }
        for sample in samples
    ]


def newline_logprobs(loaded, persona, items):
    """log P(newline) that lm-evaluation-harness counts with every letter: it ends our prompt."""
    from leakfast.prompts import chat

    out = []
    for item in items:
        ids = chat.render(loaded.tokenizer, persona.system, item.letters_prompt)
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1]
        out.append(float(logits.float().log_softmax(-1)[ids[-1]]))
    return np.array(out)


@pytest.mark.parametrize("scoring", ["letters", "full-text"])
@pytest.mark.usefixtures("requirements")
def test_choices_and_logprobs_are_the_harness(loaded, items, scoring, monkeypatch, record_property):
    (persona,) = load_personas(PERSONA)
    theirs = harness(loaded, items, persona, scoring, monkeypatch)
    assert len(theirs) == len(items) == N_ITEMS
    mine = choices.score(loaded, [persona], items, scoring)
    by_item = mine.partition_by("item", maintain_order=True)
    shift = newline_logprobs(loaded, persona, items) if scoring == "letters" else np.zeros(len(items))
    errors, agree, same = [], [], {"acc": [], "acc_norm": [], "acc_bytes": []}
    for place, (one, frame) in enumerate(zip(theirs, by_item, strict=True)):
        logprobs = frame["logprob_nats"].to_numpy()
        errors.append(np.abs(logprobs + shift[place] - one["logprobs"]).max())
        agree.append(bool(frame["chosen"].arg_max() == one["logprobs"].argmax() and frame["chosen"].any()))
        for metric, column in (
            ("acc", "chosen"),
            ("acc_norm", "chosen_per_char"),
            ("acc_bytes", "chosen_per_byte"),
        ):
            if scoring == "full-text" or metric == "acc":
                same[metric].append(frame.filter(pl.col(column) & pl.col("correct")).height == one[metric])
    found = {
        "largest_difference_nats": float(np.max(errors)),
        "agreement": float(np.mean(agree)),
        **{metric: float(np.mean(values)) for metric, values in same.items() if values},
    }
    for name, value in found.items():
        record_property(name, value)
    print(scoring, found)
    assert found["largest_difference_nats"] <= 1e-4
    assert found["agreement"] >= 0.995
    assert min(found[metric] for metric in same if metric in found) >= 0.995
    chosen = {int(frame["chosen"].arg_max()) for frame in by_item}
    assert len(chosen) > 1, "one place for every item would agree by itself"


@pytest.fixture(scope="module")
def requirements():
    """The version the comparison is stated for."""
    assert importlib.metadata.version("lm_eval") == "0.4.13"


pytestmark = [pytest.mark.long, pytest.mark.parity, *needs]
