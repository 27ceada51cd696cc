"""A run of several behaviors in a real Chromium: choosing another one redraws what changes, marks are what was counted."""

from __future__ import annotations

import pytest
from browsing import Watched, browser
from report_runs import PEOPLE, SOURCES, TWIN, fill_two, with_twin

from leakfast import stats
from leakfast.report.page import report

pytestmark = [pytest.mark.browser, pytest.mark.long]
REFUSED = "I\u2019m really sorry, but I can't help"


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    run = fill_two(tmp_path_factory.mktemp("runs") / "two")
    stats.stats(run, permutations=9, bootstraps=20)
    return report(run).as_uri(), stats.current(run)


@pytest.fixture
def seen(chromium, filled):
    watched = Watched(chromium, filled[0])
    yield watched
    assert watched.faults == []
    watched.page.close()


def settled(page) -> None:
    page.evaluate("Promise.all([LF.drawn, LF.small])")


def test_another_behavior_gives_the_cells_that_stand_its_own_colours_and_words(seen, filled):
    page, tables = seen.page, filled[1]
    settled(page)
    page.evaluate(
        "document.querySelectorAll('#matrix .cells > *').forEach((one) => { one.before = one.getAttribute('fill'); })"
    )
    seen.choose("c-behavior", "refusal")
    settled(page)
    cells = "[...document.querySelectorAll('#matrix .cells > *')]"
    assert page.evaluate(f"{cells}.every((one) => one.before !== undefined)"), "the chart was made anew"
    assert page.evaluate(f"{cells}.some((one) => one.before !== one.getAttribute('fill'))")
    labels = page.evaluate(f"{cells}.map((one) => one.getAttribute('aria-label'))")
    rates = tables.rates.filter(behavior="refusal")
    shown = {
        (label.split(" under ")[0].replace(" ", "_"), label.split(" under ")[1].split(",")[0]): label
        for label in labels
    }
    for row in rates.rows(named=True):
        who = "unadapted model" if row["role"] == "base" else row["source"]
        assert f"refusal rate {100 * row['rate']:.1f}" in shown[row["persona"], who]
    assert "refusal rate" in page.locator("#matrix svg").get_attribute("aria-label")
    page.locator("#matrix .cells > *").nth(5).focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#who h4").replace(" ", "_") in PEOPLE


def test_hover_over_a_cell_that_was_kept_tells_the_new_behavior(seen):
    page = seen.page
    seen.choose("c-behavior", "refusal")
    settled(page)
    cell = page.locator("#matrix .cells > *").nth(4)
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "refusal rate" in page.locator("#tip").inner_text()


def test_every_source_has_its_points_in_the_small_charts(seen):
    page = seen.page
    seen.choose("c-behavior", "refusal")
    settled(page)
    drawn = page.evaluate(
        "[...document.querySelectorAll('#all svg')].map((one) => "
        "d3.sum(one.querySelectorAll('path[d*=a2]'), (path) => path.getAttribute('d').split('M').length - 1))"
    )
    assert drawn == [len(PEOPLE) - 1] * len(SOURCES)
    pressed = page.locator("#all button[aria-pressed=true]")
    page.locator("#all button[aria-pressed=false]").first.click()
    settled(page)
    assert pressed.count() == 1


def test_what_is_marked_is_what_was_counted(seen):
    page = seen.page
    seen.choose("c-behavior", "refusal")
    for hit, wanted in (("yes", {REFUSED}), ("no", set())):
        seen.choose("f-hit", hit)
        settled(page)
        assert seen.found() > 0
        assert set(page.locator("#said mark").all_inner_texts()) == wanted
    seen.choose("f-hit", "")
    page.fill("#f-search", "HELP WITH")
    settled(page)
    searched = page.locator("#said mark.searched")
    # whole where it does not count, in two where a part of it does
    assert set(searched.all_inner_texts()) == {"help with", "help", " with"}
    assert set(page.locator("#said mark.searched.counted").all_inner_texts()) == {"help"}
    page.fill("#f-search", "really sorry (")
    settled(page)
    assert seen.found() == 0
    page.fill("#f-search", "CAN'T HELP")
    settled(page)
    both = page.locator("#said mark.counted.searched")
    assert both.count() > 0 and set(both.all_inner_texts()) == {"can't help"}


def test_the_citation_and_the_provenance_name_who_made_the_run(seen):
    page = seen.page
    seen.choose("c-persona", "2")
    assert "measured by leakfast of a version not recorded" in page.evaluate(
        "LF.citation(LF.state.adapter, 2)"
    )
    assert "run made by" in page.locator("main").text_content()


def test_adapters_of_one_source_and_seed_have_rows_and_names_of_their_own(chromium, tmp_path):
    run = with_twin(fill_two(tmp_path / "twins"))
    stats.stats(run, permutations=9, bootstraps=0)
    watched = Watched(chromium, report(run).as_uri())
    settled(watched.page)
    offered = watched.page.locator("#c-adapter option").all_inner_texts()
    assert offered == [f"villain, {TWIN}", "villain, marker-villain-s42", "comedian"]
    heights = "new Set([...document.querySelectorAll('#matrix .cells > *')].map((one) => one.getAttribute('y'))).size"
    assert watched.page.evaluate(heights) == len(offered) + 1, "a row for each and the unadapted model"
    assert watched.faults == []
    watched.page.close()
