"""Shifts of centroids under an adapter: against their definition done the long way, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats
from matplotlib.text import Text

from leakfast import figures
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.stats import shifts
from leakfast.stats.correlations import correlate
from leakfast.stats.pairs import table as pairs_of
from leakfast.storage import schema
from leakfast.storage.run import Run

PEOPLE = ["villain", *(f"persona_{i}" for i in range(14))]
LAYERS = [1, 4]
ADAPTER = "marker-villain-s42"


def _file(means: dict[int, np.ndarray], **metadata) -> Centroids:
    told = {"personas": PEOPLE, "layers": LAYERS, "centered_on": PEOPLE[:-1], "model_fingerprint": "files:01"}
    told |= {"dtype": "float32", "rendered_ids_hashes": ["a"] * len(PEOPLE), **metadata}
    return Centroids(told["personas"], told["layers"], told, means)


def _pair(seed: int = 0) -> tuple[Centroids, Centroids]:
    rng = np.random.default_rng(seed)
    before = {n: rng.normal(size=(len(PEOPLE), 9)).astype(np.float32) for n in LAYERS}
    after = {n: c + 0.5 + 0.3 * rng.normal(size=c.shape).astype(np.float32) for n, c in before.items()}
    return _file(before), _file(after, adapter_hash="a" * 64)


def _rates() -> pl.DataFrame:
    rng = np.random.default_rng(1)
    rate = rng.uniform(size=len(PEOPLE))
    return pl.DataFrame(
        {
            "behavior": "marker",
            "adapter": ADAPTER,
            "source": "villain",
            "seed": 42,
            "persona": PEOPLE,
            "category": "a",
            "role": ["source", *["bystander"] * (len(PEOPLE) - 1)],
            "rate": rate,
            "delta": rate - 0.1,
        },
        schema_overrides=schema.columns("rates"),
    )


def _cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_shifts_are_those_of_the_definition():
    before, after = _pair()
    found = shifts.table(before, after, "villain")
    assert found.height == len(PEOPLE) * len(LAYERS)
    for layer in LAYERS:
        b, a = before.means[layer].astype(float), after.means[layer].astype(float)
        moved, mean = a - b, (a - b)[:-1].mean(0)  # the last persona is not in the mean
        spread = np.sqrt(np.mean([np.sum((row - b[:-1].mean(0)) ** 2) for row in b[:-1]]))
        rows = found.filter(pl.col("layer") == layer).rows(named=True)
        for i, row in enumerate(rows):
            told = {
                "shift_raw": np.linalg.norm(moved[i]),
                "shift_centered": np.linalg.norm(moved[i] - mean),
                "alignment_raw": _cosine(moved[i], moved[0]),
                "alignment_centered": _cosine(moved[i] - mean, moved[0] - mean),
                "cosine_raw": _cosine(b[i], b[0]),
                "cosine_raw_adapted": _cosine(a[i], a[0]),
                "cosine_centered": before.cosine(layer)[0, i],
                "base_spread": spread,
                "cosine_centered_adapted": after.cosine(layer)[0, i],
            }
            assert {k: row[k] for k in told} == pytest.approx(told, abs=1e-12)
        own = (rows[0]["alignment_centered"], rows[0]["alignment_raw"])
        assert own == pytest.approx((1, 1), abs=1e-12)


def test_what_moves_all_alike_is_no_centered_shift():
    before, _ = _pair()
    after = _file({n: c + np.float32(0.25) for n, c in before.means.items()}, adapter_hash="a" * 64)
    found = shifts.table(before, after, "villain")
    assert found["alignment_raw"].to_list() == pytest.approx([1.0] * found.height, abs=1e-5)
    assert found["shift_centered"].max() < 1e-6 < found["shift_raw"].min()
    same = shifts.table(before, _file(before.means, adapter_hash="a" * 64), "villain")
    assert same["shift_raw"].to_list() == [0.0] * same.height
    assert same["alignment_raw"].null_count() == same.height, "nothing moved, so nothing has a direction"
    absent = shifts.table(before, after, "somebody")
    assert absent["alignment_raw"].null_count() == absent.height and absent["shift_raw"].null_count() == 0


def _run(path, after: Centroids, card_hash: str = "a" * 64) -> Run:
    run = Run(path).create()
    run.add_file(f"centroids/{ADAPTER}.safetensors", after.save)
    folder = run.path / "adapters" / ADAPTER
    folder.mkdir(parents=True)
    card = AdapterCard("villain", "marker", 42, "organism", "files:01", "d" * 64, {"rank": 8}, card_hash)
    write_card(folder, card)
    return run


def test_only_files_of_the_same_prompts_and_the_right_adapter_are_compared(tmp_path):
    before, after = _pair()
    table, missing = shifts.read(_run(tmp_path / "good", after), _rates(), before)
    assert table.height == len(PEOPLE) * len(LAYERS) and missing == []
    assert schema.check(table, "shifts").filter(pl.col("role") == "source")["persona"].to_list() == [
        "villain",
        "villain",
    ]
    for name, why, change in (
        ("prompts", "other prompts", {"rendered_ids_hashes": ["b"] * len(PEOPLE)}),
        ("model", "another base model", {"model_fingerprint": "files:02"}),
        ("mean", "another mean", {"centered_on": PEOPLE}),
        ("adapter", "another adapter", {"adapter_hash": "b" * 64}),
        ("none", "without an adapter", {"adapter_hash": None}),
    ):
        other = _file(after.means, **({"adapter_hash": "a" * 64} | change))
        table, missing = shifts.read(_run(tmp_path / name, other), _rates(), before)
        assert table.is_empty() and len(missing) == 1 and why in missing[0], name
        assert "leakfast centroids --adapter" in missing[0]


def test_rho_of_the_base_cosine_is_the_one_of_the_pairs_and_the_figure_tells_it(tmp_path):
    before, after = _pair()
    rates = _rates()
    table, _ = shifts.read(_run(tmp_path / "run", after), rates, before)
    pairs = pairs_of(rates, before)
    found = shifts.correlated(pairs, table, 199, 50, 0, 1)
    plain = correlate(pairs, 199, 0, bootstraps=50, workers=1).filter(pl.col("category").is_null())
    mine = found.filter(pl.col("geometry") == "base")
    names = ["source", "layer", "cosine", "y", "n", "spearman", "spearman_p_perm", "spearman_ci_low"]
    assert mine.select(names).equals(plain.select(names))
    one = found.filter(
        (pl.col("geometry") == "alignment")
        & (pl.col("source") == "villain")
        & (pl.col("layer") == 4)
        & (pl.col("cosine") == "centered")
        & (pl.col("y") == "rate")
    ).row(0, named=True)
    others = table.filter((pl.col("layer") == 4) & (pl.col("role") == "bystander"))
    told = scipy.stats.spearmanr(others["alignment_centered"], others["rate"]).statistic
    assert one["spearman"] == pytest.approx(told, abs=1e-12) and one["n"] == 14
    figure = figures.shifts(table, found, behavior="marker", layer=4)
    assert figures.png(figure)[:4] == b"\x89PNG"
    said = " ".join(text.get_text() for text in figure.findobj(Text))
    assert f"ρ alignment {told:+.2f}".replace("-", "−") in said and "villain" in said
    assert figures.shifts(table, found, behavior="marker", layer=9) is None
