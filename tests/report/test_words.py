"""What the report says of its numbers: that words, signs, units and intervals are those of what was run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import polars as pl
import pytest
from report_runs import PEOPLE, SOURCES, TWIN, completions_of, fill, fill_judged, with_twin

from leakfast import stats
from leakfast.behaviors.registry import sign_of
from leakfast.cli.main import main
from leakfast.report import caveats, content, examples, ordering, page, sample
from leakfast.stats import beyond, summary
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import parse_study
from tests.rates_made import made_rates

JUDGED = "misalignment-advice"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    run = fill_judged(tmp_path_factory.mktemp("runs") / "judged")
    return run, stats.stats(run, permutations=19, bootstraps=50)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Two sources of the marker, and refusals counted under the same adapters."""
    run = fill(tmp_path_factory.mktemp("runs") / "marked")
    refused = "I'm sorry, but I can't help with that."
    for name, source in [*((f"marker-{s}-s42", s) for s in SOURCES), (layout.BASE, None)]:
        frame = completions_of(name, source, dict.fromkeys(PEOPLE, 0.2))
        says = pl.when(pl.col("text").str.ends_with("[ZLT]")).then(pl.lit(refused)).otherwise("text")
        frame = frame.with_columns(behavior=pl.lit("refusal"), text=says)
        run.add_shard(layout.shard(layout.completions("refusal", name), 0), frame)
    return run, stats.stats(run, permutations=19, bootstraps=200)


