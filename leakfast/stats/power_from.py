"""The sizes and spreads of a finished run, for `power`: how much personas, questions, their meeting, sources and training
seeds differ on the logit scale once sampling noise is taken out. Demands counts per question; judged means have none.

Method of moments on the scale of shares, where counts give unbiased estimates whatever their size, matched to the
logit-normal model of `power` by quadrature. With p(i, q) the chance of persona i on question q under one adapter, M
the mean of p, and F(v, w) the mean product of two chances whose logits have variance v and covariance w:

    mean of hits(hits − 1) / (total(total − 1))  = F(v, v)   total variance v, from cells of two samples or more
    mean of p(i, q) · p(i, q′)                   = F(v, w)   w = sd_persona² + sd_seed²
    mean of p(i, q) · p(i′, q)                   = F(v, w)   w = sd_question²
    the same persona under another seed, question q′    w = sd_persona²
    the same persona under another source, question q′  w = the covariance of its logits between sources

sd_interaction² is what is left of v. Each equation is summed over the adapters, every one with its own mu, so that
adapters with many hits weigh more. A negative variance is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.optimize import brentq
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from leakfast.errors import InputError
from leakfast.stats.power import Assumed, Design, located, nodes
from leakfast.storage.run import Run

TOP = 25.0  # variance of logits beyond which none is looked for


@dataclass(frozen=True)
class Read:
    """What a run tells: its sizes, its spreads, where they come from in sentences. cosine, layer: whose cosines."""

    design: Design
    assumed: Assumed
    behavior: str
    cosine: str
    layer: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """hits, total: (A, P, Q) float64, of A adapters' bystanders; total 0 where a persona is no bystander or was not
    asked. source: (A,) whose they are."""

    hits: np.ndarray
    total: np.ndarray
    source: tuple[str, ...]


def read(run: str | Path, behavior: str | None = None) -> Read:
    """Read a finished run. behavior: which, where it measured several.

    Raises InputError for a run without adapters, counts per question or cosines, or whose bystanders all show, or
    never show, the behavior."""
    from leakfast.stats import analysis, named, tables

    known = None if behavior is None else named.behaviors_of(Run(run).open())
    if known is not None and behavior not in known:  # before tables are made
        raise _uncounted(run, known, behavior)
    made = tables.current(run)
    counted = made.more.get("question_counts", pl.DataFrame())
    there = made.behaviors()
    usable = [b for b in there if counted.height and counted.filter(behavior=b).height]
    if behavior is None and len(usable) > 1:
        raise InputError(
            f"power: {run} measured {', '.join(usable)}; one behavior is needed. Give --behavior {usable[0]}."
        )
    behavior = behavior or (usable[0] if usable else "")
    if behavior not in usable:
        raise _uncounted(run, usable, behavior)
    adapters = _adapters(made.rates, behavior)
    counts, people = _counts(counted.filter(behavior=behavior), made.rates, behavior, adapters)
    cosine, layer = analysis.headline(made.rates, made.correlations, behavior)
    why = made.correlations.filter(pl.col("reason").is_not_null(), behavior=behavior)
    if layer is None and why.height:  # cosines are there
        raise InputError(
            f"power: ρ of {behavior} is defined nowhere in {run}: {why['reason'][0]}. Give another run, or --base-rate and the "
            "spreads by hand."
        )
    pairs = made.pairs.filter(behavior=behavior, layer=-1 if layer is None else layer)
    pairs = pairs.drop_nulls(f"cosine_{cosine}")
    if layer is None or pairs.is_empty():
        raise InputError(
            f"power: {run} has no cosine of {behavior} that ρ is defined for; centroids are needed. "
            f"Make them with `leakfast centroids` and then `leakfast stats {run}`."
        )
    scores = _scores(pairs, f"cosine_{cosine}", people, tuple(dict.fromkeys(counts.source)))
    assumed, notes = fit(counts, scores)
    notes = (f"{behavior}, {cosine} cosine at layer {layer}", *notes)
    return Read(_sizes(counts, adapters), assumed, behavior, cosine, layer, notes)


def _uncounted(run: str | Path, there: list[str], behavior: str | None) -> InputError:
    return InputError(
        f"power: {run} has counts per question of {', '.join(there) or 'no behavior'}, but not of {behavior or 'any'}; counts "
        "are needed. Give the run of a behavior that a detector reads or that has right answers, or give --base-rate and the "
        "spreads by hand."
    )


def _adapters(rates: pl.DataFrame, behavior: str) -> pl.DataFrame:
    """adapter, source, seed: one for each source and training seed, that was taught this behavior where one was."""
    mine = rates.filter(behavior=behavior, role="bystander")
    mine = (
        mine.with_columns(own=(pl.col("taught") == behavior).fill_null(False))
        if "taught" in mine.columns
        else (mine.with_columns(own=pl.lit(False)))
    )
    order = mine.select("adapter", "source", "seed", "own").unique(maintain_order=True)
    return order.sort("own", descending=True, maintain_order=True).unique(
        ["source", "seed"], maintain_order=True
    )


def _counts(
    counted: pl.DataFrame, rates: pl.DataFrame, behavior: str, adapters: pl.DataFrame
) -> tuple[Counts, list[str]]:
    who = rates.filter(behavior=behavior, role="bystander").select("adapter", "persona")
    mine = counted.join(who, on=["adapter", "persona"], how="semi").join(adapters, on="adapter", how="semi")
    people, asked = sorted(mine["persona"].unique()), sorted(mine["question"].unique())
    names = adapters["adapter"].to_list()
    hits, total = (np.zeros((len(names), len(people), len(asked))) for _ in range(2))
    a, i, q = (
        mine[column].replace_strict({v: k for k, v in enumerate(values)}, return_dtype=pl.Int64).to_numpy()
        for column, values in (("adapter", names), ("persona", people), ("question", asked))
    )
    hits[a, i, q], total[a, i, q] = mine["hits"].to_numpy(), mine["total"].to_numpy()
    return Counts(hits, total, tuple(adapters["source"])), people


def _scores(pairs: pl.DataFrame, column: str, people: list[str], sources: tuple[str, ...]) -> np.ndarray:
    """(S, P) normal scores of each source's cosines, NaN where a persona has none."""
    out = np.full((len(sources), len(people)), np.nan)
    place = {name: i for i, name in enumerate(people)}
    for s, source in enumerate(sources):
        found = dict(pairs.filter(source=source).select("persona", column).rows())
        known = [(place[name], value) for name, value in found.items() if name in place]
        if known:
            at, values = (np.array(side) for side in zip(*known, strict=True))
            out[s, at] = ndtri(rankdata(values) / (len(values) + 1))
    return out


