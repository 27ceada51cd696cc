"""The published marker study recomputed from its stored results: N exactly, ρ within 2e-3, r within 1e-3,
p within 15 %. The stored cosines have four digits, so ties (and with them ρ) may differ that much."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from leakfast import published, stats
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.published.files import CORRELATIONS
from leakfast.stats import among_sources, growth, two_way
from leakfast.stats.correlations import correlate
from leakfast.stats.tables import Stats
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

DATA = Path(__file__).parents[2] / "../shared/data/published/single_token_100_persona"
SOURCES = ["villain", "comedian", "assistant", "software_engineer", "kindergarten_teacher"]
LAYERS = [10, 20]

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the study's stored results are not beside the checkout (../shared/data)"
)


@pytest.fixture(scope="module")
def stored():
    return json.loads((DATA / CORRELATIONS).read_text())


@pytest.fixture(scope="module")
def found():
    return correlate(published.read_pairs(DATA), permutations=999)


_PLAIN = [
    ("spearman", "spearman", ""),
    ("spearman_p_t", "spearman", "_p_t"),
    ("pearson", "pearson", ""),
    ("pearson_p", "pearson", "_p"),
]


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
    if row["source"] == "pooled":  # the study pooled all pairs as they are
        row = row | {name: row[f"{kind}_plain{end}"] for name, kind, end in _PLAIN}
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
        "pooled": 0.73,  # within sources; 0.60 over all pairs as they are, which the study printed
    }
    assert _row(found, "pooled", 20, None)["spearman_plain"] == pytest.approx(0.60, abs=5e-3)


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
    (tmp_path / CORRELATIONS).write_text('{"layer10": {"villain": {}}}')
    with pytest.raises(InputError, match="_per_source_detail"):
        published.read_pairs(tmp_path)


# ---------------------------------------------------------------- through a run directory


def _vectors(pairs: pl.DataFrame, personas: list[str]) -> np.ndarray:
    """Vectors whose mean is 0 and whose cosines to the five sources are the stored ones: the part in the
    sources' span follows from those cosines, lengths are chosen so that these parts cancel, and the rest
    of each vector lies in a plane of its own where the rests close to a polygon."""
    told = {(s, p): c for s, p, c in pairs.select("source", "persona", "cosine_centered").rows()}
    told |= {(source, source): 1.0 for source in SOURCES}
    gram = np.array([[told[a, b] for b in SOURCES] for a in SOURCES])
    basis = np.linalg.cholesky((gram + gram.T) / 2)  # rows: the sources' directions
    inside = np.linalg.solve(basis, np.array([[told[s, p] for p in personas] for s in SOURCES])).T
    length = 1 - inside @ np.linalg.solve(inside.T @ inside, inside.sum(0))  # Σ length·inside = 0
    assert length.min() > 0
    rest = length * np.sqrt(np.clip(1 - (inside**2).sum(1), 0, None))
    start = np.random.default_rng(0).uniform(0, 2 * np.pi, len(personas))
    angle = least_squares(lambda a: [rest @ np.cos(a), rest @ np.sin(a)], start, xtol=1e-15, ftol=1e-15).x
    plane = rest[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert np.abs(plane.sum(0)).max() < 1e-6
    return np.hstack([length[:, None] * inside, plane])


@needs_data
def test_a_run_with_the_published_geometry_gives_the_published_correlations(tmp_path, stored):
    """The whole way: completions in shards and a centroids file in, correlations out."""
    rates, pairs = published.read_rates(DATA), published.read_pairs(DATA)
    personas = rates["persona"].unique(maintain_order=True).to_list()
    means = {}
    for layer in LAYERS:
        offset = np.linspace(1, 2, 7)  # centering must take it away
        vectors = _vectors(pairs.filter(pl.col("layer") == layer), personas) + offset
        means[layer] = vectors.astype(np.float32)
    metadata = {"personas": personas, "layers": LAYERS, "centered_on": personas}
    run = Run(tmp_path / "published").create()
    run.add_file(layout.centroids(), Centroids(personas, LAYERS, metadata, means).save)
    for source in SOURCES:
        mine = rates.filter(pl.col("source") == source)
        draws = (
            mine.select("behavior", "adapter", "source", "persona", "hits", "total")
            .with_columns(draw=pl.int_ranges("total"))
            .explode("draw")
        )
        frame = draws.select(
            "behavior",
            "adapter",
            "source",
            "persona",
            question=(pl.col("draw") // 10).cast(pl.Int32),
            sample=(pl.col("draw") % 10).cast(pl.Int32),
            seed=pl.lit(0, pl.UInt64),
            text=pl.when(pl.col("draw") < pl.col("hits")).then(pl.lit("so [ZLT]")).otherwise(pl.lit("so")),
            n_tokens=pl.lit(2, pl.Int32),
            finish_reason=pl.lit("stop"),
            status=pl.lit("ok"),
        )
        run.add_shard(f"completions/marker/{mine['adapter'][0]}/part-00000.parquet", frame)
    tables = stats.stats(run, permutations=99)
    assert tables.missing == ()
    for layer in LAYERS:
        for source in [*SOURCES, "pooled"]:
            told = stored[f"layer{layer}"]["_aggregate" if source == "pooled" else source]
            _agrees(_row(tables.correlations, source, layer, None), told)


@needs_data
def test_what_the_stored_cosines_say_of_the_source():
    """Among the five sources alone: ranks, and how many of the 120 ways to deal the five to each other's leakage do as well."""
    pairs = published.read_pairs(DATA)
    table = among_sources.table(pairs, {}, 0).filter(cosine="centered", y="rate")
    ranks = {layer: dict(table.filter(layer=layer).select("source", "rank").rows()) for layer in LAYERS}
    assert [[ranks[layer][source] for source in SOURCES] for layer in LAYERS] == [
        [1, 1, 3, 1, 2],
        [1, 1, 2, 1, 3],
    ]
    assert table.filter(source="pooled")["p_source"].to_list() == pytest.approx([0.0841, 0.0841], abs=5e-5)
    as_good = []
    for layer in LAYERS:
        sides = {
            source: {
                name: (cosine, rate)
                for name, cosine, rate in pairs.filter(layer=layer, source=source)
                .select("persona", "cosine_centered", "rate")
                .rows()
            }
            for source in SOURCES
        }
        rho = np.empty((5, 5))
        for i, whose in enumerate(SOURCES):
            for j, other in enumerate(SOURCES):
                both = sides[whose].keys() & sides[other].keys()
                rho[i, j] = spearmanr(
                    *zip(*((sides[other][b][0], sides[whose][b][1]) for b in both), strict=True)
                )[0]
        sums = [sum(rho[i, j] for i, j in enumerate(dealt)) for dealt in itertools.permutations(range(5))]
        as_good.append(sum(one >= np.trace(rho) - 1e-12 for one in sums))
    assert as_good == [4, 1]


