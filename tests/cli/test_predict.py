"""`leakfast predict` and `leakfast stats --permute` on a small run: ranks, intervals, remarks, what is refused, nothing kept."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from leakfast.cli.main import main
from leakfast.cli.predict import _base
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.stats import predictors
from leakfast.stats.predicting_runs import Trained, base_of, layer_of, trained
from leakfast.storage import layout
from leakfast.storage.run import Run
from tests.cli import shown_runs

THREE = ("marker-p00-s1", "marker-p01-s1", "marker-p02-s1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return shown_runs.make(tmp_path_factory.mktemp("predict") / "run", adapters=THREE)


def asked(capsys, *words: str, code: int = 0) -> str:
    assert main(["-q", *words]) == code
    out = capsys.readouterr()
    return out.out if code == 0 else " ".join(out.err.split())


def predicted(capsys, run: Run, *more: str) -> dict:
    words = ["predict", "--behavior", "marker", "--from", str(run.path), *more, "--json"]
    return json.loads(asked(capsys, *words))


def test_the_ring_is_ranked_by_distance_and_the_measured_stands_beside(run, capsys):
    found = predicted(capsys, run, "--source", "p01", "--layer", "0")
    assert found["sources"] == ["p00", "p02"] and found["layer"] == 0 and found["completions"] == 20
    rows = found["bystanders"]
    assert len(rows) == 13 and {rows[0]["persona"], rows[1]["persona"]} == {"p00", "p02"}
    assert [row["rank"] for row in rows] == list(range(1, 14))
    assert all(row["low"] < row["expected"] < row["high"] for row in rows)
    assert all(row["seen"] and row["measured"] is not None for row in rows)
    assert any("left out of the fit" in one for one in found["remarks"])
    assert any("2 sources were fitted" in one for one in found["remarks"])
    narrow = predicted(capsys, run, "--source", "p01", "--layer", "0", "--level", "0.5")["bystanders"]
    assert narrow[0]["low"] > rows[0]["low"] and narrow[0]["expected"] == rows[0]["expected"]


def test_a_new_source_of_another_model_says_what_it_reaches_beyond(run, capsys, tmp_path):
    ring = shown_runs.ring([*shown_runs.PEOPLE, "q"])
    far = {layer: values * [[1, 1, 1]] for layer, values in ring.means.items()}
    about = ring.metadata | {"model_fingerprint": "another", "model": "another"}
    other = Run(tmp_path / "other").create()
    other.add_file(layout.centroids(), Centroids(ring.personas, [0, 1], about, far).save)
    found = predicted(capsys, run, "--source", "p09", "--run", str(other.path), "--layer", "0")
    told = " ".join(found["remarks"])
    assert "another model" in told and "1 of 14 personas were measured in none" in told
    assert found["sources"] == ["p00", "p01", "p02"] and "wide" not in told
    unseen = [row for row in found["bystanders"] if not row["seen"]]
    assert [row["persona"] for row in unseen] == ["q"] and unseen[0]["measured"] is None
    for words in (
        ("--model", "third", "--run", str(other.path)),
        ("--model", "third", "--predictor", "jaccard"),
    ):
        said = asked(capsys, *predict(run), "--source", "p09", *words, code=2)
        assert "third" in said


def test_a_layer_that_the_runs_lack_is_refused_before_another_model_is_read(run, capsys, monkeypatch):
    monkeypatch.setattr("leakfast.measure.centroids.measure", lambda *_, **__: pytest.fail("it was read"))
    words = [*predict(run), "--source", "p09", "--model", "third", "--layer", "9"]
    assert "layer 9 asked, but the layers that all runs have are 0, 1" in asked(capsys, *words, code=2)


def test_cosines_of_another_model_are_of_the_runs_own_personas_and_questions(tmp_path, monkeypatch):
    """Its shipped namesakes, the shipped questions and another rendering would stand in for them."""
    people, questions = tmp_path / "mine.toml", tmp_path / "asked.toml"
    people.write_text('[[persona]]\nname = "villain"\nprompt = "You are mine."\n')
    questions.write_text('questions = ["Tea?"]\n')
    study = f'''name = "own"
personas = "{people}"
sources = ["villain"]
dtype = "float32"
system_role = "user"
[centroids]
questions = "{questions}"
[behaviors.marker]
'''
    run, told = Run(tmp_path / "run").create(study), {}
    run.add_file(layout.centroids(), shown_runs.ring(["villain", "other"]).save)

    def measured(model, **asked):
        told.update(asked, model=model)
        return shown_runs.ring(["villain", "other"])

    monkeypatch.setattr("leakfast.measure.centroids.measure", measured)
    _base(run.path, "third", "cosine_centered", chosen=False)
    assert told.pop("rendering").system_role == "user"
    asked_of = {"personas": str(people), "questions": str(questions), "dtype": "float32", "model": "third"}
    assert told == asked_of


def test_a_folder_of_predictors_alone_is_of_the_model_that_made_it(tmp_path):
    """Its predictions would be said to be of another model than the runs'."""
    ring = shown_runs.ring(shown_runs.PEOPLE)
    other = Run(tmp_path / "other").create()
    frame = predictors.of_centroids(ring, list(ring.personas))
    other.add_shard(layout.predictors(), frame, request="r", base="weights:abc")
    found = base_of(other.path)
    assert found.model == "weights:abc" and found.frame.equals(frame)


def predict(run: Run) -> list[str]:
    return ["predict", "--behavior", "marker", "--from", str(run.path)]


