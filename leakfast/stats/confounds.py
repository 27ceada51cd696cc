"""What else could explain a correlation of cosine and leakage: lengths, shared words, baselines,
categories, single personas. Demands pairs and who the personas are; decides nothing.

Without the study's own prompts the words of a persona are those of its name, and the table says so."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import stdtr

from leakfast.stats import intervals
from leakfast.stats.correlations import MIN_PAIRS, YS
from leakfast.stats.people import People
from leakfast.stats.ranking import alike, average_ranks
from leakfast.stats.resample import ordered
from leakfast.stats.ties import floats

# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces stand between their words
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# words that any two prompts share without being about the same thing
_COMMON = frozenset(
    "a an and are as at by every for from has have he her his in into is it its of on or she that the their "
    "them they this to was were who will with you your".split()
)
CONTROLS = ("prompt_words", "baseline", "jaccard", "shared_word", "tfidf", "similarity", "category")


def words(people: People) -> tuple[dict[str, frozenset[str]], str]:
    """Content words of each persona, and what they are words of: `prompt`, or `name` where no prompts are
    known. The same kind for all, so that overlaps can be compared."""
    if people.prompts:
        return {name: _words(text) for name, text in people.prompts.items()}, "prompt"
    return {name: _words(name) for name in people.categories}, "name"


def _words(text: str) -> frozenset[str]:
    return frozenset(_in(text)) - _COMMON


def _in(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters with their marks, of scripts that put spaces between words."""
    spaced = _UNSPACED.sub(" ", unicodedata.normalize("NFC", text.lower()))
    return "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in spaced).split()


def covariates(pairs: pl.DataFrame, rates: pl.DataFrame, people: People, given: pl.DataFrame | None = None):
    """`pairs` + prompt_words, baseline, jaccard, shared_word, tfidf, similarity, and words_of.

    jaccard: shared content words over all content words of source and bystander; shared_word: 1 if any;
    tfidf: cosine of tf-idf vectors (Salton and Buckley 1988, idf = ln(N/df) + 1), where N counts the personas of the study
    (without one, those that were measured) and df those whose prompt has the word;
    similarity: from `given` (source, persona, similarity: an embedding's, say), null without it."""
    said, kind = words(people)
    among = set(rates["persona"]) if people.named is None else people.named
    among = among.union(pairs["source"], pairs["persona"])
    said = {name: bag for name, bag in said.items() if name in among}
    counts: dict[str, int] = {}
    for bag in said.values():
        for word in bag:
            counts[word] = counts.get(word, 0) + 1
    weight = {word: np.log(len(said) / n) + 1 for word, n in counts.items()}
    length = {name: float(np.sqrt(sum(weight[w] ** 2 for w in bag))) for name, bag in said.items()}
    rows = []
    for source, persona in pairs.select("source", "persona").unique(maintain_order=True).rows():
        a, b = said.get(source), said.get(persona)
        if not a or not b:
            rows.append((source, persona, None, None, None))
            continue
        common = a & b
        dot = sum(weight[w] ** 2 for w in common)
        apart = length[source] * length[persona]
        rows.append((source, persona, len(common) / len(a | b), float(bool(common)), dot / apart))
    names = ["source", "persona", "jaccard", "shared_word", "tfidf"]
    types = dict(zip(names, [pl.String, pl.String, *[pl.Float64] * 3], strict=True))
    overlap = pl.DataFrame(rows, schema=types, orient="row")
    lengths = {n: float(len(_in(text))) for n, text in people.prompts.items()}
    base = rates.select("behavior", "adapter", "persona", "baseline").unique(
        ["behavior", "adapter", "persona"]
    )
    out = pairs.join(overlap, on=["source", "persona"], how="left", maintain_order="left")
    out = out.join(base, on=["behavior", "adapter", "persona"], how="left", maintain_order="left")
    if given is not None:
        out = out.join(given, on=["source", "persona"], how="left", maintain_order="left")
    else:
        out = out.with_columns(similarity=pl.lit(None, pl.Float64))
    told = pl.col("persona").replace_strict(lengths, default=None, return_dtype=pl.Float64)
    return out.with_columns(
        prompt_words=(told if lengths else pl.lit(None, pl.Float64)), words_of=pl.lit(kind)
    )


