"""How every figure of the house looks, and how one becomes bytes. Demands matplotlib (no display, no pyplot
state); the same figure gives the same bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from leakfast.stats.summary import twins

# Colour and shape both tell the category, so that neither is needed alone. Colours: Paul Tol's
# "muted" set with a dark grey first; distinct under the common colour-vision deficiencies.
CATEGORY_STYLES = (
    ("#555555", "o"),
    ("#332288", "s"),
    ("#88ccee", "^"),
    ("#44aa99", "D"),
    ("#117733", "v"),
    ("#999933", "P"),
    ("#ddcc77", "X"),
    ("#cc6677", "<"),
    ("#882255", ">"),
    ("#aa4499", "h"),
    ("#4477aa", "p"),
    ("#ee7733", "d"),
)
SOURCE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
STAR = "#d7263d"
INK, FAINT = "#222222", "#bbbbbb"
COLUMN_IN, PAGE_IN = 3.5, 7.0  # a column of a two-column paper, and its page
SMALLEST_PT = 7.0  # letters that a printed page can be read with
_GAP_IN = 0.06  # between a figure and the words below it
_LETTER_IN = 0.0545  # mean width of a letter of the smallest size
_BELOW = "below"  # marks the words under a figure

STYLE = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "leakfast",
}


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as PNG, without a software stamp."""
    return _saved(figure, "png", dpi=dpi, metadata={"Software": None})


