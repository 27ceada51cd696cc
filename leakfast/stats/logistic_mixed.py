"""A logistic model of counts with crossed random effects, fitted by Laplace's approximation. Demands counts per pair and
question and what is known of each pair; leaves what the terms mean, and the table, to `mixed`.

Of pair i (a bystander under a source) and question q

    η = X β + persona + source + question + pair + cosine · (slope of the source + slope of the question),

hits are binomial with P = 1 / (1 + exp(−η)), and each kind of effect is normal with mean 0 and a standard deviation of its
own. Given the deviations, all effects are found by Newton's method; pairs, of which there are most and which do not meet one
another, are eliminated first. The deviations maximise

    Σ log P(hits | η̂) − ½ Σ û² / σ² − Σ log σ − ½ log |H|,   H: Hessian at the mode, β among the effects,

Laplace's approximation of the likelihood with β integrated out too, so that deviations of few levels do not come out too
small (Breslow and Clayton 1993; Bates, Mächler, Bolker and Walker 2015). The mode is not the mean where hits are few: what
is told of effects is the mean to second order,

    E[θ] ≈ θ̂ − ½ H⁻¹ Σ n P (1 − P) (1 − 2 P) var(η) ∂η/∂θ   (Tierney and Kadane 1986)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy  # loads its parts when they are used
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

from leakfast.stats import intervals

FEWEST, MOST = 1e-3, 10.0  # bounds of a standard deviation, log-odds
# with more questions (items), their slopes add next to nothing to the error of the mean slope, and much time
MOST_SLOPES = 256
_GRID = np.geomspace(0.02, 5.0, 15)  # deviations of slopes over which a source's slope is averaged
_STEPS = 60
_TOLERANCE = 1e-8
_QUESTIONS = {
    "question": 0,
    "question_slope": 1,
}  # kind → column of the pairs that it multiplies: 1, the cosine
_SOURCES = ("source", "slope")


@dataclass(frozen=True)
class Counts:
    """hits, total: (N, Q) of pairs and questions, total 0 where a cell was not asked; fixed: (N, F), the first column 1,
    the second the cosine about its mean over the source's pairs; persona, source: (N,) numbers from 0."""

    hits: np.ndarray
    total: np.ndarray
    fixed: np.ndarray
    persona: np.ndarray
    source: np.ndarray

    def kinds(self) -> tuple[str, ...]:
        """Which random effects can be told apart: with one source, persona and pair are one thing."""
        several, asked = len(np.unique(self.source)) > 1, self.total.shape[1]
        met = several and len(np.unique(self.persona)) < len(self.persona)
        return (
            "pair",
            *(("question",) if asked > 1 else ()),
            *(("question_slope",) if 1 < asked <= MOST_SLOPES else ()),
            *(("persona",) if met else ()),
            *(_SOURCES if several else ()),
        )


@dataclass(frozen=True)
class Fitted:
    """beta, beta_se, beta_df: (F,); slope, slope_se: (S,), of each source, the common slope and its own together; sd: kind
    → standard deviation (`slope`: of the sources' slopes); log_likelihood: restricted, by Laplace, without constants."""

    beta: np.ndarray
    beta_se: np.ndarray
    beta_df: np.ndarray
    slope: np.ndarray
    slope_se: np.ndarray
    sd: dict[str, float]
    log_likelihood: float


