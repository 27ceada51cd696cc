"""What the page's charts say in a real Chromium: legend, units, places, empty charts, ticks, and what stands on paper."""

from __future__ import annotations

import polars as pl
import pytest
from browsing import Watched, browser
from flat_runs import PEOPLE as FEW
from flat_runs import made
from report_runs import fill, fill_judged

from leakfast import stats
from leakfast.inert import STEERING, inert
from leakfast.report.page import report
from leakfast.stats import beyond

pytestmark = [pytest.mark.browser, pytest.mark.long]


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name → (address, tables): small runs of several kinds."""
    root = tmp_path_factory.mktemp("runs")
    runs = {
        "marker": fill(root / "marker"),
        "judged": fill_judged(root / "judged"),
        "alike": made(root / "alike", set(FEW), FEW),
        "bare": made(root / "bare", {"villain", "poet"}, FEW, True, ()),
    }
    out = {}
    for name, run in runs.items():
        tables = stats.stats(run, permutations=19, bootstraps=50)
        out[name] = report(run, tables).as_uri(), tables
    return out


@pytest.fixture
def look(chromium, pages):
    opened = []

    def opens(name, **settings):
        watched = Watched(chromium, pages[name][0], **settings)
        opened.append(watched)
        return watched

    yield opens
    for watched in opened:
        assert watched.faults == []
        watched.page.close()


def test_the_page_writes_out_what_the_terminal_writes_out(look):
    page = look("bare").page
    found = page.evaluate(
        """() => {
          const out = [];
          for (let code = 0; code < 0x110000; code++) {
            const one = LF.inert(String.fromCodePoint(code));
            if (one !== String.fromCodePoint(code)) out.push([code, one]);
          }
          return out;
        }"""
    )
    steering = [code for code in range(0x110000) if STEERING.fullmatch(chr(code))]
    assert len(steering) > 2_000
    assert found == [[code, inert(chr(code))] for code in steering]


def test_the_legend_is_there_from_the_start(look):
    page = look("marker").page
    kinds = page.evaluate("LF.kinds().map(LF.words)")
    shown = page.locator("#legend button").all_inner_texts()
    assert [text.split(" ", 1)[1] for text in shown] == kinds


def test_a_change_of_a_share_is_in_percentage_points_with_its_sign(look):
    watched = look("marker")
    page = watched.page
    watched.choose("c-persona", "3")
    change = page.locator("#who dt", has_text="change").locator("xpath=following-sibling::dd[1]").inner_text()
    assert change.count("pp") == 2 and "%)" not in change and change[0] in "+−0"
    watched.choose("c-y", "delta")
    label = page.locator("#scatter svg .points > *").first.get_attribute("aria-label")
    assert "pp, 95 %" in label and "\u00a0%" not in label.split(" of ")[0]
    assert "pp" in page.locator("#matrix svg .cells > *").first.get_attribute("aria-label")


def test_of_judged_behaviors_who_leaks_beyond_its_cosine_is_aligned_less_than_it(look, pages):
    watched = look("judged")
    page = watched.page
    assert "Lower is more of misalignment-advice" in page.inner_text("#scatter-told")
    assert "aligned score" in page.locator("#scatter svg").get_attribute("aria-label")
    assert "pale at 0" in page.inner_text("#matrix-told")
    page.evaluate("LF.set({ y: 'rate' })")
    tables = pages["judged"][1]
    adapter, layer = page.evaluate("[LF.data.adapters[LF.state.adapter].adapter, LF.state.layer]")
    leaks = beyond.leaks(tables, "misalignment-advice", layer).filter(adapter=adapter).drop_nulls("beyond")
    shown = page.evaluate("LF.beyond(LF.points()).map((p) => [p.name, p.beyond])")
    assert dict(shown) == pytest.approx(dict(leaks.select("persona", "beyond").rows()))
    assert [value for _, value in shown] == sorted(value for _, value in shown)  # the least aligned first
    points = pl.DataFrame(
        page.evaluate("LF.points().filter((p) => !p.source).map((p) => ({y: p.y, name: p.name}))")
    )
    lowest = points.sort("y")["name"][0]
    page.select_option("#c-persona", label=lowest.replace("_", " "))
    assert "by leakage number 1" in page.inner_text("#who")


def test_the_page_and_the_terminal_have_one_curve(look, pages):
    """Of every adapter and layer, weights and ties included."""
    page, tables = look("marker").page, pages["marker"][1]
    for cosine in ("centered", "raw"):
        for layer in tables.pairs["layer"].unique():
            page.evaluate("(given) => LF.set(given)", {"layer": layer, "cosine": cosine})
            for place, one in enumerate(
                page.evaluate("LF.data.adapters.map((a) => [a.adapter, a.behavior])")
            ):
                leaks = (
                    beyond.leaks(tables, one[1], layer, cosine).filter(adapter=one[0]).drop_nulls("beyond")
                )
                shown = page.evaluate(f"LF.beyond(LF.points({place})).map((p) => [p.name, p.beyond])")
                if shown:
                    wanted = dict(leaks.select("persona", "beyond").rows())
                    assert dict(shown) == pytest.approx(wanted, abs=1e-9)


def test_where_all_leak_alike_nobody_is_beyond_its_cosine(look):
    watched = look("alike")
    page = watched.page
    page.select_option("#c-persona", label="poet")
    assert "of its cosine" not in page.inner_text("#who") and "cosine" in page.inner_text("#who")
    assert page.locator("#beyond").is_hidden()
    assert page.locator("#scatter svg .points > *").count() == len(FEW) - 1


def test_without_cosines_there_is_a_sentence_and_no_chart(look):
    page = look("bare").page
    assert "nothing to set against each other" in page.inner_text("#scatter")
    assert page.locator("#scatter svg").count() == 0 and page.inner_text("#scatter-told") == ""
    assert page.locator("#brush").is_hidden() and page.locator("#all-figure").is_hidden()
    assert page.locator("#matrix svg").is_visible()


def test_a_layer_is_named_once_on_its_axis(look):
    ticks = look("marker").page.locator("#layers svg text").all_text_contents()
    assert [text for text in ticks if text.isdigit()] == ["0", "3"]


def test_whole_completions_are_not_said_to_go_on_and_one_is_said_in_the_singular(look):
    watched = look("marker")
    watched.choose("f-question", "1")
    assert "more characters" not in watched.page.inner_text("#said")
    watched.choose("f-hit", "yes")
    watched.choose("f-adapter", "0")
    counts = set()
    for persona in range(16):
        watched.choose("f-persona", str(persona))
        words = watched.page.inner_text("#found").split(" of those here")[0]
        counts.add(words)
        assert words.endswith(" completion") == (words == "1 completion")
    assert "1 completion" in counts


def test_paper_is_light_and_holds_what_is_folded(look):
    page = look("marker", color_scheme="dark").page
    page.wait_for_selector("#all button svg")
    page.emulate_media(media="print")
    colour = "(one) => getComputedStyle(one)"
    ground = page.evaluate(f"({colour})(document.querySelector('.warn')).backgroundColor")
    assert min(map(int, ground[4:-1].split(","))) > 200, ground
    assert (
        page.locator("#all button").first.is_visible() and page.locator("#legend button").first.is_visible()
    )
    folded = page.locator("#beyond li").first
    assert (
        folded.is_visible() and folded.bounding_box()["height"] > 0 and folded.locator("button").is_visible()
    )
    assert page.locator("#clear").is_hidden()
