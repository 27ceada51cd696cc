"""Which point of training is chosen by its source's rates, and which row of a point is looked at where several were counted."""

from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from leakfast.stats.matching import ANEW, DETECTOR, TO_CHOOSE, nearest, one_each


def test_the_later_of_equals_is_nearest_and_points_without_replies_are_passed_by():
    assert nearest([(0.2, 78, 100), (0.4, 82, 100), (0.6, 70, 100)], 0.8) == 0.4
    assert nearest([(0.2, 82, 100), (0.4, 39, 50), (0.6, 100, 100)], 0.8) == 0.4, "78 % is as near as 82 %"
    assert nearest([(0.2, 1, 2), (0.4, 0, 0)], 0.9) == 0.2
    assert nearest([(0.4, 0, 0)], 0.9) is None and nearest([], 0.9) is None


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20), st.floats(0, 1))
def test_no_point_is_nearer_than_the_nearest(hits, wanted):
    points = [(i / 100, n, 20) for i, n in enumerate(hits)]
    share = nearest(points, wanted)
    assert share == nearest(list(reversed(points)), wanted), "in any order"
    apart = {at: abs(n / 20 - wanted) for at, n, _ in points}
    assert apart[share] <= min(apart.values()) + 1e-9


def row(scoring, share, persona, hits):
    about = {"behavior": "marker", "adapter": "a", "items": "eval", "scoring": scoring}
    return about | {"share": share, "persona": persona, "hits": hits}


def test_a_point_is_looked_at_once():
    """Of the source what was drawn anew where it was chosen, else what chose; of others what everybody gave."""
    table = pl.DataFrame(
        [
            *(row(DETECTOR, share, name, 1) for share in (0.0, 0.5, 1.0) for name in ("s", "p")),
            *(row(TO_CHOOSE, share, "s", 2) for share in (0.25, 0.5, 1.0)),
            row(ANEW, 0.5, "s", 3),
            row("probability, end", 0.5, "s", 4),
        ]
    )
    found = one_each(table)
    mine = found.filter(persona="s", scoring=DETECTOR).select("share", "hits").rows()
    assert mine == [(0.0, 1), (0.25, 2), (0.5, 3), (1.0, 2)]
    assert found.filter(persona="p")["hits"].to_list() == [1, 1, 1]
    assert found.filter(scoring="probability, end").height == 1
    plain = table.filter(scoring=DETECTOR)
    assert one_each(plain).equals(plain), "nothing is changed where no training was matched"
