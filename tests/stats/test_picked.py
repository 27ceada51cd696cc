"""ρ at a layer that was picked after looking."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from leakfast.stats import picked
from leakfast.storage import schema

LAYERS = 6


def world(rng, people=60, asked=12, drawn=10, strength=0.0, layers=LAYERS, sources=("s",)):
    """(pairs, counts): layers whose cosines go together, leakage that follows that of layer 0 by `strength`."""
    pairs, counts = [], []
    names = [f"p{i}" for i in range(people)]
    for source in sources:
        shared = rng.normal(size=people)
        cosines = [0.6 * shared + 0.8 * rng.normal(size=people) for _ in range(layers)]
        logit = strength * cosines[0] + 0.7 * rng.normal(size=people)
        hits = rng.binomial(drawn, (1 / (1 + np.exp(1.5 - logit)))[:, None], size=(people, asked))
        for layer, cosine in enumerate(cosines):
            frame = {"behavior": "marker", "source": source, "seed": 42, "persona": names, "category": None}
            frame |= {"layer": layer, "cosine_centered": cosine, "cosine_raw": None}
            frame |= {"rate": hits.sum(1) / (asked * drawn), "delta": None}
            pairs.append(pl.DataFrame(frame, schema=schema.columns("pairs")))
        counted = {"behavior": "marker", "adapter": source, "persona": np.repeat(names, asked)}
        counted |= {"question": np.tile(np.arange(asked), people), "hits": hits.ravel(), "total": drawn}
        types = {"question": pl.Int32, "total": pl.Int64}
        counts.append(pl.DataFrame(counted, schema_overrides=types))
    return pl.concat(pairs), pl.concat(counts)


def made(pairs, counts, bootstraps=300):
    return picked.table(pairs, counts, bootstraps, workers=1).filter(y="rate", cosine="centered")


def test_the_best_layer_is_scipys_and_noise_is_optimistic():
    pairs, counts = world(np.random.default_rng(0))
    row = made(pairs, counts).row(0, named=True)
    rho = [
        spearmanr(*pairs.filter(layer=k).select("cosine_centered", "rate").to_numpy().T)[0]
        for k in range(LAYERS)
    ]
    assert row["layer"] == int(np.argmax(np.abs(rho))) and row["spearman"] == pytest.approx(max(rho, key=abs))
    assert row["optimism"] > 0.02 and row["picked_low"] < 0 < row["picked_high"]
    assert abs(row["cross_fitted"]) < abs(row["spearman"])


def test_where_one_layer_stands_out_nothing_is_paid():
    row = made(*world(np.random.default_rng(1), strength=2.5, people=100)).row(0, named=True)
    assert row["layer"] == row["cross_fitted_layer"] == 0 and row["cross_fitted_share"] == 1.0
    assert abs(row["optimism"]) < 0.02 and row["cross_fitted"] > 0.75


def test_pooled_is_picked_for_itself_and_what_lacks_says_so():
    pairs, counts = world(np.random.default_rng(2), sources=("s", "t"), strength=2.0)
    table = made(pairs, counts)
    assert table["source"].to_list() == ["s", "t", "pooled"] and table["layer"].to_list() == [0, 0, 0]
    bare = made(pairs, schema.empty("question_counts"), 0)
    assert bare["picked_low"].null_count() == 3 and set(bare["reason"]) == {"no bootstrap was asked for"}
    assert "0 questions with counts" in bare["cross_fitted_reason"][0]
    assert picked.table(pairs.filter(layer=0), counts, 0).is_empty(), "one layer is no pick"
    raw = picked.table(pairs, counts, 0).filter(cosine="raw", y="rate")
    assert raw["spearman"].null_count() == raw.height and raw["reason"].null_count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_coverage_at_the_picked_layer(strength):
    """ρ over many personas at the layer that each trial picks; the plain interval holds it less often."""
    true = {}
    far, _ = world(np.random.default_rng(9), people=40_000, strength=strength)
    for layer in range(LAYERS):
        true[layer] = spearmanr(*far.filter(layer=layer).select("cosine_centered", "rate").to_numpy().T)[0]
    rng, inside = np.random.default_rng(3), []
    for _ in range(1_000):
        row = made(*world(rng, people=110, strength=strength), 400).row(0, named=True)
        inside.append(row["picked_low"] <= true[row["layer"]] <= row["picked_high"])
    print(f"strength {strength}: {np.mean(inside):.4f}")
    assert 0.92 <= np.mean(inside) <= 0.98


@pytest.mark.parametrize("people", range(10, 24))
def test_a_rho_of_one_up_to_rounding_has_a_reason_and_no_interval(people):
    names = [f"p{i}" for i in range(people)]
    frame = {"behavior": "marker", "source": "s", "seed": 42, "persona": names, "category": None, "layer": 0}
    frame |= {"cosine_centered": np.linspace(-0.5, 0.9, people), "cosine_raw": None, "delta": None}
    frame |= {"rate": np.linspace(0.9, 0.1, people)}
    pairs = pl.DataFrame(frame, schema=schema.columns("pairs"))
    row = made(pl.concat([pairs, pairs.with_columns(layer=pl.lit(1, pl.Int32))]), pl.DataFrame()).row(
        0, named=True
    )
    assert row["spearman"] == pytest.approx(-1, abs=1e-12) and row["picked_low"] is None
    assert "ρ is ±1" in row["reason"]
