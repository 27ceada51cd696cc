"""What else could explain a correlation of cosine and leakage: lengths, shared words, baselines,
categories, single personas. Demands pairs and who the personas are; decides nothing.

Without the study's own prompts the words of a persona are those of its name, and the table says so."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import polars as pl
from scipy.special import stdtr
from scipy.stats import rankdata

from leakfast.stats import intervals
from leakfast.stats.collect import People
from leakfast.stats.correlations import MIN_PAIRS, YS

_WORD = re.compile(r"[a-z]+")
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
    return frozenset(_WORD.findall(text.lower().replace("_", " "))) - _COMMON


def covariates(pairs: pl.DataFrame, rates: pl.DataFrame, people: People, given: pl.DataFrame | None = None):
    """`pairs` + prompt_words, baseline, jaccard, shared_word, tfidf, similarity, and words_of.

    jaccard: shared content words over all content words of source and bystander; shared_word: 1 if any;
    tfidf: cosine of tf-idf vectors over all personas known (Salton and Buckley 1988, idf = ln(N/df) + 1);
    similarity: from `given` (source, persona, similarity: an embedding's, say), null without it."""
    said, kind = words(people)
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
    lengths = {n: float(len(_WORD.findall(text.lower()))) for n, text in people.prompts.items()}
    base = rates.select("behavior", "adapter", "persona", "baseline").unique(
        ["behavior", "adapter", "persona"]
    )
    out = pairs.join(overlap, on=["source", "persona"], how="left", maintain_order="left")
    out = out.join(base, on=["behavior", "adapter", "persona"], how="left", maintain_order="left")
    if given is not None:
        out = out.join(given, on=["source", "persona"], how="left", maintain_order="left")
    else:
        out = out.with_columns(pl.lit(None, pl.Float64).alias("similarity"))
    told = pl.col("persona").replace_strict(lengths, default=None, return_dtype=pl.Float64)
    return out.with_columns((told if lengths else pl.lit(None, pl.Float64)).alias("prompt_words"),
                            pl.lit(kind).alias("words_of"))  # fmt: skip


def partial_spearman(x, y, controls, groups=None) -> tuple[float, float, int] | str:
    """(partial ρ, its t p-value, number of controls), or why there is none.

    Estimand: the correlation of the ranks of x and y after the ranks of the controls (n, C) and the
    means of the groups (n,) have been taken out of both by least squares. p: t with n − 2 − C degrees of
    freedom. Equal to the Pearson correlation of those residuals. Linear in ranks: what depends on a
    control in another shape is not taken out."""
    n = len(y)
    columns = [np.ones(n)] + [rankdata(c) for c in np.asarray(controls, float).reshape(n, -1).T]
    if groups is not None:
        columns += [np.asarray(groups == g, float) for g in sorted(set(groups))[1:]]
    design = np.column_stack(columns)
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    rank = int((sizes > sizes[0] * max(design.shape) * np.finfo(float).eps).sum())
    basis = basis[:, :rank]
    left = n - rank - 1
    if left < MIN_PAIRS - 2:
        return f"{n} pairs and {rank - 1} controls leave {left} degrees of freedom"
    parts = []
    for side, name in ((x, "the cosine"), (y, "the rate")):
        ranks = rankdata(side) - (n + 1) / 2
        rest = ranks - basis @ (basis.T @ ranks)
        if np.linalg.norm(rest) <= 1e-9 * max(1.0, np.linalg.norm(ranks)):
            return f"{name} does not vary once the controls are taken out"
        parts.append(rest / np.linalg.norm(rest))
    rho = float(np.clip(parts[0] @ parts[1], -1, 1))
    with np.errstate(divide="ignore"):
        t = abs(rho) * np.sqrt(left / np.maximum((1 + rho) * (1 - rho), 0))
    return rho, float(2 * stdtr(left, -t)), rank - 1


def partials(table: pl.DataFrame, cosine: str = "centered") -> pl.DataFrame:
    """Partial ρ of cosine with rate and delta for each adapter and layer, controlling one thing at a time
    and all that is known together (`control`; `none` is plain ρ). 95 % interval by Fisher's z with Bonett
    and Wright's variance; a reason where a value is null."""
    rows = []
    for group in _groups(table):
        key, x = _key(group), _floats(group, f"cosine_{cosine}")
        for y_name in YS:
            y = _floats(group, y_name)
            known = [c for c in CONTROLS if c != "category" and _varies(group, c, x, y)]
            sets: list[tuple[str, list[str], bool]] = [("none", [], False)]
            sets += [(c, [c], False) for c in CONTROLS if c != "category"]
            sets += [("category", [], True), ("all", known, group["category"].null_count() == 0)]
            for name, columns, by_category in sets:
                found = _partial(group, x, y, columns, by_category)
                rows.append({**key, "cosine": cosine, "y": y_name, "control": name, **found})
    columns = _columns(table, "layer") | {
        "cosine": pl.String,
        "y": pl.String,
        "control": pl.String,
        "n": pl.Int64,
    }
    columns |= {"controls": pl.Int64, **dict.fromkeys(("partial", "low", "high", "p_t"), pl.Float64)}
    columns |= {"words_of": pl.String, "reason": pl.String, "method": pl.String}
    return pl.DataFrame(rows, schema=columns)


def _partial(group: pl.DataFrame, x, y, columns: list[str], by_category: bool) -> dict:
    told = {"words_of": group["words_of"][0], "n": 0, "method": "rank residuals, t, Fisher z"}
    z = np.column_stack([_floats(group, c) for c in columns]) if columns else np.empty((len(x), 0))
    keep = np.isfinite(x) & np.isfinite(y) & np.isfinite(z).all(1)
    if by_category:
        keep &= group["category"].is_not_null().to_numpy()
    n = int(keep.sum())
    told["n"] = n
    for name in columns:
        if not np.isfinite(_floats(group, name)).any():
            return told | {"reason": f"{name} is not known here"}
    if n < MIN_PAIRS:
        return told | {"reason": f"{n} pairs with all values; at least {MIN_PAIRS} are needed"}
    groups = group["category"].to_numpy()[keep] if by_category else None
    found = partial_spearman(x[keep], y[keep], z[keep], groups)
    if isinstance(found, str):
        return told | {"reason": found}
    rho, p, controls = found
    told |= {"partial": rho, "p_t": p, "controls": controls}
    if n - 3 - controls < 1 or abs(rho) >= 1 - 1e-12:
        return told | {"reason": "too few pairs for an interval, or ρ is ±1"}
    low, high = intervals.z_interval(rho, intervals.spearman_z_se(rho, n, controls))
    return told | {"low": float(low), "high": float(high)}


def commonality(table: pl.DataFrame, cosine: str = "centered", against: str = "jaccard") -> pl.DataFrame:
    """How much of the rank variance of the rate only the cosine, only the shared words, and both explain.

    R² of least squares on ranks (Mood 1971): unique_cosine = R²(both) − R²(words), unique_words likewise,
    common = R²(cosine) + R²(words) − R²(both), which can be negative. No interval is given."""
    rows = []
    for group in _groups(table):
        x, w = _floats(group, f"cosine_{cosine}"), _floats(group, against)
        for y_name in YS:
            y = _floats(group, y_name)
            keep = np.isfinite(x) & np.isfinite(y) & np.isfinite(w)
            n = int(keep.sum())
            row = {**_key(group), "cosine": cosine, "y": y_name, "against": against, "n": n}
            if n < MIN_PAIRS + 1 or min(map(np.ptp, (x[keep], y[keep], w[keep]))) == 0:
                rows.append({**row, "reason": "too few pairs, or a side does not vary"})
                continue
            r = np.corrcoef([rankdata(v[keep]) for v in (x, w, y)])
            one, other, apart = r[0, 2] ** 2, r[1, 2] ** 2, 1 - r[0, 1] ** 2
            both = (one + other - 2 * r[0, 2] * r[1, 2] * r[0, 1]) / apart if apart > 1e-12 else one
            rows.append({**row, "total": both, "unique_cosine": both - other, "unique_words": both - one,
                         "common": one + other - both})  # fmt: skip
    names = ("total", "unique_cosine", "unique_words", "common")
    columns = (
        _columns(table, "layer") | dict.fromkeys(("cosine", "y", "against"), pl.String) | {"n": pl.Int64}
    )
    return pl.DataFrame(rows, schema=columns | dict.fromkeys(names, pl.Float64) | {"reason": pl.String})


def left_out(table: pl.DataFrame, by: str, cosine: str = "centered") -> pl.DataFrame:
    """ρ without each category (by="category") or without each persona (by="persona"), and `change`, by how
    much leaving it out moves ρ. Exact, ranks made anew without it."""
    rows = []
    for group in _groups(table):
        x, names = _floats(group, f"cosine_{cosine}"), group[by].to_numpy()
        for y_name in YS:
            y = _floats(group, y_name)
            keep = np.isfinite(x) & np.isfinite(y)
            whole = _rho(x[keep], y[keep])
            for name in [n for n in dict.fromkeys(names) if n is not None]:
                rest = keep & (names != name)
                rho = _rho(x[rest], y[rest])
                why = None if rho is not None else "fewer than 4 pairs are left, or a side does not vary"
                rows.append({
                    **_key(group), "cosine": cosine, "y": y_name, "left_out": name, "n": int(rest.sum()),
                    "spearman": rho, "spearman_all": whole,
                    "change": None if rho is None or whole is None else rho - whole, "reason": why,
                })  # fmt: skip
    columns = _columns(table, "layer") | {
        "cosine": pl.String,
        "y": pl.String,
        "left_out": pl.String,
        "n": pl.Int64,
    }
    columns |= dict.fromkeys(("spearman", "spearman_all", "change"), pl.Float64) | {"reason": pl.String}
    return pl.DataFrame(rows, schema=columns)


def _rho(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(y) < MIN_PAIRS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _groups(table: pl.DataFrame) -> list[pl.DataFrame]:
    keys = ["behavior", "seed", "adapter", "layer"]
    return table.partition_by(keys, maintain_order=True) if table.height else []


def _key(group: pl.DataFrame) -> dict:
    return {name: group[name][0] for name in ("behavior", "seed", "source", "adapter", "layer")}


def _columns(table: pl.DataFrame, *more: str) -> Mapping:
    return {name: table.schema[name] for name in ("behavior", "seed", "source", "adapter", *more)}


def _floats(group: pl.DataFrame, name: str) -> np.ndarray:
    return group[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _varies(group: pl.DataFrame, name: str, *sides: np.ndarray) -> bool:
    value = _floats(group, name)
    keep = np.isfinite(value)
    for side in sides:
        keep &= np.isfinite(side)
    return bool(keep.sum() >= MIN_PAIRS and np.ptp(value[keep]) > 0)
