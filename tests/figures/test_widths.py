"""Every figure at a column's and a page's width, of tables as large as a real run's: letters of 7 pt and more, none cut,
none over another, axes that say which cosine at which layer; and what the new figures and their numbers are."""

from __future__ import annotations

import functools
import itertools
import re

import polars as pl
import pytest
import tables_made as made
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from leakfast import figures
from leakfast.figures.style import COLUMN_IN, PAGE_IN
from leakfast.stats import confounds, persona_map
from leakfast.stats import gradient_tables as shapes
from leakfast.stats import transfer as between
from leakfast.stats.people import People

pytestmark = pytest.mark.long
WIDTHS = pytest.mark.parametrize("width", [COLUMN_IN, PAGE_IN])


@functools.cache
def tables() -> dict[str, pl.DataFrame]:
    return made.base_tables()


def matrix_table() -> pl.DataFrame:
    names = ("bb_low", "bb_high", "delta_low", "delta_high")
    return between.leakage_matrix(
        tables()["rates"].with_columns(pl.lit(None, pl.Float64).alias(n) for n in names)
    )


def _draw(kind: str, width: float) -> Figure:
    rates, pairs, correlations = tables().values()
    at = pairs.filter(pl.col("layer") == 10)
    if kind == "grid":
        return figures.grid(rates, pairs, correlations, layers={"marker": 10}, width=width)
    if kind == "grid of behaviors":
        layers = dict.fromkeys(made.BEHAVIORS, 10)
        return figures.grid(rates, pairs, correlations, layers=layers, width=width, p="t")
    if kind == "scatter":
        return figures.scatter(rates, pairs, correlations, behavior="marker", layer=10, width=width)
    if kind == "layers":
        found = made.picked(correlations)
        return figures.layers(correlations, behavior="misalignment-advice", picked=found, width=width)
    if kind == "gradients":
        found = shapes.tables(at, rates, "centered")
        return figures.gradients(pairs, found["gradients"], found["isotonic"], behavior="marker", width=width)
    if kind.startswith("matrix"):
        order = persona_map.in_a_row(made.centroids()) if kind.endswith("cluster") else kind.split()[-1]
        return figures.matrix(matrix_table(), behavior="marker", order=order, width=width)
    if kind == "partials":
        found = confounds.partials(confounds.covariates(at, rates, People(made.people())))
        return figures.partials(found, behavior="misalignment-advice", layer=10, width=width)
    if kind == "predictors":
        return figures.predictors(made.held_out(), behavior="marker", width=width)
    if kind == "question sets":
        return figures.question_sets(made.question_sets(), behavior="marker", layer=10, width=width)
    if kind == "shifts":
        return figures.shifts(*made.shifts(pairs), behavior="marker", layer=10, width=width)
    if kind == "steering":
        return figures.steering(made.steering(), behavior="marker", width=width)
    if kind == "mitigations":
        return figures.mitigations(made.mitigations(), behavior="marker", width=width)
    if kind == "relations":
        table, alike = made.relations()
        units = dict.fromkeys(table["behavior"].unique(), "share")
        return figures.relations(table, alike, units=units, width=width)
    if kind.startswith("trajectory"):
        table = made.trajectory()
        table = table if kind.endswith("all") else table.filter(behavior="marker")
        return figures.trajectory(table, lambda behavior: "share", width)
    found = persona_map.persona_map(made.centroids(), 10)
    return figures.persona_map(found, made.people(), made.SOURCES, width=width)


KINDS = ["grid", "grid of behaviors", "scatter", "layers", "gradients", "matrix category", "matrix leakage"]
KINDS += [
    "matrix cluster",
    "partials",
    "predictors",
    "question sets",
    "shifts",
    "steering",
    "mitigations",
    "relations",
    "trajectory",
    "trajectory all",
    "map",
]


def shown(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Every text that is drawn, with the box its letters fill."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    hidden: set[Text] = set()
    for axis in figure.axes:
        for side in (axis.xaxis, axis.yaxis):
            ticks = [*side.get_major_ticks(), *side.get_minor_ticks()]
            drawn = side._update_ticks() if axis.axison else []
            hidden |= {label for tick in ticks if tick not in drawn for label in (tick.label1, tick.label2)}
            if not axis.axison:
                hidden.add(side.label)
    found = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    return [(text, Text.get_window_extent(text, renderer)) for text in found]


@WIDTHS
@pytest.mark.parametrize("kind", KINDS)
def test_letters_are_large_whole_and_apart(kind, width):
    if kind in ("grid of behaviors", "trajectory all") and width < PAGE_IN:
        pytest.skip("a column does not hold them together: leakfast plot draws each behavior by itself there")
    figure = figures.captioned(_draw(kind, width), "A caption " + 30 * "that goes on ")
    figures.noted(
        figure,
        "A footnote on an adapter whose replies are cut, as wide as it comes, and in two lines or three.",
    )
    texts = shown(figure)
    assert figure.get_figwidth() <= width + 1e-9
    assert figure.get_figheight() <= 9.3, "a page is no higher"
    small = {text.get_text(): text.get_fontsize() for text, _ in texts if text.get_fontsize() < 7}
    assert not small
    assert not [text.get_text() for text, _ in texts if "$" in text.get_text()], (
        "mathtext has smaller letters"
    )
    page = figure.bbox
    cut = [
        t.get_text()
        for t, box in texts
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]
    assert not cut
    over = [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in itertools.combinations(texts, 2)
        if one.x0 + 1 < other.x1
        and other.x0 + 1 < one.x1
        and one.y0 + 1.5 < other.y1
        and other.y0 + 1.5 < one.y1
    ]
    assert not over


@WIDTHS
@pytest.mark.parametrize(
    "kind", ["grid", "grid of behaviors", "scatter", "gradients", "partials", "question sets"]
)
def test_axes_name_the_cosine_and_its_layer(kind, width):
    told = {axis.get_xlabel().replace("\n", " ") for axis in _draw(kind, width).axes} - {""}
    assert any(re.search(r"\bcentered cosine,? \(?layer 10\b", text) for text in told), told
