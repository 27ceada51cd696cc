"""How well each predictor orders the bystanders: ρ with leakage at every layer, within categories, with length and shared
words taken out, and a p that pays for having looked at all of them. Demands what `predictors.compared` lays out; leaves
sources that were not looked at to `predictors_held_out`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import intervals, resample, two_way
from leakfast.stats.association import spearman_and_pearson, unit, within
from leakfast.stats.confounds import partial_cells
from leakfast.stats.correlations import MIN_BOOTSTRAP, MIN_PAIRS, POOLED
from leakfast.stats.predictors import HEAD, LENGTH, WORDS, Compared, patterns, told_of
from leakfast.stats.ranking import alike
from leakfast.storage.seeds import derive_seed

_ERROR = "error of z"  # what a cell knows on its way to a row
_METHOD = (
    "Spearman of value × orientation and leakage; percentile bootstrap over personas; shuffles of personas"
)
_FLOATS = (
    "spearman spearman_ci_low spearman_ci_high spearman_both_low spearman_both_high spearman_p_perm spearman_p_max"
).split()
COLUMNS: dict[str, Any] = {
    **HEAD,
    "y": pl.String,
    "direction": pl.Int64,
    "n": pl.Int64,
    **dict.fromkeys(_FLOATS, pl.Float64),
    "predictors_compared": pl.Int64,
    "within_category": pl.Float64,
    "within_n": pl.Int64,
    **dict.fromkeys(("partial", "partial_low", "partial_high"), pl.Float64),
    "taken_out": pl.String,
    **dict.fromkeys(("reason", "ci_reason", "both_reason", "within_reason", "partial_reason"), pl.String),
    **dict.fromkeys(("permutations", "bootstraps", "resampling_seed"), pl.Int64),
    **dict.fromkeys(("resampling_unit", "method"), pl.String),
}


def table(
    parts: Iterable[Compared], permutations: int, bootstraps: int, seed: int = 0, workers: int | None = None
) -> pl.DataFrame:
    """A row per behavior, training seed, source (and `pooled`), predictor and layer; columns COLUMNS.

    spearman: ρ of value × orientation with leakage (`y` × `direction`), over the bystanders that have both, so that a
    predictor that is right has a positive one; pooled, of ranks within each source. Estimand: ρ over further personas of this
    kind. spearman_ci: 95 % bootstrap over personas; spearman_both: over personas and questions (`two_way`).
    spearman_p_perm: shuffles of which persona has which leakage, the same under all sources. spearman_p_max: against the
    largest |ρ*| over all predictors and layers of the row's source (`predictors_compared`) in the same shuffle: whoever
    picks the best of them has paid. In both a value that is not known stands in the middle of the ranks, so that all see the
    same shuffles; under them any fixed ranks are as good. within_category: of ranks within each source and category, those
    with at least two bystanders. partial: ranks of token length and of the share of words in common taken out
    (`taken_out`; a predictor is not taken out of itself); its interval is Fisher's, for single sources."""
    draws = (permutations, bootstraps, seed, workers)
    rows: list[dict] = []
    for made in parts:
        scopes = [(number,) for number in range(len(made.adapters))]
        if made.one_each():
            scopes.append(tuple(range(len(made.adapters))))
        for members in scopes:
            rows += _scope(made, members, draws)
    return pl.DataFrame(rows, schema=COLUMNS)


