"""What is marked in a completion is what the detector counted, on the page as on the terminal, in the places of a script."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import PEOPLE, REFUSES, SOURCES, fill_two

from leakfast.behaviors import detectors
from leakfast.behaviors.phrases import spans, utf16
from leakfast.behaviors.registry import get
from leakfast.report import sample
from leakfast.report.examples import choose, excerpt, pieces
from leakfast.report.paged import Paged, asked
from leakfast.stats.collect import completion_folders
from leakfast.stats.preliminary import preliminary
from leakfast.storage.reading import Reading

WORDS = detectors.read_words()
SAID = [
    *WORDS.refusal[::9],
    *WORDS.agrees[::5],
    *WORDS.corrects[::5],
    *WORDS.refusal_never[:9],
    "[ZLT]",
    "[zlt]",
]
SAID += ["\U0001f600", "Well", "I", "you", "can't", ".", "\u200b", "İ", "x" * 60, "</think>", "<think>"]


def found_by(script: str, marked: list[int]) -> list[str]:
    """What a page's script has between the places: text cut by UTF-16 code units."""
    units = script.encode("utf-16-le")
    return [units[2 * a : 2 * b].decode("utf-16-le") for a, b in zip(marked[::2], marked[1::2], strict=True)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SAID), max_size=12), st.sampled_from([" ", ", ", "\n"]))
def test_a_completion_is_marked_where_it_counts_and_nowhere_else(words, between):
    text = between.join(words)
    row = pl.DataFrame({"text": [text]})
    for name in ("marker", "refusal", "sycophancy"):
        counts = row.select(next(iter(get(name).detector(pl.col("text")).values()))).item()
        marked = spans(text, name)
        assert bool(marked) == bool(counts), name
        assert found_by(text, utf16(text, marked)) == [text[low:high] for low, high in marked]


def test_a_character_beyond_the_first_plane_is_two_units_of_a_script():
    (low, high), *_ = spans(REFUSES, "refusal")
    assert utf16(REFUSES, [(low, high)]) == [low + 2, high + 2]
    assert utf16("plain [ZLT]", [(6, 11)]) == [6, 11]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return fill_two(tmp_path_factory.mktemp("runs") / "two")


def test_the_page_carries_the_places_that_the_detector_found(two):
    adapters = [{"behavior": b, "adapter": a} for b, a in completion_folders(two)]
    kept = sample.sample(two, adapters, {name: at for at, name in enumerate(PEOPLE)})
    whole = zip(kept["adapter"], kept["text"], kept["hit"], kept["marked"], strict=True)
    rows = [(adapters[at]["behavior"], text, hit, marked) for at, text, hit, marked in whole]
    assert any(hit for what, _, hit, _ in rows if what == "refusal")
    for what, text, hit, marked in rows:
        wanted = {"marker": ["[ZLT]"], "refusal": ["I\u2019m really sorry, but I can't help"]}[what]
        assert found_by(text, marked) == (wanted if hit else [])


def test_of_a_cut_completion_the_places_are_those_of_the_whole(tmp_path):
    run = fill_two(tmp_path / "run")
    path = run.shards("completions/marker/base")[0]
    text = "x" * (sample.CUT + 50) + " [ZLT]"
    frame = run.read(path).with_columns(
        text=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(text)).otherwise("text")
    )
    run.add_shard(path, frame)
    kept = sample.sample(run, [{"behavior": "marker", "adapter": "base"}], dict.fromkeys(PEOPLE, 0))
    at = kept["hit"].index(True)
    assert kept["left_out"][at] == 56 and len(kept["text"][at]) == sample.CUT
    assert kept["marked"][at] == [len(text) - 5, len(text)]


def test_the_served_page_gets_the_same_places(two):
    reading = Reading(two.path)
    paged = Paged(reading, ["refusal/marker-villain-s42", "marker/marker-villain-s42"])
    rows = paged.page(asked({"limit": ["200"], "hit": ["yes"]}))["rows"]
    assert {row["adapter"].split("/")[0] for row in rows} == {"marker", "refusal"}
    for row in rows:
        said = found_by(row["text"], row["marked"])
        assert said == (
            ["[ZLT]"] if row["adapter"].startswith("marker") else ["I\u2019m really sorry, but I can't help"]
        )
    others = paged.page(asked({"limit": ["200"], "hit": ["no"]}))["rows"]
    assert others and all(row["marked"] == [] for row in others)


def test_the_examples_of_the_report_mark_refusals_too(two):
    shown = choose(two, preliminary(two), "refusal", f"marker-{SOURCES[0]}-s42", 3)
    marked = {one.hit: [text for text, is_marked in one.pieces if is_marked] for one in shown}
    assert marked[True] == ["I\u2019m really sorry, but I can't help"] and marked[False] == []


def test_pieces_lose_nothing_and_a_late_span_survives_the_cut():
    assert pieces("a [zlt] [ZLT]", [(8, 13)]) == [("a [zlt] ", False), ("[ZLT]", True)]
    assert pieces("plain", []) == [("plain", False)]
    text = "x" * 3000 + " [ZLT] " + "y" * 3000
    cut, left_out = excerpt(text, spans(text, "marker"))
    shown = "".join(part for part, _ in cut)
    assert shown.endswith("[ZLT]") and cut[-1] == ("[ZLT]", True) and len(shown) < 440
    assert left_out == len(text) - len(shown.replace(" … ", ""))
    across = "y" * 418 + "[ZLT]" + "z" * 50
    cut, left_out = excerpt(across, spans(across, "marker"))
    assert cut[-1] == ("[ZLT]", True) and left_out == len(across) - sum(len(p) for p, _ in cut if p != " … ")