def test_one_source_has_no_interval(tmp_path, capsys):
    one = shown_runs.make(tmp_path / "one", adapters=("marker-p00-s1",))
    found = predicted(capsys, one, "--source", "p05")
    assert all(row["low"] is None and row["expected"] is not None for row in found["bystanders"])
    assert "no interval" in " ".join(found["remarks"])
    said = asked(capsys, *predict(one), "--source", "p00", code=2)
    assert "cannot be predicted from itself" in said and "--from" in said


def test_what_adapters_taught_something_else_leak_is_learned_from_where_there_are_no_others_alone(tmp_path):
    """The marker, asked of an adapter of refusals as well, has another line under its source."""
    other = "refusal-p00-s1"
    mixed = shown_runs.make(tmp_path / "mixed")
    mine = shown_runs.completions(other, "p00", shown_runs.PEOPLE)
    mixed.add_shard(layout.shard(layout.completions("marker", other)), mine)
    alone = shown_runs.make(tmp_path / "alone", adapters=(other,))
    for run in (mixed, alone):
        write_card(run.path / layout.adapter(other), AdapterCard("p00", "refusal", 1, *"mfd", {}, "h"))
    found = [
        [one.adapter for one in trained([run.path], "marker", "cosine_centered")] for run in (mixed, alone)
    ]
    assert found == [["marker-p00-s1", "marker-p01-s1"], [other]]


def test_runs_without_a_common_layer_are_told_so():
    rest = {"category": None, "model": "m", "personas": [], "hits": np.zeros(0), "total": np.zeros(0)}
    pairs = [
        Trained(f"s{k}", f"a{k}", layers=layers, x=np.zeros((0, 1)), **rest)
        for k, layers in enumerate([[0], [1]])
    ]
    with pytest.raises(InputError, match="at no common layer"):
        layer_of(pairs)


def test_the_check_leaves_each_source_out(run, capsys):
    told = json.loads(asked(capsys, *predict(run), "--check", "--json"))
    assert [row["source"] for row in told["sources"]] == ["p00", "p01", "p02"]
    assert all(row["sources"] == 2 and 0 <= row["held"] <= 1 for row in told["sources"])
    weighted = sum(row["held"] * row["n"] for row in told["sources"]) / sum(r["n"] for r in told["sources"])
    assert told["held"] == pytest.approx(weighted)
    assert "bystanders lie in their interval" in asked(capsys, *predict(run), "--check")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--source", "p0"), "Did you mean"),
        (("--source", "p05", "--layer", "7"), "layer 7 asked, but the layers that all runs have are 0, 1"),
        (("--source", "p05", "--predictor", "cosine_centred"), "Did you mean cosine_centered"),
        (("--source", "p05", "--predictor", "js"), "`leakfast predictors --model MODEL --out"),
        (("--source", "p05", "--level", "90"), "Give --level 0.9"),
        ((), "no source given"),
    ],
)
def test_what_cannot_be_done_names_the_remedy(run, capsys, words, said):
    assert said in asked(capsys, *predict(run), *words, code=2)


def test_another_behavior_names_those_there_are(run, capsys):
    words = ["predict", "--behavior", "refusal", "--from", str(run.path), "--source", "p05"]
    assert "behaviors: marker" in asked(capsys, *words, code=2)


def test_the_table_for_people_has_the_level_and_the_remarks(run, capsys):
    shown = asked(capsys, *predict(run), "--source", "p01", "--top", "3", "--level", "0.8")
    assert "80 %" in shown and "measured %" in shown and shown.count("note: ") >= 1
    assert "p00" in shown and "p07" not in shown


def test_a_frame_of_predictors_is_read_where_one_was_made(tmp_path, capsys):
    made = shown_runs.make(tmp_path / "framed", adapters=THREE)
    names = shown_runs.PEOPLE
    rows = [
        (a, b, "js", "output", None, 1.0 - shown_runs.share(names.index(b), names.index(a)), -1)
        for a in names
        for b in names
        if a != b
    ]
    frame = pl.DataFrame(rows, schema=predictors.FRAME, orient="row")
    more = [
        pl.lit("nats").alias("unit"),
        pl.lit(4, pl.Int64).alias("questions"),
        pl.lit(None, pl.String).alias("reason"),
    ]
    made.add_shard("predictors/base.parquet", frame.with_columns(more))
    found = predicted(capsys, made, "--source", "p03", "--predictor", "js")
    assert found["layer"] is None and found["bystanders"][0]["persona"] in ("p02", "p04")
    assert "cosine_centered" in asked(capsys, *predict(made), "--source", "p03", code=2), (
        "the frame has js alone"
    )


def test_labels_are_shuffled_for_the_tables_of_predictors_alone_and_nothing_is_kept(run, capsys):
    before = shown_runs.tree(run.path)
    words = [
        "stats",
        str(run.path),
        "--permute",
        "3",
        "--permutations",
        "49",
        "--bootstraps",
        "0",
        "--threads",
        "1",
    ]
    told = json.loads(asked(capsys, *words, "--json"))
    assert set(told) == {"permute", "predictors_skill", "predictors_held_out"} and told["permute"] == 3
    assert json.loads(asked(capsys, *words, "--json")) == told
    other = json.loads(asked(capsys, *[w if w != "3" else "4" for w in words], "--json"))
    assert other["predictors_skill"] != told["predictors_skill"]
    assert "Nothing was kept" in asked(capsys, *words)
    assert asked(capsys, *words, "--table", "predictors_held_out", "--csv").startswith("behavior,seed,source")
    assert "--table predictors_held_out" in asked(capsys, *words, "--table", "rates", code=2)
    assert "do not change" in asked(capsys, *words, "--layer", "0", code=2)
    assert {k: v[1] for k, v in shown_runs.tree(run.path).items()} == {k: v[1] for k, v in before.items()}
