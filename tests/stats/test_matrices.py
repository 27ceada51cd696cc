"""QAP and MRQAP against plain loops, scipy and numpy's least squares; which personas a run's table tests, and why not."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import polars as pl
import pytest
import scipy.stats

from leakfast.geometry import Centroids
from leakfast.stats import compiled, matrices, matrix_tests, resample
from leakfast.stats.pairs import table as pair_table
from leakfast.stats.people import People
from leakfast.stats.relabelling import relabel


def _case(sources: int, people: int, layers: int, seed: int, levels: int = 0):
    rng = np.random.default_rng(seed)
    near = rng.normal(size=(layers, people, 4))
    cosine = near @ near.transpose(0, 2, 1)
    y = rng.normal(size=(sources, people))
    if levels:
        cosine, y = np.round(cosine * levels / 4), np.round(y * levels / 2)
    return y, cosine, rng.choice(people, sources, replace=False)


def _relabellings(people: int, seed: int, count: int) -> list[np.ndarray]:
    out = []
    for number in range(count):
        sent = np.empty(people, np.int64)
        compiled.shuffle(np.uint64(seed), number, sent)
        out.append(sent)
    return out


def _loop(y, cosine, rows, sent) -> tuple[int, int, int]:
    """Σ of products and squares of doubled centered ranks, one pair after another."""
    people, products, own, other = len(cosine), 0, 0, 0
    for s, row in enumerate(rows):
        those = [b for b in range(people) if b != row]
        a = [int(2 * r) - people for r in scipy.stats.rankdata([y[s, b] for b in those])]
        c = [int(2 * r) - people for r in scipy.stats.rankdata([cosine[sent[row], sent[b]] for b in those])]
        products += sum(u * v for u, v in zip(a, c, strict=True))
        own, other = own + sum(u * u for u in a), other + sum(v * v for v in c)
    return products, own, other


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("sources", [1, 3])
def test_qap_is_a_plain_loop(sources, levels):
    y, cosine, rows = _case(sources, 7, 2, sources + levels, levels)
    found = matrices.qap(y, cosine, rows, 120, 11)
    drawn = np.empty((120, 2))
    for k in range(2):
        products, own, other = _loop(y, cosine[k], rows, np.arange(7))
        assert found.value[k] == products / np.sqrt(own * other), "equal to the bit"
        for r, sent in enumerate(_relabellings(7, 11, 120)):
            products, own, other = _loop(y, cosine[k], rows, sent)
            drawn[r, k] = abs(products / np.sqrt(own * other)) if other else 0.0
    assert (found.p == (1 + (drawn >= abs(found.value)).sum(0)) / 121).all()
    assert (found.p_max == (1 + (drawn.max(1)[:, None] >= abs(found.value)).sum(0)) / 121).all()
    assert found.pairs == sources * 6


def test_qap_without_ties_is_the_mean_of_the_sources_rho():
    y, cosine, rows = _case(4, 20, 3, 0)
    found = matrices.qap(y, cosine, rows, 9, 0)
    for k in range(3):
        each = [
            scipy.stats.spearmanr(np.delete(y[s], row), np.delete(cosine[k, row], row)).statistic
            for s, row in enumerate(rows)
        ]
        assert found.value[k] == pytest.approx(np.mean(each), abs=1e-12)


def test_qap_p_is_that_of_all_relabellings():
    y, cosine, rows = _case(2, 6, 1, 3)
    all_of = []
    for sent in permutations(range(6)):
        products, own, other = _loop(y, cosine[0], rows, sent)
        all_of.append(abs(products / np.sqrt(own * other)))
    found = matrices.qap(y, cosine, rows, 40_000, 1)
    exact = np.mean(np.array(all_of) >= abs(found.value[0]))
    assert abs(found.p[0] - exact) < 5 * np.sqrt(0.25 / 40_000)


def test_one_source_is_the_free_permutation_test():
    y, cosine, rows = _case(1, 40, 1, 4)
    row = int(rows[0])
    x, flat = np.delete(cosine[0, row], row), np.delete(y[0], row)
    free = resample.permute_spearman(x[None], flat, 20_000, 5).p[0]
    assert abs(matrices.qap(y, cosine, rows, 20_000, 6).p[0] - free) < 6 * np.sqrt(0.25 / 20_000)


def test_what_a_source_has_of_itself_and_sources_that_do_not_vary_are_not_read():
    y, cosine, rows = _case(3, 12, 1, 5)
    told = matrices.qap(y, cosine, rows, 99, 2)
    y[np.arange(3), rows] = 1e9
    cosine[0][np.diag_indices(12)] = np.nan
    same = matrices.qap(y, cosine, rows, 99, 2)
    assert (told.value, told.p) == (same.value, same.p)
    flat = matrices.qap(
        np.vstack([y, np.ones(12)]), cosine, np.append(rows, np.setdiff1d(range(12), rows)[0]), 99, 2
    )
    assert (flat.value, flat.p, flat.pairs) == (told.value, told.p, told.pairs)


def _products() -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Rows, left sides and matrices of ranks, whole numbers: with several layers and with one of each."""
    y, cosine, rows = _case(5, 60, 6, 6)
    words = matrices.row_ranks(np.random.default_rng(1).normal(size=(60, 60)), np.arange(60))[:, :, None]
    near = [np.stack([matrices.row_ranks(one, np.arange(60)) for one in cosine], axis=-1), words]
    return rows, [matrices.row_ranks(y, rows)[:, :, None], near[0][rows], words[rows]], near


