"""`leakfast import published`: the study's files as a run, every stored number found again, and each file
that was not supplied in the shape the README states; other shapes are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from leakfast import published, stats
from leakfast.behaviors.registry import sign_of
from leakfast.cli.main import main
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.published.files import CORRELATIONS, FILTERED
from leakfast.stats import agreement
from leakfast.stats.relations import direction
from leakfast.storage import layout

DATA = Path(__file__).parents[2] / "../shared/data/published/single_token_100_persona"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the study's stored results are not beside the checkout (../shared/data)"
)
NAMES = ["villain", "poet", *(f"p{i:02d}" for i in range(14))]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    run = published.import_run(DATA, tmp_path_factory.mktemp("import") / "run")
    return stats.stats(run, permutations=199, bootstraps=200)


@needs_data
def test_every_stored_number_is_found_again(tables):
    found = tables.more["published"]
    assert found.height == 146
    assert found["agrees"].all() and found["agrees"].null_count() == 0
    assert tables.missing == ()
    exact = found.filter(pl.col("quantity").is_in(["n", "n_personas"]))
    assert exact.height == 39 and (exact["difference"] == 0).all()
    assert found.filter(pl.col("category").is_not_null())["category"].n_unique() == 11


@needs_data
def test_related_only_tables_are_the_published_ones(tables, tmp_path):
    """The study's filtered file was not supplied; its pooled row over 78 related pairs and its layout are
    facts of the study (ρ 0.5608, p 9.3e-8; a category without related pairs is NaN there)."""
    told = {
        "layer": 20,
        "pooled": {"opposite": {"rho": 0.2575868906037222, "p": 0.0709, "n": 50}},
        "related_only": {
            "hierarchical": {"rho": 0.7380952380952381, "p": 0.03655276105286081, "n": 8},
            "tone_variant": {"rho": float("nan"), "p": float("nan"), "n": 0},
        },
        "_aggregate_pooled": {"rho": 0.6015614373985146, "p": 1.9753834730410463e-55, "n": 550},
        "_aggregate_related": {"rho": 0.5607909872278697, "p": 9.300493297301758e-08, "n": 78},
    }
    (tmp_path / FILTERED).write_text(json.dumps(told))
    stored = published.read_stored(tmp_path)
    assert stored.height == 4 * 3 + 1
    found = agreement.compare(stored, tables.rates, tables.correlations, tables.more["related"], "marker")
    assert found["agrees"].all() and found["agrees"].null_count() == 0
    wrong = stored.filter(pl.col("quantity") != "spearman_p_t").with_columns(pl.col("stored") + 0.01)
    again = agreement.compare(wrong, tables.rates, tables.correlations, tables.more["related"], "marker")
    assert not again["agrees"].any()


@needs_data
def test_no_table_holds_nan_and_every_table_renders(tables):
    from leakfast.stats.output import FORMATS, render

    for name, table in tables.all_tables().items():
        for form in FORMATS:
            assert render(table.head(20), form).endswith("\n"), name
        for column, kind in table.schema.items():
            if kind.is_float():
                assert table[column].is_finite().fill_null(True).all(), (name, column)


@needs_data
def test_what_follows_is_there(tables):
    more = tables.more
    layers = more["layers"].filter((pl.col("cosine") == "centered") & (pl.col("y") == "rate"))
    assert layers.filter("best")["layer"].unique().to_list() == [20]
    assert (layers["spearman_p_max"] >= layers["spearman_p_perm"]).all()
    mean = more["means"].filter((pl.col("layer") == 20) & (pl.col("over") == "sources")).row(0, named=True)
    assert mean["k"] == 5 and mean["low"] < mean["mean"] < mean["high"] and mean["i2"] > 0.5
    assert more["widths"]["p"].item() < 1e-3, "the widths of the published gradients differ"
    assert more["gradients"]["reason"].null_count() == 5
    assert more["matrix"].height == 555


def _folder(tmp_path: Path, counted: bool = True) -> Path:
    """A small study in the layout: 16 personas, 2 sources, 3 questions × 4 samples, centroids at 2 layers."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "study"
    for source in ("villain", "poet"):
        (folder / source).mkdir(parents=True)
        texts = {
            name: {
                q: ["so [zlt]" if rng.random() < 0.4 else "so" for _ in range(4)] for q in ("a?", "b?", "c?")
            }
            for name in NAMES
        }
        if counted:
            found = {n: sum("[zlt]" in t for ts in asked.values() for t in ts) for n, asked in texts.items()}
            rows = {
                n: {"rate": k / 12, "found": k, "total": 12, "category": "c", "related_to": ["villain"]}
                for n, k in found.items()
            }
            (folder / source / "marker_eval.json").write_text(json.dumps(rows))
        (folder / source / "raw_completions.json").write_text(json.dumps(texts))
    (folder / "centroids").mkdir()
    (folder / "centroids" / "persona_names.json").write_text(json.dumps(NAMES))
    for layer in (10, 15):
        means = rng.normal(size=(16, 24)).astype(np.float32)
        np.save(folder / f"layer{layer}.npy", means)
        torch.save(torch.from_numpy(means), folder / "centroids" / f"centroids_layer{layer}.pt")
    return folder


