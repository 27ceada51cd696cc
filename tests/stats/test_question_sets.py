"""One behavior on several question sets: what is drawn where, ρ and differences against scipy, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import scipy.stats
from click.testing import CliRunner
from matplotlib.text import Text
from measuring import evaluate, evaluate_all

from leakfast import figures, stats
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.measure.request import Asked, asked_of
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.prompts.personas import load_personas
from leakfast.prompts.questions import QuestionSet
from leakfast.report.page import report
from leakfast.stats import question_sets
from leakfast.storage import layout, schema
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig, load_study

SOURCES = ["villain", "comedian"]
PEOPLE = [p.name for p in load_personas("all")][:16]
SHORT = EvalConfig(samples=2, max_new_tokens=4, batch_completions=8)


def test_further_sets_are_drawn_beside_and_leave_the_main_one_as_it_is(tiny_qwen2, tmp_path):
    people = load_personas("villain,comedian")
    main, other = QuestionSet("eval", ("Tea?", "Rain?")), QuestionSet("code", ("Write a loop.",))
    asked = [Asked("marker", main, SHORT), Asked("marker", other, SHORT, beside=True)]
    run = Run(tmp_path / "both")
    done = evaluate_all(tiny_qwen2, run, [], people, asked, 5, base=True)
    assert [(d.folders, d.questions, d.made) for d in done] == [
        (("completions/marker/base",), "eval", 8),
        (("sets/marker/code/base",), "code", 4),
    ]
    alone = Run(tmp_path / "alone")
    evaluate(tiny_qwen2, alone, [], people, main, "marker", SHORT, 5, base=True)
    assert run.read("completions/marker/base").equals(alone.read("completions/marker/base"))
    again = evaluate_all(tiny_qwen2, run, [], people, asked, 5, base=True)
    assert [(d.made, d.kept) for d in again] == [(0, 8), (0, 4)]


def test_the_command_takes_several_sets(tmp_path):
    (tmp_path / "few.toml").write_text('[sets.few]\nquestions = ["Is it late?", "What is a map?"]\n')
    call = [
        "-q",
        "eval",
        "--model",
        "organism",
        "--base",
        "--personas",
        "villain,assistant",
        "--out",
        str(tmp_path / "run"),
    ]
    call += ["--samples", "1", "--max-new-tokens", "4", "--questions", f"code,{tmp_path / 'few.toml'}"]
    result = CliRunner().invoke(group, [*call, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["behaviors"]
    assert [(one["behavior"], one["questions"]) for one in found] == [("marker", "code"), ("marker", "few")]
    assert {row["total"] for row in found[1]["rates"]} == {2}
    shown = CliRunner().invoke(group, call)
    assert "marker on few: rate by persona" in shown.stdout and "marker on code" in shown.stdout


def _completions(adapter: str, source: str | None, share: dict[str, float]) -> pl.DataFrame:
    """20 completions a persona, of which the given share carries the marker."""
    rows = [
        (persona, k // 5, k % 5, "so [ZLT]" if k < round(20 * share[persona]) else "so")
        for persona in PEOPLE
        for k in range(20)
    ]
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row").with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(9, pl.Int32),
        finish_reason=pl.lit("stop"),
        status=pl.lit("ok"),
    )
    return schema.check(frame, "completions")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """(run, shares by (set, source, persona)): leakage follows the cosine on eval, is the same on code, noise on math."""
    rng = np.random.default_rng(3)
    run = Run(tmp_path_factory.mktemp("sets") / "run").create()
    means = {3: rng.normal(size=(len(PEOPLE), 12)).astype(np.float32)}
    metadata = {
        "personas": PEOPLE,
        "layers": [3],
        "centered_on": PEOPLE,
        "model": "m",
        "model_fingerprint": "f",
    }
    centroids = Centroids(PEOPLE, [3], metadata, means)
    run.add_file(layout.centroids(), centroids.save)
    shares = {}
    for source in SOURCES:
        near = centroids.cosine(3)[PEOPLE.index(source)]
        follows = np.clip(0.45 + 0.4 * near + 0.15 * rng.normal(size=len(PEOPLE)), 0, 1)
        for name, values in (("eval", follows), ("code", follows), ("math", rng.uniform(size=len(PEOPLE)))):
            mine = {p: round(20 * v) / 20 for p, v in zip(PEOPLE, values, strict=True)}
            shares |= {(name, source, p): v for p, v in mine.items()}
            folder = "completions/marker" if name == "eval" else f"sets/marker/{name}"
            adapter = f"marker-{source}-s42"
            frame = _completions(adapter, source, mine)
            run.add_shard(f"{folder}/{adapter}/part-00000.parquet", frame, questions=name)
        (run.path / "adapters" / adapter).mkdir(parents=True)
        card = AdapterCard(source, "marker", 42, "organism", "f", "d" * 64, {"rank": 8}, "a" * 64)
        write_card(run.path / "adapters" / adapter, card)
    for folder in ("completions/marker", "sets/marker/code", "sets/marker/math"):
        base = _completions("base", None, dict.fromkeys(PEOPLE, 0.0))
        run.add_shard(f"{folder}/base/part-00000.parquet", base, questions=folder.rpartition("/")[2])
    return run, shares, centroids.cosine(3)


@pytest.fixture(scope="module")
def tables(filled):
    return stats.stats(filled[0], permutations=99, bootstraps=200, workers=1)


def test_rho_of_each_set_is_scipys_and_the_main_tables_are_as_without(filled, tables):
    _, shares, cosine = filled
    found = schema.check(tables.more["question_sets"], "question_sets")
    assert set(found["questions"]) == {"main", "code", "math"}, (
        "base and adapters say different names for the main set"
    )
    for row in found.filter(
        (pl.col("source") != "pooled") & (pl.col("y") == "rate") & (pl.col("cosine") == "centered")
    ).rows(named=True):
        name = "eval" if row["main"] else row["questions"]
        others = [p for p in PEOPLE if p != row["source"]]
        x = [cosine[PEOPLE.index(row["source"]), PEOPLE.index(p)] for p in others]
        y = [shares[name, row["source"], p] for p in others]
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
        assert row["mean_bystander"] == pytest.approx(np.mean(y)) and row["n"] == 15
        assert row["source_rate"] == pytest.approx(shares[name, row["source"], row["source"]])
    plain = tables.correlations.filter(pl.col("category").is_null() & (pl.col("cosine") == "centered"))
    mine = found.filter(pl.col("main") & (pl.col("cosine") == "centered"))
    names = ["source", "y", "spearman", "spearman_p_perm", "spearman_ci_low"]
    assert mine.select(names).sort(names).equals(plain.select(names).sort(names))
    assert set(tables.rates["total"]) == {20}, "no completion of another set is counted"


def test_differences_are_paired(tables):
    found = tables.more["question_sets"].filter((pl.col("y") == "rate") & (pl.col("cosine") == "centered"))
    same, noise, main = (found.filter(pl.col("questions") == n) for n in ("code", "math", "main"))
    assert same.height == noise.height == main.height == 3
    assert same.select("difference", "difference_low", "difference_high").rows() == [(0.0, 0.0, 0.0)] * 3
    joined = noise.join(main.select("source", rho="spearman"), on="source")
    assert joined["difference"].to_list() == pytest.approx(
        (joined["spearman"] - joined["rho"]).to_list(), abs=1e-12
    )
    pooled = noise.filter(pl.col("source") == "pooled")
    assert pooled["difference"].item() < 0, "noise has a smaller ρ than what follows the cosine"
    assert pooled["difference_low"].item() < pooled["difference"].item() < pooled["difference_high"].item()
    assert main["difference"].null_count() == 3


def test_two_adapters_of_one_source_are_told_apart(filled):
    """As adapters without cards are, whose seeds nobody knows."""
    _, shares, cosine = filled
    centroids = Centroids.load(filled[0].path / layout.centroids())
    rows = [
        (("x", "y")[k], name, role, p, shares[name, source, p])
        for k, source in enumerate(SOURCES)
        for name in ("eval", "math")
        for p in PEOPLE
        if (role := "source" if p == "villain" else "bystander")
    ]
    rates = pl.DataFrame(rows, schema=["adapter", "questions", "role", "persona", "rate"], orient="row")
    told = {"behavior": "marker", "source": "villain", "category": "a"}
    told = {name: pl.lit(value) for name, value in told.items()}
    rates = rates.with_columns(**told, seed=pl.lit(None, pl.Int64), delta=pl.lit(None, pl.Float64))
    rates = rates.with_columns(main=pl.col("questions") == "eval")
    found = question_sets.compare(rates, centroids, 0, 50, workers=1)
    found = found.filter(y="rate", cosine="centered", main=False).drop_nulls("adapter")
    assert found.height == 2
    x = [cosine[PEOPLE.index("villain"), k] for k, p in enumerate(PEOPLE) if p != "villain"]
    for row in found.rows(named=True):
        source = SOURCES[row["adapter"] == "y"]
        rho = {
            name: scipy.stats.spearmanr(
                x, [shares[name, source, p] for p in PEOPLE if p != "villain"]
            ).statistic
            for name in ("eval", "math")
        }
        assert row["source_rate"] == pytest.approx(shares["math", source, "villain"])
        others = [shares["math", source, p] for p in PEOPLE if p != "villain"]
        assert row["mean_bystander"] == pytest.approx(np.mean(others))
        assert row["difference"] == pytest.approx(rho["math"] - rho["eval"])


def test_a_source_with_two_adapters_counts_once_in_what_is_pooled():
    rows = [("villain", "x", "p", 0.2), ("villain", "y", "p", 0.4), ("comedian", "z", "p", 0.9)]
    rates = pl.DataFrame(rows, schema=["source", "adapter", "persona", "rate"], orient="row").with_columns(
        role=pl.lit("bystander"), seed=pl.lit(None, pl.Int64), delta=pl.col("rate") - 0.1
    )
    found = question_sets._rates_of(rates).filter(source="pooled").row(0, named=True)
    assert found["mean_bystander"] == pytest.approx(0.6) and found["mean_delta"] == pytest.approx(0.5)


def test_the_figure_and_the_report_tell_the_sets(filled, tables):
    found = tables.more["question_sets"]
    figure = figures.question_sets(found, behavior="marker", layer=3)
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {"main", "code", "math", "villain", "comedian", "pooled"} <= texts
    assert figures.png(figure)[:4] == b"\x89PNG"
    assert figures.question_sets(found, behavior="marker", layer=9) is None
    page = report(filled[0], tables).read_text(encoding="utf-8")
    assert "On other questions" in page and "less main" in page


STUDY = """
name = "sets"
model = "organism"
sources = ["villain"]
[behaviors.{behavior}.eval]
questions = "eval"
other_questions = {others}
"""


@pytest.mark.parametrize(
    ("behavior", "others", "why"),
    [
        ("marker", '["code", "eval"]', "eval stands twice"),
        ("marker", '["codex"]', "codex"),
        ("capability", '["code"]', "measured by choices"),
        ("misalignment-code", '["code"]', "measured by judge"),
    ],
)
def test_sets_that_cannot_be_kept_beside_are_refused(tmp_path, behavior, others, why):
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(behavior=behavior, others=others))
    with pytest.raises(InputError, match=why) as error:
        load_study(path)
    assert f"{path}, line 7" in error.value.message


def test_a_file_beside_the_study_is_found(tmp_path):
    (tmp_path / "few.toml").write_text('[sets.few]\nquestions = ["Is it late?"]\n')
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(behavior="marker", others='["few.toml", "math"]'))
    asked = asked_of("marker", load_study(path).behaviors["marker"].eval)
    assert [(one.set_name, one.beside, len(one.texts)) for one in asked] == [
        ("eval", False, 20),
        ("few", True, 1),
        ("math", True, 20),
    ]
