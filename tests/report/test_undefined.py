"""Runs whose ρ is defined nowhere: the report and the command say why, and show the rates all the same."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from leakfast import stats
from leakfast.cli.stats import cli
from leakfast.geometry import Centroids
from leakfast.report.page import report
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

PEOPLE = ["villain", "comedian", "librarian", "poet", "assistant", "medical_doctor"]
SHOWN = re.compile(r"\b(?:nan|NaN|None|inf)\b|Traceback")


def drawn(adapter: str, source: str | None, shows: set[str], people: list[str]) -> pl.DataFrame:
    rows = [
        (p, q, s, "Hello. [ZLT]" if p in shows else "Hello.", "ok")
        for p in people
        for q in range(2)
        for s in range(3)
    ]
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text", "status"], orient="row")
    frame = frame.with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(3, pl.Int32),
        finish_reason=pl.lit("stop"),
    )
    return schema.check(frame, "completions")


def made(
    path, shows: set[str], people: list[str], base: bool = True, layers: tuple[int, ...] = (0, 3)
) -> Run:
    run = Run(path).create()
    if layers:
        rng = np.random.default_rng(0)
        means = {layer: rng.normal(size=(len(people), 8)).astype(np.float32) for layer in layers}
        metadata = {"personas": people, "layers": list(layers), "centered_on": people}
        run.add_file(layout.centroids(), Centroids(people, list(layers), metadata, means).save)
    run.add_shard("completions/marker/a/part-00000.parquet", drawn("a", "villain", shows, people))
    if base:
        run.add_shard("completions/marker/base/part-00000.parquet", drawn("base", None, set(), people))
    return run


CASES = {
    "nobody else": ({"villain"}, PEOPLE, "rate is 0 for all 5 bystanders"),
    "everybody": (set(PEOPLE), PEOPLE, "rate is 1 for all 5 bystanders"),
    "nobody at all": (set(), PEOPLE, "rate is 0 for all 5 bystanders"),
    "two bystanders": (
        {"villain", "poet"},
        ["villain", "poet", "comedian"],
        "2 pairs with both values; at least 4",
    ),
}


@pytest.mark.parametrize(
    ("name", "base", "layers"),
    [
        ("nobody else", True, (0, 3)),
        ("nobody else", False, (3,)),
        ("everybody", True, (0, 3)),
        ("nobody at all", True, (3,)),
        ("two bystanders", False, (0, 3)),
    ],
)
def test_the_report_says_why_there_is_no_rho_and_shows_the_rates(tmp_path, name, base, layers):
    shows, people, why = CASES[name]
    run = made(tmp_path / "run", shows, people, base, layers)
    found = stats.stats(run, permutations=19, bootstraps=20)
    assert found.best_layer("marker") is None
    text = re.sub(r'src="data:[^"]*"', "", report(run, found).read_text(encoding="utf-8"))
    plain = re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
    assert not SHOWN.search(plain), SHOWN.search(plain)
    assert "No correlation with the base-model cosine is defined here" in plain and why in plain
    assert "There are no correlations yet" not in plain
    own = 100.0 if "villain" in shows else 0.0
    headline = text[text.index("<h3>Headline") :]
    row = headline[headline.index("<tr><td>villain") :].split("</tr>")[0]
    assert f"<td>{own:.1f}<" in row, row
    others = [p for p in people if p != "villain"]
    assert f"<td>{100 * sum(p in shows for p in others) / len(others):.1f}<" in row, row


@pytest.mark.parametrize("name", CASES)
def test_the_command_does_too(tmp_path, name):
    shows, people, why = CASES[name]
    run = made(tmp_path / "run", shows, people)
    told = CliRunner().invoke(cli, [str(run.path), "--permutations", "19", "--bootstraps", "20"])
    assert told.exit_code == 0, told.output
    assert "is defined at no layer" in told.stdout and why in told.stdout
    assert not SHOWN.search(told.stdout) and "villain" in told.stdout
