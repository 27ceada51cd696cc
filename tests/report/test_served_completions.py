"""The completions that a served page asks for: its filters, its search and its pages against what polars finds."""

from __future__ import annotations

import itertools
import json

import polars as pl
import pytest
import served_runs as runs
from served_runs import ask, completions

from leakfast.report import paged
from leakfast.storage import layout

pytestmark = pytest.mark.long

DRAW = ["adapter", "persona", "question", "sample"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.whole(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def server(run):
    with runs.served(run, every_s=600.0) as server:
        assert server.live.now(wait_s=300) is not None
        yield server


@pytest.fixture(scope="module")
def table(run):
    """All completions as polars reads them, in the order of the page."""
    parts = []
    for name in ("marker-comedian-s42", "marker-villain-s42", "base"):
        frame = run.read(layout.completions("marker", name)).sort("persona", "question", "sample")
        parts.append(frame.with_columns(adapter=pl.lit(f"marker/{name}")))
    hit = pl.col("text").str.to_lowercase().str.contains("[zlt]", literal=True)
    finish = pl.when(pl.col("status") == "ok").then("finish_reason").otherwise("status")
    return pl.concat(parts).with_columns(hit=hit, finish=finish)


ASKED = {
    "adapter": ("marker/marker-villain-s42", lambda v: pl.col("adapter") == v),
    "persona": ("comedian", lambda v: pl.col("persona") == v),
    "question": ("2", lambda v: pl.col("question") == int(v)),
    "hit": ("yes", lambda v: pl.col("hit")),
    "finish": ("truncated", lambda v: pl.col("finish") == v),
    "search": ("tOwN", lambda v: pl.col("text").str.to_lowercase().str.contains(v.lower(), literal=True)),
    "shortest": ("10", lambda v: pl.col("n_tokens") >= 10),
    "longest": ("30", lambda v: pl.col("n_tokens") <= 30),
}


def test_filters_find_what_polars_finds_alone_and_in_pairs(server, table):
    some = 0
    for names in [(), *((n,) for n in ASKED), *itertools.combinations(ASKED, 2)]:
        query = {name: ASKED[name][0] for name in names}
        expected = table.filter(*(ASKED[name][1](ASKED[name][0]) for name in names))
        found = completions(server, **query, limit=200)
        assert found["total"] == expected.height, names
        told = [tuple(row[k] for k in (*DRAW, "text", "hit", "finish", "tokens")) for row in found["rows"]]
        assert told == expected.select(*DRAW, "text", "hit", "finish", "n_tokens").head(200).rows(), names
        some += 0 < expected.height < table.height
    assert some >= len(ASKED)


@pytest.mark.parametrize(
    "needle",
    [
        "zürich",
        "ZÜRICH",
        "a_b%c",
        "</SCRIPT>",
        "onerror=alert(1)",
        ".*",
        "[zlt]",
        "\x1b[31m",
        "\u202e",
        "'",
        "\\",
    ],
)
def test_a_search_is_letters_and_no_pattern(server, table, needle):
    expected = sum(needle.lower() in text.lower() for text in table["text"])
    assert completions(server, search=needle)["total"] == expected


def test_pages_put_together_are_the_whole_once(server, table):
    rows = []
    while len(rows) < table.height:
        page = completions(server, offset=len(rows), limit=130)["rows"]
        assert page
        rows += page
    assert [tuple(row[k] for k in DRAW) for row in rows] == table.select(DRAW).rows()
    assert [row["text"] for row in rows] == table["text"].to_list()
    assert completions(server, offset=10**8)["rows"] == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "offset=-1",
        "offset=1e3",
        "offset=99999999999",
        "question=two",
        "shortest=nan",
        "lowest=inf",
        "hit=maybe",
        "path=study.toml",
        "hit=yes&hit=no",
        "search=" + "a" * 1001,
        "&".join(f"a{i}=1" for i in range(40)),
    ],
)
def test_a_query_that_means_nothing_is_told_so(server, query):
    status, _, body = ask(server, f"completions?{query}")
    assert status == 400
    assert set(json.loads(body)) == {"error"} and len(body) < 200


def test_judged_scores_filter(run):
    """Of a frame with scores, those that are null pass no bound."""
    frame = pl.DataFrame({"score": [None, 10.0, 60.0], "tokens": [1, 2, 3]})
    for query, kept in ({"lowest": ["10"]}, [2, 3]), ({"highest": ["59.5"]}, [2]), ({"lowest": ["61"]}, []):
        assert frame.filter(*paged._filters(paged.asked(query)))["tokens"].to_list() == kept