def partial_spearman(x, y, controls, groups=None) -> tuple[float, float, int] | str:
    """(partial ρ, its t p-value, number of controls), or why there is none.

    Estimand: the correlation of the ranks of x and y after the ranks of the controls (n, C) and the
    means of the groups (n,) have been taken out of both by least squares. p: t with n − 2 − C degrees of
    freedom. Equal to the Pearson correlation of those residuals. Linear in ranks: what depends on a
    control in another shape is not taken out."""
    return _partial_columns(np.asarray(x, float)[:, None], y, controls, groups)[0]


def _partial_columns(x, y, controls, groups=None) -> list[tuple[float, float, int] | str]:
    """`partial_spearman` of every column of x (n, K), the controls taken out once for all of them."""
    n = len(y)
    columns = [np.ones(n), *average_ranks(np.asarray(controls, float).reshape(n, -1).T)]
    if groups is not None:
        columns += [np.asarray(groups == g, float) for g in sorted(set(groups))[1:]]
    design = np.column_stack(columns)
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    rank = int((sizes > sizes[0] * max(design.shape) * np.finfo(float).eps).sum())
    basis = basis[:, :rank]
    left = n - rank - 1
    if left < MIN_PAIRS - 2:
        return [f"{n} pairs and {rank - 1} controls leave {left} degrees of freedom"] * x.shape[1]
    parts = []
    for side in (x, np.asarray(y, float)[:, None]):
        ranks = ordered(side.T).rank.T / 2
        rest = ranks - basis @ (basis.T @ ranks)
        size = np.linalg.norm(rest, axis=0)
        gone = size <= 1e-9 * np.maximum(1.0, np.linalg.norm(ranks, axis=0))
        parts.append((rest / np.where(gone, 1.0, size), gone))
    (own, still), (other, settled) = parts
    found: list[tuple[float, float, int] | str] = []
    for rho, nothing in zip(np.clip(own.T @ other[:, 0], -1, 1), still, strict=True):
        if nothing or settled[0]:
            side = "the cosine" if nothing else "the rate"
            found.append(f"{side} does not vary once the controls are taken out")
            continue
        with np.errstate(divide="ignore"):
            t = abs(rho) * np.sqrt(left / np.maximum((1 + rho) * (1 - rho), 0))
        found.append((float(rho), float(2 * stdtr(left, -t)), rank - 1))
    return found


