"""Numbers on their way to a terminal: rates with their intervals, correlations, p, and rows of little bars. Demands
values at full precision; rounds them, and shows what is not known as a dash."""

from __future__ import annotations

from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
NONE = "–"


def scale_of(unit: str) -> int:
    """What a rate is multiplied by to be shown: shares are shown in percent, points as they are."""
    return 100 if unit == "share" else 1


def sign_of(unit: str) -> str:
    """What stands behind a heading of rates."""
    return "%" if unit == "share" else "0–100"


def amount(value: float | None, unit: str, form: str = ".1f") -> str | None:
    """A rate, or a change of one; None where it is not known."""
    return None if value is None else f"{scale_of(unit) * value:{form}}"


def with_interval(
    value: float | None, low: float | None, high: float | None, unit: str, form: str = ".1f"
) -> str | None:
    """`80.0 (67.7–88.4)`, the brackets left out where no interval is known."""
    shown = amount(value, unit, form)
    if shown is None or low is None or high is None:
        return shown
    between = "–" if form == ".1f" else " to "
    return f"{shown} ({amount(low, unit, form)}{between}{amount(high, unit, form)})"


def between(low: float | None, high: float | None, form: str = "+.2f") -> str | None:
    """`+0.42 to +0.59`, the ends of an interval of ρ; None where one is not known."""
    return None if low is None or high is None else f"{low:{form}} to {high:{form}}"


def rho(value: float | None, low: float | None = None, high: float | None = None) -> str | None:
    """`+0.51 (+0.42 to +0.59)`."""
    if value is None:
        return None
    return f"{value:+.2f}" if low is None or high is None else f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def p_value(p: float | None) -> str | None:
    return None if p is None else f"{p:.2g}"


def bars(values: Sequence[float | None], low: float, high: float) -> str:
    """A bar a value, the lowest at `low` and the highest at `high`; a dot where a value is not known."""
    span = high - low
    steps = len(_BARS) - 1
    return "".join(
        "·"
        if value is None
        else _BARS[min(steps, max(0, round(steps * (value - low) / span)))]
        if span > 0
        else _BARS[0]
        for value in values
    )


def binned(values: Sequence[float], bins: int) -> list[float]:
    """`values` in order as at most `bins` means of runs of them that are equally long, give or take one."""
    n = min(bins, len(values))
    edges = [len(values) * i // n for i in range(n + 1)] if n else [0]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; a dash where it is not known."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