def _sizes(counts: Counts, adapters: pl.DataFrame) -> Design:
    """Bystanders, questions and samples as most adapters (cells) have them."""
    some = counts.total > 0
    return Design(
        personas=int(np.median(some.any(2).sum(1))),
        questions=int(np.median(some.any(1).sum(1))),
        samples=max(1, int(np.median(counts.total[some]))),
        sources=len(set(counts.source)),
        seeds=max(adapters.group_by("source", maintain_order=True).len()["len"]),
    )


def fit(counts: Counts, scores: np.ndarray) -> tuple[Assumed, tuple[str, ...]]:
    """The `Assumed` that counts (A, P, Q) and cosines' scores (S, P) give, and what could not be told, in sentences.

    scores: NaN where not known; rows in the order in which `counts.source` names the sources first. Raises InputError where
    no adapter has both hits and misses among its bystanders."""
    rates, seen = _shares(counts)
    means = np.array([float(np.mean(r[s])) if s.any() else np.nan for r, s in zip(rates, seen, strict=True)])
    some = np.nonzero((means > 0) & (means < 1))[0]
    if not len(some):
        raise InputError(
            "power: the bystanders of this run never show the behavior, or always do; some must differ for a spread "
            "to be read. Give another run, or --base-rate and the spreads by hand."
        )
    counted = np.isfinite(means)
    notes = []
    if flat := int(counted.sum()) - len(some):
        notes.append(
            f"{flat} adapters whose bystanders all show the behavior alike, never or always, tell no spread: they stand in the "
            "base rate alone"
        )
    if absent := len(means) - int(counted.sum()):
        notes.append(f"{absent} adapters without counts are left out")
    found = _Fit(means[some], rates[some], seen[some], tuple(counts.source[a] for a in some))
    product, number = _within(counts, some)
    v, persona, question, told = found.variances(product, number)
    notes += told
    seed = 0.0
    if (again := found.between(same_source=True)) is not None:
        stable = found.solved(*again, v, 0.0)
        persona, seed = min(persona, stable), max(0.0, persona - stable)
    else:
        notes.append("one training seed a source: sd_seed is not known and 0, and is part of sd_persona")
    places = {s: [] for s in dict.fromkeys(found.source)}
    for mean, source in zip(found.means, found.source, strict=True):
        places[source].append(located(float(mean), v))
    mu = np.array([np.mean(values) for values in places.values()])
    alike = _alike(found, scores, tuple(dict.fromkeys(counts.source)), v, persona)
    assumed = Assumed(
        base_rate=_base_rate(means, counts.source),
        sd_persona=float(np.sqrt(persona)),
        sd_question=float(np.sqrt(question)),
        sd_interaction=float(np.sqrt(max(0.0, v - persona - seed - question))),
        sd_seed=float(np.sqrt(seed)),
        sd_source=float(mu.std(ddof=1)) if len(mu) > 1 else 0.0,
        alike=alike,
        cosines=_correlations(scores),
    )
    return assumed, tuple(notes)