@dataclass(frozen=True)
class _Adapter:
    """The pairs of one adapter, wide. key: behavior, seed, source, adapter; x (n, L) cosines, NaN where
    there is none; every other column (n,), one value a persona."""

    key: dict
    layers: list[int]
    x: np.ndarray
    people: pl.DataFrame

    def column(self, name: str) -> np.ndarray:
        return floats(self.people[name])

    def alike(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(which layers, which personas (n,)) for each set of personas that some layers have cosines for."""
        return [(columns, rows) for rows, columns in alike(np.isfinite(self.x))]

    def same(self) -> bool:
        """Whether rate and delta are equal to the bit (over a baseline of 0, say), so that what is told of one holds of both."""
        return np.array_equal(*(self.column(y) for y in YS), equal_nan=True)

    def rows(self, found: Mapping[tuple, dict], cosine: str) -> list[dict]:
        """(layer's number, y, …) → values, as rows in order of layer and y."""
        return [
            {**self.key, "layer": self.layers[j], "cosine": cosine, "y": y_name, **values}
            for (j, y_name, *_), values in sorted(found.items(), key=lambda p: (p[0][0], YS.index(p[0][1])))
        ]


def by_adapter(table: pl.DataFrame, cosine: str) -> list[_Adapter]:
    """The pairs of each behavior, training seed and adapter, one row a persona, all layers beside each other."""
    keys = ["behavior", "seed", "adapter"]
    out = []
    for group in table.partition_by(keys, maintain_order=True) if table.height else []:
        people = group.unique("persona", keep="first", maintain_order=True)
        place = {name: i for i, name in enumerate(people["persona"])}
        layers = sorted(group["layer"].unique())
        number = {layer: j for j, layer in enumerate(layers)}
        x = np.full((len(place), len(layers)), np.nan)
        for name, layer, value in group.select("persona", "layer", f"cosine_{cosine}").rows():
            x[place[name], number[layer]] = np.nan if value is None else value
        key = {name: group[name][0] for name in ("behavior", "seed", "source", "adapter")}
        out.append(_Adapter(key, layers, x, people))
    return out


def partials(table: pl.DataFrame, cosine: str = "centered") -> pl.DataFrame:
    """Partial ρ of cosine with rate and delta for each adapter and layer, controlling one thing at a time
    and all that is known together (`control`; `none` is plain ρ). 95 % interval by Fisher's z with Bonett
    and Wright's variance; a reason where a value is null."""
    rows = []
    for one in by_adapter(table, cosine):
        values, found = {c: one.column(c) for c in CONTROLS if c != "category"}, {}
        kinds, words_of = one.people["category"].to_numpy(), one.people["words_of"][0]
        for which, known in one.alike():
            for y_name in YS[:1] if one.same() else YS:
                y = one.column(y_name)
                both = known & np.isfinite(y)
                vary = [c for c, value in values.items() if _varies(value[both])]
                sets: list[tuple[str, list[str], bool]] = [("none", [], False)]
                sets += [(c, [c], False) for c in values]
                sets += [("category", [], True), ("all", vary, one.people["category"].null_count() == 0)]
                for name, columns, by_category in sets:
                    z = np.column_stack([values[c] for c in columns]) if columns else np.empty((len(y), 0))
                    told = partial_cells(one.x[:, which], y, z, both, columns, kinds if by_category else None)
                    for j, cell in zip(which, told, strict=True):
                        cell |= {"control": name, "words_of": words_of}
                        found[int(j), y_name, name] = cell
        rows += one.rows(_both(found) if one.same() else found, cosine)
    columns = _columns(table, "layer") | dict.fromkeys(("cosine", "y", "control"), pl.String)
    columns |= {"n": pl.Int64, "controls": pl.Int64}
    columns |= dict.fromkeys(("partial", "low", "high", "p_t"), pl.Float64)
    columns |= {"words_of": pl.String, "reason": pl.String, "method": pl.String}
    return pl.DataFrame(rows, schema=columns)


def partial_cells(x, y, z, both, names: list[str], kinds) -> list[dict]:
    """The cells of some layers, whose cosines x (n, K) are known for the same personas `both` (n,): n, partial, low,
    high, p_t, controls and method, or a reason. z (n, C): the controls called `names`; kinds (n,): groups, or None."""
    keep = both & np.isfinite(z).all(1)
    if kinds is not None:
        keep = keep & np.array([kind is not None for kind in kinds])
    n = int(keep.sum())
    told = {"n": n, "method": "rank residuals, t, Fisher z"}
    why = None
    for name, column in zip(names, z.T, strict=True):
        if not np.isfinite(column).any():
            why = f"{name} is not known here"
        elif len(names) == 1 and keep.any() and np.ptp(column[keep]) == 0:
            why = f"{name} is {column[keep][0]:g} for all {n} pairs: there is nothing to take out"
    if why is None and n < MIN_PAIRS:
        why = f"{n} pairs with all values; at least {MIN_PAIRS} are needed"
    if why is not None:
        return [told | {"reason": why} for _ in range(x.shape[1])]
    cells = []
    for found in _partial_columns(x[keep], y[keep], z[keep], None if kinds is None else kinds[keep]):
        if isinstance(found, str):
            cells.append(told | {"reason": found})
            continue
        rho, p, controls = found
        cell = told | {"partial": rho, "p_t": p, "controls": controls}
        if n - 3 - controls < 1 or abs(rho) >= 1 - 1e-12:
            cells.append(cell | {"reason": "too few pairs for an interval, or ρ is ±1"})
            continue
        low, high = intervals.z_interval(rho, intervals.spearman_z_se(rho, n, controls))
        cells.append(cell | {"low": float(low), "high": float(high)})
    return cells


def commonality(table: pl.DataFrame, cosine: str = "centered", against: str = "jaccard") -> pl.DataFrame:
    """How much of the rank variance of the rate only the cosine, only the shared words, and both explain.

    R² of least squares on ranks (Mood 1971): unique_cosine = R²(both) − R²(words), unique_words likewise,
    common = R²(cosine) + R²(words) − R²(both), which can be negative. No interval is given."""
    rows = []
    for one in by_adapter(table, cosine):
        w, found = one.column(against), {}
        for which, known in one.alike():
            for y_name in YS:
                y = one.column(y_name)
                keep = known & np.isfinite(y) & np.isfinite(w)
                told = {"against": against, "n": int(keep.sum()), "method": "R² of least squares on ranks"}
                why = None
                if told["n"] < MIN_PAIRS + 1 or min(np.ptp(y[keep]), np.ptp(w[keep])) == 0:
                    why = "too few pairs, or a side does not vary"
                    first = [None] * len(which)
                else:
                    first, alike = (
                        _rhos(one.x[np.ix_(keep, which)], y[keep]),
                        _rhos(one.x[np.ix_(keep, which)], w[keep]),
                    )
                    second = _rhos(w[keep][:, None], y[keep])[0]
                for k, j in enumerate(which):
                    if why is not None or first[k] is None:
                        found[int(j), y_name] = told | {"reason": "too few pairs, or a side does not vary"}
                        continue
                    alone, other, apart = first[k] ** 2, second**2, 1 - alike[k] ** 2
                    both = (
                        (alone + other - 2 * first[k] * second * alike[k]) / apart if apart > 1e-12 else alone
                    )
                    found[int(j), y_name] = told | {
                        "total": both,
                        "unique_cosine": both - other,
                        "unique_words": both - alone,
                        "common": alone + other - both,
                    }
        rows += one.rows(found, cosine)
    columns = _columns(table, "layer") | dict.fromkeys(("cosine", "y", "against"), pl.String)
    columns |= {"n": pl.Int64}
    columns |= dict.fromkeys(("total", "unique_cosine", "unique_words", "common"), pl.Float64)
    return pl.DataFrame(rows, schema=columns | {"reason": pl.String, "method": pl.String})


def left_out(table: pl.DataFrame, by: str, cosine: str = "centered") -> pl.DataFrame:
    """ρ without each category (by="category") or without each persona (by="persona"), and `change`, by how
    much leaving it out moves ρ. Exact, ranks made anew without it."""
    rows = []
    for one in by_adapter(table, cosine):
        names, found = one.people[by].to_numpy(), {}
        for which, known in one.alike():
            for y_name in YS[:1] if one.same() else YS:
                y = one.column(y_name)
                keep = known & np.isfinite(y)
                whole = _rhos(one.x[np.ix_(keep, which)], y[keep])
                for name in [n for n in dict.fromkeys(names) if n is not None]:
                    rest = keep & (names != name)
                    for j, all_of, rho in zip(
                        which, whole, _rhos(one.x[np.ix_(rest, which)], y[rest]), strict=True
                    ):
                        found[int(j), y_name, name] = {
                            "left_out": name,
                            "n": int(rest.sum()),
                            "spearman": rho,
                            "spearman_all": all_of,
                            "change": None if rho is None or all_of is None else rho - all_of,
                            "reason": "fewer than 4 pairs are left, or a side does not vary"
                            if rho is None
                            else None,
                            "method": "Spearman of the others, ranked anew",
                        }
        rows += one.rows(_both(found) if one.same() else found, cosine)
    columns = _columns(table, "layer") | dict.fromkeys(("cosine", "y", "left_out"), pl.String)
    columns |= {"n": pl.Int64, **dict.fromkeys(("spearman", "spearman_all", "change"), pl.Float64)}
    return pl.DataFrame(rows, schema=columns | {"reason": pl.String, "method": pl.String})


def _both(found: dict[tuple, dict]) -> dict[tuple, dict]:
    """What is told of the first y, of the other too."""
    return found | {(j, YS[1], *more): cell for (j, _, *more), cell in found.items()}


def _rhos(x: np.ndarray, y: np.ndarray) -> list[float | None]:
    """Spearman's ρ of each column of x (n, K) with y (n,); None where it is not defined."""
    if len(y) < MIN_PAIRS:
        return [None] * x.shape[1]
    a, b = ordered(x.T).rank, ordered(y).rank[0]
    length = np.sqrt((a * a).sum(axis=1) * (b @ b))
    return [
        float(np.clip(s / size, -1, 1)) if size > 0 else None for s, size in zip(a @ b, length, strict=True)
    ]


def _columns(table: pl.DataFrame, *more: str) -> Mapping:
    return {name: table.schema[name] for name in ("behavior", "seed", "source", "adapter", *more)}


def _varies(value: np.ndarray) -> bool:
    value = value[np.isfinite(value)]
    return bool(len(value) >= MIN_PAIRS and np.ptp(value) > 0)
