"""Names beside points of a panel, none over another: a few places around each point are weighed, and a name that fits
nowhere is left out. Demands axes whose layout is settled; leaves who is named to the callers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from leakfast.figures.style import SMALLEST_PT, wrapped

_HALO = withStroke(linewidth=1.2, foreground="white")
_NEAR = 5  # points from a point to its name; farther away a line joins them
_DISTANCES = (_NEAR, 9, 14, 20, 28, 38, 50)
_AROUND = np.array(  # direction, and which corner of the name is tied to the place
    [
        (-1, 0, 1, 0.5),
        (1, 0, 0, 0.5),
        (-0.7, 0.7, 1, 0),
        (0.7, 0.7, 0, 0),
        (-0.7, -0.7, 1, 1),
        (0.7, -0.7, 0, 1),
        (0, 1, 0.5, 0),
        (0, -1, 0.5, 1),
    ]
)
_BESIDE = ("left", "center", "right"), ("bottom", "center", "top")
_NEVER, _MOST = (1e6, 8.0)  # cost of a place that is none, and of the worst that is taken


def name_points(
    axis: Axes,
    named: Sequence[tuple[str, tuple[float, float]]],
    points: np.ndarray,
    *,
    most: int,
    bold: frozenset[str] = frozenset(),
    wrap_in: float = 1.0,
) -> list[str]:
    """Write up to `most` names of `named` (name, data coordinates; the first come first) and return those written.

    points: (N, 2) data coordinates of what is not to be hidden. Of 56 places around a point the one is taken
    where the name and the line to it cover the fewest points; a place outside the panel, over another name or over
    several points is none."""
    renderer = axis.figure.canvas.get_renderer()
    scale = axis.figure.dpi / 72
    frame = axis.get_window_extent(renderer)
    hidden = axis.transData.transform(np.asarray(points, dtype=np.float64))
    boxes, lines, written = np.empty((0, 4)), np.empty((0, 2)), []
    for name, spot in named:
        if len(written) == most:
            break
        words = wrapped(name, wrap_in)
        weight = "bold" if name in bold else "normal"
        size = _size(axis, words, weight, renderer)
        start = axis.transData.transform(spot)
        places = list(itertools.product(_DISTANCES, range(len(_AROUND))))
        ends = np.array([_AROUND[k, :2] * distance for distance, k in places])
        at = start + ends * scale
        corner = at - np.array([_AROUND[k, 2:] for _, k in places]) * size
        found = np.hstack([corner, corner + size])
        away = np.array([distance > _NEAR for distance, _ in places])
        paths = start + np.linspace(0.15, 1, 9)[None, :, None] * (at - start)[:, None]
        paths[~away] = np.nan
        cost = _cost(found, paths, hidden, boxes, lines, frame) + 0.1 * np.array([d for d, _ in places])
        best = int(np.argmin(cost))
        if cost[best] >= _MOST:
            continue
        _write(axis, words, spot, ends[best], _AROUND[places[best][1], 2:], bool(away[best]), weight)
        boxes = np.vstack([boxes, found[best]])
        lines = np.vstack([lines, paths[best][away[best : best + 1].repeat(9)]])
        written.append(name)
    return written


def _size(axis: Axes, words: str, weight: str, renderer) -> np.ndarray:
    text = axis.text(0, 0, words, fontsize=SMALLEST_PT, fontweight=weight, linespacing=1.05)
    box = text.get_window_extent(renderer)
    text.remove()
    return np.array([box.width, box.height])


def _inside(points: np.ndarray, boxes: np.ndarray, pad: float) -> np.ndarray:
    """(K,) how many of the points (N, 2) lie in each of the boxes (K, 4)."""
    x, y = points[None, :, 0], points[None, :, 1]
    held = (x > boxes[:, :1] - pad) & (x < boxes[:, 2:3] + pad)
    return (held & (y > boxes[:, 1:2] - pad) & (y < boxes[:, 3:] + pad)).sum(1)


def _cost(
    found: np.ndarray, paths: np.ndarray, hidden: np.ndarray, boxes: np.ndarray, lines: np.ndarray, frame
) -> np.ndarray:
    """(K,) points hidden by each place; _NEVER more where it is none."""
    cost = 6.0 * _inside(hidden, found, 3.0) + 6.0 * _inside(lines, found, 1.0)
    near = np.abs(paths[:, :, None] - hidden[None, None]).max(-1) < 2.5  # a line over a point
    cost += 0.5 * near.any(1).sum(1)
    outside = (found[:, 0] < frame.x0) | (found[:, 2] > frame.x1)
    outside |= (found[:, 1] < frame.y0) | (found[:, 3] > frame.y1 + 2)
    cost += _NEVER * outside
    for box in boxes:
        apart = (found[:, 0] >= box[2] + 2) | (found[:, 2] <= box[0] - 2)
        apart |= (found[:, 1] >= box[3] + 1) | (found[:, 3] <= box[1] - 1)
        through = _inside(paths.reshape(-1, 2), box[None], 1.0)[0] and np.array(
            [_inside(path, box[None], 1.0)[0] for path in paths]
        )
        cost += _NEVER * ~apart + 6.0 * through
    return cost


def _write(axis: Axes, words: str, spot, offset, corner, joined: bool, weight: str) -> Text:
    """The name, tied by its corner to the place `offset` points from the spot."""
    line = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 2}
    (horizontal, vertical) = (names[int(2 * part)] for names, part in zip(_BESIDE, corner, strict=True))
    return axis.annotate(
        words,
        spot,
        tuple(offset),
        textcoords="offset points",
        fontsize=SMALLEST_PT,
        fontweight=weight,
        linespacing=1.05,
        ha=horizontal,
        va=vertical,
        multialignment=horizontal,
        color="#333333",
        zorder=5,
        arrowprops=line if joined else None,
        path_effects=[_HALO],
        gid="name",
    )
