"""How likely a study of a given size is to find the relation of cosine and leakage, by simulation. Demands sizes and
assumptions (`power_from` reads them off a finished run); leaves tables and what more would buy to `power_choices`.

Model of a trial, for persona i (a bystander), question q and source s:

    logit p(i, q, s) = mu(s) + sd_persona · z(i, s) + sd_question · b(q, s) + sd_interaction · c(i, q, s)

and + sd_seed · d(i, s, k) under training seed k, which moves mu and d alone; hits ~ Binomial(samples, p). b, c, d are
standard normal. z is the Gaussian copula of the cosine at Spearman's ρ: z = r·g + √(1 − r²)·e, r = 2 sin(πρ/6),
with g the cosine's normal score. p rises with z, so ρ is the rank correlation of the cosine with a bystander's expected
rate over questions of this kind, the same for every source. Of cosines, ranks alone matter: g has their correlation
between sources, e the correlation `alike`. mu(s) is normal with spread sd_source around the value at which the
mean rate is base_rate. Left out: the noise of the unadapted model's rates, and picking a layer by the same data.

Test, two-sided: ranks within each source, x and y centered; T = Σ x·y over all pairs, against all joint
shuffles of the personas (one shuffle moves a persona's rates under all sources together), under which T has mean 0 and
variance Σ_{s,t} (Σ x_s x_t)(Σ y_s y_t) / (n − 1) (Hoeffding 1951). One source: Spearman's ρ by the t approximation, as
scipy; several: T / √variance taken as standard normal. `leakfast stats` draws these shuffles; a
permutation test within a simulation would be dear.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr

from leakfast.errors import InputError
from leakfast.stats import intervals, resample
from leakfast.stats.association import p_by_t
from leakfast.stats.correlations import ALPHA
from leakfast.storage.seeds import derive_seed

BLOCK = 256  # trials that are drawn together
FEWEST = 4  # personas
TRIALS = 2_000


@dataclass(frozen=True)
class Design:
    """Sizes of a study. personas: bystanders of each source; samples: completions a question."""

    personas: int = 110
    questions: int = 20
    samples: int = 10
    sources: int = 5
    seeds: int = 1

    def generations(self) -> int:
        """Completions of bystanders under adapters."""
        return self.personas * self.questions * self.samples * self.sources * self.seeds


@dataclass(frozen=True)
class Assumed:
    """What is taken to be true. base_rate: mean rate of bystanders, a share; the sd are on the logit scale; alike:
    correlation between sources of what the cosine does not explain of a persona's logit; cosines: (S, S) correlations
    between sources of the cosines' normal scores, None for sources whose cosines have nothing to do with each other
    (further sources than there are rows get the mean of those given). The defaults are what `power_from` reads off
    the marker study on SmolLM2-135M-Instruct, rounded (docs/power.md), but for three: seed-to-seed spread was not measured
    there and is 0, every source has the base rate, and sources have nothing in common."""

    base_rate: float = 0.13
    sd_persona: float = 1.0
    sd_question: float = 0.5
    sd_interaction: float = 0.3
    sd_seed: float = 0.0
    sd_source: float = 0.0
    alike: float = 0.0
    cosines: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Trials:
    """R simulated studies. observed: (R,) pooled ρ within sources, NaN where no rate varies; found: (R,) p < alpha;
    rate: (R,) mean rate of the bystanders."""

    observed: np.ndarray
    found: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True)
class Power:
    """power with Wilson's 95 % interval over trials; observed: mean of the ρ that studies would see, and where 5 to 95 %
    of them lie (None where no rate ever varies); rate: mean simulated rate; blank: share of the trials in which no rate
    varies, which find nothing."""

    power: float
    power_low: float
    power_high: float
    observed: float | None
    observed_low: float | None
    observed_high: float | None
    rate: float
    blank: float


def check(rho: float, design: Design, assumed: Assumed, alpha: float = ALPHA) -> None:
    """Raises InputError for what cannot be simulated."""
    if not -1 < rho < 1:
        _refuse(f"rho is {rho:g}", "a rank correlation strictly between -1 and 1 is needed", "--rho 0.3")
    if not 0 < assumed.base_rate < 1:
        _refuse(
            f"the base rate is {assumed.base_rate:g}",
            "a share strictly between 0 and 1 is needed",
            "--base-rate 0.1",
        )
    if not 0 < alpha < 1:
        _refuse(f"alpha is {alpha:g}", "a level strictly between 0 and 1 is needed", "--alpha 0.05")
    if design.personas < FEWEST:
        _refuse(
            f"{design.personas} personas",
            f"a rank correlation needs at least {FEWEST} bystanders",
            "--personas 110",
        )
    for name in ("questions", "samples", "sources", "seeds"):
        if getattr(design, name) < 1:
            _refuse(f"{getattr(design, name)} {name}", "at least 1 is needed", f"--{name} 1")
    for name in (field.name for field in fields(assumed) if field.name.startswith("sd_")):
        if not 0 <= getattr(assumed, name) <= 10:
            told = f"--{name.replace('_', '-')} 1"
            _refuse(
                f"{name} is {getattr(assumed, name):g}", "a spread in logits from 0 to 10 is needed", told
            )
    if assumed.sd_persona == 0 and rho != 0:
        _refuse(
            "sd_persona is 0", "personas that differ are needed for their order to exist", "--sd-persona 1"
        )
    if not 0 <= assumed.alike < 1:
        _refuse(
            f"alike is {assumed.alike:g}", "a correlation from 0 to below 1 is needed", "--sources-alike 0"
        )


def _refuse(given: str, needed: str, typed: str) -> None:
    raise InputError(f"power: {given}; {needed}. Give for example {typed}.")


def power(rho: float, design: Design, assumed: Assumed, trials: int = TRIALS, seed: int = 0) -> Power:
    """The chance that a study of this design gets p < 0.05 where the true rank correlation is rho.

    Estimand: the share of such studies, over draws of personas, questions, completions and training seeds. Resampling
    unit: a whole study. Same arguments, same bits. Raises InputError (`check`), ValueError for fewer than 100 trials.
    """
    return summarize(simulate(rho, design, assumed, trials, seed))


def summarize(drawn: Trials) -> Power:
    """The shares and means of simulated studies."""
    share = float(drawn.found.mean())
    low, high = intervals.wilson_share(share, len(drawn.found))
    seen = drawn.observed[np.isfinite(drawn.observed)]
    told = (None, None, None)
    if len(seen):
        told = (float(seen.mean()), *(float(v) for v in np.quantile(seen, [0.05, 0.95])))
    blank = 1 - len(seen) / len(drawn.observed)
    return Power(share, float(low), float(high), *told, float(drawn.rate.mean()), blank)


def simulate(
    rho: float, design: Design, assumed: Assumed, trials: int = TRIALS, seed: int = 0, alpha: float = ALPHA
) -> Trials:
    """`trials` studies of the model above, their ρ and whether they find it.

    Common random numbers: the same seed gives a trial the same persons, questions and uniform numbers whatever ρ,
    the spreads and the rate are, and a larger study holds the smaller one's persons, questions and sources. Raises as
    `power`."""
    check(rho, design, assumed, alpha)
    if trials < 100:
        raise ValueError(f"power: {trials} trials; at least 100 are needed for a share of them to mean much")
    blocks = [
        _block(rho, design, assumed, derive_seed("power", seed, number))
        for number in range(-(-trials // BLOCK))
    ]
    x, hits = (np.concatenate(parts)[:trials] for parts in zip(*blocks, strict=True))
    observed, p = tested(x, hits)
    drawn = design.questions * design.samples * design.seeds
    return Trials(observed, p < alpha, hits.mean(axis=(1, 2)) / drawn)


def tested(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pooled ρ, p) of the test above, (R,) each; x, y: (R, S, n) cosines and rates of n personas under S sources.

    NaN and 1 where x or y vary under no source. Equal to `scipy.stats.spearmanr` for S = 1."""
    trials, sources, n = x.shape
    ranks = [
        resample.ordered(side.reshape(-1, n)).rank.reshape(trials, sources, n).astype(np.float64)
        for side in (x, y)
    ]
    own = [side @ side.transpose(0, 2, 1) for side in ranks]  # (R, S, S), whole numbers
    total = (ranks[0] * ranks[1]).sum(axis=(1, 2))
    length = np.sqrt(np.prod([np.trace(gram, axis1=1, axis2=2) for gram in own], axis=0))
    spread = np.sqrt((own[0] * own[1]).sum(axis=(1, 2)) / (n - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = np.where(length > 0, total / length, np.nan)
        z = np.where(spread > 0, total / spread, 0.0)
    if sources == 1:
        return observed, np.where(length > 0, p_by_t(np.clip(observed, -1, 1), n), 1.0)
    return observed, np.where(spread > 0, 2 * ndtr(-np.abs(z)), 1.0)


def _block(rho: float, design: Design, assumed: Assumed, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines' scores and hits over all questions and seeds of BLOCK trials, (BLOCK, S, P) float64 each."""
    r, shape = 2 * np.sin(np.pi * rho / 6), (design.personas, BLOCK)
    own = np.stack([_normal(shape, seed, "cosine", s) for s in range(design.sources)])
    g = np.tensordot(_factor(assumed.cosines, design.sources), own, axes=1)
    common = _normal(shape, seed, "rest")
    mu, hits = center(assumed), np.zeros_like(g)
    for s in range(design.sources):
        rest = _normal(shape, seed, "rest", s)
        e = np.sqrt(assumed.alike) * common + np.sqrt(1 - assumed.alike) * rest
        place = mu + assumed.sd_source * _normal(BLOCK, seed, "source", s)
        _ask(
            place + assumed.sd_persona * (r * g[s] + np.sqrt(1 - r * r) * e),
            design,
            assumed,
            (seed, s),
            hits[s],
        )
    return g.transpose(2, 0, 1), hits.transpose(2, 0, 1)


def _ask(logit: np.ndarray, design: Design, assumed: Assumed, key: tuple, hits: np.ndarray) -> None:
    """Adds to hits (P, T) what personas of these logits (P, T) show over all questions and training seeds."""
    from leakfast.stats import binomials

    odds = []
    for k in range(design.seeds):
        moved = logit + assumed.sd_seed * _normal(logit.shape, *key, "seed", k) if assumed.sd_seed else logit
        odds.append(np.exp(moved))
    for q in range(design.questions):
        effect = np.zeros_like(logit) + assumed.sd_question * _normal(logit.shape[1], *key, "question", q)
        if assumed.sd_interaction:
            effect += assumed.sd_interaction * _normal(logit.shape, *key, "interaction", q)
        factor = np.exp(effect)
        for k in range(design.seeds):
            drawn = derive_seed(*key, "samples", q, k)
            if design.samples <= binomials.MOST:
                binomials.add(odds[k], factor, design.samples, np.uint64(drawn), hits)
            else:
                both = odds[k] * factor
                hits += np.random.Generator(np.random.PCG64(drawn)).binomial(
                    design.samples, both / (1 + both)
                )


def _normal(shape, *key) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(derive_seed(*key))).standard_normal(shape)


def center(assumed: Assumed) -> float:
    """The logit around which the sources lie, at which the mean rate is base_rate."""
    spreads = (getattr(assumed, field.name) for field in fields(assumed) if field.name.startswith("sd_"))
    return located(assumed.base_rate, float(sum(sd * sd for sd in spreads)))


@cache
def nodes() -> tuple[np.ndarray, np.ndarray]:
    """Points and weights that average over a standard normal (Gauss-Hermite, 64 of them)."""
    at, weight = np.polynomial.hermite_e.hermegauss(64)
    return at, weight / weight.sum()


@cache
def located(rate: float, variance: float) -> float:
    """The mu at which expit(mu + normal of this variance) averages to rate."""
    at, weight = nodes()
    spread = np.sqrt(variance) * at
    return float(brentq(lambda mu: float(weight @ expit(mu + spread)) - rate, -60, 60, xtol=1e-12))


@cache
def _factor(cosines: tuple[tuple[float, ...], ...] | None, sources: int) -> np.ndarray:
    """Lower triangular L with L·Lᵀ the correlation of the cosines between `sources` sources: of those given, the
    first; of further ones, the mean of those given. Made positive definite by raising eigenvalues below 1e-6."""
    given = np.asarray([[1.0]] if cosines is None else cosines)[:sources, :sources]
    known = len(given)
    mean = (given.sum() - known) / (known * (known - 1)) if known > 1 else 0.0
    whole = np.full((sources, sources), mean)
    whole[:known, :known] = given
    np.fill_diagonal(whole, 1.0)
    value, vector = np.linalg.eigh(whole)
    whole = (vector * np.maximum(value, 1e-6)) @ vector.T
    scale = 1 / np.sqrt(np.diag(whole))
    return np.linalg.cholesky(whole * np.outer(scale, scale))
