"""A run directory from its completions to its page: real store, real shards, real centroids file. The
completions are hostile on purpose: what a model says must not become markup, nor steer a terminal."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import scipy.stats
from report_runs import LAYERS, PEOPLE, QUESTIONS, SAMPLES, SOURCES, STUDY, completions_of, fill, vectors_of

from leakfast import stats
from leakfast.cli.main import main
from leakfast.errors import InputError, StoreError
from leakfast.report import content
from leakfast.report import policy as policy_of_page
from leakfast.report import sample as samples
from leakfast.report.caveats import caveats
from leakfast.report.page import p_value, report, signed
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    run = fill(tmp_path_factory.mktemp("runs") / "small")
    return run, report(run)


@pytest.fixture
def fresh(filled, tmp_path):
    """A copy that a test may damage, without tables or report."""
    path = tmp_path / "copy"
    shutil.copytree(filled[0].path, path)
    shutil.rmtree(path / "tables")
    return Run(path)


# ---------------------------------------------------------------- tables of a run


def test_stats_counts_pairs_and_correlates_a_run(fresh):
    tables = stats.stats(fresh.path, permutations=99)
    assert tables.missing == ()
    assert tables.rates.height == 3 * len(PEOPLE)
    assert tables.rates["total"].unique().to_list() == [QUESTIONS * SAMPLES]
    trained = tables.rates.filter(pl.col("role") != "base")
    assert trained["baseline"].unique().to_list() == [0.0]
    assert (trained["delta"] == trained["rate"]).all()
    assert tables.pairs.height == len(SOURCES) * (len(PEOPLE) - 1) * len(LAYERS)
    assert not (tables.pairs["persona"] == tables.pairs["source"]).any()
    mine = tables.pairs.filter((pl.col("source") == "villain") & (pl.col("layer") == 3))
    vectors = vectors_of()[3].astype(np.float64)
    vectors -= vectors.mean(0)
    near = vectors @ vectors[PEOPLE.index("villain")]
    near /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(vectors[PEOPLE.index("villain")])
    told = dict(zip(PEOPLE, near, strict=True))
    assert np.allclose([told[name] for name in mine["persona"]], mine["cosine_centered"], atol=1e-12)
    row = tables.correlations.filter(
        (pl.col("source") == "villain")
        & (pl.col("layer") == 3)
        & (pl.col("cosine") == "centered")
        & (pl.col("y") == "delta")
        & pl.col("category").is_null()
    ).row(0, named=True)
    assert row["n"] == 15
    expected = scipy.stats.spearmanr(mine["cosine_centered"], mine["rate"]).statistic
    assert row["spearman"] == pytest.approx(expected, abs=1e-12)
    assert row["seed"] == 42
    assert tables.best_layer("marker") == 3
    order = tables.rates["adapter"].unique(maintain_order=True).to_list()
    assert order == ["marker-villain-s42", "marker-comedian-s42", "base"]  # the study's, not the alphabet's


def test_tables_on_disk_are_the_ones_returned_and_are_reused(fresh, caplog):
    made = stats.stats(fresh, permutations=9)
    for name, table in made.tables().items():
        assert pl.read_parquet(fresh.path / "tables" / f"{name}.parquet").equals(table)
    assert stats.current(fresh).correlations["permutations"].drop_nulls().unique().to_list() == [9]
    extra = completions_of("marker-villain-s42", "villain", dict.fromkeys(PEOPLE, 0.0))
    fresh.add_shard(
        "completions/marker/marker-villain-s42/part-00002.parquet",
        extra.with_columns(pl.col("sample") + SAMPLES),
    )
    again = stats.current(fresh)
    assert again.rates.filter(pl.col("source") == "villain")["total"].unique().to_list() == [40]


def test_without_centroids_there_are_rates_and_a_reason(fresh):
    (fresh.path / layout.centroids()).unlink()
    tables = stats.stats(fresh)
    assert tables.rates.height == 3 * len(PEOPLE)
    assert tables.pairs.is_empty()
    assert tables.correlations.is_empty()
    assert "leakfast centroids" in tables.missing[0]
    assert tables.summary()["source_rate"].null_count() == 0
    assert "Not complete" in report(fresh).read_text(encoding="utf-8")


def test_a_persona_measured_but_not_named_by_the_study_is_no_bystander(fresh):
    fewer = [name for name in PEOPLE if name != "librarian"]
    study = STUDY.format(names=", ".join(f'"{name}"' for name in fewer))
    fresh.create(study)
    tables = stats.stats(fresh, permutations=0)
    assert "librarian" not in tables.pairs["persona"].to_list()
    assert tables.rates.filter(pl.col("persona") == "librarian")["role"].unique().sort().to_list() == [
        "base",
        "outsider",
    ]


def test_an_unfinished_adapter_is_told(fresh):
    fresh.retire("completions/marker/marker-comedian-s42/part-00001.parquet", "a test")
    tables = stats.stats(fresh, permutations=0)
    assert any("marker-comedian-s42" in sentence for sentence in tables.missing)
    assert main(["--quiet", "stats", str(fresh.path)]) == 3


def test_no_run_no_completions_and_twice_the_same_are_refused(tmp_path, fresh):
    with pytest.raises(InputError, match="no such folder"):
        stats.stats(tmp_path / "nowhere")
    Run(tmp_path / "empty").create()
    with pytest.raises(InputError, match="holds no completions"):
        stats.stats(tmp_path / "empty")
    again = fresh.read("completions/marker/marker-villain-s42/part-00000.parquet")
    fresh.add_shard("completions/marker/marker-villain-s42/part-00009.parquet", again)
    with pytest.raises(StoreError, match="more than once"):
        stats.stats(fresh)


def test_a_foreign_adapter_takes_its_source_from_thecompletions_of(fresh):
    shutil.rmtree(fresh.path / "adapters" / "marker-villain-s42")
    tables = stats.stats(fresh, permutations=0)
    villain = tables.rates.filter(pl.col("adapter") == "marker-villain-s42")
    assert villain["source"].unique().to_list() == ["villain"]
    assert villain["seed"].null_count() == villain.height
    assert tables.summary().filter(pl.col("source") == "villain")["n"].to_list() == [15, 15]


# ---------------------------------------------------------------- command line


def test_stats_prints_its_tables_by_name_as_json(filled, capsys):
    run, _ = filled
    assert main(["--quiet", "stats", str(run.path), "--permutations", "9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"rates", "pairs", "correlations"} <= set(told)
    for name in ("rates", "pairs", "correlations"):
        assert set(schema.columns(name)) <= set(told[name][0])
    assert len(told["pairs"]) == 60


def test_stats_shows_headline_and_layers(filled, capsys):
    run, _ = filled
    assert main(["--quiet", "stats", str(run.path), "--layer", "0", "--cosine", "raw"]) == 0
    out = capsys.readouterr().out
    assert "raw cosine at layer 0 (asked)" in out
    for word in ("villain", "comedian", "pooled", "p (perm)", "ρ by layer"):
        assert word in out


def test_a_layer_without_pairs_is_refused_with_the_ones_there_are(filled, capsys):
    run, _ = filled
    assert main(["--quiet", "stats", str(run.path), "--layer", "9"]) == 2
    assert "layers 0, 3" in capsys.readouterr().err


def test_report_prints_its_path(filled, capsys):
    run, path = filled
    assert main(["--quiet", "report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)


# ---------------------------------------------------------------- the page


class _Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.code: list[tuple[str, dict, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.code.append((self.open[-1], self.tags[-1][1], data))
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def page(filled):
    return _Page(filled[1].read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_asks_for_nothing_outside(page):
    assert page.open == []
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"link", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("style", "action") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/svg+xml;base64,"))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "connect-src 'none'" in policy
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "http:", "https:"} & set(
        policy.replace(";", " ").split()
    )


def test_every_script_is_one_that_the_policy_names_or_plain_letters(page):
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    for tag, attributes, text in page.code:
        if attributes.get("type") == "application/gzip+base64":
            assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)  # nothing of a run can end the element
        else:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy, tag
    assert sum(tag == "script" for tag, _, _ in page.code) == len(policy_of_page.scripts()) + 2


def test_charts_are_drawn_from_the_tables_and_every_completion(filled, page):
    run, _ = filled
    blobs = {attributes["id"]: text for tag, attributes, text in page.code if "id" in attributes}
    data, texts = (json.loads(gzip.decompress(base64.b64decode(blobs[name]))) for name in ("data", "texts"))
    tables = stats.current(run)
    assert [person["name"] for person in data["personas"]] == PEOPLE
    drawn = pl.DataFrame(
        {name: data["rates"][name] for name in ("adapter", "persona", "rate", "hits", "low")}
    )
    drawn = drawn.with_columns(
        adapter=pl.col("adapter").map_elements(lambda at: data["adapters"][at]["adapter"], pl.String),
        persona=pl.col("persona").map_elements(lambda at: PEOPLE[at], pl.String),
    )
    both = drawn.join(tables.rates, on=["adapter", "persona"], suffix="_table")
    assert both.height == tables.rates.height == drawn.height
    assert (both["rate"] == both["rate_table"]).all() and (both["hits"] == both["hits_table"]).all()
    assert (both["low"] == both["bb_low"]).all()
    pair = tables.pairs.filter(source="villain", persona=PEOPLE[3], layer=3).row(0, named=True)
    at = data["cosines"]["layers"].index(3)
    assert data["cosines"]["sources"]["villain"]["centered"][at][3] == round(pair["cosine_centered"], 6)
    everything = run.read("completions")
    assert len(texts["text"]) == texts["total"] == everything.height and texts["whole"]
    assert sum(texts["hit"]) == tables.rates["hits"].sum()
    assert set(texts["left_out"]) == {0}
    assert set(texts["text"]) == set(
        everything["text"]
    )  # as they are: the page makes them inert when it shows them


def test_a_sample_of_completions_takes_the_first_of_either_kind(filled):
    run, _ = filled
    adapters = [{"behavior": "marker", "adapter": "marker-villain-s42"}]
    place = {name: at for at, name in enumerate(PEOPLE)}
    drawn = samples.sample(run, adapters, place, limit=1)
    assert not drawn["whole"] and "the first 1 completions that show" in drawn["rule"]
    frame = run.read("completions/marker/marker-villain-s42").sort("persona", "question", "sample")
    for persona in PEOPLE[:6]:
        mine = frame.filter(persona=persona)
        shows = pl.col("text").str.contains("[ZLT]", literal=True)
        first = [part.row(0, named=True) for part in (mine.filter(shows), mine.filter(~shows)) if part.height]
        rows = [row for row, at in enumerate(drawn["persona"]) if at == place[persona]]
        assert sorted(drawn["text"][row] for row in rows) == sorted(one["text"] for one in first)


def test_caveats_are_those_of_the_run(filled, page):
    run, _ = filled
    text = "".join(page.text)
    assert "One training seed for each source (marker)" in text
    assert "marker: layer" in text and "is the one of 2 with the largest pooled |ρ|" in text
    assert "replies were cut at the token limit" not in text  # none was
    tables = stats.current(run)
    whole = pl.col("persona").is_null() & (pl.col("adapter") == "marker-villain-s42")
    cut = tables.health.with_columns(truncated_share=pl.when(whole).then(0.31).otherwise("truncated_share"))
    told = caveats(run, dataclasses.replace(tables, more={**tables.more, "health": cut}), None)
    assert any("marker-villain-s42 31.0 %" in one.text and one.table == "health" for one in told)
    seeds = tables.rates.filter(adapter="marker-villain-s42").with_columns(
        seed=pl.lit(7, pl.Int64), adapter=pl.lit("marker-villain-s7")
    )
    only = pl.concat([tables.rates.filter(adapter="marker-villain-s42"), seeds])
    told = caveats(run, dataclasses.replace(tables, rates=only), None)
    assert not any("One training seed" in one.text for one in told)
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert {one.anchor for one in caveats(run, tables, None)} <= anchors


def test_a_study_that_cannot_be_read_is_said_to_be_and_one_without_its_files_is_read(filled, tmp_path):
    """Both took the caveat about the questions with them, and not a word stood in its place."""
    run, _ = filled
    tables = stats.current(run)
    text = 'name = "mine"\nmodel = "organism"\npersonas = "gone.json"\nsources = ["villain"]\n[behaviors.marker]\n'
    beside = Run(tmp_path / "mine").create(text)
    studied, why = content.study_of(beside)
    assert studied.name == "mine" and why is None
    said = [one.text for one in caveats(beside, tables, studied, why)]
    assert any("Asked were the questions of eval alone" in one for one in said)
    assert not any("could not be checked" in one for one in said)
    broken = Run(tmp_path / "broken").create(text.replace("[behaviors.marker]", "[behaviours.marker]"))
    (said,) = [one for one in caveats(broken, tables, *content.study_of(broken)) if "checked" in one.text]
    assert "behaviors is missing" in said.text and said.anchor == "settings"


def test_completions_are_shown_as_text_and_the_marker_is_marked(page):
    text = "".join(page.text)
    assert "<script>alert('x')</script>" in text  # as words, not as a tag
    assert "\\x1b[31mred\\u202eder" in text
    assert not set(text) & {"\x1b", "\u202e"}
    marked = [i for i, (tag, _) in enumerate(page.tags) if tag == "mark"]
    assert len(marked) == 2 * len(SOURCES)  # the source and its highest bystander
    assert text.count("[ZLT]") >= len(marked)


def test_the_page_tells_numbers_settings_and_that_it_is_an_organism(filled, page):
    run, _ = filled
    text = "".join(page.text)
    tables = stats.current(run)
    best = tables.summary().filter(pl.col("best_layer"))
    for row in best.rows(named=True):
        assert signed(row["spearman"]) in text
    for phrase in ("model organism", "not a result about Qwen", "personas = [", "One training seed"):
        assert phrase in text
    for phrase in ("a" * 16, "d" * 16, "files:0123", "polars", "9,999, seed 0", "Unadapted model: 0 of 320"):
        assert phrase in text
    categories = tables.rates["category"].drop_nulls().unique()
    assert all(category.replace("_", " ") in text for category in categories)


def test_the_model_of_all_replies_stands_in_the_page(filled, page):
    table = stats.current(filled[0]).more["mixed"]
    row = table.filter(part="fixed", term="cosine").row(0, named=True)
    shown = signed(row["coefficient"])
    assert row["coefficient"] is not None and shown in "".join(page.text)
    assert "One model of all replies" in "".join(page.text)


def test_the_same_run_gives_the_same_page(filled):
    run, path = filled
    before = path.read_bytes()
    assert report(run).read_bytes() == before


def test_a_name_with_markup_is_escaped_everywhere(fresh):
    study = (fresh.path / "study.toml").read_text(encoding="utf-8")
    text = study.replace('name = "small"', 'name = "small"  # <b onclick="x()">bold</b>')
    fresh.create(text)
    html = report(fresh).read_text(encoding="utf-8")
    assert "&lt;b onclick=" in html
    assert not any("onclick" in attributes for _, attributes in _Page(html).tags)


# ---------------------------------------------------------------- numbers


def test_numbers_are_rounded_for_people():
    assert re.sub("<.*?>|&thinsp;", "", p_value(3.2164e-34)) == "3.2×10−34"
    assert p_value(0.0123) == "0.012"
    assert "&lt; 10" in p_value(0.0)
    assert signed(-0.125) == "−0.12"
    assert "–" in signed(None)