def _base_rate(means: np.ndarray, source: tuple[str, ...]) -> float:
    """Mean over sources of the means of their adapters, those that never show it too; NaN is an adapter without counts."""
    of = np.array(source)
    known = [means[(of == name) & np.isfinite(means)] for name in dict.fromkeys(source)]
    return float(np.mean([mine.mean() for mine in known if len(mine)]))


def _shares(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    seen = counts.total > 0
    return np.where(seen, counts.hits / np.where(seen, counts.total, 1), 0.0), seen


def _within(counts: Counts, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per adapter: the mean over cells of the unbiased p², and of how many cells."""
    hits, total = counts.hits[some], counts.total[some]
    twice = total > 1
    square = np.where(twice, hits * (hits - 1) / np.where(twice, total * (total - 1), 1), 0.0)
    number = twice.sum((1, 2))
    return square.sum((1, 2)) / np.maximum(number, 1), number


@dataclass(frozen=True)
class _Fit:
    """means: (A,); rates, seen: (A, P, Q); source: (A,)."""

    means: np.ndarray
    rates: np.ndarray
    seen: np.ndarray
    source: tuple[str, ...]

    def variances(self, square: np.ndarray, number: np.ndarray) -> tuple[float, float, float, list[str]]:
        """(total, of personas and seeds, of questions, what could not be told); square, number: of `_within`."""
        pairs = [(a, a) for a in range(len(self.means))]
        persona, question = (self._products(axis) for axis in (2, 1))
        twice = number > 0
        if twice.any():
            kept = [pair for pair, one in zip(pairs, twice, strict=True) if one]
            v = _root(lambda v: float(sum(square[twice])) - self._expected(kept, v, v), 0.0, TOP)
            return v, self.solved(pairs, persona, v, 0.0), self.solved(pairs, question, v, 0.0), []
        v, parts = 4.0, (0.0, 0.0)
        for _ in range(100):  # no cell has two samples: what meets in one cannot be told from chance
            parts = (self.solved(pairs, persona, v, 0.0), self.solved(pairs, question, v, 0.0))
            v, before = sum(parts), v
            if abs(v - before) < 1e-9:
                break
        return v, *parts, ["one sample a question: sd_interaction cannot be told from chance and is 0"]

    def between(self, *, same_source: bool) -> tuple[list[tuple[int, int]], np.ndarray] | None:
        """Pairs of adapters of one source (or of two), and the mean product of a persona's chances under both, on
        different questions. None without such a pair."""
        pairs, products = [], []
        for a in range(len(self.means)):
            for b in range(a):
                both = (self.seen[a].any(1) & self.seen[b].any(1)).nonzero()[0]
                if (self.source[a] == self.source[b]) != same_source or not len(both):
                    continue
                one, other = self.rates[a, both], self.rates[b, both]
                here, there = self.seen[a, both], self.seen[b, both]
                number = here.sum(1) * there.sum(1) - (here & there).sum(1)
                value = one.sum(1) * other.sum(1) - (one * other).sum(1)
                if (number > 0).any():
                    pairs.append((a, b))
                    products.append(float(np.mean(value[number > 0] / number[number > 0])))
        return (pairs, np.array(products)) if pairs else None

    def solved(self, pairs: list[tuple[int, int]], products: np.ndarray, v: float, least: float) -> float:
        """The covariance w of logits, from `least` to v, at which the expected products sum to those found."""
        return _root(lambda w: float(np.sum(products)) - self._expected(pairs, v, w), least, v)

    def _products(self, axis: int) -> np.ndarray:
        """(A,) mean product of two chances of one persona (axis 2) or on one question (axis 1)."""
        number = self.seen.sum(axis)
        number = number * (number - 1)
        value = self.rates.sum(axis) ** 2 - (self.rates**2).sum(axis)
        return np.array(
            [
                np.mean(one[n > 0] / n[n > 0]) if (n > 0).any() else np.nan
                for one, n in zip(value, number, strict=True)
            ]
        )

    def _expected(self, pairs: list[tuple[int, int]], v: float, w: float) -> float:
        mu = [located(float(mean), v) for mean in self.means]
        return float(sum(mean_product(mu[a], mu[b], v, w) for a, b in pairs))


def mean_product(mu: float, other: float, variance: float, covariance: float) -> float:
    """The mean of expit(mu + X) · expit(other + Y), X and Y normal with this variance and covariance."""
    at, weight = nodes()
    shared, own = np.sqrt(abs(covariance)), np.sqrt(max(0.0, variance - abs(covariance)))
    one = expit(mu + shared * at[:, None] + own * at) @ weight
    two = expit(other + np.sign(covariance) * shared * at[:, None] + own * at) @ weight
    return float(weight @ (one * two))


def _root(short: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, the nearer end where it does not."""
    if not short(low) > 0:
        return low
    return high if short(high) > 0 else float(brentq(short, low, high, xtol=1e-10))


def _alike(found: _Fit, scores: np.ndarray, sources: tuple[str, ...], v: float, persona: float) -> float:
    """Correlation between sources of the persona's logit beyond what the cosines explain, from 0 to 0.95."""
    other = found.between(same_source=False)
    if other is None or persona <= 0:
        return 0.0
    whole = found.solved(*other, v, -v) / persona
    told = []
    for a, source in enumerate(found.source):
        g, rate = scores[sources.index(source)], found.rates[a].sum(1) / np.maximum(found.seen[a].sum(1), 1)
        kept = np.isfinite(g) & found.seen[a].any(1)
        if kept.sum() > 3 and np.ptp(rate[kept]) > 0 and np.ptp(g[kept]) > 0:
            noisy = np.var(rate[kept])
            true = mean_product(*[located(float(found.means[a]), v)] * 2, v, persona) - found.means[a] ** 2
            rho = np.corrcoef(rankdata(g[kept]), rankdata(rate[kept]))[0, 1]
            told.append(rho / np.sqrt(min(1.0, max(0.1, true / noisy))))
    rho = float(np.clip(np.mean(told), -0.95, 0.95)) if told else 0.0
    r2 = (2 * np.sin(np.pi * rho / 6)) ** 2
    together = np.array(_correlations(scores) or ((1.0,),))
    apart = (together.sum() - len(together)) / max(1, len(together) * (len(together) - 1))
    return float(np.clip((whole - r2 * apart) / (1 - r2), 0.0, 0.95))


def _correlations(scores: np.ndarray) -> tuple[tuple[float, ...], ...] | None:
    """(S, S) correlations of the scores over the personas that both sources have; None for one source."""
    if len(scores) < 2:
        return None
    out = np.eye(len(scores))
    for a in range(len(scores)):
        for b in range(a):
            both = np.isfinite(scores[a]) & np.isfinite(scores[b])
            if both.sum() > 2 and np.ptp(scores[a, both]) > 0 and np.ptp(scores[b, both]) > 0:
                out[a, b] = out[b, a] = np.corrcoef(scores[a, both], scores[b, both])[0, 1]
    return tuple(tuple(float(v) for v in row) for row in out)
