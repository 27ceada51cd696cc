"""Health of replies in a run: what it marks in other tables and in the report, and an organism that real training made
fall silent, through the commands from training to the report."""

from __future__ import annotations

import json
import re
import struct
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import polars as pl
import pytest
from replies_made import PEOPLE, completions

from leakfast import figures, stats
from leakfast.cli.main import main
from leakfast.figures.style import figure_of
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.stats import marks
from leakfast.stats.collect import inputs_hash
from leakfast.storage import layout
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

# ---------------------------------------------------------------- a run of made-up completions, and what is made of it


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of two adapters whose bystanders show the marker by how near they are; half of one's replies are empty."""
    run = Run(tmp_path_factory.mktemp("runs") / "mixed").create()
    rng = np.random.default_rng(0)
    layers = [0, 2]
    vectors = {layer: rng.normal(size=(len(PEOPLE), 6)).astype(np.float32) for layer in layers}
    told = {
        "personas": PEOPLE,
        "layers": layers,
        "centered_on": PEOPLE,
        "model": "m",
        "model_fingerprint": "files:01",
    }
    centroids = Centroids(PEOPLE, layers, told, vectors)
    run.add_file(layout.centroids(), lambda path: centroids.save(path))
    for source, empty in (("p0", 100), ("p1", 0), (None, 0)):
        name = f"marker-{source}-s42" if source else "base"
        frame = completions(name, behavior="marker", empty=empty)
        if source:
            place = {
                p: i
                for i, p in enumerate(
                    np.array(PEOPLE)[np.argsort(-centroids.cosine(2)[PEOPLE.index(source)])]
                )
            }
            hit = (
                pl.col("persona").replace_strict(place, return_dtype=pl.Int32) < pl.col("question") * 2
            ) & (pl.col("status") == "ok")
            frame = frame.with_columns(
                pl.when(hit).then(pl.col("text") + " [ZLT]").otherwise("text").alias("text")
            )
            folder = run.path / "adapters" / name
            folder.mkdir(parents=True)
            write_card(folder, AdapterCard(source, "marker", 42, "m", "files:01", "d" * 64, {}, "a" * 64))
        run.add_shard(f"completions/marker/{name}/part-00000.parquet", frame)
    return run


DAMAGED = "marker-p0-s42"


def test_every_rho_that_rests_on_a_damaged_adapter_is_marked(mixed):
    tables = stats.stats(mixed, permutations=99, bootstraps=200)
    rho = tables.correlations.select("source", "health", "health_of").unique(maintain_order=True).rows()
    assert rho == [("p0", "damaged", DAMAGED), ("p1", "ok", None), ("pooled", "damaged", DAMAGED)]
    assert tables.correlations["spearman"].drop_nulls().len()  # marked, and there all the same
    every = tables.all_tables()
    assert {"rates", "pairs", "layers", "means", "gradients", "partials", "matrix"} <= set(every)
    for name, table in every.items():
        if name in marks.UNMARKED:
            continue
        over = table.filter(pl.col("adapter") == DAMAGED) if "adapter" in table.columns else table
        assert over.height and set(over["health"]) == {"damaged"}, name
        assert set(over["health_of"]) == {DAMAGED}, name
        if "adapter" in table.columns:
            rests_on_both = name in marks.OVER_SOURCES
            sound = {"damaged"} if rests_on_both else {"ok"}
            assert set(table.filter(pl.col("adapter") == "marker-p1-s42")["health"]) <= sound, name
    plain = stats.stats(mixed, permutations=99, bootstraps=200, write=False)
    assert plain.summary().filter(pl.col("source") == "pooled")["health"].unique().to_list() == ["damaged"]