@pytest.mark.parametrize("scale", [1.0, 1024.0])  # sums beyond 2²⁴ are no longer of float32
def test_products_of_relabelled_matrices_are_einsums(scale):
    rows, left, near = _products()
    left = [scale * one for one in left]
    total, sources = relabel(rows, left, near, 40, 3)
    for r, sent in enumerate(_relabellings(60, 3, 40)):
        assert (sources[r] == sent[rows]).all()
        for u, one in enumerate(left):
            for v, other in enumerate(near):
                moved = other[np.ix_(sent[rows], sent)]
                assert np.array_equal(total[r, u, v], np.broadcast_to((one * moved).sum((0, 1)), 6))


def test_threads_change_no_bit_and_fewer_is_a_prefix():
    rows, left, near = _products()
    total, sources = relabel(rows, left, near, 3_000, 3, workers=1)
    for workers in (2, 5):
        again = relabel(rows, left, near, 3_000, 3, workers=workers)
        assert np.array_equal(total, again[0]) and np.array_equal(sources, again[1])
    assert np.array_equal(total[:50], relabel(rows, left, near, 50, 3)[0])
    with pytest.raises(ValueError, match="meets itself"):
        relabel(rows, left, [near[0] + 1], 9, 3)
    with pytest.raises(ValueError, match="each once"):
        relabel(np.zeros(5, int), left, near, 9, 3)
    with pytest.raises(ValueError, match="must be"):
        relabel(rows, left, [near[0][:, :, :4], near[0]], 9, 3)


def test_each_y_and_term_is_as_if_asked_alone():
    """Two leakages that vary under the same sources, and one that varies under fewer."""
    y, cosine, rows = _case(4, 30, 3, 12)
    words = np.random.default_rng(2).normal(size=(1, 30, 30))
    several = np.stack([y, y[::-1] ** 2, y])
    several[2, 1] = 0.5
    whole = matrices.mrqap_each(several, [cosine, words], rows, 499, 1)
    for k in range(3):
        for j, (term, other) in enumerate([(cosine, words), (words, cosine)]):
            alone = matrices.mrqap(several[k], term, [other], rows, 499, 1)
            for name in ("value", "t", "p", "p_max"):
                assert np.array_equal(getattr(whole[k][j], name), getattr(alone, name))
        alone = matrices.qap(several[k], cosine, rows, 499, 1)
        assert np.array_equal(matrices.qap_each(several, cosine, rows, 499, 1)[k].p_max, alone.p_max)


def _least_squares(y, columns) -> tuple[float, float]:
    """(coefficient, t) of the first column, y and columns flat with the sources' means among the columns."""
    design = np.column_stack(columns)
    slope, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ slope
    variance = (left @ left) / (len(y) - design.shape[1]) * np.linalg.inv(design.T @ design)[0, 0]
    return float(slope[0]), float(slope[0] / np.sqrt(variance))


def test_mrqap_is_least_squares_on_each_relabelled_residual():
    """numpy's least squares with a column for each source's mean, once for the observed and once a relabelling."""
    y, cosine, rows = _case(3, 9, 2, 7)
    rng = np.random.default_rng(8)
    words, length = np.round(rng.normal(size=(1, 9, 9)), 1), np.tile(rng.normal(size=9), (9, 1))[None]
    found = matrices.mrqap(y, cosine, [words, length], rows, 60, 4)
    off = ~np.eye(9, dtype=bool)
    held = off[rows]
    source = np.repeat(np.arange(3), 8)
    means = [(source == s).astype(float) for s in range(3)]
    ry = matrices.row_ranks(y, rows)[held]
    ranks = [matrices.row_ranks(m, np.arange(9)) for m in (words[0], length[0])]
    seen = np.empty((60, 2))
    for k in range(2):
        rc = matrices.row_ranks(cosine[k], np.arange(9))
        slope, t = _least_squares(ry, [rc[rows][held], *(m[rows][held] for m in ranks), *means])
        assert (found.value[k], found.t[k]) == (pytest.approx(slope), pytest.approx(t))
        design = np.column_stack([m[off] for m in ranks])
        left = np.zeros((9, 9))
        left[off] = rc[off] - design @ np.linalg.lstsq(design, rc[off], rcond=None)[0]
        for r, sent in enumerate(_relabellings(9, 4, 60)):
            moved = left[np.ix_(sent[rows], sent)][held]
            seen[r, k] = abs(_least_squares(ry, [moved, *(m[rows][held] for m in ranks), *means])[1])
    assert (found.p == (1 + (seen >= abs(found.t) - 1e-9).sum(0)) / 61).all()
    assert (found.p_max == (1 + (seen.max(1)[:, None] >= abs(found.t) - 1e-9).sum(0)) / 61).all()


