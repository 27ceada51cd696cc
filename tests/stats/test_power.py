"""Power by simulation: against scipy, the closed form where sampling noise vanishes, all shuffles of a few personas, and
the level at ρ = 0; spreads found again in counts drawn from known ones."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest
import scipy.stats
from scipy.special import expit

from leakfast.errors import InputError
from leakfast.stats import binomials, correlations, intervals, power, power_choices, power_from, summaries
from leakfast.stats.power import Assumed, Design

SMALL = Design(personas=30, questions=4, samples=3, sources=1)
EXACT = Assumed(base_rate=0.4, sd_question=0.0, sd_interaction=0.0)
LEVEL = 5_000


# ---------------------------------------------------------------- the test that a simulated study makes


def test_one_source_is_scipys_t_approximation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 1, 25)), rng.integers(0, 6, size=(40, 1, 25))
    observed, p = power.tested(x, y)
    for k in range(40):
        told = scipy.stats.spearmanr(x[k, 0], y[k, 0])
        assert observed[k] == pytest.approx(told.statistic, abs=1e-12)
        assert p[k] == pytest.approx(told.pvalue, abs=1e-12)


def test_the_variance_of_several_sources_is_that_over_all_joint_shuffles():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 6)), rng.integers(0, 4, size=(3, 6)).astype(float)
    ranks = [np.stack([scipy.stats.rankdata(row) - 3.5 for row in side]) for side in (x, y)]
    totals = [(ranks[0] * ranks[1][:, list(to)]).sum() for to in itertools.permutations(range(6))]
    z = (ranks[0] * ranks[1]).sum() / np.std(totals)
    assert np.mean(totals) == pytest.approx(0, abs=1e-9)
    observed, p = power.tested(x[None], y[None])
    assert p[0] == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=1e-12)
    length = np.sqrt(np.prod([(side**2).sum() for side in ranks]))
    assert observed[0] == pytest.approx((ranks[0] * ranks[1]).sum() / length, abs=1e-12)


def test_rates_that_do_not_vary_find_nothing():
    observed, p = power.tested(np.random.default_rng(2).normal(size=(2, 3, 9)), np.zeros((2, 3, 9)))
    assert np.isnan(observed).all() and (p == 1).all()
    rare = power.power(0.5, SMALL, replace(EXACT, base_rate=1e-9), 100)
    assert (rare.power, rare.blank, rare.observed) == (0, 1, None)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(("samples", "p"), [(1, 0.3), (3, 0.1), (10, 0.9), (64, 0.2)])
def test_counts_are_binomial(samples, p):
    hits = np.zeros((200, 256))
    binomials.add(
        np.full(hits.shape, p / (1 - p)), np.ones(hits.shape), samples, np.uint64(12345678901), hits
    )
    expected = scipy.stats.binom.pmf(np.arange(samples + 1), samples, p) * hits.size
    seen = np.bincount(hits.astype(int).ravel(), minlength=samples + 1)
    some = expected > 20
    pooled = [np.append(side[some], side[~some].sum()) for side in (seen, expected)]
    kept = pooled[1] > 0
    assert (
        scipy.stats.chisquare(pooled[0][kept], pooled[1][kept] * seen.sum() / pooled[1][kept].sum()).pvalue
        > 1e-3
    )


def test_a_larger_chance_never_counts_less_and_more_personas_change_no_draw():
    fewer, more, low = (np.zeros((n, 256)) for n in (5, 9, 5))
    for hits, odds in ((fewer, 1.1), (more, 1.1), (low, 0.9)):
        binomials.add(np.full(hits.shape, odds), np.ones(hits.shape), 7, np.uint64(99), hits)
    assert (more[:5] == fewer).all()
    assert (low <= fewer).all() and (low < fewer).any()


def test_same_seed_same_numbers_and_more_trials_go_on_where_fewer_end():
    one = power.simulate(0.4, SMALL, Assumed(), 300, seed=5)
    two = power.simulate(0.4, SMALL, Assumed(), 600, seed=5)
    assert (one.observed == two.observed[:300]).all() and (one.found == two.found[:300]).all()
    assert (power.simulate(0.4, SMALL, Assumed(), 300, seed=6).observed != one.observed).any()


# ---------------------------------------------------------------- power


def test_it_is_the_closed_form_where_sampling_noise_vanishes():
    design = Design(personas=60, questions=1, samples=200_000, sources=1)
    rho = intervals.detectable(60)
    found = power.power(rho, design, EXACT, 4_000, 1)
    assert found.power == pytest.approx(0.8, abs=0.025)
    # the mean of Spearman's ρ of n bivariate normal pairs (Moran 1948)
    r = 2 * np.sin(np.pi * rho / 6)
    moran = 6 / (np.pi * 61) * (np.arcsin(r) + 58 * np.arcsin(r / 2))
    assert found.observed == pytest.approx(moran, abs=0.008)


def test_more_samples_bring_the_noise_free_limit():
    shares, seen = [], []
    for samples in (1, 4, 16, 64, 10_000):
        design = Design(personas=60, questions=4, samples=samples, sources=1)
        found = power.power(0.35, design, EXACT, 1_500, 2)
        shares.append(found.power)
        seen.append(found.observed)
    assert shares[:4] == sorted(shares[:4]) and seen[:4] == sorted(seen[:4])
    assert shares[0] < 0.5 and shares[4] == pytest.approx(shares[3], abs=0.04)
    assert shares[4] == pytest.approx(
        power.power(0.35, Design(60, 1, 200_000, 1), EXACT, 1_500, 2).power, abs=0.03
    )


def test_the_mean_rate_is_the_one_asked_whatever_the_spreads():
    spread = Assumed(
        0.2, sd_persona=1.5, sd_question=1.0, sd_interaction=0.8, sd_seed=0.5, sd_source=1.0, alike=0.4
    )
    found = power.power(-0.3, Design(40, 10, 3, 6, 2), spread, 800, 3)
    assert found.rate == pytest.approx(0.2, abs=0.006)
    assert found.observed < -0.1


def test_seeds_average_out_what_training_moves():
    moved, design = replace(Assumed(), sd_seed=1.5), Design(personas=60, questions=10, samples=10, sources=1)
    one, four = (power.power(0.4, replace(design, seeds=k), moved, 600, 4) for k in (1, 4))
    many = power.power(0.4, replace(design, samples=40), moved, 600, 4)
    assert four.observed > many.observed + 0.03 > one.observed + 0.02


def test_sources_whose_cosines_say_the_same_bring_less_than_others():
    design, alike = Design(personas=40, questions=10, samples=5, sources=3), Assumed(alike=0.6)
    same = replace(alike, cosines=((1.0, 0.95), (0.95, 1.0)))
    apart, one = (power.power(0.25, design, assumed, 1_000, 5).power for assumed in (alike, same))
    alone = power.power(0.25, replace(design, sources=1), alike, 1_000, 5).power
    assert alone < one < apart - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "assumed"),
    [
        (Design(110, 20, 10, 1), Assumed()),
        (Design(110, 20, 3, 5), Assumed()),
        (Design(110, 20, 3, 5), Assumed(0.13, sd_source=1.0, alike=0.6, cosines=((1, 0.6), (0.6, 1)))),
        (Design(30, 20, 3, 3, 2), Assumed(0.05, sd_seed=0.5, alike=0.3, cosines=((1, -0.7), (-0.7, 1)))),
    ],
)
def test_the_level_is_the_one_stated(design, assumed):
    share = power.power(0.0, design, assumed, LEVEL, 11).power
    assert 0.04 <= share <= 0.06, share


def test_without_a_relation_five_percent_are_found():
    share = power.power(0.0, Design(50, 5, 3, 2), Assumed(alike=0.5), 2_000, 12).power
    low, high = scipy.stats.binom.ppf([0.0005, 0.9995], 2_000, 0.05) / 2_000
    assert low <= share <= high


@pytest.mark.parametrize(
    ("rho", "design", "assumed", "said"),
    [
        (1.0, SMALL, Assumed(), "rho is 1; .*between -1 and 1 is needed. Give for example --rho"),
        (0.3, SMALL, Assumed(base_rate=0.0), "base rate is 0; .* is needed. Give for example --base-rate"),
        (
            0.3,
            replace(SMALL, personas=3),
            Assumed(),
            "3 personas; .* at least 4 .* Give for example --personas",
        ),
        (0.3, replace(SMALL, seeds=0), Assumed(), "0 seeds; at least 1 is needed. Give for example --seeds"),
        (0.3, SMALL, Assumed(sd_question=-1), "sd_question is -1; .*needed. Give for example --sd-question"),
        (0.3, SMALL, Assumed(sd_persona=0), "sd_persona is 0; .*needed.* Give for example --sd-persona"),
        (0.3, SMALL, Assumed(alike=1.0), "alike is 1; .*needed. Give for example --sources-alike"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_three_parts(rho, design, assumed, said):
    with pytest.raises(InputError, match=said):
        power.power(rho, design, assumed, 200)


# ---------------------------------------------------------------- choices


def test_the_smallest_rho_has_the_power_and_the_closed_forms_size():
    design = Design(personas=60, questions=1, samples=200_000, sources=1)
    found = power_choices.smallest_rho(design, EXACT, 1_000, 1)
    assert found == pytest.approx(intervals.detectable(60), abs=0.02)
    assert power.power(found, design, EXACT, 1_000, 1).power >= 0.8
    assert power.power(found - 0.01, design, EXACT, 1_000, 1).power < 0.8
    assert power_choices.smallest_rho(replace(SMALL, personas=4), Assumed(base_rate=0.01), 200) is None


def test_curves_change_one_size_at_a_time():
    points = power_choices.curves(0.4, SMALL, Assumed(), 200)
    assert {(p.size, p.value) for p in points} >= {
        ("personas", 15),
        ("samples", 2),
        ("sources", 4),
        ("seeds", 1),
    }
    own = power.power(0.4, SMALL, Assumed(), 200).power
    for p in points:
        changed = replace(SMALL, **{p.size: p.value})
        assert p.generations == changed.generations()
        assert changed != SMALL or p.power == own


def test_an_hour_is_spent_in_whole_units_and_the_best_comes_first():
    each = SMALL.generations()  # 360
    rows = power_choices.spend(0.4, SMALL, Assumed(), each + 11, 400, 7)
    by = {row.size: row for row in rows}
    assert (by["personas"].value, by["personas"].spent) == (60, 360), "371 // 12 = 30 more"
    assert (by["sources"].value, by["seeds"].value, by["questions"].value, by["samples"].value) == (
        2,
        2,
        8,
        6,
    )
    gains = [row.gain for row in rows]
    assert gains == sorted(gains, reverse=True)
    before = power.power(0.4, SMALL, Assumed(), 400, 7).power
    assert all(row.power - before == pytest.approx(row.gain) for row in rows)
    none = {row.size: row for row in power_choices.spend(0.4, SMALL, Assumed(), 20, 100)}
    assert none["sources"].gain is None and none["sources"].reason == "one more costs 360 generations"
    assert none["personas"].value == 31 and none["personas"].reason is None
    with pytest.raises(InputError, match="at least 1 is needed. Give --per-hour"):
        power_choices.spend(0.4, SMALL, Assumed(), 0, 100)


# ---------------------------------------------------------------- spreads of a run


def _counts(design: Design, assumed: Assumed, rho: float, rng) -> tuple[power_from.Counts, np.ndarray]:
    """Counts of one study, written apart from the simulation."""
    shape, r = (design.personas, design.questions), 2 * np.sin(np.pi * rho / 6)
    g, common = rng.normal(size=(design.sources, design.personas)), rng.normal(size=design.personas)
    hits, source = [], []
    for s in range(design.sources):
        e = np.sqrt(assumed.alike) * common + np.sqrt(1 - assumed.alike) * rng.normal(size=design.personas)
        logit = power.center(assumed) + assumed.sd_source * rng.normal()
        logit = logit + assumed.sd_persona * (r * g[s] + np.sqrt(1 - r * r) * e)[:, None]
        logit = (
            logit
            + assumed.sd_question * rng.normal(size=shape[1])
            + assumed.sd_interaction * rng.normal(size=shape)
        )
        for _ in range(design.seeds):
            moved = logit + assumed.sd_seed * rng.normal(size=(shape[0], 1))
            hits.append(rng.binomial(design.samples, expit(moved)))
            source.append(f"s{s}")
    total = np.full((len(hits), *shape), float(design.samples))
    return power_from.Counts(np.array(hits, float), total, tuple(source)), g


@pytest.mark.parametrize("design", [Design(110, 20, 3, 5), Design(110, 20, 5, 4, 2)])
def test_spreads_are_found_again(design):
    true = Assumed(0.15, 1.2, 0.8, 0.6, sd_seed=0.7 if design.seeds > 1 else 0.0, sd_source=0.4, alike=0.3)
    rng = np.random.default_rng(8)
    fits = [asdict(power_from.fit(*_counts(design, true, 0.5, rng))[0]) for _ in range(10)]
    bars = {"base_rate": 0.03, "alike": 0.12, "sd_source": 0.25}
    for name, value in asdict(true).items():
        if name != "cosines":
            assert np.mean([one[name] for one in fits]) == pytest.approx(value, abs=bars.get(name, 0.12)), (
                name
            )
    assert all(len(one["cosines"]) == design.sources for one in fits)


def test_one_sample_a_question_leaves_the_interaction_unknown_and_says_so():
    true = Assumed(0.2, 1.0, 0.8, 0.0)
    assumed, notes = power_from.fit(*_counts(Design(80, 150, 1, 3), true, 0.4, np.random.default_rng(9)))
    assert assumed.sd_interaction == 0 and any("sd_interaction cannot be told" in note for note in notes)
    assert assumed.sd_persona == pytest.approx(1.0, abs=0.15)


def test_a_source_whose_rates_are_all_alike_says_nothing_of_the_others():
    """Ten times 0.3 has a variance of 3e-33, not 0; its correlation with the cosines is none."""
    counts, g = _counts(Design(10, 10, 1, 2), Assumed(0.3), 0.5, np.random.default_rng(13))
    counts.hits[1] = np.arange(10) < 3
    assert power_from.fit(counts, g)[0].alike >= 0


def test_adapters_that_never_show_it_count_in_the_base_rate():
    """Of one source at 0.5 and 0, and another at 0: a quarter of one half. One without counts counts for nothing."""
    hits = np.zeros((4, 6, 4))
    hits[0, ::2] = 2
    total = np.full(hits.shape, 2.0)
    total[3] = 0
    counts = power_from.Counts(hits, total, ("villain", "villain", "comedian", "poet"))
    assumed, notes = power_from.fit(counts, np.random.default_rng(3).normal(size=(3, 6)))
    assert assumed.base_rate == pytest.approx((0.25 + 0) / 2)
    assert [note.split()[:2] for note in notes[:2]] == [["2", "adapters"], ["1", "adapters"]]
    assert "never or always" in notes[0] and "without counts" in notes[1]


def test_bystanders_without_hits_are_refused():
    counts = power_from.Counts(np.zeros((1, 5, 4)), np.ones((1, 5, 4)), ("villain",))
    with pytest.raises(InputError, match="never show the behavior, or always do; .* Give another run"):
        power_from.fit(counts, np.zeros((1, 5)))


def test_the_mean_product_is_that_of_draws():
    rng, at = np.random.default_rng(10), (-1.5, 0.5, 2.0)
    for w in (-1.2, 0.0, 0.7, 2.0):
        x, y = rng.multivariate_normal([0, 0], [[2.0, w], [w, 2.0]], 400_000, method="svd").T
        told = np.mean(expit(at[0] + x) * expit(at[1] + y))
        assert power_from.mean_product(at[0], at[1], at[2], w) == pytest.approx(told, abs=0.002)


# ---------------------------------------------------------------- what is detectable over noisy rates


def test_detectable_of_the_disattenuated_table_pays_for_the_noise():
    rng, n = np.random.default_rng(11), 60
    counts, g = _counts(Design(n, 10, 3, 1), Assumed(0.3), 0.6, rng)
    people = [f"p{i:02d}" for i in range(n)]
    key = {"behavior": "m", "adapter": "a"}
    asked = pl.DataFrame(
        {"persona": np.repeat(people, 10), "question": np.tile(np.arange(10), n), "total": 3}
        | {"hits": counts.hits[0].astype(int).ravel()}
    ).with_columns(**{k: pl.lit(v) for k, v in key.items()})
    pairs = pl.DataFrame(
        {
            "persona": people,
            "layer": 0,
            "cosine_centered": g[0],
            "cosine_raw": g[0],
            "rate": counts.hits[0].mean(1) / 3,
        }
    ).with_columns(delta=pl.col("rate"), seed=1, source=pl.lit("s"), **{k: pl.lit(v) for k, v in key.items()})
    row = summaries.disattenuated(pairs, asked, 0).filter(y="rate", cosine="centered").row(0, named=True)
    exact = intervals.detectable(n, correlations.POWER, correlations.ALPHA)
    assert (
        row["detectable"] == pytest.approx(exact / np.sqrt(row["reliability"])) and row["detectable"] > exact
    )
    assert summaries._detectable(n, 0.04)["reason"].startswith("too few personas, or rates too noisy")
    assert summaries._detectable(4, 1.0)["detectable"] is None, "no closed form below five"