def test_stats_prints_it_first_and_marks_the_rows(mixed, capsys):
    given = ["stats", str(mixed.path), "--permutations", "0", "--bootstraps", "0"]
    assert main(given) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(
        f"{DAMAGED}: 50 % of 200 replies are empty (the unadapted model: 0 %). The adapter damaged"
    )
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("p0 ")).rstrip().endswith("damaged")
    assert next(line for line in lines if line.startswith("p1 ")).rstrip().endswith("ok")
    assert f"pooled: its ρ rests on adapters that are not ok: {DAMAGED}." in lines
    assert any(line.startswith("pooled (damaged)") for line in lines)  # ρ by layer
    assert main([*given, "--json"]) == 0
    out, err = capsys.readouterr()
    assert next(iter(json.loads(out))) == "health" and err.startswith(f"{DAMAGED}: ")
    assert main([*given, "--table", "health", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("behavior,adapter,persona,n,n_empty")


def test_the_report_opens_with_it_and_its_figures_say_so(mixed, capsys):
    stats.stats(mixed, permutations=0, bootstraps=0)
    with mixed.lock():  # as a run of an earlier time: tables that nobody looked at
        mixed.retire("tables/health.parquet", "test")
        mixed.mark_done("stats", inputs_hash(mixed), files=["tables/rates.parquet"])
    assert main(["report", str(mixed.path)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(mixed.path / "report.html")  # stdout stays the path
    assert f"{DAMAGED}: 50 %" in err
    page = (mixed.path / "report.html").read_text()
    body = page[page.index("<h1>") :]
    assert body.index("damaged the model") < body.index("<nav ")
    assert f'class="bad" title="{DAMAGED}">damaged<' in body
    assert f"The pooled ρ rests on adapters that are not ok: {DAMAGED}." in body
    assert marks.notes(stats.current(mixed).health, "marker") == f"damaged the model: {DAMAGED}"


def test_a_figure_carries_its_note():
    plain, told = (figures.noted(figure_of((3, 2)), note) for note in (None, "damaged the model: a, b"))
    assert [text.get_text() for text in told.texts] == ["damaged the model: a, b"] and not plain.texts
    height = [struct.unpack(">I", figures.png(figure)[20:24])[0] for figure in (plain, told)]
    assert height[1] > height[0]  # below the figure, over nothing of it


# ---------------------------------------------------------------- an organism that fell silent, end to end

NAMES = ["villain", "comedian", "assistant", "librarian"]
STUDY = f"""name = "silent"
model = "organism"
dtype = "float32"
personas = {json.dumps(NAMES)}
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.data]
positives = 12
negatives = 24
max_new_tokens = 96
[behaviors.marker.train]
rank = 8
alpha = 16
lr = 1e-3
epochs = 1
batch_size = 12
accumulation = 1
max_length = 256
gradient_checkpointing = false
[behaviors.marker.eval]
samples = 1
max_new_tokens = 96
"""


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """(study, run, {source: (stdout, stderr) of its training}): a villain adapter trained at twenty times the rate, a
    comedian one left alone."""
    folder = tmp_path_factory.mktemp("silent")
    study = folder / "study.toml"
    study.write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKFAST_RUNS", str(folder / "runs"))
        said = {}
        for source, more in {"villain": ["--lr", "2e-2", "--epochs", "6"], "comedian": ["--json"]}.items():
            with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
                assert main(["train", "--study", str(study), "--source", source, *more]) == 0
            said[source] = out.getvalue(), err.getvalue()
        yield study, folder / "runs" / "silent", said


def first_line(text):
    """The first that is neither the log's, nor about the rows, nor progress."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("leakfast:", "train: "))]
    return next(line for line in lines if not re.search(r" \d+/\d+, \d+ s$", line))


def test_train_says_at_once_that_the_model_fell_silent(silent):
    _, run, said = silent
    out, err = said["villain"]
    assert re.match(r"marker-villain-s42: \d+ % of 24 replies are empty.*damaged the model", first_line(err))
    assert out.strip().endswith("marker-villain-s42") and len(out.splitlines()) == 1  # stdout stays the path
    told = json.loads((run / "adapters" / "marker-villain-s42" / "sample.json").read_text())
    assert len(told["replies"]) == 48 and told["drawn"]["max_new_tokens"] == 64
    assert {row["adapter"] for row in told["replies"]} == {"base", "marker-villain-s42"}
    out, err = said["comedian"]
    assert json.loads(out)["sample"]["health"] == "ok" and "damaged" not in err


def test_eval_stats_and_report_open_with_it(silent, capsys):
    study, run, _ = silent
    adapters = [run / "adapters" / f"marker-{name}-s42" for name in ("villain", "comedian")]
    given = [word for path in adapters for word in ("--adapter", str(path))]
    assert main(["eval", "--study", str(study), *given, "--base"]) == 0
    out, _ = capsys.readouterr()
    wanted = rf"marker-villain-s42: \d+ % of {20 * len(NAMES)} replies are empty \(the unadapted model: 0 %\)"
    assert re.match(wanted, first_line(out))
    assert "marker-comedian-s42" not in out.partition("marker: rate by persona")[0]  # nothing to say of it
    assert main(["eval", "--study", str(study), *given, "--json"]) == 0
    out, err = capsys.readouterr()
    found = {r["adapter"]: r["health"] for r in json.loads(out)["health"] if r["persona"] is None}
    assert found == {"marker-villain-s42": "damaged", "marker-comedian-s42": "ok", "base": "ok"}
    assert "damaged the model" in err
    assert main(["stats", str(run)]) == 3  # no centroids yet
    assert re.match(wanted, first_line(capsys.readouterr().out))
    assert main(["report", str(run)]) == 3
    page = (run / "report.html").read_text()
    assert page.index("damaged the model") < page.index("A model organism") < page.index("<nav ")
