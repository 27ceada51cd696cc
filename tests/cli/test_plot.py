"""`leakfast plot`: the kinds and formats that were asked, as wide as asked, what is absent with its reason, and refusals
that say what to type."""

from __future__ import annotations

import json

import polars as pl
import pytest
from steered_made import drawn
from tables_made import SOURCES, base_tables

from leakfast.cli.main import main
from leakfast.stats.imported import IMPORTED
from leakfast.storage.run import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of imported rates and pairs: two layers, no centroids."""
    path = tmp_path_factory.mktemp("plot") / "run"
    opened = Run(path).create()
    made = {name: table.filter(behavior="marker") for name, table in base_tables().items()}
    people = made["rates"].select("persona", "category").unique().drop_nulls().rows()
    told = {"categories": dict(people), "named": list(dict(people)), "sources": SOURCES, "related_to": {}}
    opened.add_file("personas.json", json.dumps(told).encode())
    opened.add_shard(f"{IMPORTED}/rates.parquet", made["rates"])
    opened.add_shard(f"{IMPORTED}/pairs.parquet", made["pairs"])
    from leakfast.stats.tables import stats

    stats(path, permutations=9, bootstraps=20)
    return path


def test_files_of_the_kinds_and_formats_asked(run, tmp_path, capsys):
    out = tmp_path / "drawn"
    asked = ["--only", "grid,layers", "--format", "svg,pdf", "--width", "column", "--out", str(out), "--json"]
    assert main(["plot", str(run), *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["grid-column", "layers-marker-column"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{n}.{kind}" for n in names for kind in ("svg", "pdf")
    )
    assert [row["kind"] for row in told["figures"]] == ["grid", "layers"]
    assert all(row["width_in"] == 3.5 for row in told["figures"]) and told["absent"] == []
    assert "marker, all sources" in told["figures"][0]["caption"]
    assert (out / "grid-column.pdf").read_bytes().startswith(b"%PDF")


def test_what_is_not_there_is_said_and_the_code_is_3(run, tmp_path, capsys):
    code = main(["plot", str(run), "--only", "map,trajectory", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert code == 3
    assert "not drawn: map: the run holds no centroids" in said.err
    assert "not drawn: trajectory: nothing was measured at points of training" in said.err
    assert said.out == ""


def test_files_lie_in_the_run_by_default_and_the_manifest_knows_them(run, capsys):
    main(["plot", str(run), "--only", "partials", "--format", "png"])
    path = Run(run).open().path / "figures" / "partials-marker-page.png"
    assert capsys.readouterr().out.split() == [str(path)]
    assert Run(run).open().has("figures/partials-marker-page.png")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--only", "gird"], "--only holds 'gird'"),
        (["--format", "jpg"], "--format holds 'jpg', but there are png, pdf, svg"),
        (["--layer", "7"], "layer 7 asked, but"),
        (["--only", ","], "--only is empty"),
    ],
)
def test_refusals_say_what_there_is(run, asked, told, capsys):
    assert main(["plot", str(run), *asked]) == 2
    assert told in capsys.readouterr().err


def test_the_order_by_cluster_needs_centroids(run, tmp_path, capsys):
    assert main(["plot", str(run), "--only", "matrix", "--order", "cluster", "--out", str(tmp_path)]) == 3
    assert "choose category or leakage" in capsys.readouterr().err


def test_orders_put_the_rows_as_they_say(run):
    from leakfast import figures
    from leakfast.stats.tables import read

    table = read(run).more["matrix"]
    by = figures.matrix(table, behavior="marker", order="leakage").axes[:3]
    rows = [label.get_text() for axis in by for label in axis.get_yticklabels()]
    means = table.filter(pl.col("role") != "source").group_by("persona").agg(pl.col("rate").mean())
    value = {name.replace("_", " "): mean for name, mean in means.rows()}
    shown = [value[name] for name in rows]
    assert len(rows) == 111 and shown == sorted(shown, reverse=True)


def test_steering_is_drawn_of_a_run_that_holds_nothing_else(tmp_path, capsys):
    run = Run(tmp_path / "run").create()
    for strength, hits in ((0.0, 1), (2.0, 3)):
        drawn(run, strength, hits)
    assert main(["plot", str(run.path), "--only", "steering", "--format", "png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["behavior"]) for row in told["figures"]] == [("steering", "marker")]
    assert run.shards("figures") == ["figures/steering-marker-page.png"]
    assert main(["plot", str(run.path), "--only", "steering,layers"]) == 2, "rates have nothing to count"