def _scope(made: Compared, members: tuple[int, ...], draws: tuple) -> Iterator[dict]:
    """The rows of one source, or of several pooled."""
    permutations, bootstraps, seed, workers = draws
    mine = np.isin(made.adapter, members)
    block, x, y = made.adapter[mine], made.x[mine], made.leak[mine]
    several = len(members) > 1
    adapter, source = (None, POOLED) if several else made.adapters[members[0]]
    drawn = derive_seed("predictors", seed, made.behavior, made.seed, adapter or POOLED)
    cells: list[dict[str, Any]] = [
        {"n": int(np.isfinite(column).sum()), "reason": "too few bystanders have it, or it does not vary"}
        for column in x.T
    ]
    people = made.people()[mine]
    for rows, columns in patterns(x, y, MIN_PAIRS):
        sides = _ranked(x[np.ix_(rows, columns)], y[rows], block[rows], several)
        _of_rows(cells, columns, sides, (people[rows], bootstraps, drawn, workers))
    _shuffled(cells, (x, y, block, people), (permutations, drawn, workers))
    _two_way(cells, [made.of(number) for number in members], made, drawn)
    _within_categories(cells, x, y, block, made.category[mine])
    _partial(cells, made, (x, y, block), several)
    head = {
        **told_of(made),
        "source": source,
        "adapter": adapter,
        "method": _METHOD,
        "resampling_seed": drawn,
    }
    head["resampling_unit"] = "persona, across sources" if several else "persona"
    for column, cell in zip(made.columns, cells, strict=True):
        cell.pop(_ERROR, None)
        yield head | {"predictor": column.predictor, "family": column.family, "layer": column.layer} | cell


def _ranked(x: np.ndarray, y: np.ndarray, block: np.ndarray, several: bool) -> tuple[np.ndarray, np.ndarray]:
    return (within(x, block), within(y[:, None], block)[:, 0]) if several else (x, y)


def _of_rows(cells: list[dict], columns: np.ndarray, sides: tuple, draws: tuple) -> None:
    """ρ and its interval, of columns known in the same rows."""
    x, y = sides
    people, bootstraps, seed, workers = draws
    if np.ptp(y) == 0:
        for k in columns:
            cells[k] |= {"reason": "the leakage is the same for all bystanders"}
        return
    rho = spearman_and_pearson(x, y)[0]
    known = np.isfinite(rho)
    for k, value in zip(columns[known], rho[known], strict=True):
        cells[k] |= {"spearman": float(value), "reason": None}
    fewest = len(np.unique(people))
    why = "no bootstrap was asked for" if bootstraps < 2 else f"{fewest} personas; {MIN_BOOTSTRAP} are needed"
    if bootstraps < 2 or fewest < MIN_BOOTSTRAP or not known.any():
        for k in columns:
            cells[k] |= {"ci_reason": why}
        return
    drawn = resample.bootstrap_spearman(x[:, known].T, y, bootstraps, seed, person=people, workers=workers)
    error, lost = intervals.bootstrap_z(rho[known], drawn)
    ends = zip(*intervals.percentiles(drawn), strict=True)
    for k, (low, high), se, gone in zip(columns[known], ends, error, lost, strict=True):
        if gone > intervals.TOO_FEW_DRAWS:
            cells[k] |= {"ci_reason": "over 5 % of the resamples have no ρ"}
            continue
        cells[k] |= {"spearman_ci_low": float(low), "spearman_ci_high": float(high), "bootstraps": bootstraps}
        cells[k] |= {_ERROR: float(se)}


def _shuffled(cells: list[dict], sides: tuple, draws: tuple) -> None:
    """p of each column, and with the largest of all."""
    x, y, block, people = sides
    permutations, seed, workers = draws
    used = np.array(["spearman" in cell for cell in cells])
    if not permutations or not used.any():
        return
    ranks = np.full((len(y), int(used.sum())), 0.5)  # what is not known stands in the middle
    for rows, columns in alike(np.isfinite(x[:, used])):
        ranks[np.ix_(rows, columns)] = within(x[:, used][np.ix_(rows, columns)], block[rows])
    found = resample.permute_spearman(
        ranks.T,
        within(y[:, None], block)[:, 0],
        permutations,
        seed,
        person=people,
        block=block,
        workers=workers,
    )
    for k, p, p_max in zip(np.nonzero(used)[0], found.p, found.p_max, strict=True):
        if np.isfinite(p):
            told = {"spearman_p_perm": float(p), "spearman_p_max": float(p_max), "permutations": permutations}
            cells[k] |= told | {"predictors_compared": int(used.sum())}


