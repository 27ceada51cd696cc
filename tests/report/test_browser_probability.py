"""The report of a run with probabilities in a real Chromium: the charts have them as a y, with the tables' numbers."""

from __future__ import annotations

import polars as pl
import pytest
from browsing import Watched, browser
from report_runs import fill, with_probabilities

from leakfast import stats
from leakfast.report.page import report

pytestmark = [pytest.mark.browser, pytest.mark.long]


def test_the_charts_show_probabilities(tmp_path):
    run = with_probabilities(fill(tmp_path / "small"))
    page_at, tables = report(run).as_uri(), stats.current(run)
    with browser() as chromium:
        watched = Watched(chromium, page_at)
        page = watched.page
        watched.choose("c-y", "probability")
        watched.choose("c-layer", "3")
        adapter = page.evaluate("LF.data.adapters[LF.state.adapter].adapter")
        points = page.evaluate("LF.points().filter((p) => !p.source).map((p) => [p.name, p.value, p.low])")
        mine = tables.more["probabilities"].filter(adapter=adapter)
        wanted = {
            name: (value, low)
            for name, value, low in mine.select("persona", "mean_probability", "mean_probability_low").rows()
        }
        assert {name: (value, low) for name, value, low in points}.items() <= wanted.items() and len(
            points
        ) == 15
        assert "probability of marker" in page.locator("#scatter svg").get_attribute("aria-label")
        found = tables.more["probability_correlations"].filter(
            pl.col("category").is_null(), adapter=adapter, layer=3, cosine="centered"
        )
        rho = f"ρ {found['spearman'][0]:+.2f}".replace("-", "−")
        assert rho in page.inner_text("#scatter-told")
        assert "probability of marker" in page.locator("#matrix svg").get_attribute("aria-label")
        watched.choose("c-persona", "2")
        cell = page.evaluate("LF.cell(LF.state.adapter, 2)")
        assert (
            f"probability {cell['probability']}, 95 % interval {cell['probability_low']} to"
            in page.evaluate("LF.citation(LF.state.adapter, 2)")
        )
        assert f"{100 * cell['probability']:.1f}" in page.inner_text("#who dl")
        assert run.manifest["shards"]["tables/probabilities.parquet"]["sha256"] == page.evaluate(
            "LF.data.tables.probabilities"
        )
        assert watched.faults == []
        page.close()
