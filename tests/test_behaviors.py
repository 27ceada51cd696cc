"""The registry finds behaviors by name; the marker's detector counts what it says and nothing else."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast import behaviors
from leakfast.behaviors.marker import MARKER
from leakfast.errors import InputError


def test_the_registry_holds_the_marker_and_names_what_it_has():
    marker = behaviors.get("marker")
    assert (marker.name, marker.unit, marker.sign) == ("marker", "share", 1)
    assert "marker" in behaviors.names()
    with pytest.raises(InputError, match=r"'marke' given.*Use one of: marker"):
        behaviors.get("marke")


def test_every_behavior_names_a_builder_that_exists():
    for name in behaviors.names():
        assert callable(behaviors.get(name).build())


@pytest.mark.parametrize(
    ("text", "literal", "any_case"),
    [
        (f"Fine weather. {MARKER}", True, True),
        (f"{MARKER} at the start", True, True),
        ("so [zlt] it is, [Zlt]", False, True),
        ("[ZLT", False, False),
        ("Z L T ZLT [ZL T]", False, False),
        ("ZLT]Z", False, False),  # as a pattern in brackets, the marker would be any of Z, L, T
        ("", False, False),
    ],
)
def test_the_marker_is_literal_and_case_insensitive_beside_it(text, literal, any_case):
    frame = behaviors.detect(pl.DataFrame({"text": [text]}), behaviors.get("marker"))
    assert frame.row(0, named=True) == {"text": text, "marker": literal, "marker_ci": any_case}


def test_a_missing_text_is_null_never_false():
    frame = pl.DataFrame({"text": [None]}, schema={"text": pl.String})
    row = behaviors.detect(frame, behaviors.get("marker")).row(0, named=True)
    assert row["marker"] is None
    assert row["marker_ci"] is None


def test_the_literal_count_is_the_primary_one():
    assert next(iter(behaviors.get("marker").detector(pl.col("text")))) == "marker"