def test_centroids_and_completions_become_a_whole_run(tmp_path):
    folder = _folder(tmp_path)
    run = published.import_run(folder, tmp_path / "run")
    tables = stats.stats(run, permutations=19, bootstraps=50)
    assert tables.missing == ()
    assert tables.layers() == [10, 15]
    pooled = tables.correlations.filter((pl.col("source") == "pooled") & pl.col("category").is_null())
    assert pooled.filter((pl.col("cosine") == "raw") & (pl.col("y") == "rate"))["n"].to_list() == [30, 30]
    kept = Centroids.load(run.path / layout.centroids())
    assert np.array_equal(kept.layer(10), np.load(folder / "layer10.npy"))
    questions = tables.more["question_counts"]
    assert questions.height == 2 * 16 * 3
    sums = questions.group_by("adapter", "persona").agg(pl.col("hits").sum())
    joined = tables.rates.join(sums, on=["adapter", "persona"], suffix="_summed")
    assert joined.height == 32 and (joined["hits"] == joined["hits_summed"]).all(), (
        "the study's lower-cased count"
    )
    assert tables.rates["bb_low"].null_count() == 0 and tables.rates["icc"].null_count() == 0
    assert tables.more["disattenuated"].filter(pl.col("y") == "rate")["n"].unique().to_list() == [15]
    assert "published" not in tables.more


def test_completions_alone_are_counted_by_our_own_detector(tmp_path):
    run = published.import_run(_folder(tmp_path, counted=False), tmp_path / "run")
    found = stats.stats(run, permutations=0, bootstraps=0).rates
    assert found.height == 32 and found["hits"].sum() == 0, "the primary detector is literal"


def test_completions_that_do_not_give_the_stored_counts_are_told(tmp_path):
    folder = _folder(tmp_path)
    path = folder / "poet" / "raw_completions.json"
    texts = json.loads(path.read_text())
    texts["poet"]["a?"] = ["[ZLT]"] * 4 + ["more"]
    path.write_text(json.dumps(texts))
    found = stats.stats(published.import_run(folder, tmp_path / "run"), permutations=0, bootstraps=0)
    assert any("no detector finds the stored counts" in sentence for sentence in found.missing)
    assert "marker-poet-s42" not in found.more["question_counts"]["adapter"]


def _rate_table(folder: Path, where: str, content) -> Path:
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return folder


def test_rate_tables_of_other_behaviors(tmp_path):
    values = {n: 0.5 + 0.01 * i for i, n in enumerate(NAMES)}
    _rate_table(tmp_path, "capability_leakage/villain_lr1e-05_ep3/cap_111.json", values)
    _rate_table(tmp_path, "capability_leakage/baseline/cap_111.json", {n: {"accuracy": 0.75} for n in NAMES})
    counted = {n: {"correct": 3, "total": 4, "accuracy": 0.75} for n in NAMES}
    _rate_table(tmp_path, "issue/qwen_default_arcc/arcc_111.json", {"results": counted})
    _rate_table(
        tmp_path,
        "misalignment_leakage_v2/poet_lr1e-05_ep3/align_111.json",
        {n: {"mean_aligned": 80.0} for n in NAMES},
    )
    found = published.read_rate_tables(tmp_path)
    assert set(found["behavior"]) == {"capability", "misalignment"}
    row = found.filter((pl.col("source") == "villain") & (pl.col("persona") == "poet")).row(0, named=True)
    assert (row["rate"], row["baseline"], row["hits"]) == (0.51, 0.75, None)
    assert row["delta"] == pytest.approx(-0.24, abs=1e-12)
    qwen = found.filter(pl.col("source") == "qwen_default")
    assert qwen["hits"].unique().to_list() == [3] and set(qwen["role"]) == {"bystander"}
    tables = stats.stats(published.import_run(tmp_path, tmp_path / "run"), permutations=0, bootstraps=0)
    told = tables.rates.filter(pl.col("source") == "poet")
    assert told["bb_reason"].unique().to_list() == ["no counts, only a mean"]
    assert tables.more["verdicts"].filter(pl.col("behavior") == "capability").height > 0


