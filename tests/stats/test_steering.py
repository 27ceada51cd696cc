"""The table `steering` of made-up shards: changes are of what was asked and drawn alike with and without the arm."""

from __future__ import annotations

import pytest
from steered_made import PLAIN, drawn

from leakfast.stats.steering import table
from leakfast.storage.run import Run


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run").create()
    drawn(made, None, 1)
    return made


def test_a_change_is_against_the_adapter_as_it_is(run):
    drawn(run, 2.0, 3)
    (row,) = table(run).rows(named=True)
    assert (row["on_source"], row["on_source_change"], row["change"]) == (0.75, 0.5, 0.5)
    assert row["change_reason"] is None


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"questions_sha256": "b"}, "was asked other questions than without it"),
        ({"drawn": "e"}, "was drawn otherwise"),
        ({"personas": {**PLAIN["personas"], "comedian": "q"}}, "had another prompt as comedian"),
    ],
)
def test_what_was_asked_or_drawn_otherwise_has_a_reason_in_place_of_a_change(run, meta, why):
    """Questions go by their numbers: those of one set were paired with those of another."""
    drawn(run, 2.0, 3, **meta)
    (row,) = table(run).rows(named=True)
    assert row["change"] is None and row["on_source_change"] is None and why in row["change_reason"]
    drawn(run, 0.0, 1, **meta)
    row = table(run).filter(strength=2.0).row(0, named=True)
    assert row["change"] == 0.5, "an arm of strength 0 that was asked alike is the adapter as it is"
