"""The served page in a real Chromium: charts and completions come up, filters ask the server, a run that grows is followed
with what was chosen kept, and the console stays empty."""

from __future__ import annotations

import time

import pytest
import served_runs as runs
from browsing import browser

pytestmark = [pytest.mark.browser, pytest.mark.long]

SLOW_MS = 180_000


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture
def tab(chromium):
    """A page and what its console said; requests that left for another server."""
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(SLOW_MS)
    page.said, page.asked = [], []
    page.on(
        "console",
        lambda message: page.said.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: page.said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    context.close()


def chosen(page, name: str) -> str:
    return page.eval_on_selector(name, "one => one.selectedOptions[0]?.textContent ?? ''")


def until(page, holds: str) -> None:
    """Wait until an expression is true. Playwright's own wait needs eval in the page, which its policy forbids."""
    end = time.monotonic() + SLOW_MS / 1000
    while time.monotonic() < end:
        if page.evaluate(holds):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{holds} did not come: {page.inner_text('#found')!r}, {page.inner_text('#live')!r}")


def found(page, number: int) -> None:
    until(page, f"document.getElementById('found').textContent.startsWith('{number} ')")


def test_it_comes_up_asks_its_server_and_follows_the_run(tab, tmp_path):
    run = runs.begin(tmp_path / "grows")
    runs.measure(run, "villain")
    each = len(runs.PEOPLE) * runs.QUESTIONS * runs.SAMPLES
    with runs.served(run) as server:
        server.live.now(wait_s=300)
        tab.goto(server.url)
        tab.wait_for_selector("html[data-ready=all]")
        assert tab.locator("#scatter .points > *").count() == len(runs.PEOPLE) - 1
        found(tab, each)
        assert "rates, their intervals and ρ" in tab.inner_text("#live")

        # choose, filter, search
        tab.select_option("#c-persona", label="comedian")
        tab.select_option("#f-persona", label="comedian")
        tab.select_option("#f-hit", "yes")
        frame = runs.drawn("marker-villain-s42", "villain").filter(persona="comedian")
        hits = frame.filter(frame["text"].str.contains("[ZLT]", literal=True))
        found(tab, hits.height)
        tab.fill("#f-search", "TEA")
        teas = hits.filter(hits["text"].str.to_lowercase().str.contains("tea", literal=True)).height
        assert 0 < teas < hits.height
        found(tab, teas)
        assert tab.locator("#said article").count() == teas
        assert {text.lower() for text in tab.locator("#said mark").all_inner_texts()} == {"tea", "[zlt]"}

        # the run grows: an adapter that stands before the chosen one in no list, and personas keep their names
        runs.measure(run, "comedian")
        runs.measure(run, None)
        until(tab, "document.querySelectorAll('#f-adapter option').length === 4")
        assert chosen(tab, "#c-persona") == chosen(tab, "#f-persona") == "comedian"
        assert chosen(tab, "#c-adapter").startswith("villain")
        assert tab.input_value("#f-search") == "TEA" and tab.input_value("#f-hit") == "yes"
        assert tab.is_visible("#older")
        tab.click("#clear")
        found(tab, 3 * each)
        tab.click("#more-completions")
        until(tab, "document.querySelectorAll('#said article').length === 40")

        # what stands below is made again on a reload, with the view kept
        tab.click("#reload")
        tab.wait_for_selector("html[data-ready=all]")
        assert chosen(tab, "#c-persona") == "comedian"
        assert tab.said == []
        assert all(url.startswith((server.url, "data:")) for url in tab.asked)


def test_a_run_in_which_nothing_is_measured_says_so_and_then_begins(tab, tmp_path):
    run = runs.begin(tmp_path / "empty")
    with runs.served(run) as server:
        tab.goto(server.url)
        until(tab, "document.getElementById('live').textContent.startsWith('Nothing has been measured')")
        runs.measure(run, "villain")
        tab.wait_for_selector("html[data-ready=all]")
        assert tab.locator("#scatter .points > *").count() == len(runs.PEOPLE) - 1
        assert tab.said == []