def test_a_term_that_follows_from_the_others_has_no_value():
    y, cosine, rows = _case(2, 10, 1, 9)
    found = matrices.mrqap(y, cosine, [2 * cosine + 1], rows, 19, 0)
    assert np.isnan(found.value[0]) and np.isnan(found.p[0])


def test_words_that_cause_leakage_take_the_cosine_with_them():
    rng = np.random.default_rng(10)
    _, cosine, rows = _case(4, 60, 1, 10)
    noise = rng.normal(size=(60, 60))
    words = cosine[0] / 2 + noise + noise.T
    y = words[rows] + 0.5 * rng.normal(size=(4, 60))
    assert matrices.qap(y, cosine, rows, 999, 0).p[0] < 0.01
    assert matrices.mrqap(y, cosine, [words[None]], rows, 999, 0).p[0] > 0.05
    assert matrices.mrqap(y, words[None], [cosine], rows, 999, 0).p[0] == 0.001


# ---------------------------------------------------------------- the table


def _run(people: int = 16, drop: tuple[str, str] | None = None, prompts: bool = True):
    rng = np.random.default_rng(3)
    named = [f"p{i:02d}" for i in range(people)]
    means = {k: rng.normal(size=(people, 6)).astype(np.float32) for k in range(2)}
    made = Centroids(named, [0, 1], {"centered_on": named}, means)
    rows = []
    for source in named[:3]:
        for name in named:
            if (source, name) != drop:
                role = "source" if name == source else "bystander"
                hits, base = float(rng.integers(0, 30)) / 30, float(rng.integers(0, 4)) / 30
                rows.append(
                    ("marker", f"m-{source}", source, 42, name, "kind", role, hits, base, hits - base)
                )
    names = "behavior adapter source seed persona category role rate baseline delta".split()
    rates = pl.DataFrame(rows, schema=names, orient="row")
    said = {n: " ".join(["you", "are", n[1:], *["x" * (1 + i % 5)] * (i % 7)]) for i, n in enumerate(named)}
    said = {n: text.translate(str.maketrans("0123456789", "abcdefghij")) for n, text in said.items()}
    people_of = People(dict.fromkeys(named, "kind"), prompts=said if prompts else {})
    return pair_table(rates, made), rates, people_of, made


def test_the_table_has_every_layer_cosine_y_and_term():
    pairs, rates, people, made = _run()
    found = matrix_tests.table(pairs, rates, people, made, 99, 1, 1)
    assert found.height == 2 * 2 * 2 * (1 + 3)
    assert found["reason"].null_count() == found.height and found["p"].null_count() == 0
    assert found["personas"].unique().to_list() == [16] and found["n"].unique().to_list() == [45]
    assert found.filter(term="cosine")["p_max"].null_count() == 0
    again = matrix_tests.table(pairs.sample(fraction=1, shuffle=True, seed=2), rates, people, made, 99, 1, 3)
    keys = ["layer", "cosine", "y", "test", "term"]
    assert again.sort(keys).equals(found.sort(keys))
    one = found.filter(layer=1, cosine="raw", y="rate", test="qap").row(0, named=True)
    wide = (
        pairs.filter(layer=1)
        .pivot("persona", index="source", values="rate", sort_columns=True)
        .sort("source")
    )
    y = wide.select(made.personas).fill_null(0.0).to_numpy()
    direct = matrices.qap(y, made.cosine(1, "raw")[None], np.arange(3), 99, one["permutation_seed"])
    assert (one["rho"], one["p"]) == (direct.value[0], direct.p[0])


def test_a_bystander_that_one_source_lacks_is_left_out_and_a_source_with_it():
    pairs, rates, people, made = _run(drop=("p01", "p09"))
    found = matrix_tests.table(pairs, rates, people, made, 19, 0, 1)
    assert found["personas"].unique().to_list() == [15] and found["sources"].unique().to_list() == [3]
    pairs, rates, people, made = _run(drop=("p01", "p00"))
    found = matrix_tests.table(pairs, rates, people, made, 19, 0, 1)
    assert found["personas"].unique().to_list() == [15] and found["sources"].unique().to_list() == [2]


def test_what_cannot_be_tested_says_why():
    pairs, rates, people, made = _run()
    without = matrix_tests.table(pairs, rates, people, None, 19, 0, 1)
    assert without["p"].null_count() == without.height
    assert without["reason"].str.contains("no centroids").all()
    pairs, rates, people, made = _run(prompts=False)
    found = matrix_tests.table(pairs, rates, people, made, 19, 0, 1)
    length = found.filter(term="length")
    assert length["reason"].str.contains("not known").all() and length["p"].null_count() == length.height
    flat = pairs.with_columns(rate=pl.lit(0.5), delta=pl.lit(0.5))
    still = matrix_tests.table(flat, rates, people, made, 19, 0, 1)
    assert still["reason"].str.contains("does not vary").all()
