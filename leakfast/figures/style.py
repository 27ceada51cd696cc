"""How every figure of the house looks, and how one becomes bytes. Demands matplotlib (no display, no pyplot
state); the same figure gives the same bytes."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

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
_NOTE_PT, _GAP_IN = 6.5, 0.06  # a footnote's letters, and its distance from the figure
PANEL_IN = (2.4, 2.35)  # three panels fill a text width of 7.2 inches

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
    if note:
        lines = textwrap.wrap(note, max(40, int(22 * figure.get_figwidth())))
        place = (0.01, -_GAP_IN / figure.get_figheight())
        with matplotlib.rc_context(STYLE):
            figure.text(
                *place, "\n".join(lines), fontsize=_NOTE_PT, color=STAR, ha="left", va="top", linespacing=1.25
            )
    return figure


def _with_footnote(figure: Figure) -> Bbox | None:
    """The part of the page to keep, in inches: the figure and, where there is one, the footnote below it."""
    lines = sum(text.get_text().count("\n") + 1 for text in figure.texts if text.get_position()[1] < 0)
    if not lines:
        return None
    below = _GAP_IN + lines * 1.3 * _NOTE_PT / 72 + 0.04
    return Bbox([[0, -below], [figure.get_figwidth(), figure.get_figheight()]])


def settle(figure: Figure) -> None:
    """Run the layout once and keep it, so that labels can be placed in final coordinates."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def words(name: str) -> str:
    """villain_teacher → villain teacher."""
    return name.replace("_", " ")


def source_words(source: str, seed: int | None, several: bool) -> str:
    """The name of a source, and of its seed where there are several."""
    return words(source) + (f", seed {seed}" if several else "")


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
    **ticks: Any,
) -> None:
    """A bar beside `axes` that tells what the shades of `image` stand for; ticks: settings of its ticks."""
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=aspect, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(**ticks)
    in_percent(bar.ax.yaxis, unit)
    bar.set_label(label, fontsize=6.5)


def interval(axis: Axes, low: float | None, high: float | None, at: float, colour: str) -> None:
    """A horizontal line from low to high at the height `at`; none where there is no interval."""
    if low is not None:
        axis.plot([low, high], [at] * 2, color=colour, linewidth=0.9)


def p_words(p: float) -> str:
    """0.012, or 3×10⁻⁵ as mathtext."""
    if p >= 1e-3:
        return f"{p:.2g}"
    mantissa, exponent = f"{p:.0e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def quantity(behavior: str, y: str, unit: str) -> str:
    """What an axis shows, with its unit."""
    what = f"{behavior} rate" if y == "rate" else f"change of {behavior} rate"
    return f"{what} (%)" if unit == "share" else f"{what} ({unit})"
