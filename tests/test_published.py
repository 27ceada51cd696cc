"""The published marker study recomputed from its stored results: N exactly, ρ within 2e-3, r within 1e-3,
p within 15 %. The stored cosines have four digits, so ties (and with them ρ) may differ that much."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from leakfast import published
from leakfast.errors import InputError
from leakfast.stats import Stats
from leakfast.stats.correlations import correlate

DATA = Path(__file__).parents[1] / "../shared/data/published/single_token_100_persona"
SOURCES = ["villain", "comedian", "assistant", "software_engineer", "kindergarten_teacher"]
LAYERS = [10, 20]

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the study's stored results are not beside the checkout (../shared/data)"
)


@pytest.fixture(scope="module")
def stored():
    return json.loads((DATA / published.CORRELATIONS).read_text())


@pytest.fixture(scope="module")
def found():
    return correlate(published.read_pairs(DATA), permutations=999)


def _row(table: pl.DataFrame, source: str, layer: int, category: str | None) -> dict:
    row = table.filter(
        (pl.col("source") == source)
        & (pl.col("layer") == layer)
        & pl.col("category").eq_missing(category)
        & (pl.col("cosine") == "centered")
        & (pl.col("y") == "rate")
    )
    assert row.height == 1
    return row.row(0, named=True)


def _agrees(row: dict, told: dict) -> None:
    assert row["n"] == told["n_pairs"]
    assert row["spearman"] == pytest.approx(told["spearman_rho"], abs=2e-3)
    assert row["spearman_p_t"] == pytest.approx(told["spearman_p"], rel=0.15)
    if "pearson_r" in told:
        assert row["pearson"] == pytest.approx(told["pearson_r"], abs=1e-3)
        assert row["pearson_p"] == pytest.approx(told["pearson_p"], rel=0.15)


@needs_data
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("source", [*SOURCES, "pooled"])
def test_correlations_per_source_and_pooled_are_the_published_ones(found, stored, source, layer):
    told = stored[f"layer{layer}"]["_aggregate" if source == "pooled" else source]
    assert told["n_pairs"] == (550 if source == "pooled" else 110)
    _agrees(_row(found, source, layer, None), told)


@needs_data
@pytest.mark.parametrize("layer", LAYERS)
def test_correlations_per_category_are_the_published_ones(found, stored, layer):
    told = stored[f"layer{layer}"]["_per_category"]
    assert len(told) == 11
    for category, values in told.items():
        _agrees(_row(found, "pooled", layer, category), values)


@needs_data
def test_headline_numbers_of_the_study(found):
    at_20 = {source: _row(found, source, 20, None)["spearman"] for source in [*SOURCES, "pooled"]}
    rounded = {source: round(value, 2) for source, value in at_20.items()}
    assert rounded == {
        "villain": 0.70,
        "comedian": 0.67,
        "assistant": 0.73,
        "software_engineer": 0.87,
        "kindergarten_teacher": 0.76,
        "pooled": 0.60,
    }


@needs_data
def test_rates_keep_the_stored_counts_and_means():
    rates = published.read_rates(DATA)
    assert rates.height == 5 * 111
    for source in SOURCES:
        told = json.loads((DATA / source / "summary.json").read_text())
        mine = rates.filter(pl.col("source") == source)
        own, others = mine.filter(pl.col("role") == "source"), mine.filter(pl.col("role") == "bystander")
        assert own["rate"].item() == told["source_marker"]
        assert others.height == 110
        assert others["rate"].mean() == pytest.approx(told["mean_bystander"], abs=1e-12)
        assert others["rate"].max() == told["max_bystander"]
    assert rates["baseline"].null_count() == rates.height


@needs_data
def test_raw_cosine_and_delta_were_not_stored_and_say_so(found):
    absent = found.filter((pl.col("cosine") == "raw") | (pl.col("y") == "delta"))
    assert absent["spearman"].null_count() == absent.height
    assert absent["reason"].null_count() == 0


@needs_data
def test_best_of_the_two_layers_is_the_headline_one(found):
    tables = Stats(published.read_rates(DATA), published.read_pairs(DATA), found)
    assert tables.best_layer("marker") == 20
    pooled = tables.summary().filter(pl.col("best_layer") & (pl.col("source") == "pooled"))
    assert pooled["mean_bystander"].item() == pytest.approx(0.1832, abs=5e-4)


def _eval_file(folder: Path, rows: dict) -> Path:
    (folder / "villain").mkdir(parents=True)
    (folder / "villain" / "marker_eval.json").write_text(json.dumps(rows))
    return folder


def test_a_rate_that_is_not_its_counts_is_refused(tmp_path):
    row = {"rate": 0.5, "found": 10, "total": 200, "category": "original", "related_to": []}
    with pytest.raises(InputError, match="not found/total"):
        published.read_rates(_eval_file(tmp_path, {"villain": row}))


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(InputError, match=r"marker_eval\.json"):
        published.read_rates(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        published.read_pairs(tmp_path)
    with pytest.raises(InputError, match="lacks found, total"):
        published.read_rates(_eval_file(tmp_path / "a", {"villain": {"rate": 0.5, "category": "original"}}))
    (tmp_path / published.CORRELATIONS).write_text('{"layer10": {"villain": {}}}')
    with pytest.raises(InputError, match="_per_source_detail"):
        published.read_pairs(tmp_path)
