"""Figures from tables alone: files of the right kind, the same bytes twice, the words and numbers that
belong on them, and nothing drawn where nothing is defined."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
import tables_made as made

from leakfast import figures
from leakfast.figures.scatter import NAMED
from leakfast.stats import rates as rate_tables
from leakfast.stats.correlations import correlate
from leakfast.storage import schema

pytestmark = pytest.mark.long

SOURCES = ["villain", "poet"]
KINDS = ["original", "tone_variant", "opposite", None]


@pytest.fixture(scope="module")
def tables():
    """Two sources, 24 bystanders, three layers, one of them informative."""
    rng = np.random.default_rng(0)
    people = [f"persona_{i}" for i in range(24)]
    counts, pairs = [], []
    for s, source in enumerate(SOURCES):
        x = np.sort(rng.uniform(-0.6, 0.9, size=24))
        hits = rng.binomial(200, np.clip(x, 0.02, 0.95))
        for persona, k in zip([*people, source], [*hits, 180], strict=True):
            counts.append({"behavior": "marker", "adapter": f"a{s}", "persona": persona, "hits": int(k)})
        for layer in (0, 3, 5):
            noise = 0 if layer == 3 else 1
            for i, persona in enumerate(people):
                cosine = float(np.clip(x[i] + noise * rng.normal(), -1, 1))
                pairs.append([f"a{s}", source, persona, KINDS[i % 4], layer, cosine, hits[i] / 200])
    rates = rate_tables.table(
        pl.DataFrame(counts).with_columns(total=pl.lit(200)),
        {f"a{s}": (source, 42) for s, source in enumerate(SOURCES)},
        {persona: KINDS[i % 4] for i, persona in enumerate(people)},
    )
    names = ["adapter", "source", "persona", "category", "layer", "cosine_centered", "rate"]
    columns = schema.columns("pairs")
    frame = pl.DataFrame(pairs, schema=names, orient="row").with_columns(
        behavior=pl.lit("marker"),
        seed=pl.lit(42, pl.Int64),
        layer=pl.col("layer").cast(pl.Int32),
        cosine_raw=0.9 + pl.col("cosine_centered") / 10,
        delta=pl.lit(None, pl.Float64),
    )
    frame = schema.check(frame.select("adapter", *columns), "pairs")
    return rates, frame, correlate(frame, permutations=199)


def _texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_scatter_tells_what_it_shows(tables):
    rates, pairs, correlations = tables
    figure = figures.scatter(rates, pairs, correlations, behavior="marker", layer=3)
    texts = _texts(figure)
    assert "villain" in texts
    assert "poet" in texts
    assert "centered cosine, layer 3" in texts
    assert "marker rate (%)" in texts
    found = correlations.filter(
        (pl.col("source") == "villain")
        & (pl.col("layer") == 3)
        & (pl.col("cosine") == "centered")
        & (pl.col("y") == "rate")
        & pl.col("category").is_null()
    ).row(0, named=True)
    title = next(text for text in texts if text.startswith(f"ρ = {found['spearman']:.2f}"))
    assert title.endswith("N = 24")
    assert "p ≤" in title  # all 199 shuffles stay below: the p is a bound
    assert {"no category", "tone variant", "source (not in ρ)"} <= set(texts)


def test_scatter_draws_every_pair_and_the_source_as_a_star(tables):
    rates, pairs, correlations = tables
    figure = figures.scatter(rates, pairs, correlations, behavior="marker", layer=3, cosine="raw")
    axis = figure.axes[0]
    drawn = np.vstack([points.get_offsets() for points in axis.collections])
    mine = pairs.filter((pl.col("source") == "villain") & (pl.col("layer") == 3))
    expected = mine.select("cosine_raw", "rate").to_numpy()
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, expected))
    stars = [line for line in axis.lines if line.get_marker() == "*"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(1, 0.9)]


def test_the_highest_bystanders_are_named_inside_their_panel(tables):
    rates, pairs, correlations = tables
    figure = figures.scatter(rates, pairs, correlations, behavior="marker", layer=3)
    from matplotlib.text import Annotation, Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axis, source in zip(figure.axes, SOURCES, strict=False):
        mine = pairs.filter((pl.col("source") == source) & (pl.col("layer") == 3))
        top = mine.sort(["rate", "persona"], descending=[True, False]).head(NAMED)["persona"]
        notes = axis.findobj(lambda child: isinstance(child, Annotation) and child.get_gid() == "name")
        assert sorted(n.get_text() for n in notes) == sorted(p.replace("_", " ") for p in top)
        frame = axis.get_window_extent(renderer).padded(20)
        for note in notes:
            box = Text.get_window_extent(note, renderer)
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


@pytest.mark.parametrize("write", [figures.png, figures.pdf, figures.svg])
def test_the_same_tables_give_the_same_bytes(tables, write):
    rates, pairs, correlations = tables
    once, again = (
        write(figures.scatter(rates, pairs, correlations, behavior="marker", layer=5)) for _ in range(2)
    )
    assert once == again
    assert once.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[write.__name__])
    assert re.search(rb"\b20[0-9]{6}[0-9]{6}\b|20[0-9]{2}-[01][0-9]-[0-3][0-9]T", once) is None


def test_layer_figure_has_a_line_per_source_and_rings_the_best(tables):
    _, _, correlations = tables
    figure = figures.layers(correlations, behavior="marker")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["centered cosine", "raw cosine"]
    for axis in figure.axes:
        lines = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert len(lines) == 3  # two sources and pooled
        assert all(list(line.get_xdata()) == [0, 3, 5] for line in lines)
        ring = [line for line in axis.lines if line.get_fillstyle() == "none"]
        assert [list(line.get_xdata()) for line in ring] == [[3]]
    assert {"villain", "poet", "pooled"} <= set(_texts(figure))


def test_nothing_is_drawn_where_nothing_is_defined(tables):
    rates, pairs, correlations = tables
    one = correlations.filter(pl.col("layer") == 3)
    assert figures.layers(one, behavior="marker") is None
    with pytest.raises(ValueError, match="no pair"):
        figures.scatter(rates, pairs, correlations, behavior="marker", layer=4)
    with pytest.raises(ValueError, match="delta"):
        figures.scatter(rates, pairs, correlations, behavior="marker", layer=3, y="delta")


def test_an_undefined_correlation_is_said_not_drawn_as_zero(tables):
    rates, pairs, _ = tables
    flat = pairs.with_columns(rate=pl.lit(0.0))
    zero = rates.with_columns(rate=pl.when(pl.col("role") == "bystander").then(0.0).otherwise("rate"))
    figure = figures.scatter(zero, flat, correlate(flat, 9), behavior="marker", layer=3)
    assert _texts(figure).count("ρ is not defined") == 2


def test_colours_and_shapes_are_distinct_for_the_eleven_categories():
    used = figures.CATEGORY_STYLES[:11]
    assert len({colour for colour, _ in used}) == len({shape for _, shape in used}) == 11


def _more(tables):
    from leakfast.stats import confounds
    from leakfast.stats import gradient_tables as shapes
    from leakfast.stats import transfer as between
    from leakfast.stats.people import People

    rates, pairs, _ = tables
    at = pairs.filter(pl.col("layer") == 3)
    said = confounds.covariates(at, rates, People(dict.fromkeys([*rates["persona"], *SOURCES])))
    said = said.with_columns(jaccard=pl.int_range(pl.len()) % 7 / 7)  # of made up names no two share a word
    whole = rates.with_columns(
        *[pl.lit(None, pl.Float64).alias(n) for n in ("bb_low", "bb_high", "delta_low", "delta_high")]
    )
    return shapes.tables(at, rates, "centered"), confounds.partials(said), between.leakage_matrix(whole)


def test_the_further_figures_tell_their_numbers(tables):
    shaped, partial, matrix = _more(tables)
    drawn = {
        "gradients": figures.gradients(tables[1], shaped["gradients"], shaped["isotonic"], behavior="marker"),
        "partials": figures.partials(partial, behavior="marker", layer=3),
        "matrix": figures.matrix(matrix, behavior="marker"),
    }
    for name, figure in drawn.items():
        texts = " ".join(_texts(figure))
        assert "villain" in texts and "poet" in texts, name
        assert figures.png(figure)[:4] == b"\x89PNG", name
    row = shaped["gradients"].row(0, named=True)
    assert f"midpoint {row['midpoint']:.2f}".replace("-", "−") in " ".join(_texts(drawn["gradients"]))
    shown = _texts(drawn["partials"])
    assert {"nothing", "word overlap", "category"} <= set(shown) and "given similarity" not in shown
    assert {f"persona {i}" for i in range(24)} <= set(_texts(drawn["matrix"])), "every persona has its row"
    again = figures.matrix(matrix, behavior="marker")
    assert figures.svg(again) == figures.svg(figures.matrix(matrix, behavior="marker"))


def test_predictors_stand_by_family_and_mean_and_one_source_draws_none():
    table = made.held_out()
    axis = figures.predictors(table, behavior="marker").axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[0] == "cosine centered" and names.index("kl forward") < names.index("jaccard")
    diamonds = [line for line in axis.lines if line.get_marker() == "D" and len(line.get_xdata()) == 1]
    rho = table.filter(source="pooled", predictor="cosine_centered")["spearman"][0]
    assert diamonds[0].get_xdata()[0] == rho and len(diamonds) == len(names) == 16
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [16] * 5
    alone = table.filter(pl.col("source") != "pooled")
    assert figures.predictors(alone, behavior="marker") is None


def test_the_matrix_shows_each_value_in_its_cell(tables):
    _, _, matrix = _more(tables)
    figure = figures.matrix(matrix, behavior="marker")
    axis = figure.axes[0]
    people = [label.get_text().replace(" ", "_") for label in axis.get_yticklabels()]
    sources = [label.get_text() for label in axis.get_xticklabels()]
    values = axis.images[0].get_array()
    told = {(row["persona"], row["source"]): row["rate"] for row in matrix.rows(named=True)}
    for i, persona in enumerate(people):
        for j, source in enumerate(sources):
            known = told.get((persona, source))
            assert values.mask[i, j] if known is None else values[i, j] == known
    assert figures.matrix(matrix, behavior="marker", y="delta") is None, "no baseline, no deltas"


def test_nothing_known_draws_nothing(tables):
    shaped, partial, _ = _more(tables)
    empty = shaped["gradients"].with_columns(midpoint=pl.lit(None, pl.Float64))
    assert figures.gradients(tables[1], empty, shaped["isotonic"], behavior="marker") is None
    assert figures.partials(partial, behavior="marker", layer=9) is None


def test_a_layer_that_chance_explains_is_hollow(tables):
    table = tables[2].with_columns(spearman_p_max=pl.when(pl.col("layer") == 3).then(0.01).otherwise(0.5))
    figure = figures.layers(table, behavior="marker", cosines=("centered",))
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert {x for line in hollow for x in line.get_xdata()} == {0, 5}


def test_adapters_of_one_source_and_seed_have_a_panel_and_a_name_each(tables):
    """The points of both were drawn in one panel, under the ρ of the first."""
    rates, pairs, correlations = (
        table.with_columns(source=pl.col("source").replace("poet", "villain"), **more)
        for table, more in zip(
            tables,
            ({"persona": pl.col("persona").replace("poet", "villain")}, {}, {"adapter": pl.col("adapter")}),
            strict=True,
        )
    )
    correlations = correlations.filter(pl.col("adapter").is_not_null())
    grid = figures.grid(rates, pairs, correlations, layers={"marker": 3})
    panels = [axis for axis in grid.axes if axis.collections]
    assert [sum(len(dots.get_offsets()) for dots in axis.collections) for axis in panels] == [24, 24]
    drawn = [
        grid,
        figures.scatter(rates, pairs, correlations, behavior="marker", layer=3),
        figures.layers(correlations, behavior="marker"),
    ]
    for figure in drawn:
        told = " ".join(_texts(figure)).replace("\n", " ")
        assert "villain (a0)" in told and "villain (a1)" in told


def test_strengths_in_other_units_or_at_other_blocks_are_points_of_other_lines():
    table = made.steering().filter(direction="mean", mode="add", source=made.SOURCES[0])
    ways = [("direction", "3"), ("direction", "4"), ("residual", "3")]
    table = pl.concat(
        table.with_columns(unit=pl.lit(unit), steered_layers=pl.lit(layers)) for unit, layers in ways
    )
    figure = figures.steering(table, behavior="marker")
    told = " ".join(_texts(figure)).replace("\n", " ")
    for words in (
        "in lengths of the direction",
        "in mean lengths of centroids",
        "mean, layers 3",
        "mean, layers 4",
    ):
        assert words in told
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "o"]
    assert len(lines) == 3 * len(ways), "source, bystanders and plain text of each"
    assert all((np.diff(line.get_xdata()) > 0).all() for line in lines)
