"""The table of mixed models: units, rows, what is null and why, and that a run gets it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from mixed_worlds import world

from leakfast.stats import mixed
from leakfast.storage import schema

PEOPLE, SOURCES = 24, ("s0", "s1", "s2")
AT = {"marker": ("centered", 3)}


def _made(seed: int = 0, sources=SOURCES, **more):
    """(pairs with covariates, counts per question, exposure, correlations) of a made-up run."""
    sizes = {"sources": len(sources), "people": PEOPLE, "asked": 6, "drawn": 5} | more
    counts, _, _ = world(np.random.default_rng(seed), **sizes)
    n, asked = counts.hits.shape
    names = np.array([f"p{i}" for i in range(PEOPLE)])
    adapters = np.array([f"marker-{s}-s42" for s in sources])
    pairs = pl.DataFrame(
        {
            "behavior": "marker",
            "source": np.array(sources)[counts.source],
            "seed": 42,
            "adapter": adapters[counts.source],
            "persona": names[counts.persona],
            "layer": 3,
            "cosine_centered": counts.fixed[:, 1],
            "cosine_raw": None,
            "baseline": 0.1 + 0.01 * counts.persona,
            "jaccard": 0.2 + 0.05 * counts.fixed[:, 2],
            "words_of": "prompt",
        },
        schema_overrides={"layer": pl.Int32, "cosine_raw": pl.Float64, "seed": pl.Int64},
    )
    cells = pl.DataFrame(
        {
            "behavior": "marker",
            "adapter": np.repeat(pairs["adapter"], asked),
            "persona": np.repeat(pairs["persona"], asked),
            "question": np.tile(np.arange(asked, dtype=np.int32), n),
            "hits": counts.hits.ravel(),
            "total": counts.total.ravel(),
        }
    )
    base = pl.DataFrame(
        {
            "behavior": "marker",
            "adapter": "base",
            "persona": names,
            "question": 0,
            "hits": np.arange(PEOPLE) + 5,
            "total": 100,
        },
        schema=cells.schema,
    )
    exposure = pairs.select("behavior", "adapter", "persona").with_columns(
        mean_tokens=pl.Series(2.0 ** (5 + 0.3 * counts.fixed[:, 3])), n_at_marker=0
    )
    rho = [("s1", adapters[1], 0.5)] if len(sources) > 1 else [("s0", adapters[0], 0.5)]
    rho = [*rho, ("pooled", None, 0.6)]
    correlations = pl.DataFrame(rho, schema=["source", "adapter", "spearman"], orient="row").with_columns(
        behavior=pl.lit("marker"),
        seed=pl.lit(42, pl.Int64),
        layer=pl.lit(3, pl.Int32),
        cosine=pl.lit("centered"),
        y=pl.lit("rate"),
        category=pl.lit(None, pl.String),
    )
    return pairs, pl.concat([cells, base]), exposure, correlations


def _row(table: pl.DataFrame, **where) -> dict:
    return table.filter(**where).row(0, named=True)


def test_a_model_has_all_its_rows():
    found = mixed.table(*_made(), AT)
    assert found["part"].to_list() == ["fixed"] * 5 + ["source"] * 3 + ["spread"] * 6
    assert found["term"].to_list()[:5] == ["intercept", *mixed.TERMS]
    assert found.filter(part="source")["source"].to_list() == list(SOURCES)
    own = found.filter(pl.col("part") != "spread")
    assert own.select("coefficient", "se", "low", "high", "df").null_count().sum_horizontal().item() == 0
    assert (own["low"] < own["coefficient"]).all() and (own["coefficient"] < own["high"]).all()
    assert found.filter(part="spread")["coefficient"].null_count() == 6
    one = _row(found, part="fixed", term="cosine")
    assert (one["n"], one["personas"], one["sources"], one["questions"]) == (72, 24, 3, 6)
    assert one["replies"] == 72 * 6 * 5 and one["n_without"] == 0 and one["spearman"] == 0.6
    slopes = found.filter(part="source")
    assert slopes["spearman"].to_list() == [None, 0.5, None] and slopes["n"].to_list() == [24] * 3


def test_coefficients_are_in_the_units_they_name():
    """Twice the cosine halves its coefficient and leaves the others; words and tokens alike."""
    pairs, questions, exposure, rho = _made()
    found = mixed.table(pairs, questions, exposure, rho, AT)
    pairs = pairs.with_columns(pl.col("cosine_centered") * 2, pl.col("jaccard") * 4)
    exposure = exposure.with_columns(pl.col("mean_tokens") ** 2)
    other = mixed.table(pairs, questions, exposure, rho, AT)
    for term, times in (("cosine", 2), ("words", 4), ("length", 2), ("baseline", 1), ("intercept", 1)):
        one, two = (_row(t, part="fixed", term=term) for t in (found, other))
        for name in ("coefficient", "se", "low"):
            assert two[name] == pytest.approx(one[name] / times, rel=1e-3, abs=1e-4)
    for term in ("cosine of source", "cosine of question"):
        assert _row(other, term=term)["sd"] == pytest.approx(_row(found, term=term)["sd"] / 2, rel=0.02)
    assert _row(other, term="persona")["sd"] == pytest.approx(_row(found, term="persona")["sd"], rel=0.02)


def test_true_coefficients_are_within_their_intervals_in_a_large_world():
    found = mixed.table(*_made(1, asked=20, drawn=20), AT)
    for term, truth in (("cosine", 0.2), ("words", 0.3 * 0.1 / 0.05), ("length", 0.0)):
        row = _row(found, part="fixed", term=term)
        assert row["low"] <= truth <= row["high"]


def test_what_stands_between_sources_moves_nothing():
    """All cosines of one source, or all its lengths, moved by a constant: terms are about the source's own mean."""
    pairs, questions, exposure, rho = _made()
    moved = pairs.with_columns(
        pl.when(pl.col("source") == "s1").then(pl.col("cosine_centered") + 0.3).otherwise("cosine_centered")
    )
    one, two = (mixed.table(p, questions, exposure, rho, AT) for p in (pairs, moved))
    np.testing.assert_allclose(
        one["coefficient"].drop_nulls().to_numpy(), two["coefficient"].drop_nulls().to_numpy(), rtol=1e-6
    )


