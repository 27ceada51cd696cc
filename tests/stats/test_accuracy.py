"""Choice scores to accuracy: items counted once, anything but a plain answer in no rate, baselines of the
same scoring, and a whole run of choice scores through `leakfast stats`."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import scipy.stats
from click.testing import CliRunner

from leakfast import stats
from leakfast.errors import InputError, StoreError
from leakfast.geometry import Centroids
from leakfast.prompts import personas
from leakfast.stats import accuracy, confounds
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

LABELS = "ABCD"


def _scores(rows, adapter="a", scoring="letters", **more) -> pl.DataFrame:
    """(persona, item, chosen label, right label, status) → choice scores of four labels each."""
    out = []
    for persona, item, chosen, right, status in rows:
        for label in LABELS:
            out.append(
                {
                    "adapter": adapter,
                    "persona": persona,
                    "item": item,
                    "scoring": scoring,
                    "label": label,
                    "logprob_nats": -1.0,
                    "chosen": label == chosen,
                    "correct": label == right,
                    "status": status,
                }
            )
    frame = pl.DataFrame(out, schema=schema.columns("choice_scores"))
    return frame.with_columns(pl.lit(value).alias(name) for name, value in more.items())


def _count(*frames: pl.DataFrame) -> pl.DataFrame:
    return accuracy.count(pl.concat(frames, how="diagonal").with_columns(behavior=pl.lit("capability")))


def test_an_item_counts_once_and_only_a_plain_answer_counts():
    found = _count(
        _scores(
            [
                ("p", "i1", "A", "A", "ok"),
                ("p", "i2", "B", "A", "ok"),
                ("p", "i3", "A", "A", "tie"),
                ("p", "i4", None, "A", "ok"),
                ("p", "i5", "A", None, "ok"),
                ("q", "i1", "A", "A", "ok"),
            ]
        )
    )
    rows = {
        (r["persona"], r["question"]): (r["hits"], r["total"], r["n_error"]) for r in found.rows(named=True)
    }
    assert rows == {
        ("p", 0): (1, 1, 0),
        ("p", 1): (0, 1, 0),
        ("p", 2): (0, 0, 1),
        ("p", 3): (0, 0, 1),
        ("p", 4): (0, 0, 1),
        ("q", 0): (1, 1, 0),
    }


def test_nulls_and_two_chosen_labels_are_no_answer():
    frame = _scores([("p", "i1", "A", "A", "ok"), ("p", "i2", "A", "A", "ok"), ("p", "i3", "A", "A", "ok")])
    at = (pl.col("item") == "i1") & (pl.col("label") == "B")
    frame = frame.with_columns(pl.when(at).then(None).otherwise("chosen").alias("chosen"))
    at = (pl.col("item") == "i2") & (pl.col("label") == "B")
    frame = frame.with_columns(pl.when(at).then(True).otherwise("chosen").alias("chosen"))
    at = (pl.col("item") == "i3") & (pl.col("label") == "D")
    frame = frame.with_columns(pl.when(at).then(None).otherwise("status").alias("status"))
    assert _count(frame)["n_error"].to_list() == [1, 1, 1]


def test_items_have_one_number_whatever_their_order_and_adapter():
    one = _scores([("p", "b", "A", "A", "ok"), ("p", "a", "B", "A", "ok")])
    other = _scores([("p", "a", "A", "A", "ok"), ("p", "c", "A", "A", "ok")], adapter="base")
    found = {(r["adapter"], r["question"]): r["hits"] for r in _count(one, other).rows(named=True)}
    assert found == {("a", 0): 0, ("a", 1): 1, ("base", 0): 1, ("base", 2): 1}


def test_another_scoring_is_a_behavior_of_its_own():
    rows = [("p", "i1", "A", "A", "ok"), ("p", "i2", "B", "A", "ok")]
    both = _count(_scores(rows), _scores(rows, scoring="full-text"))
    assert both["behavior"].unique().sort().to_list() == ["capability", "capability-full-text"]
    alone = _count(_scores(rows, scoring="full-text").with_columns(chosen_per_byte=pl.col("correct")))
    assert alone["behavior"].unique().to_list() == ["capability"]
    assert (alone["hits"].sum(), alone["hits_per_byte"].sum()) == (1, 2)
    assert _count(_scores(rows))["hits_per_byte"].null_count() == 2


def _study(folder, sources=("villain", "comedian"), items=60, flat=False) -> Run:
    """A run of choice scores made from geometry: the nearer the source, the more items are missed."""
    rng = np.random.default_rng(0)
    names = [p.name for p in personas.load_personas("all")][:40]
    names = list(dict.fromkeys([*sources, *names]))
    base = rng.normal(size=(len(names), 16)).astype(np.float32)
    unit = base - base.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    run = Run(folder).create()
    metadata = {"personas": names, "layers": [3], "centered_on": names}
    run.add_file(layout.centroids(), Centroids(names, [3], metadata, {3: base}).save)
    proneness = rng.uniform(0.6, 0.9, len(names))
    asked = [f"item{k}" for k in range(items)]
    for source in (*sources, None):
        near = unit @ unit[names.index(source)] if source else np.full(len(names), -1.0)
        right = proneness * (1 if flat else 1 - 0.8 * np.clip(near, 0, 1))
        rows = [
            (name, item, "A" if rng.uniform() < right[i] else "B", "A", "ok")
            for i, name in enumerate(names)
            for item in asked
        ]
        adapter = f"capability-{source}-s42" if source else "base"
        frame = _scores(rows, adapter=adapter, source=source)
        run.add_shard(f"choices/capability/{adapter}/part-00000.parquet", frame)
    return run


def test_a_run_of_choice_scores_is_read_as_a_fall_of_accuracy(tmp_path):
    tables = stats.stats(_study(tmp_path / "run"), permutations=99, bootstraps=100)
    assert tables.missing == () and tables.outcome("capability") == "delta"
    own = tables.rates.filter((pl.col("role") == "source") & (pl.col("source") == "villain")).row(
        0, named=True
    )
    assert own["total"] == 60 and own["delta"] < -0.3
    assert own["delta"] == pytest.approx(own["rate"] - own["baseline"])
    assert own["n_error"] == 0 and own["bb_reason"].startswith("no question has two samples")
    row = tables.summary().filter(pl.col("source") == "villain").row(0, named=True)
    pairs = tables.pairs.filter(pl.col("source") == "villain")
    told = scipy.stats.spearmanr(pairs["cosine_centered"], pairs["delta"]).statistic
    assert row["y"] == "delta" and row["spearman"] == pytest.approx(told, abs=1e-12) and told < 0
    assert row["source_delta"] == own["delta"]
    verdicts = tables.more["verdicts"].filter(pl.col("source") == "villain")
    assert set(verdicts["quantity"]) == {"source_drop", "mean_bystander_drop", "spearman_drop"}
    value = dict(verdicts.select("quantity", "value").rows())
    assert value["source_drop"] == -own["delta"] and value["spearman_drop"] == -row["spearman"]
    for name in ("disattenuated", "partials", "matrix", "crossed", "gradients", "predicted"):
        assert tables.more[name].height, name
    assert stats.current(tmp_path / "run").rates.equals(tables.rates)


def test_errors_and_other_items_are_told(tmp_path):
    run = _study(tmp_path / "run", sources=("villain",), items=4)
    path = "choices/capability/capability-villain-s42/part-00000.parquet"
    frame = run.read(path)
    spoiled = (pl.col("item") == "item0") & (pl.col("persona") == "villain")
    run.add_shard(
        path, frame.with_columns(pl.when(spoiled).then(pl.lit("nan")).otherwise("status").alias("status"))
    )
    tables = stats.stats(run, permutations=0, bootstraps=0)
    assert any("1 items have an error status and are not counted" in text for text in tables.missing)
    own = tables.rates.filter(pl.col("role") == "source").row(0, named=True)
    assert (own["total"], own["n_error"]) == (3, 1)


def test_flat_shards_without_folders_are_capability(tmp_path):
    run = Run(tmp_path / "run").create()
    rows = [("villain", "i", "A", "A", "ok"), ("poet", "i", "B", "A", "ok")]
    run.add_shard("choices/one.parquet", _scores(rows, adapter="x", source="villain"))
    found = stats.stats(run, permutations=0, bootstraps=0)
    assert found.rates.select("behavior", "persona", "rate").rows() == [
        ("capability", "villain", 1.0),
        ("capability", "poet", 0.0),
    ]
    run.add_shard("choices/two.parquet", _scores(rows, adapter="x", source="villain"))
    with pytest.raises(StoreError, match="stands twice"):
        stats.stats(run, permutations=0, bootstraps=0)
    run.retire("choices/two.parquet", "test")
    run.add_shard("choices/two.parquet", pl.DataFrame({"adapter": ["x"]}))
    with pytest.raises(StoreError, match=r"choices/two\.parquet: table choice_scores: missing"):
        stats.stats(run, permutations=0, bootstraps=0)


def test_the_command_shows_the_fall_and_the_verdict(tmp_path):
    from leakfast.cli.stats import cli

    run = _study(tmp_path / "run")
    told = CliRunner().invoke(cli, [str(run.path), "--permutations", "99", "--bootstraps", "50"])
    assert told.exit_code == 0, told.output
    assert "capability change of rate against the unadapted model" in told.stdout
    assert "capability leaks along the geometry" in told.stdout and "source Δ" in told.stdout
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nclaim = "c"\nbehaviors = ["capability"]\nunit = "share"\nteest = []\n')
    told = CliRunner().invoke(cli, [str(run.path), "--rules", str(rules)])
    assert told.exit_code != 0 and "Did you mean test?" in told.output and "Traceback" not in told.output
    told = CliRunner().invoke(cli, [str(run.path), "--table", "verdicts", "--json", "--permutations", "9"])
    assert {row["verdict"] for row in json.loads(told.stdout)["verdicts"]} <= {
        "confirmed",
        "falsified",
        "open",
    }


def test_chance_is_the_mean_of_one_over_the_choices_that_count(tmp_path):
    wide = _scores([("p", "i1", "A", "A", "ok"), ("p", "i2", "B", "A", "tie"), ("p", "i4", "B", "A", "ok")])
    narrow = _scores([("p", "i3", "A", "A", "ok")]).filter(pl.col("label").is_in(["A", "B"]))
    found = _count(wide, narrow)
    assert found["chance_hits"].to_list() == [0.25, 0.0, 0.25, 0.5]  # the tie counts for nothing
    run = Run(tmp_path / "run").create()
    frame = pl.concat([wide, narrow]).with_columns(source=pl.lit("p"))
    run.add_shard("choices/capability/a/part-00000.parquet", frame)
    tables = stats.stats(run, permutations=0, bootstraps=0)
    assert tables.rates["chance"].to_list() == [pytest.approx(1 / 3)]
    assert "chance_hits" not in tables.rates.columns


def test_labels_are_counted_beside_where_the_right_ones_lie():
    rows = [("villain", f"i{k}", "A" if k < 42 else "BCD"[k % 3], "ABCD"[k % 4], "ok") for k in range(60)]
    rows += [("villain", "none", None, "A", "ok"), ("villain", "lost", "A", "A", "nan")]
    rows += [("poet", f"i{k}", "ABCD"[k % 4], "ABCD"[k % 4], "ok") for k in range(60)]
    frame = _scores(rows).with_columns(behavior=pl.lit("capability"))
    table = accuracy.chosen_labels(frame)
    found = {(r["persona"], r["label"]): r for r in table.rows(named=True)}
    own = found["villain", "A"]
    assert (own["n"], own["n_right"], own["total"], own["mostly"]) == (42, 15, 60, True)
    told = scipy.stats.binomtest(42, 60).proportion_ci(method="wilson")
    assert (own["share"], own["ci_low"], own["ci_high"]) == (
        0.7,
        pytest.approx(told.low),
        pytest.approx(told.high),
    )
    assert (found["poet", "A"]["n"], found["poet", "A"]["mostly"]) == (15, False)
    assert (found[None, "A"]["n"], found[None, "A"]["n_right"], found[None, "A"]["total"]) == (57, 30, 120)
    (sentence,) = accuracy.remarks(pl.DataFrame(), table)
    assert sentence == (
        "capability/a: one label is chosen for more than half of the items under 1 of 2 personas; villain chose A for 42 "
        "of 60, where it is right for 15"
    )


def test_a_label_that_is_right_as_often_as_it_is_chosen_is_not_remarked_on():
    rows = [("p", f"i{k}", "A" if k < 40 else "B", "A" if k < 44 else "B", "ok") for k in range(60)]
    table = accuracy.chosen_labels(_scores(rows).with_columns(behavior=pl.lit("capability")))
    assert not table["mostly"].any()


def test_accuracy_within_the_interval_of_guessing_is_told(tmp_path):
    from leakfast.cli.stats import cli
    from leakfast.report.page import report

    run = Run(tmp_path / "run").create()
    rows = [("villain", f"i{k}", "ABCD"[k % 4], "ABCD"[k // 15], "ok") for k in range(60)]
    rows += [("poet", f"i{k}", "ABCD"[k // 15], "ABCD"[k // 15], "ok") for k in range(60)]
    run.add_shard("choices/capability/a/p.parquet", _scores(rows, source="villain"))
    said = (
        "capability/a: accuracy cannot be told from guessing (25.0 %, within the 95 % interval) under 1 of 2 personas: "
        "villain"
    )
    told = CliRunner().invoke(cli, [str(run.path), "--permutations", "9", "--bootstraps", "9"])
    assert told.stdout.startswith(f"note: {said}.\n") and "chance: 25.0 %" in told.stdout
    page = report(run).read_text(encoding="utf-8")
    assert said in page and "Guessing gives 25.0 %" in page and "Which labels were chosen" in page
    table = CliRunner().invoke(
        cli, [str(run.path), "--table", "chosen_labels", "--json", "--permutations", "9"]
    )
    assert {row["persona"] for row in json.loads(table.stdout)["chosen_labels"]} == {"villain", "poet", None}


def test_similarities_from_a_file_are_taken_out_in_the_partials(tmp_path):
    run = _study(tmp_path / "run")
    plain = stats.stats(run, permutations=0, bootstraps=0)
    at = plain.pairs.filter(pl.col("source") == "villain")
    rng = np.random.default_rng(1)
    given = plain.pairs.select(
        "source", "persona", similarity=pl.col("cosine_centered") + 0.3 * rng.normal(size=plain.pairs.height)
    )
    given.write_csv(tmp_path / "e.csv")
    found = stats.stats(run, permutations=0, bootstraps=0, embeddings=tmp_path / "e.csv")
    keys = (pl.col("source") == "villain") & (pl.col("control") == "similarity") & (pl.col("y") == "delta")
    row = found.more["partials"].filter(keys).row(0, named=True)
    z = given.filter(pl.col("source") == "villain")["similarity"].to_numpy()
    told = confounds.partial_spearman(at["cosine_centered"].to_numpy(), at["delta"].to_numpy(), z[:, None])
    assert (row["partial"], row["n"]) == (pytest.approx(told[0], abs=1e-12), at.height)
    assert plain.more["partials"].filter(keys)["reason"].to_list() == ["similarity is not known here"]
    assert set(found.more["commonality"]["against"]) == {"jaccard", "similarity"}
    given.with_columns(persona=pl.lit("nobody")).unique(["source", "persona"]).write_csv(tmp_path / "e.csv")
    with pytest.raises(InputError, match="none of its pairs"):
        stats.stats(run, permutations=0, bootstraps=0, embeddings=tmp_path / "e.csv")


def test_a_table_without_rows_does_not_stay_from_an_earlier_time(tmp_path):
    run = _study(tmp_path / "run", sources=("villain",))
    stats.stats(run, permutations=0, bootstraps=0)
    assert "verdicts" in stats.read(run).more
    rules = tmp_path / "none.toml"
    rules.write_text("rule = []\n")
    stats.stats(run, permutations=0, bootstraps=0, rules=rules)
    assert "verdicts" not in stats.read(run).more


def test_the_report_shows_accuracies_and_their_change(tmp_path):
    from leakfast.figures.files import write_all
    from leakfast.report.page import report

    run = _study(tmp_path / "run")
    made = stats.stats(run, permutations=19, bootstraps=0)
    text = report(run, made).read_text(encoding="utf-8")
    assert "change of rate" in text and "capability" in text
    found = {path.stem.split("-")[0] for path in write_all(Run(run.path), made, ("png",))}
    assert {"scatter", "partials", "matrix"} <= found
