"""ρ with length taken out: against the correlations, the matrix of ranks and simulated leakage by length alone; and whole
runs, those without anything to read among them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from exposed import PEOPLE, QUESTIONS, SAMPLES, by_length_alone, paired, rated, replies
from replies_made import completions
from scipy.stats import rankdata

from leakfast import stats
from leakfast.cli.main import main
from leakfast.geometry import Centroids
from leakfast.stats import correlations, exposure, exposure_correlations
from leakfast.stats.people import People
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

N = QUESTIONS * SAMPLES


def _table(found: pl.DataFrame) -> pl.DataFrame:
    return exposure.table(found, rated(found), PEOPLE)


def test_leakage_that_follows_length_alone_loses_its_rho():
    """One run of the 200 in test_exposure_coverage."""
    found, cosine = by_length_alone(7)
    made = rated(found)
    table = exposure_correlations.correlated(paired(made, cosine), _table(found)).filter(source="p0")
    rho = {(y, c): r for y, c, r in table.select("y", "control", "partial").rows()}
    assert rho["rate", "none"] > 0.6
    for key in (("rate", "reply_tokens"), ("rate", "all"), ("hazard", "none"), ("logistic", "none")):
        assert abs(rho[key]) < 0.3, key
    assert rho["rate", "edit_distance"] > 0.6


def _two(people: int = 30, base: bool = True):
    """Two adapters and the unadapted model, two layers."""
    rng = np.random.default_rng(5)
    parts = [
        by_length_alone(seed, people)[0].with_columns(adapter=pl.lit(name)) for seed, name in enumerate("ab")
    ]
    if base:
        parts.append(replies(rng.integers(5, 60, (people, N)), rng.random((people, N)) < 0.1, "base"))
    found = pl.concat(parts)
    made = rated(found)
    pairs = pl.concat([paired(made, rng.normal(size=people), layer) for layer in (1, 2)])
    return found, made, pairs


def test_without_a_control_it_is_the_rho_of_the_correlations_pooled_too():
    found, made, pairs = _two()
    mine = exposure_correlations.correlated(pairs, exposure.table(found, made, PEOPLE)).filter(control="none")
    theirs = correlations.correlate(pairs, 0, bootstraps=0).filter(pl.col("cosine") == "centered")
    both = theirs.join(mine, on=["source", "layer", "cosine", "y"], suffix="_mine")
    assert both.height == 3 * 2 * 2
    assert both["partial"].to_list() == pytest.approx(both["spearman"].to_list(), abs=1e-12)
    assert both["p_t"].to_list() == pytest.approx(both["spearman_p_t"].to_list(), rel=1e-6)
    assert both["n"].to_list() == both["n_mine"].to_list()


def test_all_taken_out_is_the_inverse_of_the_matrix_of_ranks():
    found, made, pairs = _two()
    table = exposure.table(found, made, PEOPLE)
    row = exposure_correlations.correlated(pairs, table).filter(
        control="all", y="delta", layer=2, source="p1", cosine="centered"
    )
    own = pairs.filter(adapter="b", layer=2).join(table, on=["behavior", "adapter", "persona"])
    columns = ["cosine_centered", "delta", "mean_tokens", "prompt_chars", "edit_distance"]
    ranks = np.stack([rankdata(own[name].round(12)) for name in columns])
    inverse = np.linalg.inv(np.corrcoef(ranks))
    told = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    assert row["partial"].item() == pytest.approx(told, abs=1e-10)
    assert (row["controls"].item(), row["prompt_length_in"].item()) == (3, "characters")


def test_what_is_not_known_is_null_with_a_reason():
    found, made, pairs = _two(base=False)
    stranger = People({})
    table = exposure.table(found, made, stranger)
    rho = exposure_correlations.correlated(pairs, table).filter(layer=1, source="p0")
    why = dict(rho.filter(y="rate").select("control", "reason").rows())
    assert why["none"] is None and why["reply_tokens"] is None
    for control in ("base_tokens", "prompt_length", "edit_distance"):
        assert why[control] == f"{control} is not known here"
    assert why["all"] is not None
    assert rho.filter(y="delta")["partial"].null_count() == len(exposure_correlations.CONTROLS)
    assert set(rho["cosine"]) == {"centered"}  # no raw cosine at all


def test_prompt_tokens_take_the_place_of_characters():
    found, made, pairs = _two()
    longer = found.with_columns(prompt_tokens=pl.col("persona").str.slice(1).cast(pl.Int64) % 5 + 30)
    rho = exposure_correlations.correlated(pairs, exposure.table(longer, made, PEOPLE))
    assert rho["prompt_length_in"].unique().to_list() == ["tokens"]


def test_a_pool_takes_one_adapter_of_each_source():
    found, made, pairs = _two()
    twins = made.with_columns(source=pl.when(pl.col("adapter") != "base").then(pl.lit("p0")))
    pairs = pairs.with_columns(source=pl.lit("p0"))
    rho = exposure_correlations.correlated(pairs, exposure.table(found, twins, PEOPLE))
    pooled = rho.filter(source="pooled")
    assert pooled.height and pooled["partial"].null_count() == pooled.height
    assert "p0 has more than one adapter" in pooled["reason"][0]
    assert rho.filter(control="none", adapter="a", y="rate")["partial"].null_count() == 0


# ---------------------------------------------------------------- runs


def _run(path, **columns) -> Run:
    """A run of one adapter whose replies show the marker by how long they are."""
    run = Run(path).create()
    names = [f"p{i}" for i in range(12)]
    rng = np.random.default_rng(0)
    vectors = {layer: rng.normal(size=(12, 5)).astype(np.float32) for layer in (0, 1)}
    told = {"personas": names, "layers": [0, 1], "centered_on": names, "model": "m"}
    centroids = Centroids(names, [0, 1], {**told, "model_fingerprint": "files:01"}, vectors)
    run.add_file(layout.centroids(), lambda file: centroids.save(file))
    for adapter, share in (("marker-p0-s42", 0.5), ("base", 0.0)):
        n = 12 * 20
        shown = rng.random(n) < share
        frame = pl.DataFrame(
            {
                "behavior": ["marker"] * n,
                "adapter": [adapter] * n,
                "persona": [name for name in names for _ in range(20)],
                "question": list(np.tile(np.repeat(np.arange(5), 4), 12)),
                "sample": list(np.tile(np.arange(4), 60)),
                "seed": [1] * n,
                "text": [f"a reply {i} [ZLT]" if hit else f"a reply {i}" for i, hit in enumerate(shown)],
                "n_tokens": rng.integers(4, 60, n),
                "finish_reason": ["stop"] * n,
                "status": ["ok"] * n,
            },
            schema=schema.columns("completions"),
        ).with_columns(source=pl.lit("p0" if adapter != "base" else None, pl.String), **columns)
        run.add_shard(f"completions/marker/{adapter}/part-00000.parquet", frame)
    return run


def test_a_run_has_both_tables_and_the_line_below_the_headline(tmp_path, capsys):
    run = _run(tmp_path / "run")
    drawn = ["--permutations", "0", "--bootstraps", "0", "--threads", "1"]
    main(["-q", "stats", str(run.path), *drawn])
    told = " ".join(capsys.readouterr().out.split())
    made = stats.read(run)
    best = made.best_layer("marker")
    rows = made.more["exposure_correlations"].filter(
        control="reply_tokens", y=made.outcome("marker"), layer=best, cosine="centered"
    )
    own = rows.filter(source="p0")["partial"].item()
    assert f"ρ with length out: p0 {own:+.2f}, pooled {own:+.2f} (mean reply tokens)." in told
    assert set(made.more["exposure"]["adapter"]) == {"marker-p0-s42", "base"}
    assert made.length_out("marker", layer=best) in told
    assert schema.check(made.more["exposure"], "exposure")["reason"].null_count() == 0  # prompts unknown


def test_a_run_without_tokens_has_neither_table_and_no_error(tmp_path):
    run = _run(tmp_path / "run", n_tokens=pl.lit(None, pl.Int32))
    made = stats.stats(run, permutations=0, bootstraps=0)
    assert made.correlations.height
    assert not {"exposure", "exposure_correlations"} & set(made.more)
    assert made.length_out("marker", layer=0) is None


def test_nothing_drawn_judged_replies_and_choices_have_no_rows(tmp_path):
    nothing = exposure.table(
        exposure.read(Run(tmp_path / "none").create(), []), schema.empty("rates"), PEOPLE
    )
    assert nothing.is_empty() and nothing.schema == schema.empty("exposure").schema
    _, _, pairs = _two()
    assert exposure_correlations.correlated(pairs, nothing).is_empty()
    assert exposure_correlations.correlated(
        schema.empty("pairs").with_columns(adapter=pl.lit("a")), nothing
    ).is_empty()
    judged = Run(tmp_path / "judged").create()
    name = "misalignment-advice"
    judged.add_shard(f"completions/{name}/base/part-00000.parquet", completions("base", behavior=name))
    assert exposure.read(judged, [(name, "base")]).is_empty()
    assert "exposure" not in stats.stats(judged, permutations=0, bootstraps=0).more


def test_choices_alone_make_a_run_without_exposure(tmp_path):
    run = Run(tmp_path / "run").create()
    rows = [
        {"adapter": adapter, "persona": f"p{p}", "item": str(i), "scoring": "letters", "label": label}
        | {"logprob_nats": -1.0, "logprob_per_token_nats": -1.0, "logprob_per_byte_nats": -1.0}
        | {
            "chosen": label == "A",
            "chosen_per_byte": label == "A",
            "correct": label == "AB"[i % 2],
            "status": "ok",
        }
        for adapter in ("capability-p0-s1", "base")
        for p in range(3)
        for i in range(4)
        for label in "AB"
    ]
    frame = pl.DataFrame(rows, schema=schema.columns("choice_scores")).with_columns(
        behavior=pl.lit("capability"), source=pl.when(pl.col("adapter") != "base").then(pl.lit("p0"))
    )
    run.add_shard("choices/capability.parquet", frame)
    made = stats.stats(run, permutations=0, bootstraps=0)
    assert made.rates.height == 6
    assert not {"exposure", "exposure_correlations"} & set(made.more)