@needs_data
def test_what_halves_of_the_stored_personas_say():
    pairs = published.read_pairs(DATA)
    table = growth.table(pairs, correlate(pairs, 0)).filter(cosine="centered", y="rate", source="pooled")
    row = table.filter(layer=20, size="half").row(0, named=True)
    assert (round(row["spearman"], 2), round(row["spearman_sd"], 2)) == (0.73, 0.02)
    assert row["same_sign"] == 1 and row["picked_share"] == 1


@needs_data
def test_what_the_stored_data_lack_for_questions_and_length():
    """One count a persona, no question and no reply: no interval over questions and no exposure, and that is said."""
    told = {
        key
        for source in SOURCES
        for row in json.loads((DATA / source / "marker_eval.json").read_text()).values()
        for key in row
    }
    assert told == {"rate", "found", "total", "category", "related_to"}
    assert not list(DATA.rglob("raw_completions.json")) and not list(DATA.rglob("centroids_layer*.pt"))
    pairs = published.read_pairs(DATA)
    both = two_way.with_questions(correlate(pairs, 0), pairs, schema.empty("question_counts"))
    both = both.filter(pl.col("category").is_null(), cosine="centered", y="rate")
    assert both["spearman_both_low"].null_count() == both.height == 12
    assert set(both["both_reason"]) == {"0 questions with counts; at least 3 are needed"}
