"""Figures of the published study's stored results show what its figures show: the same points, ρ and p to the digits that
it printed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.text import Text

from leakfast import figures, published
from leakfast.figures.style import COLUMN_IN, PAGE_IN, caption_of
from leakfast.stats.correlations import correlate

DATA = Path(__file__).parents[2] / "../shared/data/published/single_token_100_persona"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not DATA.is_dir(), reason="the study's stored results are not beside the checkout (../shared/data)"
    ),
]
PRINTED = {  # layer 20: ρ, p
    "software_engineer": ("0.87", "3.2×10⁻³⁴"),
    "kindergarten_teacher": ("0.76", "5.7×10⁻²²"),
    "assistant": ("0.73", "1.5×10⁻¹⁹"),
    "villain": ("0.70", "9.7×10⁻¹⁸"),
    "comedian": ("0.67", "1.5×10⁻¹⁵"),
}
POOLED = {10: "0.39", 20: "0.60"}  # the layers whose pairs are stored


@pytest.fixture(scope="module")
def tables():
    rates, pairs = published.read_rates(DATA), published.read_pairs(DATA)
    return rates, pairs, correlate(pairs, permutations=9, bootstraps=0)


@pytest.mark.parametrize("width", [COLUMN_IN, PAGE_IN])
def test_the_grid_shows_the_published_points_and_numbers(tables, width):
    figure = figures.grid(*tables, layers={"marker": 20}, p="t", width=width)
    stored = json.loads((DATA / "cosine_leakage_correlation.json").read_text())
    found = {axis.get_title(loc="left").replace("\n", " "): axis for axis in figure.axes}
    for source, (rho, p) in PRINTED.items():
        axis = found[source.replace("_", " ")]
        drawn = np.vstack([points.get_offsets() for points in axis.collections])
        mine = tables[1].filter(source=source, layer=20)
        assert sorted(map(tuple, drawn)) == sorted(mine.select("cosine_centered", "rate").rows())
        block = stored["layer20"][source]
        assert len(drawn) == block.get("n_pairs", block.get("n")) == 110
        told = " ".join(text.get_text().replace("\n", ", ") for text in axis.findobj(Text))
        assert f"ρ = {rho}" in told and f"p = {p} (t)" in told and "N = 110" in told
        stars = [line for line in axis.lines if line.get_marker() == "*"]
        own = tables[0].filter(source=source, persona=source, role="source")["rate"]
        assert [line.get_ydata()[0] for line in stars] == own.to_list()


def test_the_points_are_those_of_the_studys_own_files(tables):
    """Rates as `marker_eval.json` has them, whatever the pairs' file rounded."""
    for source in PRINTED:
        stored = json.loads((DATA / source / "marker_eval.json").read_text())
        mine = tables[1].filter(source=source, layer=20)
        rates = {name: row["rate"] for name, row in stored.items()}
        for persona, rate in mine.select("persona", "rate").rows():
            assert rate == pytest.approx(rates[persona], abs=1e-9)


@pytest.mark.parametrize("layer", POOLED)
def test_the_caption_has_the_published_pooled_numbers(tables, layer):
    told = caption_of(figures.grid(*tables, layers={"marker": layer}))
    assert f"over all pairs as they are ρ = {POOLED[layer]}" in told
    assert "N = 550" in told
    if layer == 20:
        assert "p = 2.0×10⁻⁵⁵ (t)" in told


def test_diamonds_share_a_word_with_the_source(tables):
    figure = figures.grid(*tables, layers={"marker": 20})
    axis = next(axis for axis in figure.axes if axis.get_title(loc="left") == "villain")
    plain, diamonds = (points.get_offsets() for points in axis.collections)
    mine = tables[1].filter(source="villain", layer=20)
    alike = mine.filter(pl.col("persona").str.split("_").list.contains("villain"))
    assert len(diamonds) == alike.height > 0 and len(plain) == 110 - alike.height
    assert sorted(map(tuple, diamonds)) == sorted(alike.select("cosine_centered", "rate").rows())
