"""ρ as the number of personas grows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata, spearmanr

from leakfast.stats import growth, intervals, resample, subsets
from leakfast.stats.correlations import correlate
from leakfast.storage import schema

KINDS = ("peer", "opposite", "modified", None)


def world(rng, people=64, strength=1.0, layers=1, sources=("s",), kinds=KINDS):
    """pairs: leakage that follows the cosine of layer 0 by `strength`, other layers that follow it loosely."""
    pairs = []
    names = [f"p{i:03d}" for i in range(people)]
    categories = [kinds[i % len(kinds)] for i in range(people)]
    for source in sources:
        cosine = rng.normal(size=people)
        rate = rng.binomial(200, 1 / (1 + np.exp(1 - strength * cosine - rng.normal(size=people)))) / 200
        for layer in range(layers):
            x = cosine if layer == 0 else 0.6 * cosine + 0.8 * rng.normal(size=people)
            frame = {"behavior": "marker", "source": source, "seed": 42, "persona": names, "layer": layer}
            frame |= {
                "category": categories,
                "cosine_centered": x,
                "cosine_raw": None,
                "rate": rate,
                "delta": None,
            }
            pairs.append(pl.DataFrame(frame, schema=schema.columns("pairs")))
    return pl.concat(pairs)


def made(pairs, bootstraps=0, **more):
    correlations = correlate(pairs, 0, bootstraps=bootstraps, workers=1)
    return growth.table(pairs, correlations, workers=1, **more).filter(cosine="centered", y="rate")


def row(table, **where):
    found = table.filter(pl.col(name).eq_missing(value) for name, value in where.items())
    assert found.height == 1
    return found.row(0, named=True)


def test_quarters_are_alike_in_size_and_in_categories():
    kinds = ["a"] * 40 + ["b"] * 17 + ["c"] * 3 + [None] * 11
    deal = growth.quarters(kinds, 50, 7)
    sizes = np.array([[(one == k).sum() for k in range(4)] for one in deal])
    assert deal.shape == (50, 71) and set(sizes.ravel()) == {17, 18}
    for kind in ("a", "b", "c", None):
        mine = np.array([k == kind for k in kinds])
        halves = (deal[:, mine] < 2).sum(1)
        assert np.abs(halves - mine.sum() / 2).max() <= 2, "a run of four gives two to each half"
    assert len({one.tobytes() for one in deal}) == 50 and (deal == growth.quarters(kinds, 50, 7)).all()


def test_sets_are_scipys_and_stand_beside_their_siblings():
    pairs = world(np.random.default_rng(0))
    table = made(pairs, splits=30)
    deal = growth.quarters(pairs["category"].to_list(), 30, table["split_seed"][0])
    x, y = pairs.select("cosine_centered", "rate").to_numpy().T
    half = np.array([[spearmanr(x[d // 2 == k], y[d // 2 == k])[0] for k in (0, 1)] for d in deal])
    part = np.array([[spearmanr(x[d == k], y[d == k])[0] for k in range(4)] for d in deal])
    whole = spearmanr(x, y)[0]
    halves, quarters = row(table, size="half", layer=0), row(table, size="quarter", layer=0)
    assert halves["n"] == 32 and quarters["n"] == 16 and row(table, size="all")["n"] == 64
    for found, rho in ((halves, half), (quarters, part)):
        assert found["spearman"] == pytest.approx(rho.mean(), abs=1e-12)
        assert found["spearman_sd"] == pytest.approx(rho.std(ddof=1), abs=1e-12)
        assert found["spearman_low"] == pytest.approx(np.quantile(rho, 0.025), abs=1e-12)
        assert found["difference_high"] == pytest.approx(-found["difference_low"], abs=1e-12)
    assert halves["change"] == pytest.approx((whole - half).mean(), abs=1e-12)
    assert quarters["change"] == pytest.approx((np.repeat(half, 2, 1) - part).mean(), abs=1e-12)
    assert halves["difference"] == pytest.approx(np.abs(half[:, 0] - half[:, 1]).mean(), abs=1e-12)
    apart = np.abs([part[:, 0] - part[:, 1], part[:, 2] - part[:, 3]])
    assert quarters["difference"] == pytest.approx(apart.mean(), abs=1e-12)
    assert row(table, size="all")["spearman"] == pytest.approx(whole, abs=1e-12)


def test_a_pick_from_noise_does_not_stand_and_one_that_stands_out_does():
    noise = made(world(np.random.default_rng(1), strength=0.0, layers=6), splits=100)
    found = row(noise, size="half", layer=None)
    assert found["change"] < -0.05 and found["elsewhere"] < found["spearman"] - 0.1
    assert found["picked_share"] < 0.7 and found["agree"] is None and "picked" in found["agree_reason"]
    clear = made(world(np.random.default_rng(2), strength=3.0, layers=6, people=120), splits=100)
    found = row(clear, size="half", layer=None)
    assert found["picked_share"] == found["same_sign"] == 1.0 and abs(found["change"]) < 0.02
    shares = clear.filter(pl.col("layer").is_not_null(), size="half")["picked_share"]
    assert shares.sum() == pytest.approx(1)


def test_pooled_is_ranked_within_sources_and_a_persona_comes_with_all_of_them():
    pairs = world(np.random.default_rng(3), sources=("s", "t", "u"), strength=0.5)
    table, correlations = made(pairs, splits=20), correlate(pairs, 0)
    told = correlations.filter(pl.col("category").is_null(), source="pooled", cosine="centered", y="rate")
    assert row(table, source="pooled", size="all")["spearman"] == pytest.approx(
        told["spearman"][0], abs=1e-12
    )
    deal = growth.quarters(pairs.filter(source="s")["category"].to_list(), 20, table["split_seed"][0])
    rho = []
    for one in deal:
        for k in (0, 1):
            mine = one // 2 == k
            sides = [
                np.concatenate(
                    [rankdata(pairs.filter(source=s)[name].to_numpy()[mine]) for s in ("s", "t", "u")]
                )
                for name in ("cosine_centered", "rate")
            ]
            rho.append(spearmanr(*sides)[0])
    assert row(table, source="pooled", size="half")["spearman"] == pytest.approx(np.mean(rho), abs=1e-12)


def test_order_and_threads_change_no_bit_and_what_lacks_says_so():
    pairs = world(np.random.default_rng(4), layers=3, sources=("s", "t"))
    errors = correlate(pairs, 0, bootstraps=200, workers=1)
    one = growth.table(pairs, errors, workers=1, splits=9)
    again = growth.table(pairs.sample(fraction=1, shuffle=True, seed=1), errors, workers=3, splits=9)
    key = ["source", "cosine", "y", "layer", "size"]
    assert one.sort(key).equals(again.sort(key))
    assert growth.table(pairs, errors, 1, splits=9)["split_seed"][0] != one["split_seed"][0]
    values = [name for name, kind in growth.COLUMNS.items() if kind == pl.Float64 and name != "agree"]
    gaps = one.filter(pl.any_horizontal(pl.col(values).is_null()) & pl.col("reason").is_null())
    assert (
        gaps.is_empty()
        and one.filter(pl.col("agree").is_null() & pl.col("agree_reason").is_null()).is_empty()
    )
    assert not one.select(pl.any_horizontal(pl.col(values).is_nan().any())).item()
    few = made(world(np.random.default_rng(5), people=10), splits=20)
    assert row(few, size="quarter")["spearman"] is None and "too small" in row(few, size="quarter")["reason"]
    flat = made(pairs.with_columns(rate=pl.lit(0.25)), splits=5)
    assert flat["spearman"].null_count() == flat.height
    assert flat["reason"].str.starts_with("rate is 0.25 for all").all()
    with pytest.raises(ValueError, match="at least 1"):
        growth.table(pairs, errors, splits=0)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.5])
def test_spread_over_halves_is_the_standard_error_and_halves_agree_as_often_as_said(strength):
    """1,000 studies of 110 personas, independent draws: the spread of ρ between studies against the mean spread over halves
    of one; the share of studies whose first two halves have an interval of their difference with 0 in it."""
    rng, deal = np.random.default_rng(6), growth.quarters([None] * 110, 50, 1)
    member = np.concatenate([deal < 2, deal >= 2])
    rho, spread, inside = [], [], []
    for trial in range(1_000):
        x, y = world(rng, people=110, strength=strength).select("cosine_centered", "rate").to_numpy().T
        whole = spearmanr(x, y)[0]
        se, _ = intervals.bootstrap_z([whole], resample.bootstrap_spearman(x, y, 400, trial, workers=1))
        half = subsets.spearman_of_subsets(x, y, member, workers=1)[:, 0]
        rho.append(whole)
        spread.append(half.std(ddof=1))
        apart = abs(np.arctanh(half[0]) - np.arctanh(half[50]))
        inside.append(apart <= 1.96 * se[0] * np.sqrt(2 * 110 / 55))
    ratio = np.sqrt(np.mean(np.square(spread))) / np.std(rho, ddof=1)
    print(
        f"strength {strength}: spread over halves / between studies {ratio:.3f}, agree {np.mean(inside):.4f}"
    )
    assert 0.93 <= ratio <= 1.1
    assert 0.93 <= np.mean(inside) <= 0.97


def test_a_quarter_without_anybody_has_a_reason():
    """Few bystanders of an adapter that was measured in part: a deal of all personas leaves some sets empty."""
    pairs = world(np.random.default_rng(3), 40, sources=("a", "b"))
    few = pl.concat([pairs.filter(source="a", persona=f"p{k:03d}") for k in range(6)])
    table = made(pl.concat([few, pairs.filter(source="b")]))
    quarters = table.filter(source="a", size="quarter", cosine="centered", y="rate")
    assert quarters["n"].to_list() == [0] and quarters["reason"].is_not_null().all()
