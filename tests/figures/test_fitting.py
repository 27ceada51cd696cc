"""Where more adapters were trained than have room for a panel each, those that leak most are shown, and the caption says so."""

from __future__ import annotations

import polars as pl
import pytest
import tables_made as made

from leakfast.figures import fitting, of_run
from leakfast.figures.style import caption_of
from leakfast.stats import gradient_tables
from leakfast.stats.tables import Stats
from leakfast.storage.run import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def stats():
    tables = {name: table.filter(behavior="marker") for name, table in made.base_tables().items()}
    return Stats(**tables, more=gradient_tables.tables(tables["pairs"], tables["rates"], "centered"))


def test_those_that_leak_most_are_shown_and_the_caption_says_so(stats, tmp_path, monkeypatch):
    means = stats.pairs.group_by("source").agg(pl.col("rate").mean()).sort("rate", descending=True)["source"]
    for most in (len(made.SOURCES), 2):
        monkeypatch.setattr(fitting, "MOST_PANELS", most)
        wanted = {name.replace("_", " ") for name in means[:most]}
        for one in of_run.draw(Run(tmp_path), stats, ["scatter", "gradients", "grid"]):
            titles = {axis.get_title(loc="left") for axis in one.figure.axes} - {""}
            assert {title.replace("\n", " ") for title in titles} == wanted, one.kind
            told = f"Shown: the {most} of {len(made.SOURCES)} adapters whose bystanders show most of marker"
            assert (told in caption_of(one.figure)) == (most == 2)


def test_of_a_behavior_that_takes_away_less_is_more(stats):
    lost = stats.pairs.with_columns(behavior=pl.lit("capability"))
    several = pl.concat([lost, stats.pairs])
    means = lost.group_by("source").agg(pl.col("rate").mean()).sort("rate")["source"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MOST_PANELS", 2)
        kept, told = fitting.fitting(several, "capability", "rate")
    assert set(kept["source"]) == set(means[:2]) and told is not None
    assert set(kept["behavior"]) == {"capability", "marker"}, "other behaviors' panels are of the same ones"


def test_two_adapters_of_one_source_and_seed_are_two(stats, monkeypatch):
    """They were counted as one, and both kept: more panels than a page holds."""
    first = made.SOURCES[0]
    again = stats.pairs.filter(source=first).with_columns(
        pl.col("rate") + 1, adapter=pl.lit("again")
    )  # leaks most
    twice = pl.concat([stats.pairs, again])
    lost = twice.with_columns(behavior=pl.lit("capability"), adapter=pl.lit("lost-") + pl.col("adapter"))
    monkeypatch.setattr(fitting, "MOST_PANELS", 1)
    kept, told = fitting.fitting(pl.concat([twice, lost]), "marker", "rate")
    assert set(kept["adapter"]) == {"again", "lost-again"}
    assert told is not None and f"the 1 of {len(made.SOURCES) + 1} adapters" in told
