"""A change against the unadapted model is of the same prompts, drawn alike, or it is none."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from measuring import evaluate, evaluate_all, evaluate_items
from test_completions import train_tiny

from leakfast import stats
from leakfast.cli.main import main
from leakfast.generation.backends import Drawing
from leakfast.geometry import Centroids
from leakfast.measure import Request, centroids, measure
from leakfast.measure.request import Asked
from leakfast.measure.stage import rates
from leakfast.prompts.items import ItemSet, load_items
from leakfast.prompts.personas import load_personas
from leakfast.prompts.questions import QuestionSet
from leakfast.stats.baselines import partial, seeds_apart, told_of, unlike
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig
from tests.rates_made import made_rates

NAMES = ["villain", "comedian", "assistant", "librarian"]
CFG = EvalConfig(samples=2, max_new_tokens=3, batch_completions=8)
FAST = {"permutations": 9, "bootstraps": 0, "workers": 1}


@pytest.fixture
def adapter(tiny_qwen2, tmp_path):
    return train_tiny(tiny_qwen2, tmp_path / "marker-villain-s1")


def ask(loaded, run, adapters, questions, cfg=CFG, people=NAMES, **more):
    evaluate(loaded, run, adapters, load_personas(people), questions, "marker", cfg, 3, **more)


def table(run):
    return stats.stats(run.path, **FAST)


def test_the_same_prompts_have_a_baseline_however_many_samples(tiny_qwen2, adapter, tmp_path):
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"])
    ask(tiny_qwen2, run, [], ["Tea?", "Rain?"], CFG.model_copy(update={"samples": 1}), base=True)
    found = table(run)
    mine = found.rates.filter(adapter="marker-villain-s1")
    assert mine["baseline"].null_count() == 0 and not any("baseline" in one for one in found.missing)


def test_other_questions_are_no_baseline(tiny_qwen2, adapter, tmp_path):
    """Both sides hold questions 0 and 1: only their texts differ."""
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"])
    ask(tiny_qwen2, run, [], ["Why?", "Who?"], base=True)
    found = table(run)
    mine = found.rates.filter(adapter="marker-villain-s1")
    assert mine["baseline"].null_count() == mine["delta"].null_count() == 4 and mine["rate"].null_count() == 0
    assert any("was asked other questions than the unadapted model" in one for one in found.missing)
    assert set(mine["delta_reason"]) == {"the unadapted model was not measured on the same prompts"}
    assert main(["-q", "stats", str(run.path), "--permutations", "9", "--bootstraps", "0", "--json"]) == 3


def test_evals_own_table_has_no_change_against_other_questions(tiny_qwen2, adapter, tmp_path, caplog):
    run = Run(tmp_path / "run")
    people = load_personas(NAMES)
    evaluate(tiny_qwen2, run, [], people, ["Why?", "Who?"], "marker", CFG, 3, base=True)
    done = evaluate(tiny_qwen2, run, [adapter], people, ["Tea?", "Rain?"], "marker", CFG, 3)
    found = rates(run, done, people).filter(adapter="marker-villain-s1")
    assert (
        found["delta"].null_count() == found["baseline"].null_count() == 4 and not found["rate"].null_count()
    )
    assert "was asked other questions than the unadapted model" in caplog.text


def test_other_sampling_is_no_baseline(tiny_qwen2, adapter, tmp_path):
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, [adapter], ["Tea?"])
    ask(tiny_qwen2, run, [], ["Tea?"], CFG.model_copy(update={"max_new_tokens": 9}), base=True)
    found = table(run)
    assert found.rates.filter(adapter="marker-villain-s1")["baseline"].null_count() == 4
    assert any("was drawn otherwise" in one for one in found.missing)


def ask_how_likely(loaded, run, adapters, questions, cfg=CFG, *, base=False):
    """The probability of refusals, of which nothing is drawn."""
    request = Request([Asked("refusal", questions, cfg)], load_personas(NAMES), adapters, base)
    measure(loaded, run, request, Drawing("transformers"), by="probability")


@pytest.mark.parametrize("other", ["questions", "beginnings"])
def test_a_probability_of_something_else_is_no_baseline(tiny_qwen2, adapter, tmp_path, other):
    """Nothing else was measured, so that it stands as the rate."""
    run, lists = Run(tmp_path / "run"), tmp_path / "mine.toml"
    lists.write_text('[refusal]\nopenings = ["No"]\nalternatives = ["Yes"]\n')
    ask_how_likely(tiny_qwen2, run, [], ["Tea?", "Rain?"], base=True)
    ask_how_likely(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"])
    mine = table(run).rates.filter(adapter="marker-villain-s1")
    assert mine["delta"].null_count() == 0
    if other == "questions":
        ask_how_likely(tiny_qwen2, run, [adapter], ["Why?", "Who?"])
    else:
        cfg = CFG.model_copy(update={"openings": str(lists)})
        ask_how_likely(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"], cfg)
    found = table(run)
    mine = found.rates.filter(adapter="marker-villain-s1")
    assert mine["delta"].null_count() == mine["baseline"].null_count() == 4 and not mine["rate"].null_count()
    assert any("something else" in one and "--measure probability" in one for one in found.missing)


def test_a_probability_on_other_questions_is_no_expected_rate(tiny_qwen2, adapter, tmp_path):
    run, people = Run(tmp_path / "run"), load_personas(NAMES)
    evaluate(tiny_qwen2, run, [adapter], people, ["Tea?", "Rain?"], "refusal", CFG, 3, base=True)
    ask_how_likely(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"], base=True)
    assert {"calibration", "agreement_measures"} <= set(table(run).more)
    ask_how_likely(tiny_qwen2, run, [adapter], ["Why?", "Who?"], base=True)
    found = table(run)
    assert found.more["probabilities"].height and not {"calibration", "agreement_measures"} & set(found.more)
    assert any("on other questions than completions answer" in one for one in found.missing)


def test_a_further_set_has_no_baseline_that_was_drawn_otherwise(tiny_qwen2, adapter, tmp_path, caplog):
    run, people = Run(tmp_path / "run"), load_personas(NAMES)
    longer = CFG.model_copy(update={"max_new_tokens": 9})
    for under, base, cfg in (([adapter], False, CFG), ([], True, longer)):
        asked = [Asked("marker", ["Tea?"], CFG)]
        asked += [Asked("marker", QuestionSet("code", ("Loop?",)), cfg, beside=True)]
        evaluate_all(tiny_qwen2, run, under, people, asked, 3, base=base)
    found = table(run)
    assert found.rates.filter(adapter="marker-villain-s1")["baseline"].null_count() == 0
    mine = found.more["set_rates"].filter(adapter="marker-villain-s1")
    assert {k: v["delta"].null_count() for (k,), v in mine.group_by("main")} == {True: 0, False: 4}
    assert any("sets/marker/code/marker-villain-s1: it was drawn otherwise" in one for one in found.missing)
    asked = Asked("marker", QuestionSet("code", ("Loop?",)), CFG, beside=True)
    (done,) = evaluate_all(tiny_qwen2, run, [adapter], people, [asked], 3)
    assert rates(run, done, people).filter(adapter="marker-villain-s1")["delta"].null_count() == 4
    assert "it was drawn otherwise" in caplog.text


def test_items_that_were_corrected_under_their_ids_are_no_baseline(tiny_qwen2, adapter, tmp_path, caplog):
    run, people = Run(tmp_path / "run"), load_personas(NAMES)

    def items(answer):
        entry = {"id": "one", "question": "Tea?", "choices": ["Yes", "No"], "answer": answer}
        return ItemSet("mine", load_items([entry]).items)

    evaluate_items(tiny_qwen2, run, [], people, items("A"), base=True)
    evaluate_items(tiny_qwen2, run, [adapter], people, items("A"))
    assert table(run).rates.filter(adapter="marker-villain-s1")["baseline"].null_count() == 0
    done = evaluate_items(tiny_qwen2, run, [adapter], people, items("B"))
    found = table(run)
    assert found.rates.filter(adapter="marker-villain-s1")["baseline"].null_count() == 4
    assert any("was asked other items than the unadapted model" in one for one in found.missing)
    assert rates(run, done, people).filter(adapter="marker-villain-s1")["delta"].null_count() == 4
    assert "was asked other items" in caplog.text


def test_a_persona_with_fewer_questions_has_none_and_the_rest_do(tiny_qwen2, adapter, tmp_path):
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"])
    ask(tiny_qwen2, run, [], ["Tea?", "Rain?"], base=True)
    asked = run.read("completions").select("behavior", "adapter", "persona", "question")
    short = asked.filter(
        ~((asked["adapter"] == "base") & (asked["persona"] == "comedian") & (asked["question"] == 1))
    )
    assert unlike(run.open(), asked) == (set(), [])
    found, told = unlike(run.open(), short)
    assert found == {("marker", "marker-villain-s1", "comedian")}
    assert (
        "1 of 4 personas" in told[0]
        and "comedian: 1 questions or items that it was not, 0 the other way" in told[0]
    )


def test_seeds_of_different_bystanders_are_told():
    one = made_rates(sources=("s",))
    other = one.with_columns(seed=pl.lit(1, pl.Int64), adapter=pl.lit("again"))
    assert seeds_apart(pl.concat([one, other])) == []
    told = seeds_apart(pl.concat([one, other.filter(pl.col("persona") != "p3")]))
    assert len(told) == 1 and "capability of s" in told[0] and "(29 in all of them)" in told[0]


def test_a_behavior_read_from_rates_for_want_of_some_baselines_says_so():
    whole = made_rates(sources=("s",))
    assert partial(whole) == []
    some = whole.with_columns(baseline=pl.when(pl.col("persona") != "p3").then("baseline"))
    assert "1 of 30 rates of bystanders have no baseline" in partial(some)[0]


def test_one_broken_centroid_is_named_and_takes_no_other_with_it(tiny_qwen2, adapter, tmp_path):
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, [adapter], ["Tea?", "Rain?"])
    made = centroids.compute(tiny_qwen2, load_personas(NAMES), ["Tea?"], [0, 1])
    whole = {layer: made.cosine(layer) for layer in (0, 1)}
    made.means[1][3] = np.nan
    assert made.broken() == {"librarian": [1]}
    kept = Centroids(NAMES[:3], [1], made.metadata | {"centered_on": NAMES[:3]}, {1: made.means[1][:3]})
    assert np.array_equal(made.cosine(0), whole[0])
    assert np.allclose(made.cosine(1)[:3, :3], kept.cosine(1)) and np.isnan(made.cosine(1)[3]).all()
    run.add_file("centroids/base.safetensors", made.save)
    found = table(run)
    lost = found.pairs.filter(found.pairs["cosine_centered"].is_null())
    assert lost.select("persona", "layer").rows() == [("librarian", 1)]
    assert any(
        "1 centroids hold NaN or infinity" in one and "librarian (layers 1)" in one for one in found.missing
    )


def test_variants_of_a_run_that_were_asked_otherwise_have_a_reason(tiny_qwen2, tmp_path):
    """Both sides hold question 0, and each a baseline: only the text differs."""
    run, people = Run(tmp_path / "run"), load_personas(NAMES)
    arms = {
        name: train_tiny(tiny_qwen2, tmp_path / f"{name}-villain-s1") for name in ("marker", "marker+few")
    }
    for questions, reason in ((["Tea?"], None), (["Why?"], "was asked other questions than marker+few")):
        for name, arm in arms.items():
            asked = [Asked(name, ["Tea?"] if name == "marker" else questions, CFG)]
            evaluate_all(tiny_qwen2, run, [arm], people, asked, 3, base=True)
        (row,) = table(run).more["variants"].rows(named=True)
        assert (row["difference"] is None, row["reason"]) == (reason is not None, reason)


def test_how_points_of_training_were_asked_is_told_by_their_names(tmp_path):
    run, frame = Run(tmp_path / "run").create(), pl.DataFrame({"x": [1]})
    name = "marker-villain-s1"
    for point, digest in {"base": "a", name: "b", f"{name}@p012.5": "c"}.items():
        folder = layout.completions("marker", point, series=True)
        run.add_shard(layout.shard(folder), frame, questions_sha256=digest)
    run.add_shard(layout.shard(layout.completions("marker", name)), frame, questions_sha256="d")
    for share, more in ((0.5, {}), (0.5, {"behavior": "capability-facts"}), (1.0, {})):
        folder = layout.points(name, f"items{len(more)}", "letters", share)
        run.add_shard(layout.shard(folder), frame, items_sha256=f"{share}", **more)
    assert told_of(run) == {
        ("marker", name): {"questions_sha256": {"d"}},
        ("marker", f"{name}@p012.5"): {"questions_sha256": {"c"}},
        ("capability", f"{name}@p050"): {"items_sha256": {"0.5"}},
        ("capability-facts", f"{name}@p050"): {"items_sha256": {"0.5"}},
    }
