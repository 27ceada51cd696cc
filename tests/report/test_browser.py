"""The report in a real Chromium: charts, hover, click, filters, keyboard, narrow screens, accessibility, hostile text."""

from __future__ import annotations

import re

import polars as pl
import pytest
from browsing import Watched, browser
from report_runs import PEOPLE, SOURCES, fill

from leakfast import stats
from leakfast.report.page import report

pytestmark = [pytest.mark.browser, pytest.mark.long]


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    run = fill(tmp_path_factory.mktemp("runs") / "small")
    return run, report(run).as_uri(), stats.current(run)


@pytest.fixture
def seen(chromium, filled):
    watched = Watched(chromium, filled[1])
    yield watched
    assert watched.faults == []
    watched.page.close()


def test_every_chart_is_drawn_without_a_fault(seen):
    page = seen.page
    assert page.locator("#scatter svg .points > *").count() == len(PEOPLE) - 1
    assert page.locator("#layers svg path").count() >= len(SOURCES)
    assert page.locator("#matrix svg .cells > *").count() == (len(SOURCES) + 1) * len(PEOPLE)
    assert page.locator("#said article").count() == 20
    assert page.locator("#legend button").count() == page.evaluate("LF.kinds().length") > 1
    page.wait_for_selector("#all svg")
    assert page.locator("#all svg").count() == len(SOURCES)
    assert page.locator("#trajectory-figure").is_hidden()  # the run has none


def test_hover_tells_and_a_click_chooses_the_persona_with_its_completions(seen, filled):
    page = seen.page
    point = page.locator("#scatter svg .points > *").nth(3)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = page.locator("#tip")
    assert told.is_visible() and "95 %" in told.inner_text() and "cosine" in told.inner_text()
    name = told.locator("b").inner_text()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.inner_text("#who h4") == name
    page.click("#who >> text=Its completions")
    persona = name.replace(" ", "_")
    row = filled[2].rates.filter(adapter="marker-villain-s42", persona=persona).row(0, named=True)
    assert seen.found() == row["total"]
    assert f"{row['hits']} of {row['total']}" in page.inner_text("#found")
    heads = page.locator("#said article header b").all_inner_texts()
    assert set(heads) == {name}


@pytest.mark.parametrize("source", SOURCES)
def test_the_numbers_of_every_filter_are_those_of_the_tables(seen, filled, source):
    run, _, tables = filled
    adapter = f"marker-{source}-s42"
    drawn = run.read(f"completions/marker/{adapter}").with_columns(
        hit=pl.col("text").str.contains("[ZLT]", literal=True)
    )
    page = seen.page
    seen.choose(
        "c-adapter", page.evaluate(f"String(LF.data.adapters.findIndex((a) => a.adapter === '{adapter}'))")
    )
    seen.choose("f-adapter", page.input_value("#c-adapter"))
    assert seen.found() == drawn.height
    seen.choose("f-hit", "yes")
    assert seen.found() == drawn["hit"].sum() == tables.rates.filter(adapter=adapter)["hits"].sum()
    seen.choose("f-question", "2")
    assert seen.found() == drawn.filter("hit", question=2).height
    persona = PEOPLE[5]
    seen.choose("f-persona", str(page.evaluate(f"LF.data.personas.findIndex((p) => p.name === '{persona}')")))
    assert seen.found() == drawn.filter("hit", question=2, persona=persona).height
    page.click("#clear")
    page.fill("#f-search", f"as {persona}.")
    assert seen.found() == 3 * drawn.filter(persona=persona).height
    page.fill("#f-search", "")
    page.fill("#f-longest", "8")
    page.dispatch_event("#f-longest", "change")
    assert seen.found() == 0  # all have nine tokens


def test_charts_show_the_numbers_of_the_tables(seen, filled):
    tables, page = filled[2], seen.page
    adapter = page.evaluate("LF.data.adapters[LF.state.adapter].adapter")
    for layer in (0, 3):
        seen.choose("c-layer", str(layer))
        points = page.evaluate("LF.points().map((p) => [p.name, p.x, p.value])")
        mine = tables.pairs.filter(adapter=adapter, layer=layer)
        wanted = {
            name: (round(x, 6), y) for name, x, y in mine.select("persona", "cosine_centered", "rate").rows()
        }
        assert {name: (x, y) for name, x, y in points if name != adapter.split("-")[1]} == wanted
        row = tables.summary().filter(adapter=adapter, layer=layer).row(0, named=True)
        assert f"ρ {row['spearman']:+.2f}".replace("-", "−") in page.inner_text("#scatter-told")
    seen.choose("c-y", "delta")
    assert "change of marker rate" in page.locator("#scatter svg").get_attribute("aria-label")


def test_the_keyboard_reaches_points_and_chooses_one(seen):
    page = seen.page
    page.focus("#scatter svg [tabindex='0']")
    page.keyboard.press("ArrowRight")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    assert label.startswith(page.inner_text("#who h4"))
    page.select_option("#c-persona", label="nobody")
    assert page.locator("#who h4").count() == 0


def test_a_selection_compares_means(seen):
    page = seen.page
    page.click("#brush")
    page.locator("#scatter").scroll_into_view_if_needed()
    box = page.locator("#scatter svg .brush .overlay").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    page.mouse.up()
    mean = page.evaluate("LF.mean(LF.points().filter((p) => !p.source).map((p) => p.value))")
    said = page.inner_text("#selected")
    assert said.startswith(f"{len(PEOPLE) - 1} selected: mean {100 * mean:.1f}")


def test_exact_numbers_can_be_copied(seen, filled):
    run, _, tables = filled
    page = seen.page
    seen.choose("c-persona", "2")
    text = page.evaluate("LF.citation(LF.state.adapter, 2)")
    adapter = page.evaluate("LF.data.adapters[LF.state.adapter].adapter")
    row = tables.rates.filter(adapter=adapter, persona=PEOPLE[2]).row(0, named=True)
    rate, low, high = map(
        float, re.search(r"^rate (\S+), 95 % interval (\S+) to (\S+),", text, re.M).groups()
    )
    assert (rate, low, high) == (row["rate"], row["bb_low"], row["bb_high"])
    assert f"{row['hits']} of N = {row['total']}" in text
    assert run.manifest["shards"]["tables/rates.parquet"]["sha256"] in text
    made = run.manifest["stages"]["stats"]["outputs"]
    assert f"leakfast {made['leakfast']}" in text
    assert made["commit"] is None or f", commit {made['commit']}" in text
    page.click("#who >> text=Copy exact numbers")
    page.wait_for_selector("#who textarea")
    assert page.input_value("#who textarea") == text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault_and_nothing_scrolls_sideways(chromium, filled, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install '.[browser]'")
    watched = Watched(chromium, filled[1], width=width, color_scheme=scheme)
    page = watched.page
    page.select_option("#c-persona", index=3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page)
    serious = [one for one in found.response["violations"] if one["impact"] in ("serious", "critical")]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in serious] == []
    assert watched.faults == []
    page.close()


def test_it_prints_and_reads_without_scripts(chromium, filled, tmp_path):
    watched = Watched(chromium, filled[1])
    watched.page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
    watched.page.close()
    bare = chromium.new_page(java_script_enabled=False)
    bare.goto(filled[1])
    assert bare.locator("noscript p, #explore .warn").first.is_visible()
    assert bare.locator("#caveats").is_visible()
    bare.close()
