"""The logistic mixed model: its gradient, its mode and covariances against statsmodels', and what it does at the edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from mixed_worlds import world
from scipy import sparse
from scipy.special import expit
from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

from leakfast.stats import logistic_mixed
from leakfast.stats.logistic_mixed import Counts, Model, fit


def _small(seed=0, **more):
    return world(np.random.default_rng(seed), **({"sources": 3, "people": 12, "asked": 5, "drawn": 4} | more))


@pytest.mark.parametrize("asked", [1, 5])
@pytest.mark.parametrize("sources", [1, 3])
def test_the_gradient_is_that_of_finite_differences(sources, asked, monkeypatch):
    monkeypatch.setattr(logistic_mixed, "_TOLERANCE", 1e-14)
    model = Model(_small(sources=sources, asked=asked)[0])
    log_sd = np.log(np.linspace(0.3, 0.8, len(model.kinds)))
    model.mode(np.exp(log_sd))
    gradient = model.by_log_sd(np.exp(log_sd))
    for k, step in enumerate(1e-4 * np.eye(len(log_sd))):
        ends = [model.mode(np.exp(log_sd + sign * step)) for sign in (1, -1)]
        assert gradient[k] == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-3)


def _theirs(counts: Counts, kinds) -> BinomialBayesMixedGLM:
    """The same model in statsmodels: a row a reply, all priors of β and of the deviations flat."""
    hits, total = counts.hits.ravel().astype(int), counts.total.ravel().astype(int)
    cell = np.repeat(np.arange(len(total)), total)
    first = np.repeat(np.cumsum(total) - total, total)
    shown = np.arange(len(cell)) - first < hits[cell]
    pair, question = cell // counts.total.shape[1], cell % counts.total.shape[1]
    cosine, who = counts.fixed[pair, 1], np.arange(len(cell))
    of = {"pair": (pair, 1.0), "question": (question, 1.0), "question_slope": (question, cosine)}
    of |= {"persona": (counts.persona[pair], 1.0), "source": (counts.source[pair], 1.0)}
    of |= {"slope": (counts.source[pair], cosine)}
    blocks = []
    for kind in kinds:
        at, value = of[kind]
        blocks.append(sparse.csr_array((np.broadcast_to(value, at.shape), (who, at))))
    ident = np.repeat(np.arange(len(kinds)), [block.shape[1] for block in blocks])
    design = sparse.hstack(blocks).tocsr()
    return BinomialBayesMixedGLM(shown.astype(float), counts.fixed[pair], design, ident, vcp_p=1e6, fe_p=1e6)


def test_mode_and_covariances_are_those_of_statsmodels_posterior(monkeypatch):
    monkeypatch.setattr(logistic_mixed, "_TOLERANCE", 1e-14)
    counts, _, _ = _small()
    model = Model(counts)
    sd = np.linspace(0.3, 0.8, len(model.kinds))
    model.mode(sd)
    theirs = _theirs(counts, model.kinds)
    fixed = counts.fixed.shape[1]
    effects = [model.pair if k == 0 else model.rest[model.kind_of == k] for k in range(len(sd))]
    beta = model.rest[model.kind_of == -1]
    mode = np.concatenate([beta, np.log(sd), *effects])
    free = np.r_[0:fixed, fixed + len(sd) : len(mode)]  # all but the deviations
    assert np.abs(theirs.logposterior_grad(mode)[free]).max() < 1e-5
    hessian = np.empty((len(free), len(free)))
    for row, at in enumerate(free):
        step = np.zeros(len(mode))
        step[at] = 1e-5
        ends = [theirs.logposterior_grad(mode + sign * step)[free] for sign in (1, -1)]
        hessian[row] = (ends[1] - ends[0]) / 2e-5
    wanted = np.linalg.inv(hessian)[:fixed, :fixed]
    np.testing.assert_allclose(model.covariance()[:fixed, :fixed], wanted, rtol=1e-4, atol=1e-8)


def _by_quadrature(hits, fixed, sd: float) -> tuple[float, np.ndarray]:
    """(log of the integral over two β and each pair's effect, mean of β), 60 replies a pair, one question."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    grid = np.meshgrid(np.linspace(-5, 3, 161), np.linspace(-3, 6, 181), indexing="ij")
    whole = np.ones(grid[0].shape)
    for shown, (one, cosine) in zip(hits, fixed, strict=True):
        at = (one * grid[0] + cosine * grid[1])[..., None] + sd * nodes
        whole *= np.exp(shown * at - 60 * np.logaddexp(0, at) + 30) @ weights
    mean = np.array([(whole * side).sum() / whole.sum() for side in grid])
    return float(np.log(whole.sum())), mean


def test_likelihood_and_mean_are_close_to_the_integrals():
    hits, fixed = np.array([2.0, 6.0, 21.0, 30.0]), np.column_stack([np.ones(4), [-1.0, -0.3, 0.3, 1.0]])
    counts = Counts(hits[:, None], np.full((4, 1), 60.0), fixed, np.arange(4), np.zeros(4, int))
    model, found = Model(counts), []
    for sd in (0.1, 0.5):
        exact, mean = _by_quadrature(hits, fixed, sd)
        found.append(model.mode(np.array([sd])) - exact)
        model.by_log_sd(np.array([sd]))
        far = np.abs(model.rest - mean)
        assert (np.abs(model.rest + model.shift - mean) < 0.35 * far).all() and far.max() > 0.02
    assert found[1] - found[0] == pytest.approx(0, abs=0.03)


def test_without_any_spread_it_is_the_plain_logistic_regression():
    """Expected counts, rounded, vary less than draws: all deviations go to their bound, and the GLM is left."""
    counts, beta, _ = _small()
    counts = replace(counts, total=np.full(counts.total.shape, 1000))
    p = expit(counts.fixed @ beta)[:, None]
    counts = replace(counts, hits=np.round(1000 * np.broadcast_to(p, counts.total.shape)))
    found = fit(counts)
    assert max(found.sd.values()) < 0.01
    both = np.column_stack([counts.hits.sum(1), (counts.total - counts.hits).sum(1)])
    glm = sm.GLM(both, counts.fixed, family=sm.families.Binomial()).fit()
    np.testing.assert_allclose(found.beta, glm.params, rtol=1e-3, atol=1e-3)
    assert found.beta_se[2] == pytest.approx(glm.bse[2], rel=0.05)


def test_order_and_numbering_change_nothing():
    counts, _, _ = _small()
    found, rng = fit(counts), np.random.default_rng(1)
    order, asked, names = rng.permutation(36), rng.permutation(5), rng.permutation(12)
    other = fit(
        Counts(
            counts.hits[order][:, asked],
            counts.total[order][:, asked],
            counts.fixed[order],
            names[counts.persona[order]],
            counts.source[order],
        )
    )
    np.testing.assert_allclose(other.beta, found.beta, atol=1e-4)
    np.testing.assert_allclose(other.slope, found.slope, atol=1e-4)
    np.testing.assert_allclose(other.slope_se, found.slope_se, atol=1e-4)


def test_cells_that_were_not_asked_take_no_part():
    counts, _, _ = _small(asked=6)
    hits, total = counts.hits.copy(), counts.total.copy()
    hits[:, 5], total[:, 5] = 0, 0
    left = replace(counts, hits=counts.hits[:, :5], total=counts.total[:, :5])
    found, wanted = fit(replace(counts, hits=hits, total=total)), fit(left)
    np.testing.assert_allclose(found.beta, wanted.beta, atol=2e-3)
    np.testing.assert_allclose(found.beta_se, wanted.beta_se, rtol=2e-2)


def test_kinds_that_cannot_be_told_apart_are_left_out():
    assert _small(sources=1)[0].kinds() == ("pair", "question", "question_slope")
    assert _small(sources=1, asked=1)[0].kinds() == ("pair",)
    apart = replace(_small()[0], persona=np.arange(36))
    assert apart.kinds() == ("pair", "question", "question_slope", "source", "slope")
    assert "question_slope" not in _small(asked=logistic_mixed.MOST_SLOPES + 1)[0].kinds()


def test_degrees_are_those_of_whatever_there_are_fewest_of():
    assert fit(_small()[0]).beta_df.tolist() == [2, 2, 11, 11]
    assert fit(_small(sources=7)[0]).beta_df.tolist() == [4, 4, 11, 11]
    assert fit(_small(sources=1, asked=20)[0]).beta_df.tolist() == [11, 11, 11, 11]


def test_slopes_are_drawn_towards_the_common_one_and_less_sure_than_at_the_likeliest_deviation():
    counts, _, _ = world(np.random.default_rng(3), sources=4, people=60)
    found, alone = fit(counts), []
    for source in range(4):
        mine = counts.source == source
        alone.append(
            fit(
                Counts(
                    counts.hits[mine],
                    counts.total[mine],
                    counts.fixed[mine],
                    counts.persona[mine],
                    np.zeros(60, int),
                )
            )
        )
    apart = np.array([one.beta[1] for one in alone])
    assert np.ptp(found.slope) < np.ptp(apart)
    assert np.corrcoef(found.slope, apart)[0, 1] > 0.9


def test_nothing_to_fit_is_refused():
    counts, _, _ = _small()
    with pytest.raises(ValueError, match="no reply"):
        fit(replace(counts, hits=np.zeros_like(counts.hits)))
    with pytest.raises(ValueError, match="every reply"):
        fit(replace(counts, hits=counts.total))