def _two_way(cells: list[dict], asked: list[two_way.Asked], made: Compared, seed: int) -> None:
    """The interval over personas and questions."""
    found = two_way.errors_of(asked, made.y, seed)
    for k, cell in enumerate(cells):
        if "spearman" not in cell:
            continue
        if isinstance(found, str) or "spearman_ci_low" not in cell:
            cell["both_reason"] = found if isinstance(found, str) else cell.get("ci_reason")
            continue
        rho, n_people = cell["spearman"], len({name for one in asked for name in one.people})
        if not np.isfinite([cell[_ERROR], found[0][k], found[1][k]]).all():
            cell["both_reason"] = "ρ is ±1, or not defined without one of the questions"
            continue
        errors = (cell[_ERROR], found[0][k], found[1][k])
        low, high = two_way.both(rho, errors, (n_people - 1, len(asked[0].questions) - 1))
        cell |= {"spearman_both_low": float(low), "spearman_both_high": float(high)}


def _within_categories(
    cells: list[dict], x: np.ndarray, y: np.ndarray, block: np.ndarray, category: np.ndarray
) -> None:
    """ρ of ranks within each source and category."""
    kinds = {name: i for i, name in enumerate(sorted({c for c in category if c is not None}))}
    numbers = np.array([kinds.get(c, -1) for c in category])
    group = np.where(numbers < 0, -1, block * (len(kinds) + 1) + numbers)
    for cell in cells:
        cell["within_reason"] = "too few bystanders share a category with another"
    for rows, columns in patterns(x, np.where(group < 0, np.nan, y)):
        names, which, size = np.unique(group[rows], return_inverse=True, return_counts=True)
        kept = size[which] > 1
        if kept.sum() < MIN_PAIRS or len(names) < 2:
            continue
        at = np.nonzero(rows)[0][kept]
        a = unit(within(x[np.ix_(at, columns)], which[kept]))
        b = unit(within(y[at][:, None], which[kept]))[:, 0]
        for k, value in zip(columns, a.T @ b, strict=True):
            cells[k] |= {"within_n": len(at), "within_reason": "does not vary within the categories"}
            if np.isfinite(value):
                cells[k] |= {"within_category": float(np.clip(value, -1, 1)), "within_reason": None}


def _partial(cells: list[dict], made: Compared, sides: tuple, several: bool) -> None:
    """ρ with token length and shared words taken out."""
    x, y, block = sides
    first = {c.predictor: k for k, c in reversed(list(enumerate(made.columns)))}
    controls = [next((n for n in names if n in first), None) for names in (LENGTH, WORDS)]
    groups: dict[
        tuple[tuple[str, ...], bytes], list[int]
    ] = {}  # columns freed of the same, over the same rows
    for k, column in enumerate(made.columns):
        names = [n for n in controls if n is not None and n != column.predictor]
        z = x[:, [first[n] for n in names]]
        both = np.isfinite(y) & np.isfinite(x[:, k]) & np.isfinite(z).all(1)
        vary = [n for n, values in zip(names, z.T, strict=True) if both.any() and np.ptp(values[both]) > 0]
        groups.setdefault((tuple(vary), both.tobytes()), []).append(k)
    for (names, mask), members in groups.items():
        if not names:
            for k in members:
                cells[k]["partial_reason"] = (
                    "neither lengths nor words in common are known, or they do not vary"
                )
            continue
        rows, count = np.frombuffer(mask, dtype=bool), len(members)
        sides = x[rows][:, [*members, *(first[n] for n in names)]], y[rows]
        ranked, out = _ranked(*sides, block[rows], several)
        everyone = np.ones(len(out), dtype=bool)
        found = partial_cells(ranked[:, :count], out, ranked[:, count:], everyone, list(names), None)
        for k, told in zip(members, found, strict=True):
            cell = cells[k]
            cell |= {"taken_out": ", ".join(names), "partial": told.get("partial")}
            cell["partial_reason"] = told.get("reason")
            if several and cell["partial"] is not None:
                cell["partial_reason"] = "no interval: the sources share their personas"
            elif not several:
                cell |= {"partial_low": told.get("low"), "partial_high": told.get("high")}