class Model:
    """The parts that no deviation changes; `pair` (N,) and `rest` (R,), the mode found last, from which the next starts:
    R is questions, then the columns of `design` (β first); `kind_of` (R,): number of each one's kind, −1 for β."""

    def __init__(self, counts: Counts) -> None:
        self.hits, self.total = counts.hits.astype(float), counts.total.astype(float)
        self.kinds = counts.kinds()
        n, asked = self.total.shape
        columns = [number for number, kind in enumerate(self.kinds) if kind in _QUESTIONS]
        self.by = counts.fixed[:, [_QUESTIONS[self.kinds[number]] for number in columns]]
        self.asked = asked * len(columns)
        kind_of = [np.repeat(columns, asked), np.full(counts.fixed.shape[1], -1)]
        blocks = [counts.fixed]
        for number, kind in enumerate(self.kinds):
            if kind == "pair" or kind in _QUESTIONS:
                continue
            which = counts.persona if kind == "persona" else counts.source
            block = np.zeros((n, which.max() + 1))
            block[np.arange(n), which] = counts.fixed[:, 1] if kind == "slope" else 1.0
            blocks.append(block)
            kind_of.append(np.full(block.shape[1], number))
        # sparse: a pair has one persona, one source and one slope
        self.design = scipy.sparse.csr_array(np.concatenate(blocks, axis=1))
        self.turned, self.kind_of = self.design.T.tocsr(), np.concatenate(kind_of).astype(int)
        self.pair, self.rest = np.zeros(n), np.zeros(len(self.kind_of))
        rate = (self.hits.sum() + 0.5) / (self.total.sum() + 1)
        self.rest[self.asked] = np.log(rate / (1 - rate))
        self.found: tuple = ()
        self.shift = np.zeros(
            len(self.rest)
        )  # from the mode of the rest to its mean, once `by_log_sd` was asked

    def eta(self, pair: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """(N, Q) log-odds."""
        questions = rest[: self.asked].reshape(self.by.shape[1], self.total.shape[1])
        out = (self.design @ rest[self.asked :] + pair)[:, None]
        return out + self.by @ questions if self.asked else np.broadcast_to(out, self.total.shape)

    def precision(self, sd: np.ndarray) -> tuple[float, np.ndarray]:
        """1 / σ² of pairs, and of each of the rest (0 for β)."""
        return float(sd[0] ** -2.0), np.append(sd**-2.0, 0.0)[self.kind_of]

    def joint(self, pair: np.ndarray, rest: np.ndarray, precision) -> float:
        """log P(hits | effects) − ½ Σ u² / σ², without constants."""
        eta = self.eta(pair, rest)
        fit = float((self.hits * eta - self.total * np.logaddexp(0, eta)).sum())
        return fit - 0.5 * (precision[0] * pair @ pair + precision[1] @ rest**2)

    def of_questions(self, values: np.ndarray) -> np.ndarray:
        """(N, questions' effects): values of cells (N, Q), as each question's effects see them."""
        none = np.empty((len(values), 0))
        return np.concatenate([none, *(values * column[:, None] for column in self.by.T)], axis=1)

    def hessian(self, precision) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of pairs and of the rest; the pairs' diagonal; the weights of cells (N, Q), of which the pairs' rows
        against the rest are made; and what is left of the rest's own (R, R) once pairs are eliminated. Signs are those of
        −log P."""
        share = expit(self.eta(self.pair, self.rest))
        error, weight = self.hits - self.total * share, self.total * share * (1 - share)
        of_pair = error.sum(1) - precision[0] * self.pair
        of_rest = self._summed(error) - precision[1] * self.rest
        whole, asked = weight.sum(1), self.asked
        diagonal = whole + precision[0]
        kept = precision[0] / diagonal  # of a weight, once its pair is eliminated
        met, left = self.of_questions(weight), np.zeros((len(self.rest), len(self.rest)))
        left[asked:, :asked] = self.turned @ (met * kept[:, None])
        left[:asked, asked:] = left[asked:, :asked].T
        left[asked:, asked:] = (self.turned @ (self.design * (whole * kept)[:, None])).toarray()
        left[:asked, :asked] = -met.T @ (met / diagonal[:, None])
        size, at = self.total.shape[1], np.arange(self.total.shape[1])
        for k, one in enumerate(self.by.T):
            for j, other in enumerate(self.by.T):
                left[k * size + at, j * size + at] += (one * other) @ weight
        left[np.diag_indices_from(left)] += precision[1]
        return of_pair, of_rest, diagonal, weight, left

    def _summed(self, values: np.ndarray) -> np.ndarray:
        """(R,): values of cells (N, Q), summed over pairs and questions for each effect of the rest."""
        return np.concatenate([(self.by.T @ values).ravel(), self.turned @ values.sum(1)])

    def _to_rest(self, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(R,): values of pairs (N,) times their rows against the rest."""
        return self._summed(weight * values[:, None])

    def _of_pairs(self, weight: np.ndarray, step: np.ndarray) -> np.ndarray:
        """(N,): the pairs' rows against the rest times a step of the rest (R,)."""
        asked, size = self.asked, self.total.shape[1]
        out = weight.sum(1) * (self.design @ step[asked:])
        for k, column in enumerate(self.by.T):
            out += column * (weight @ step[k * size : (k + 1) * size])
        return out

    def mode(self, sd: np.ndarray) -> float:
        """Laplace's log-likelihood at deviations sd, one a kind: Newton's method to the mode of all effects. Raises
        FloatingPointError where it does not get there."""
        precision = self.precision(sd)
        now = self.joint(self.pair, self.rest, precision)
        for _ in range(_STEPS):
            of_pair, of_rest, diagonal, weight, left = self.hessian(precision)
            factor = cho_factor(left, lower=True, check_finite=False)
            step = cho_solve(factor, of_rest - self._to_rest(weight, of_pair / diagonal), check_finite=False)
            step_pair = (of_pair - self._of_pairs(weight, step)) / diagonal
            if 0.5 * float(of_rest @ step + of_pair @ step_pair) < _TOLERANCE:
                break
            length = 1.0
            while True:
                tried = self.pair + length * step_pair, self.rest + length * step
                value = self.joint(*tried, precision)
                if value >= now or length < 1e-4:
                    break
                length /= 2
            (self.pair, self.rest), now = tried, value
        else:
            raise FloatingPointError("the mode of the effects was not found")
        levels = np.array([len(self.pair), *((self.kind_of == k).sum() for k in range(1, len(sd)))])
        half = 0.5 * float(np.log(diagonal).sum()) + float(np.log(np.diagonal(factor[0])).sum())
        self.found = diagonal, weight, factor
        return now - float(levels @ np.log(sd)) - half

    def covariance(self) -> np.ndarray:
        """Of the columns of `design`, at the mode."""
        chosen = np.eye(len(self.rest))[:, self.asked :]
        return cho_solve(self.found[2], chosen, check_finite=False)[self.asked :]

    def by_log_sd(self, sd: np.ndarray) -> np.ndarray:
        """Gradient of Laplace's log-likelihood at the mode: what σ does by itself, and through the mode, which moves
        log |H|."""
        diagonal, weight, factor = self.found
        inverse = cho_solve(factor, np.eye(len(self.rest)), check_finite=False)
        lead, whole = self.of_questions(weight / diagonal[:, None]), weight.sum(1) / diagonal
        # covariances of pairs with the rest: the pairs' rows against it, over their diagonal, times its inverse
        by_design = self.design @ inverse[self.asked :]
        met = -(lead @ inverse[: self.asked]) - whole[:, None] * by_design
        own = 1 / diagonal - np.einsum("ij,ij->i", met[:, : self.asked], lead)
        own -= whole * self._by_own(met[:, self.asked :])
        share = expit(self.eta(self.pair, self.rest))
        bent = self.total * share * (1 - share) * (1 - 2 * share) * self._spread(own, met, inverse, by_design)
        # H⁻¹ times what bends log |H|, so that one product gives each kind's part
        of_pair = bent.sum(1)
        back = inverse @ (self._summed(bent) - self._to_rest(weight, of_pair / diagonal))
        back_pair = (of_pair - self._of_pairs(weight, back)) / diagonal
        self.shift = -0.5 * back
        out = np.empty(len(sd))
        for number in range(len(sd)):
            at = self.kind_of == number
            u, var, moved = self.rest[at], np.diagonal(inverse)[at], back[at]
            if number == 0:
                u, var, moved = self.pair, own, back_pair
            out[number] = (u @ u + var.sum() - u @ moved) / sd[number] ** 2 - len(u)
        return out

    def _by_own(self, values: np.ndarray) -> np.ndarray:
        """(N,): values (N, effects of `design`), summed over those that each pair has."""
        return np.asarray(self.design.multiply(values).sum(axis=1)).ravel()

    def _spread(
        self, own: np.ndarray, met: np.ndarray, inverse: np.ndarray, by_design: np.ndarray
    ) -> np.ndarray:
        """(N, Q) variance of η. own: of pairs; met: their covariances with the rest; inverse: the rest's own; by_design:
        `design` times its rows of the inverse."""
        asked, size = self.asked, self.total.shape[1]
        out = own + 2 * self._by_own(met[:, asked:]) + self._by_own(by_design[:, asked:])
        out = np.broadcast_to(out[:, None], self.total.shape).copy()
        others = met[:, :asked] + by_design[:, :asked]
        for k, one in enumerate(self.by.T):
            out += 2 * one[:, None] * others[:, k * size : (k + 1) * size]
            for j, other in enumerate(self.by.T):
                block = inverse[k * size : (k + 1) * size, j * size : (j + 1) * size]
                out += (one * other)[:, None] * np.diagonal(block)[None]
        return out


def fit(counts: Counts) -> Fitted:
    """Fit the model to `counts`.

    Estimand: β, the change of a reply's log-odds with a column of `fixed`, all effects held; of the cosine, the mean over
    sources and questions like these. beta_se: from H at the estimated deviations, whose own error is left out but for
    beta_df: t's degrees of freedom (`_degrees`). Assumes replies independent given the effects. Raises ValueError where
    nothing varies, FloatingPointError where no mode is found."""
    hits, total = counts.hits.sum(), counts.total.sum()
    if not 0 < hits < total:
        raise ValueError("no reply shows the behavior" if hits == 0 else "every reply shows the behavior")
    model = Model(counts)

    def against(log_sd: np.ndarray) -> tuple[float, np.ndarray]:
        value = model.mode(np.exp(log_sd))
        return -value, -model.by_log_sd(np.exp(log_sd))

    start = np.log(np.full(len(model.kinds), 0.5))
    bounds = [(np.log(FEWEST), np.log(MOST))] * len(start)
    found = scipy.optimize.minimize(
        against, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-10, "gtol": 1e-4}
    )
    sd = np.exp(found.x)
    value = model.mode(sd)
    model.by_log_sd(sd)
    fixed, shift = counts.fixed.shape[1], model.shift[model.asked :].copy()
    beta, inverse = model.rest[model.asked :] + shift, model.covariance()
    variance = np.diagonal(inverse)[:fixed].copy()
    fitted = Fitted(
        beta=beta[:fixed].copy(),
        beta_se=np.sqrt(variance),
        beta_df=_degrees(counts, model.kinds),
        slope=beta[1:2].copy(),
        slope_se=np.sqrt(variance[1:2]),
        sd=dict(zip(model.kinds, sd.tolist(), strict=True)),
        log_likelihood=value,
    )
    if "slope" not in model.kinds:
        return fitted
    own = model.kind_of[model.asked :] == model.kinds.index("slope")
    slope, slope_se = _slopes(model, sd)
    return replace(fitted, slope=slope + shift[1] + shift[own], slope_se=slope_se)