def test_terms_that_are_not_known_are_left_out_with_a_reason():
    pairs, questions, exposure, rho = _made()
    bare = pairs.with_columns(baseline=pl.lit(None, pl.Float64), jaccard=pl.lit(None, pl.Float64))
    found = mixed.table(bare, questions, schema.empty("exposure"), rho, AT).filter(part="fixed")
    assert found["reason"].null_count() == 2
    assert "replies" in _row(found, term="length")["reason"]
    assert "unadapted" in _row(found, term="baseline")["reason"]
    assert "words" in _row(found, term="words")["reason"]
    cut = exposure.with_columns(n_at_marker=1)
    assert _row(mixed.table(pairs, questions, cut, rho, AT), term="length")["coefficient"] is None
    same = pairs.with_columns(jaccard=0.25)
    why = _row(mixed.table(same, questions, exposure, rho, AT), term="words")["reason"]
    assert why == "words does not vary between the bystanders of a source"
    twice = pairs.with_columns(jaccard=pl.col("cosine_centered") * 0.1 + 0.5)
    assert "follows from" in _row(mixed.table(twice, questions, exposure, rho, AT), term="words")["reason"]


def test_pairs_that_lack_a_known_term_are_counted():
    pairs, questions, exposure, rho = _made()
    some = pairs.with_columns(jaccard=pl.when(pl.col("persona") != "p3").then("jaccard"))
    row = _row(mixed.table(some, questions, exposure, rho, AT), term="cosine", part="fixed")
    assert (row["n"], row["n_without"], row["personas"]) == (69, 3, 23)


def test_one_source_has_no_spread_over_sources():
    found = mixed.table(*_made(sources=("s0",)), AT)
    assert found["part"].to_list() == ["fixed"] * 5 + ["source"] + ["spread"] * 6
    fixed, own = _row(found, part="fixed", term="cosine"), _row(found, part="source")
    assert all(fixed[name] == own[name] for name in ("coefficient", "se", "low", "high", "df"))
    assert fixed["spearman"] == 0.6 and own["spearman"] == 0.5
    assert _row(found, term="source", part="spread")["reason"] == "one source"
    assert _row(found, term="persona")["sd"] is None and _row(found, term="pair")["sd"] > 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p, q, at: (p, q.filter(adapter="base"), at), "no pair has"),
        (lambda p, q, at: (p, q.clear(), at), "no counts per question"),
        (lambda p, q, at: (p, q.with_columns(hits=0), at), "0 of 2160 replies show"),
        (lambda p, q, at: (p, q, {"marker": ("centered", None)}), "at no layer"),
        (lambda p, q, at: (p, q, {"marker": ("raw", 3)}), "no pair has a raw cosine"),
        (lambda p, q, at: (p.with_columns(source=pl.lit("s0")), q, at), "more than one adapter"),
        (lambda p, q, at: (p.head(7), q, at), "7 pairs"),
        (lambda p, q, at: (p.with_columns(cosine_centered=0.5), q, at), "does not vary"),
    ],
)
def test_without_a_model_a_row_says_why(change, why):
    pairs, questions, exposure, rho = _made()
    pairs, questions, at = change(pairs, questions, AT)
    found = mixed.table(pairs, questions, exposure, rho, at)
    assert found.height == 1 and found["coefficient"].null_count() == 1
    assert why in found["reason"][0]


def test_a_training_seed_has_a_model_of_its_own():
    pairs, questions, exposure, rho = _made()
    second = {"seed": pl.lit(43, pl.Int64), "adapter": pl.col("adapter") + "b"}
    two = pl.concat([pairs, pairs.with_columns(**second)])
    again = pl.concat([questions, questions.with_columns(adapter=pl.col("adapter") + "b")])
    longer = pl.concat([exposure, exposure.with_columns(adapter=pl.col("adapter") + "b")])
    found = mixed.table(two, again, longer, rho, AT)
    assert found["seed"].unique().sort().to_list() == [42, 43]
    values = [found.filter(seed=seed)["coefficient"].to_list() for seed in (42, 43)]
    assert values[0] == values[1]


def test_items_of_one_draw_are_fitted_too():
    """Multiple choice: a cell is an item, right or wrong, without replies to count tokens of."""
    pairs, questions, _, rho = _made(asked=40, drawn=1)
    found = mixed.table(pairs, questions, schema.empty("exposure"), rho, AT)
    assert _row(found, part="fixed", term="cosine")["coefficient"] is not None
    assert _row(found, part="fixed", term="length")["reason"]