def pdf(figure: Figure) -> bytes:
    """The figure as PDF with embedded TrueType fonts, without dates."""
    return _saved(figure, "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def svg(figure: Figure) -> bytes:
    """The figure as SVG with letters as paths, without dates: looks the same on every machine."""
    return _saved(figure, "svg", metadata={"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        box = _with_footnote(figure)
        figure.savefig(buffer, format=kind, bbox_inches=box, **settings)
    return buffer.getvalue()


def figure_of(inches: tuple[float, float]) -> Figure:
    """An empty figure of this size (width, height)."""
    figure = Figure(figsize=inches, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def noted(figure: Figure, note: str | None) -> Figure:
    """The figure with a footnote below it, in the colour of what is not well; unchanged without one."""
    return _with_words_below(figure, note, STAR)


def captioned(figure: Figure, caption: str | None) -> Figure:
    """The figure with what a reader has to know below it; unchanged without words."""
    return _with_words_below(figure, caption, "#444444")


def caption_of(figure: Figure) -> str:
    """What stands below the figure, footnotes too, as one line."""
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts if text.get_gid() == _BELOW)


def _with_words_below(figure: Figure, told: str | None, colour: str) -> Figure:
    if told:
        lines = textwrap.wrap(told, max(40, int((figure.get_figwidth() - 0.1) / _LETTER_IN)))
        place = (0.05 / figure.get_figwidth(), -_depth_in(figure) / figure.get_figheight())
        style = {"fontsize": SMALLEST_PT, "color": colour, "ha": "left", "va": "top", "linespacing": 1.25}
        with matplotlib.rc_context(STYLE):
            text = figure.text(*place, "\n".join(lines), gid=_BELOW, **style)
        text.set_in_layout(False)
    return figure


def _depth_in(figure: Figure) -> float:
    """How far the words below a figure reach, in inches from its lower edge."""
    lines = sum(t.get_text().count("\n") + 1 for t in figure.texts if t.get_gid() == _BELOW)
    return _GAP_IN + lines * 1.3 * SMALLEST_PT / 72


def _with_footnote(figure: Figure) -> Bbox | None:
    """The part of the page to keep, in inches: the figure and what is told below it; None where nothing is."""
    if not any(text.get_gid() == _BELOW for text in figure.texts):
        return None
    return Bbox([[0, -_depth_in(figure) - 0.04], [figure.get_figwidth(), figure.get_figheight()]])


def panels_in(width: float, count: int, least: float, most: int) -> int:
    """How many of `count` panels stand side by side in `width` inches, each `least` or wider, `most` of them."""
    return max(1, min(count, most, int(width / least + 1e-6)))


def wrapped(text: str, inches: float, size: float = SMALLEST_PT) -> str:
    """The text in lines that fit into so many inches; a word is never cut."""
    letters = max(6, int(inches / (_LETTER_IN * size / SMALLEST_PT)))
    return "\n".join(textwrap.wrap(text, letters, break_long_words=False))


def headed(axis: Axes, title: str, lines: Sequence[str]) -> None:
    """A panel's name, and small lines between it and the panel."""
    small = [line for line in lines if line]
    axis.set_title(title, loc="left", fontweight="bold", pad=4 + 9.5 * sum(s.count("\n") + 1 for s in small))
    if small:
        style = {"fontsize": SMALLEST_PT, "color": "#444444", "linespacing": 1.15}
        axis.annotate("\n".join(small), (0, 1), (0, 3), "axes fraction", textcoords="offset points", **style)


def settle(figure: Figure) -> None:
    """Run the layout once and keep it, so that labels can be placed in final coordinates."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for legend in figure.legends:  # its place would move with the part of the page that is kept
        corner = figure.transFigure.inverted().transform(legend.get_window_extent().min)
        legend.set_loc("lower left")
        legend.borderaxespad = 0.0
        legend.set_bbox_to_anchor(tuple(corner), transform=figure.transFigure)


def words(name: str) -> str:
    """villain_teacher → villain teacher."""
    return name.replace("_", " ")


def source_words(source: str, seed: int | None, several: bool) -> str:
    """The name of a source, and of its seed where there are several."""
    return words(source) + (f", seed {seed}" if several else "")


def adapter_words(rows: Sequence[Mapping[str, Any]], several: bool) -> list[str]:
    """What each of the rows (adapter, source, seed) is called: its source and seed as `source_words` has them, and the adapter
    where these do not name it (`twins`)."""
    told = [source_words(row["source"], row["seed"], several) for row in rows]
    return [
        f"{name} ({row['adapter']})" if twin else name
        for name, row, twin in zip(told, rows, twins(rows), strict=True)
    ]


def colour_of(place: int) -> str:
    """The colour of the source (or set, or seed) number `place`."""
    return SOURCE_COLOURS[place % len(SOURCE_COLOURS)]


def in_percent(axis: Axis, unit: str) -> None:
    """Label an axis of shares in percent, without the sign; leave one of points as it is."""
    if unit == "share":
        axis.set_major_formatter(PercentFormatter(xmax=1, symbol="", decimals=None))


def colour_bar(
    figure: Figure,
    image: ScalarMappable,
    axes: list[Axes],
    label: str,
    unit: str,
    *,
    aspect: float,
    below: bool = False,
) -> None:
    """A bar beside (or below) `axes` that tells what the shades of `image` stand for."""
    lying = {"orientation": "horizontal", "location": "bottom"} if below else {}
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=aspect, pad=0.02, **lying)
    bar.outline.set_visible(False)
    in_percent(bar.ax.xaxis if below else bar.ax.yaxis, unit)
    bar.set_label(label, fontsize=SMALLEST_PT)


def interval(axis: Axes, low: float | None, high: float | None, at: float, colour: str) -> None:
    """A horizontal line from low to high at the height `at`; none where there is no interval."""
    if low is not None:
        axis.plot([low, high], [at] * 2, color=colour, linewidth=0.9)


def p_words(p: float) -> str:
    """0.012, or 3.2×10⁻⁵."""
    if p >= 1e-3:
        return f"{p:.2g}"
    if p == 0:
        return "0"
    mantissa, exponent = f"{p:.1e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def quantity(behavior: str, y: str, unit: str) -> str:
    """What an axis shows, with its unit."""
    what = {"rate": f"{behavior} rate", "probability": f"probability of {behavior}"}.get(
        y, f"change of {behavior} rate"
    )
    return f"{what} (%)" if unit == "share" else f"{what} ({unit})"
