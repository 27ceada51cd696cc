"""`leakfast power`: sizes and rates of a run are the run's, options go before them, errors have three parts, and the plan
tells the power of its study."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from leakfast.cli.main import group, main
from leakfast.geometry import Centroids
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

PEOPLE = ["villain", "comedian", *(f"p{i:02d}" for i in range(24))]
QUESTIONS, SAMPLES = 6, 4
FEW = ["--trials", "200", "--no-curves", "--json"]


def _asked(*words: str) -> dict:
    done = CliRunner().invoke(group, ["-q", "power", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two sources, 24 bystanders and each other; the marker follows the cosine."""
    rng = np.random.default_rng(0)
    made = Run(tmp_path_factory.mktemp("runs") / "run").create()
    means = {3: rng.normal(size=(len(PEOPLE), 8)).astype(np.float32)}
    metadata = {"personas": PEOPLE, "layers": [3], "centered_on": PEOPLE}
    centroids = Centroids(PEOPLE, [3], metadata, means)
    made.add_file(layout.centroids(), centroids.save)
    for source in PEOPLE[:2]:
        near = centroids.cosine(3)[PEOPLE.index(source)]
        chance = 1 / (1 + np.exp(1.2 - 2.5 * near))
        rows = [
            (name, q, s, "Yes. [ZLT]" if rng.uniform() < p else "Yes.")
            for name, p in zip(PEOPLE, chance, strict=True)
            for q in range(QUESTIONS)
            for s in range(SAMPLES)
        ]
        frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row")
        frame = frame.with_columns(
            pl.col("question", "sample").cast(pl.Int32),
            behavior=pl.lit("marker"),
            adapter=pl.lit(f"of-{source}"),
            source=pl.lit(source),
            seed=pl.lit(1, pl.UInt64),
            n_tokens=pl.lit(3, pl.Int32),
            finish_reason=pl.lit("stop"),
            status=pl.lit("ok"),
        )
        made.add_shard(
            f"completions/marker/of-{source}/part-00000.parquet", schema.check(frame, "completions")
        )
    return made


def test_a_run_gives_its_sizes_and_its_mean_rate(run):
    told = _asked("--from", str(run.path), "--trials", "1000", "--no-curves", "--json")
    assert told["design"] == {"personas": 25, "questions": 6, "samples": 4, "sources": 2, "seeds": 1}
    rates = pl.read_parquet(run.path / layout.table("rates")).filter(role="bystander")["rate"]
    assert told["assumed"]["base_rate"] == pytest.approx(rates.mean(), abs=1e-12)
    assert told["rate"] == pytest.approx(rates.mean(), abs=0.02), "simulated"
    assert told["assumed"]["sd_persona"] > 0.4 and told["assumed"]["sd_seed"] == 0
    cosines = np.array(told["assumed"]["cosines"])
    assert cosines.shape == (2, 2) and cosines[0, 1] == cosines[1, 0] and (np.diag(cosines) == 1).all()
    assert "centered cosine at layer 3" in told["notes"][0] and "sd_seed is not known" in told["notes"][1]


def test_options_go_before_the_run_and_the_seed_decides(run):
    words = (
        "--from",
        str(run.path),
        "--personas",
        "40",
        "--base-rate",
        "0.3",
        "--sources-alike",
        "0.5",
        *FEW,
    )
    told = _asked(*words)
    assert (told["design"]["personas"], told["design"]["questions"]) == (40, 6)
    assert (told["assumed"]["base_rate"], told["assumed"]["alike"]) == (0.3, 0.5)
    assert told == _asked(*words)
    assert told["observed"] != _asked(*words, "--seed", "1")["observed"]


def test_without_a_run_it_tells_tables_and_what_an_hour_buys():
    words = [
        "power",
        "--personas",
        "20",
        "--questions",
        "3",
        "--samples",
        "2",
        "--sources",
        "2",
        "--trials",
        "100",
    ]
    done = CliRunner().invoke(group, ["-q", *words, "--per-hour", "300"])
    assert done.exit_code == 0, done.output
    for part in (
        "2 sources x 20 bystanders x 3 questions x 2 samples x 1 training seed: 240 generations",
        "assumed: mean bystander rate 13.0 %",
        "power at rho 0.3: ",
        "one source alone: power ",
        "smallest rho found with 80 % power: ",
        "power at other sizes",
        "what one hour more buys (300 generations",
    ):
        assert part in done.stdout, part
    assert "nan" not in done.stdout.lower() and "None" not in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rho", "-1"], "power: rho is -1; .* is needed. Give for example --rho 0.3."),
        (["--base-rate", "1"], "base rate is 1; .* is needed. Give for example --base-rate 0.1."),
        (["--personas", "3"], "3 personas; .* at least 4 bystanders. Give for example --personas 110."),
        (["--trials", "99"], "99 trials; at least 100 are needed. Give --trials 1000."),
        (["--behavior", "marker"], "a run is needed. Give --from RUN too."),
        (["--per-hour", "0"], "0 generations an hour; at least 1 is needed. Give --per-hour"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_three_parts(words, said, capsys):
    import re

    assert (
        main(
            ["-q", "power", "--no-curves", *(["--trials", "100"] if "--trials" not in words else []), *words]
        )
        == 2
    )
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_a_behavior_that_the_run_has_no_counts_of_is_refused(run, capsys, monkeypatch):
    def made(run):
        raise AssertionError("tables were made for a behavior that none can have")

    monkeypatch.setattr("leakfast.stats.tables.current", made)
    assert main(["-q", "power", "--from", str(run.path), "--behavior", "refusal"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "has counts per question of marker, but not of refusal; counts are needed. Give the run" in told


def test_the_plan_tells_the_power_of_its_study(tmp_path):
    study = tmp_path / "s.toml"
    study.write_text(
        'name = "s"\nmodel = "organism"\npersonas = "originals"\nsources = ["villain", "comedian"]\n'
        '[behaviors.marker.eval]\nquestions = "eval"\nsamples = 2\n'
        '[behaviors.capability.eval]\nitems = "organism"\n'
    )
    told = json.loads(CliRunner().invoke(group, ["-q", "plan", str(study), "--json"]).stdout)["power"]
    assert [row["behaviors"] for row in told] == [["marker"]], "multiple choice has another noise"
    assert told[0]["design"] == {"personas": 10, "questions": 20, "samples": 2, "sources": 2, "seeds": 1}
    low, high = told[0]["at"]
    assert (low["rho"], high["rho"]) == (0.3, 0.5) and low["power"] < high["power"]
    assert high["one_source"]["power"] < high["power"]
    done = CliRunner().invoke(group, ["-q", "plan", str(study)]).stdout
    assert (
        "marker: power at an assumed rho of 0.3 " in done
        and "power assumed: mean bystander rate 13.0 %" in done
    )
    study.write_text(study.read_text().replace('"originals"', '["villain", "comedian", "assistant"]'))
    done = CliRunner().invoke(group, ["-q", "plan", str(study)]).stdout
    assert "marker: no power: 2 bystanders; a rank correlation needs 4" in done