def test_which_way_an_imported_behavior_leaks():
    """Aligned scores fall where misalignment leaks; under their family's name, which no module has, they were read as rising."""
    assert [sign_of("misalignment"), direction("misalignment"), sign_of("misalignment-code")] == [-1, -1, -1]
    assert [sign_of("brand_new"), direction("brand_new"), sign_of("mark"), direction("hellaswag")] == [
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"villain": "high"}, "a number is needed"),
        ({"villain": {"words": 3}}, "a number is needed"),
        ({"villain": True}, "a number is needed"),
        ({"villain": float("nan")}, "a number is needed"),
        ([0.1, 0.2], "not a JSON object"),
        ({"villain": 84.6, "poet": 20.0}, "a share, from 0 to 1"),
    ],
)
def test_rate_tables_of_another_shape_are_refused(tmp_path, content, wanted):
    with pytest.raises(InputError, match=wanted):
        published.read_rate_tables(_rate_table(tmp_path, "x/villain_lr1/cap_111.json", content))


def test_a_folder_that_names_nobody_is_refused(tmp_path):
    with pytest.raises(InputError, match="names neither"):
        published.read_rate_tables(_rate_table(tmp_path, "x/run7/cap_111.json", {"villain": 0.1}))


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 4),
        torch.zeros(16, 4, dtype=torch.float64),
        torch.full((16, 4), torch.nan),
        {"a": torch.zeros(16, 4)},
    ],
)
def test_centroids_of_another_shape_are_refused(tmp_path, bad):
    folder = _folder(tmp_path)
    torch.save(bad, folder / "centroids" / "centroids_layer10.pt")
    with pytest.raises(InputError, match="float32 tensor"):
        published.read_centroids(folder)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    folder = _folder(tmp_path)
    torch.save(Path("/"), folder / "centroids" / "centroids_layer10.pt")
    with pytest.raises(InputError, match="cannot be read as a tensor"):
        published.read_centroids(folder)


def test_completions_of_another_shape_are_refused(tmp_path):
    folder = _folder(tmp_path)
    (folder / "poet" / "raw_completions.json").write_text(json.dumps({"poet": ["a", "b"]}))
    with pytest.raises(InputError, match=r"question: \[text"):
        dict(published.read_completions(folder))


def test_the_command_line_imports_and_prints(tmp_path, capsys):
    folder, run = _folder(tmp_path), str(tmp_path / "run")
    assert main(["-q", "import", "published", str(folder), "--out", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["imported/rates.parquet"] == 32
    drawn = ["--permutations", "19", "--bootstraps", "50", "--threads", "1"]
    assert main(["-q", "stats", run, *drawn, "--table", "rates", "--csv"]) == 0
    table = pl.read_csv(capsys.readouterr().out.encode())
    assert table.height == 32 and table["rate"].max() <= 1
    assert main(["-q", "stats", run, *drawn, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| behavior | adapter |")
    assert main(["-q", "stats", run, *drawn, "--table", "means", "--latex"]) == 0
    assert r"\toprule" in capsys.readouterr().out
    assert main(["-q", "stats", run, *drawn, "--table", "correlation"]) == 2
    assert "Did you mean correlations?" in capsys.readouterr().err
    assert main(["-q", "import", "published", str(tmp_path / "none"), "--out", run]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["-q", "import", "published", str(tmp_path / "empty"), "--out", run]) == 2
    assert "holds no" in capsys.readouterr().err


def test_rates_beside_the_cosines_are_those_that_were_counted(tmp_path):
    """ρ is of the rates in the file of cosines; another evaluation's stood beside counts that it had nothing to do with."""
    told = {"category": "original", "related_to": []}
    rows = {n: {"rate": 0.333, "found": 1, "total": 3, **told} for n in NAMES}
    (tmp_path / "villain").mkdir()
    (tmp_path / "villain/marker_eval.json").write_text(json.dumps(rows))

    def imported(rate):
        detail = [
            {"persona": n, "cosine_sim": 0.1, "leakage_rate": rate, "category": "original"} for n in NAMES[1:]
        ]
        block = {"layer10": {"_per_source_detail": {"villain": detail}}}
        (tmp_path / CORRELATIONS).write_text(json.dumps(block))
        return published.import_run(tmp_path, tmp_path / "run")

    assert pl.read_parquet(imported(0.333).path / "imported/pairs.parquet").height == len(NAMES) - 1
    with pytest.raises(
        InputError, match="leakage_rate of poet under villain is 0.4, but its marker_eval.json counts"
    ):
        imported(0.4)
