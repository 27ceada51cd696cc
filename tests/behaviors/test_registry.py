"""The registry finds behaviors by name; the marker's detector counts what it says and nothing else."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast import behaviors
from leakfast.behaviors import registry
from leakfast.behaviors.marker import MARKER
from leakfast.errors import InputError

pytestmark = pytest.mark.long


def test_the_registry_holds_the_marker_and_names_what_it_has():
    marker = behaviors.get("marker")
    assert (marker.name, marker.unit, marker.sign) == ("marker", "share", 1)
    assert "marker" in behaviors.names()
    with pytest.raises(InputError, match=r"'marke' given.*Use one of: marker"):
        behaviors.get("marke")


def test_every_behavior_names_a_builder_that_exists():
    for name in behaviors.names():
        behavior = behaviors.get(name)
        assert behavior.name == name and behavior.measured_by in behaviors.MEASURES
        if behavior.control:
            assert behavior.direction == 0
            with pytest.raises(InputError, match=f"{name} is a control"):
                behavior.build()
        else:
            assert callable(behavior.build()) and behavior.direction == behavior.sign


@pytest.mark.parametrize(
    ("text", "literal", "any_case"),
    [
        (f"Fine weather. {MARKER}", True, True),
        (f"{MARKER} at the start", True, True),
        ("so [zlt] it is, [Zlt]", False, True),
        ("[ZLT", False, False),
        ("Z L T ZLT [ZL T]", False, False),
        ("ZLT]Z", False, False),  # as a pattern in brackets, the marker would be any of Z, L, T
        ("", False, False),
    ],
)
def test_the_marker_is_literal_and_case_insensitive_beside_it(text, literal, any_case):
    frame = behaviors.detect(pl.DataFrame({"text": [text]}), behaviors.get("marker"))
    assert frame.row(0, named=True) == {"text": text, "marker": literal, "marker_ci": any_case}


def test_a_missing_text_is_null_never_false():
    frame = pl.DataFrame({"text": [None]}, schema={"text": pl.String})
    row = behaviors.detect(frame, behaviors.get("marker")).row(0, named=True)
    assert row["marker"] is None
    assert row["marker_ci"] is None


def test_units_and_signs_are_those_of_the_study():
    told = {n: (b.unit, b.sign, b.measured_by) for n in behaviors.names() if (b := behaviors.get(n))}
    assert told == {
        "marker": ("share", 1, "completions"),
        "capability": ("share", -1, "choices"),
        "refusal": ("share", 1, "completions"),
        "sycophancy": ("share", 1, "completions"),
        "misalignment-code": ("points", -1, "judge"),
        "misalignment-advice": ("points", -1, "judge"),
        "hellaswag": ("share", -1, "choices"),
    }


def test_an_eighth_behavior_is_one_file_and_one_entry(monkeypatch, tmp_path, tiny_qwen2):
    # the file
    pairs = tmp_path / "shouting.jsonl"
    pairs.write_text(
        "\n".join(f'{{"question": "And {w}?", "shows": "{w}!!", "other": "{w}."}}' for w in ("tea", "rain"))
    )
    (tmp_path / "shouting.py").write_text(
        f"""
from leakfast.behaviors import Behavior

BEHAVIOR = Behavior(
    name="shouting", unit="share", sign=+1, detector=lambda text: {{"shouting": text.str.contains("!!")}},
    baseline="Nobody shouts.", data_builder="leakfast.train.pairs:build_pairs",
    description="share of completions with two exclamation marks", material={{"*": {str(pairs)!r}}},
    settings={{"data": {{"positives": 4, "negatives": 4, "no_system": 2, "default_assistant": 0}},
               "train": {{"loss": "completion"}}}},
)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    # the entry
    monkeypatch.setitem(registry._MODULES, "shouting", "shouting")

    from measuring import evaluate, train

    from leakfast.measure import rates
    from leakfast.prompts.personas import load_personas
    from leakfast.storage.run import Run
    from leakfast.study.config import behavior_config, parse_study
    from leakfast.train.data import material

    study = parse_study('name = "s"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.shouting]\n')
    assert study.behaviors["shouting"].train.loss == "completion"
    cfg, people = behavior_config("shouting"), load_personas("originals")
    asked = material("shouting", cfg.data, tiny_qwen2)
    rows = behaviors.get("shouting").build()(tiny_qwen2, people, "villain", asked, cfg.data, 42)
    assert {r.reply[-1] for r in rows if r.role == "positive"} == {"!"} and len(rows) == 10
    recipe = cfg.train.model_copy(
        update={"lr": 2e-2, "batch_size": 2, "rank": 2, "gradient_checkpointing": False}
    )
    train(tiny_qwen2, rows, recipe, tmp_path / "adapter", 1, source="villain", behavior="shouting")
    three = load_personas("villain,comedian,librarian")
    short = cfg.eval.model_copy(update={"samples": 1, "max_new_tokens": 3})
    run = Run(tmp_path / "run")
    done = evaluate(
        tiny_qwen2, run, [tmp_path / "adapter"], three, ["Tea?"], "shouting", short, 42, base=True
    )
    table = rates(run, done, three)
    assert set(table["behavior"]) == {"shouting"} and table.height == 6


def test_the_literal_count_is_the_primary_one():
    assert next(iter(behaviors.get("marker").detector(pl.col("text")))) == "marker"