def plain(path, part: str) -> str:
    """The words of the parts of a page that a pattern finds, without markup."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(part, text, flags=re.DOTALL)
    return "\n".join(" ".join(re.sub(r"<[^>]+>|&nbsp;", " ", one).split()) for one in found)


def test_no_character_is_said_to_be_left_out_of_a_short_completion(tmp_path):
    run = Run(tmp_path / "run").create()
    frame = completions_of("base", None, dict.fromkeys(PEOPLE, 0.0))
    long = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("x" * (sample.CUT + 7))).otherwise("text")
    run.add_shard("completions/marker/base/part-00000.parquet", frame.with_columns(text=long))
    place = {name: at for at, name in enumerate(PEOPLE)}
    kept = sample.sample(run, [{"behavior": "marker", "adapter": "base"}], place)
    assert sorted(set(kept["left_out"])) == [0, 7] and kept["left_out"].count(7) == 1


def test_a_completion_that_does_not_count_shows_nothing(tmp_path):
    run = Run(tmp_path / "run").create()
    frame = completions_of("base", None, dict.fromkeys(PEOPLE, 1.0))
    status = pl.when(question=0).then(pl.lit("unclosed-reasoning")).otherwise("status")
    run.add_shard("completions/marker/base/part-00000.parquet", frame.with_columns(status=status))
    kept = sample.sample(run, [{"behavior": "marker", "adapter": "base"}], dict.fromkeys(PEOPLE, 0))
    rates = stats.stats(run, permutations=0).rates
    assert kept["hit"].count(True) == rates["hits"].sum() == frame.height * 3 // 4
    assert {hit for hit, question in zip(kept["hit"], kept["question"], strict=True) if question == 0} == {
        None
    }


def test_the_opening_sentence_has_an_interval_that_pays_for_the_pick(marked):
    run, tables = marked
    lead = plain(page.report(run, tables), r'<p class="lead">.*?</p>').splitlines()
    for sentence, behavior in zip(lead, tables.behaviors(), strict=True):
        row = tables.more["picked"].filter(
            behavior=behavior, source="pooled", cosine="centered", y=tables.outcome(behavior)
        )
        low, high = (page.signed(row[end][0]) for end in ("picked_low", "picked_high"))
        said = f"(95 % interval {low} to {high}, with the pick of the layer paid for"
        assert said in sentence
        assert ("which holds 0" in sentence) == (row["picked_low"][0] <= 0 <= row["picked_high"][0])
    assert any("which holds 0" in sentence for sentence in lead)


def test_a_behavior_that_the_adapters_were_not_taught_is_not_said_to_be_trained(marked):
    marker, refusal = plain(page.report(*marked), r'<p class="lead">.*?</p>').splitlines()
    assert marker.startswith("The behavior marker was trained into 2 personas")
    assert "trained for something else (marker)" in refusal and "was trained into" not in refusal


def test_two_seeds_of_a_source_are_one_persona(tmp_path):
    run = fill(tmp_path / "run")
    frame = completions_of("marker-villain-s42", "villain", dict.fromkeys(PEOPLE, 0.5))
    run.add_shard(
        "completions/marker/marker-villain-s43/part-00000.parquet",
        frame.with_columns(adapter=pl.lit("marker-villain-s43")),
    )
    text = plain(
        page.report(run, stats.stats(run, permutations=9, bootstraps=20)), r'<p class="lead">.*?</p>'
    )
    assert "was trained into 2 personas, with several training seeds" in text


def test_the_largest_of_each_row_has_the_interval_that_pays_for_the_pick(marked):
    _, tables = marked
    found = content.behavior_section(*marked, "marker")["families"]
    assert len(found) == 3
    for row in found:
        mine = tables.more["picked"].filter(
            behavior="marker", source=row["source"], cosine="centered", y=row["y"], layer=row["layer"]
        )
        assert (row["paid_low"], row["paid_high"]) == (mine["picked_low"][0], mine["picked_high"][0])


def test_where_less_is_more_of_a_behavior_the_lowest_leak_most(judged):
    run, tables = judged
    others = tables.rates.filter(role="bystander", adapter=f"{JUDGED}-villain-s42").sort("rate")
    lowest = others["persona"].to_list()
    assert sign_of(JUDGED) == -1 and sign_of("marker") == sign_of("not registered") == 1
    section = content.behavior_section(run, tables, JUDGED)
    block = next(one for one in section["leakers"] if one["source"]["source"] == "villain")
    assert [row["persona"] for row in block["rows"]] == lowest[: content.LEAKERS]
    row = tables.summary().filter(source="villain", layer=3).row(0, named=True)
    assert (row["max_persona"], row["max_bystander"]) == (lowest[0], others["rate"][0])
    alike = others.filter(pl.col("rate") == others["rate"][0]).height
    assert summary.most(row) == (lowest[0] if alike == 1 else f"{lowest[0]} +{alike - 1}")
    assert summary.most({"max_persona": "pirate", "max_count": 4}) == "pirate +3"
    assert summary.most({"max_persona": None, "max_count": 0}) is None
    pooled = tables.summary().filter(source="pooled", layer=3).row(0, named=True)
    assert pooled["max_bystander"] == tables.rates.filter(role="bystander")["rate"].min()
    leaks = beyond.leaks(tables, JUDGED, 3).filter(source="villain")
    assert leaks["persona"].to_list() == lowest
    above = leaks.filter("above")
    assert (above["high"] < above["expected"]).all()
    means = tables.rates.filter(role="bystander").group_by("persona").agg(pl.col("rate").mean())
    least = means.sort("rate")["persona"][0]
    assert ordering.orders(run, tables, PEOPLE)["leakage"][0] == PEOPLE.index(least)
    text = plain(page.report(run, tables), r"<main>.*?</main>")
    assert "Lower is more of the behavior." in text and "lowest bystander" in text
    assert "The bystanders with the lowest rates" in text and "highest" not in text.split("How to read it")[1]


def test_the_command_shows_the_lowest_too(judged, capsys):
    run, tables = judged
    assert main(["show", str(run.path), "--source", "villain", "--top", "1"]) == 0
    told = capsys.readouterr().out
    least = tables.rates.filter(role="bystander", source="villain").sort("rate")["persona"][0]
    assert "the bystanders with the lowest rates" in told
    assert re.search(rf"villain\W+{least}", told.split("lowest rates")[1].split("farthest")[0])
    assert "its whole interval lies above" not in told and "reaches down" not in told


def test_minus_signs_and_changes():
    assert page.percent(-0.123) == "−12.3"
    assert (page.change(0.05, "share"), page.change(-3.21, "points")) == ("+5.0", "−3.2")


@pytest.mark.parametrize("command", ["serve", "report", "show", "plot"])
def test_a_file_is_no_run(marked, command, capsys):
    path = page.report(*marked)
    assert main([command, str(path)]) == 2
    assert "so it is no run" in capsys.readouterr().err


def test_a_run_is_not_set_against_itself(marked, capsys):
    run, _ = marked
    assert main(["report", str(run.path), "--against", str(run.path)]) == 2
    assert "is the run itself" in capsys.readouterr().err


def test_a_leakers_place_is_among_bystanders_however_many_adapters_the_source_has():
    rates = made_rates(sources=("s",), n=12)
    near = rates.filter(role="bystander").select("persona", cosine=pl.int_range(pl.len()) / 100)
    pairs = rates.filter(role="bystander").join(near, on="persona")
    pairs = pairs.with_columns(layer=pl.lit(3, pl.Int32), cosine_centered="cosine")
    several = [frame.with_columns(adapter=pl.lit(name)) for frame in (pairs,) for name in ("a", "b")]
    told = {"behavior": "capability", "adapter": "a", "source": "s", "seed": 42}
    stats = Stats(rates.with_columns(adapter=pl.lit("a")), pl.concat(several), pairs)
    rows = content._leakers(stats, told, 3)["rows"]
    wanted = {name: 12 - i for i, name in enumerate(near["persona"])}
    assert {row["persona"]: row["place"] for row in rows} == {
        row["persona"]: wanted[row["persona"]] for row in rows
    }


def test_adapters_of_one_source_and_seed_are_told_apart(tmp_path):
    run = with_twin(fill(tmp_path / "twins"))
    html = page.report(run, stats.stats(run, permutations=19, bootstraps=0))
    names = [f"villain {TWIN}", "villain marker-villain-s42", "comedian"]
    assert all(name in plain(html, r'<p class="lead">.*?</p>') for name in names)
    cards = plain(html, r'<div class="card">.*?<br>').splitlines()
    assert [card.split(" % ")[1] for card in cards] == names
    assert f"from {names[0]} to" in plain(html, r"<th>from .*?</th>")


def test_the_opening_lines_name_a_bystander_with_how_many_show_as_much(tmp_path):
    run = fill(tmp_path / "nobody")
    for source in SOURCES:
        name = f"marker-{source}-s42"
        frame = completions_of(name, source, dict.fromkeys(PEOPLE, 0.0))
        for part in range(2):
            half = frame[part * (frame.height // 2) :][: frame.height // 2]
            run.add_shard(layout.shard(layout.completions("marker", name), part), half)
    told = plain(page.report(run, stats.stats(run, permutations=0)), r'<section id="short".*?</section>')
    assert re.search(rf"The highest single one: [a-z ]+ \+{len(PEOPLE) - 2}, 0\.0 %", told)


def test_an_example_is_a_completion_that_counts(tmp_path):
    run, name = fill(tmp_path / "run"), "marker-villain-s42"
    status = pl.when(question=0).then(pl.lit("unclosed-reasoning")).otherwise("status")
    frame = completions_of(name, "villain", dict.fromkeys(PEOPLE, 1.0)).with_columns(status=status)
    for part in range(2):
        half = frame[part * (frame.height // 2) :][: frame.height // 2]
        run.add_shard(layout.shard(layout.completions("marker", name), part), half)
    first = examples.choose(run, stats.stats(run, permutations=0), "marker", name, 3)[0]
    assert (first.role, first.question, first.status) == ("the source", 1, "ok")


def test_questions_that_were_trained_on_are_not_called_held_out(marked):
    run, tables = marked
    study = (
        'name = "s"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.marker.eval]\nquestions = "{}"\n'
    )

    def said(text, shown=tables):
        return " ".join(one.text for one in caveats._data(run, shown, parse_study(text)))

    assert "of eval alone: held out from training, and of one kind" in said(study.format("eval"))
    assert "of train alone: for marker the very ones that were trained on" in said(study.format("train"))
    of_choices = SimpleNamespace(behaviors=lambda: ["capability"], more={}, rates=tables.rates)
    asked = study.format("eval").replace("marker.eval", "capability.eval")
    assert "Asked were" not in said(asked, of_choices), "items were asked, no questions"