def _slopes(model: Model, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S,) slope of each source and its standard error, averaged over the deviation of slopes.

    Few sources say little of how much slopes differ, and at the likeliest deviation, 0 at times, each source's slope would
    seem surer than it is. So mean and variance are those of the mixture over `_GRID`, each deviation weighted by its
    likelihood (flat in the deviation, the others held: empirical Bayes, Kass and Steffey 1989)."""
    number = model.kinds.index("slope")
    at = np.nonzero(model.kind_of[model.asked :] == number)[0]
    levels, means, variances = [], [], []
    for one in _GRID:
        levels.append(model.mode(np.where(np.arange(len(sd)) == number, one, sd)))
        beta, inverse = model.rest[model.asked :], model.covariance()
        means.append(beta[1] + beta[at])
        variances.append(inverse[1, 1] + np.diagonal(inverse)[at] + 2 * inverse[1, at])
    weight = np.exp(np.array(levels) - max(levels)) * _GRID
    weight /= weight.sum()
    mean = weight @ np.array(means)
    return mean, np.sqrt(weight @ (np.array(variances) + np.square(means)) - mean**2)


def _degrees(counts: Counts, kinds: tuple[str, ...]) -> np.ndarray:
    """(F,) degrees of freedom of β: for intercept and cosine, whose effects differ between sources and questions, those of
    whatever there are fewest of; for the others personas − 1.

    Satterthwaite's rule over the same parts of the variance gave the cosine 92 to 93 % coverage where these give 95."""
    people = len(np.unique(counts.persona)) - 1
    fewest = people
    if "slope" in kinds:
        fewest = min(fewest, len(np.unique(counts.source)) - 1)
    if "question_slope" in kinds:
        fewest = min(fewest, counts.total.shape[1] - 1)
    return np.array([fewest, fewest] + [people] * (counts.fixed.shape[1] - 2), dtype=float)


def slope_df(counts: Counts, found: Fitted) -> float:
    """Degrees of freedom of each source's slope: personas − 1; of a single source, whose slope is the fixed one, those."""
    people = float(len(np.unique(counts.persona)) - 1)
    return people if len(found.slope) > 1 else float(found.beta_df[1])


def interval(value: np.ndarray, se: np.ndarray, df: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """95 % t interval."""
    half = intervals.t_half(se, df)
    return value - half, value + half
