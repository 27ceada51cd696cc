"""Means of ρ over sources and seeds that share their personas and questions: closed forms, what stands where something is
not known, and coverage for the mean and for one more (slow tier)."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.special import stdtrit
from scipy.stats import rankdata, spearmanr

from leakfast.stats import correlations, means, two_way
from leakfast.stats.compiled import leave_one_out
from leakfast.storage import schema


def draw(rng, k, asked, apart, slopes, over="sources", people=110, drawn=10):
    """(cosine (P,), hits (P, Q)) of k sources or seeds. A persona leaks alike under all of them (susceptibility, standard
    deviation 1 logit) and lies near or far from all sources; how steeply leakage follows the cosine differs between sources
    (`apart`) and between questions (`slopes`)."""
    prone, geometry = rng.normal(size=(2, people))
    levels, steeper = 0.5 * rng.normal(size=asked), slopes * rng.normal(size=asked)
    same = rng.normal(size=(2, people))
    for _ in range(k):
        own = rng.normal(size=(2, people)) if over == "sources" else same
        cosine = 0.7 * geometry + 0.7 * own[0]
        logit = -1.5 + (0.9 + apart * rng.normal() + steeper[None]) * cosine[:, None] + levels[None]
        logit = logit + (prone + 0.5 * own[1] + 0.3 * rng.normal(size=people))[:, None]
        yield cosine, rng.binomial(drawn, 1 / (1 + np.exp(-logit - 0.3 * rng.normal(size=logit.shape))))


def world(rng, k=3, asked=20, apart=0.3, slopes=0.3, over="sources", people=110, drawn=10):
    """(pairs, counts) of `draw`."""
    names = [f"p{i:03d}" for i in range(people)]
    pairs, counts = [], []
    for number, (cosine, hits) in enumerate(draw(rng, k, asked, apart, slopes, over, people, drawn)):
        source, seed = (f"s{number}", 1) if over == "sources" else ("s", number)
        adapter = f"{source}-{seed}"
        pairs.append(
            pl.DataFrame(
                {
                    "behavior": "marker",
                    "source": source,
                    "seed": seed,
                    "persona": names,
                    "category": None,
                    "layer": 0,
                    "cosine_centered": cosine,
                    "cosine_raw": None,
                    "rate": hits.sum(1) / (asked * drawn),
                    "delta": None,
                },
                schema=schema.columns("pairs"),
            ).with_columns(adapter=pl.lit(adapter))
        )
        counts.append(
            pl.DataFrame(
                {
                    "behavior": "marker",
                    "adapter": adapter,
                    "persona": np.repeat(names, asked),
                    "question": np.tile(np.arange(asked), people),
                    "hits": hits.ravel(),
                    "total": drawn,
                },
                schema_overrides={"question": pl.Int32, "total": pl.Int64},
            )
        )
    return pl.concat(pairs), pl.concat(counts)


def made(pairs, counts, over="sources"):
    table = means.table(correlations.correlate(pairs, 0, bootstraps=0), pairs, counts)
    table = table.filter(over=over, y="rate", cosine="centered")
    return (table.filter(source="s") if over == "seeds" else table).row(0, named=True)


def test_sums_without_one_are_those_of_the_rest():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (3, 20)).astype(float), rng.integers(0, 6, 20).astype(float)
    found = np.empty((3, 3, 20))
    leave_one_out(x, y, rankdata(x, axis=1), rankdata(y), found)
    rho = found[0] / np.sqrt(found[1] * found[2])
    for k in range(3):
        for i in range(20):
            told = spearmanr(np.delete(x[k], i), np.delete(y, i)).statistic
            assert rho[k, i] == pytest.approx(told, rel=1e-12)


def test_two_adapters_of_one_source_are_not_two_sources():
    """Adapters of several seeds without cards all have the seed null."""
    pairs, counts = world(np.random.default_rng(4), 3, 6, people=30)
    same = pl.col("source").replace({"s2": "s1"})
    row = made(pairs.with_columns(source=same), counts)
    assert row["mean"] is row["low"] is None and row["k"] == 3
    assert row["reason"] == "s1 has more than one adapter: a mean over sources takes one for each"
    assert made(pairs, counts)["low"] is not None


def test_intervals_are_those_of_the_formulas():
    """The covariance by leaving out with scipy, one persona and one question at a time."""
    k, asked, people = 3, 6, 30
    pairs, counts = world(np.random.default_rng(1), k, asked, people=people)
    row = made(pairs, counts)
    x = np.array([pairs.filter(source=f"s{n}").sort("persona")["cosine_centered"] for n in range(k)])
    hits = np.array(
        [
            counts.filter(adapter=f"s{n}-1")
            .sort("persona", "question")["hits"]
            .to_numpy()
            .reshape(people, asked)
            for n in range(k)
        ]
    )
    rate = hits.sum(2)

    def z(n, keep, values):
        return np.arctanh(spearmanr(x[n][keep], values[keep]).statistic)

    everyone = np.ones(people, bool)
    by_person = np.array([[z(n, np.arange(people) != p, rate[n]) for p in range(people)] for n in range(k)])
    by_question = np.array(
        [[z(n, everyone, rate[n] - hits[n][:, q]) for q in range(asked)] for n in range(k)]
    )
    of_people, of_questions = (
        (m - 1) ** 2 / m * np.cov(side) for side, m in ((by_person, people), (by_question, asked))
    )
    own = [np.trace(side) / k for side in (of_people, of_questions)]
    shared = [side[np.triu_indices(k, 1)].mean() for side in (of_people, of_questions)]
    # the noise of cells, drawn, takes something off either
    assert max(shared) - 1e-12 <= row["shared_se_z"] ** 2 <= sum(shared) * 1.05
    assert row["own_se_z"] ** 2 <= sum(own) - max(shared)
    est = np.array([z(n, everyone, rate[n]) for n in range(k)])
    spread, c = est.var(ddof=1), row["shared_se_z"] ** 2
    t, few = stdtrit(k - 1, 0.975), stdtrit(asked - 1, 0.975)
    assert row["mean"] == pytest.approx(np.tanh(est.mean()))
    wanted = _both((spread / k, c), (t, few))
    assert np.arctanh(row["high"]) == pytest.approx(est.mean() + wanted)
    assert np.arctanh(row["predict_low"]) == pytest.approx(est.mean() - t * np.sqrt(spread * (1 + 1 / k)))
    more = spread * (1 + 1 / k)
    wanted = _both((more, 2 * c), (t, few))
    assert np.arctanh(row["predict_new_high"]) == pytest.approx(est.mean() + wanted)
    assert row["tau2"] == pytest.approx(max(0, spread - row["own_se_z"] ** 2))
    assert (row["personas"], row["questions"], row["resampling_unit"]) == (
        people,
        asked,
        "persona and question",
    )


def _both(variances, t) -> float:
    own, shared = np.square(variances) / np.square(variances).sum()
    return t[0] ** own * t[1] ** shared * np.sqrt(sum(variances))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_the_interval_holds_whatever_the_sizes_of_its_two_variances(share):
    """z normal, of variance 1 in all, estimated with 2 and with 19 degrees of freedom."""
    rng, df, trials = np.random.default_rng(8), (2, 19), 4_000
    sizes = np.array([share, 1 - share])[:, None] * [rng.chisquare(f, trials) / f for f in df]
    half = np.array([means.half_width(pair, df) for pair in sizes.T])
    assert 0.94 <= np.mean(np.abs(rng.normal(size=trials)) <= half) <= 0.97


def test_equal_estimates_share_all_their_error():
    """The same source four times: nothing of its own, and the interval of the mean is that of one of them."""
    pairs, counts = world(np.random.default_rng(2), 1, 12)
    copies = [(pairs.with_columns(source=pl.lit(name), adapter=pl.lit(name)), name) for name in "abcd"]
    row = made(
        pl.concat([frame for frame, _ in copies]),
        pl.concat([counts.with_columns(adapter=pl.lit(name)) for _, name in copies]),
    )
    assert row["own_se_z"] == pytest.approx(0, abs=1e-6) and row["shared_se_z"] > 0.05
    assert row["predict_low"] == pytest.approx(row["mean"], abs=1e-6)
    assert row["low"] < row["mean"] - 0.02


def test_seeds_of_a_source_and_of_the_pool():
    parts = []
    for seed in (1, 2):
        pairs, counts = world(np.random.default_rng(3 + seed), 2, 10, people=40)
        parts.append(
            (
                pairs.with_columns(seed=pl.lit(seed, pl.Int64), adapter=pl.col("source") + f"-{seed}"),
                counts.with_columns(adapter=pl.col("adapter").str.replace("-1", f"-{seed}")),
            )
        )
    pairs, counts = (pl.concat(side) for side in zip(*parts, strict=True))
    table = means.table(correlations.correlate(pairs, 0, bootstraps=0), pairs, counts)
    table = table.filter(y="rate", cosine="centered")
    seeds = table.filter(over="seeds").sort("source")
    assert seeds["source"].to_list() == ["pooled", "s0", "s1"] and seeds["k"].to_list() == [2, 2, 2]
    assert table.filter(over="sources")["seed"].sort().to_list() == [1, 2]
    assert seeds["low"].null_count() == 0 and (seeds["shared_se_z"] >= 0).all()
    again = means.table(
        correlations.correlate(pairs.reverse(), 0, bootstraps=0), pairs.reverse(), counts.reverse()
    )
    assert again.filter(y="rate", cosine="centered", over="seeds").sort("source").equals(seeds)


def test_what_is_not_known_says_so():
    pairs, counts = world(np.random.default_rng(4), 3, 10, people=30)
    bare = made(pairs, schema.empty("question_counts"))
    assert bare["resampling_unit"] == "persona" and bare["questions"] is None and bare["low"] is not None
    other = counts.with_columns(
        question=pl.when(pl.col("adapter") == "s0-1").then(pl.col("question") + 1).otherwise("question")
    )
    assert made(pairs, other)["questions"] is None, "sources that were asked different questions"
    one = made(pairs.filter(source="s0"), counts)
    assert one["k"] == 1 and one["low"] is None and one["reason"].startswith("one estimate")
    few = made(pairs.filter(pl.col("persona") < "p004"), counts)
    assert few["mean"] is None and "fewer than 5 pairs" in few["reason"]
    exact = pairs.with_columns(rate=pl.col("cosine_centered").rank() / 40)
    assert "±1" in made(exact, counts)["reason"]


def test_the_lean_simulation_is_the_table():
    args = (3, 12, 0.3, 0.3, "sources")
    row, z = _lean(np.random.default_rng(6), *args)
    pairs, counts = world(np.random.default_rng(6), 4, *args[1:])
    first = pl.col("adapter") != "s3-1"
    told = made(pairs.filter(first), counts.filter(first))
    assert np.tanh(z[:3].mean()) == pytest.approx(told["mean"])
    assert row["own_se_z"] == pytest.approx(told["own_se_z"], rel=0.05)
    assert row["low"] == pytest.approx(told["low"], abs=0.02), "but for the signs that turn cells"


def test_a_source_is_not_among_its_own_bystanders():
    """Personas of one source that are missing under another neither break the covariance nor move it much."""
    pairs, counts = world(np.random.default_rng(5), 3, 10)
    gone = [(f"s{n}", f"p00{n}") for n in range(3)]
    part = pairs.filter(~pl.struct("source", "persona").is_in([{"source": s, "persona": p} for s, p in gone]))
    whole, less = made(pairs, counts), made(part, counts)
    assert less["personas"] == whole["personas"] == 110
    assert less["shared_se_z"] == pytest.approx(whole["shared_se_z"], rel=0.15)


def _lean(rng, k, asked, apart, slopes, over) -> tuple[dict, np.ndarray]:
    """(the row of the first k of k + 1 estimates, z of all) without the tables in between."""
    names = [f"p{i:03d}" for i in range(110)]
    parts, z, members = {}, [], []
    for number, (cosine, hits) in enumerate(draw(rng, k + 1, asked, apart, slopes, over)):
        rate = hits.mean(1) / 10
        left = two_way._left_out((hits, np.full(hits.shape, 10.0)), None, np.isfinite(rate))
        one = two_way.Asked(names, cosine[:, None], {"rate": rate}, {"rate": left}, list(range(asked)))
        parts[number] = means.Part(one, names)
        rho = spearmanr(cosine, rate).statistic
        z.append(np.arctanh(rho))
        members.append({"spearman": rho, "n": len(rate)})
    first = dict(list(parts.items())[:k])
    shared = means.errors_of(first, {}, "rate", int(rng.integers(2**31))).among(list(first), 0)
    return means._mean(members[:k], shared), np.array(z)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "k", "asked", "apart", "slopes"),
    [
        ("sources", 3, 20, 0.0, 0.0),
        ("sources", 3, 20, 0.4, 0.3),
        ("sources", 5, 8, 0.4, 0.3),
        ("sources", 5, 20, 0.4, 0.3),
        ("seeds", 3, 20, 0.0, 0.3),
        ("seeds", 3, 20, 0.2, 0.3),
    ],
)
def test_coverage_of_the_mean_and_of_one_more(over, k, asked, apart, slopes):
    """The mean of z over trials stands for the estimand. One more: the next of the same trial (same personas and
    questions), and one of the next trial (others)."""
    rng = np.random.default_rng(13)
    rows, z = [], []
    for _ in range(1_000):
        row, found = _lean(rng, k, asked, apart, slopes, over)
        rows.append(row)
        z.append(found)
    z = np.array(z)
    low, high, p_low, p_high, n_low, n_high = (
        np.arctanh([row[name] for row in rows])
        for name in ("low", "high", "predict_low", "predict_high", "predict_new_low", "predict_new_high")
    )
    independent = z[:, :k].mean(1)[:, None] + _half(z[:, :k])[:, None] * np.array([-1, 1])
    share = {
        "mean": np.mean((low <= z.mean()) & (z.mean() <= high)),
        "one more": np.mean((p_low <= z[:, k]) & (z[:, k] <= p_high)),
        "one more elsewhere": np.mean((n_low <= np.roll(z[:, k], 1)) & (np.roll(z[:, k], 1) <= n_high)),
        "taken as independent": np.mean((independent[:, 0] <= z.mean()) & (z.mean() <= independent[:, 1])),
    }
    print(
        over,
        k,
        asked,
        apart,
        slopes,
        {name: round(float(value), 4) for name, value in share.items()},
        "shared",
        np.mean([row["shared_se_z"] for row in rows]).round(3),
        "own",
        np.mean([row["own_se_z"] for row in rows]).round(3),
        "true shared",
        np.sqrt(np.mean(np.cov(z.T)[np.triu_indices(k + 1, 1)])).round(3),
        np.tanh(z.mean()).round(2),
    )
    bar = (0.93, 0.97)
    assert all(bar[0] <= share[name] <= bar[1] for name in ("mean", "one more", "one more elsewhere")), share


def _half(z) -> np.ndarray:
    k = z.shape[1]
    return stdtrit(k - 1, 0.975) * z.std(1, ddof=1) / np.sqrt(k)
