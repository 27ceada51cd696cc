"""Predictors from states: cosines of centroids (of last prompt tokens and of replies), whitened, of contrasts, projections and
CKA, at each layer. Demands states' means and Gram matrices that `states` makes; correlates with no behavior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from leakfast.geometry import Centroids
from leakfast.measure.predictors.frame import Told
from leakfast.measure.predictors.text import centered

FEWEST_QUESTIONS = 4  # for CKA
FEW = f"fewer than {FEWEST_QUESTIONS} questions for a centered kernel alignment"
FLAT = "a centroid, a contrast or a kernel of length 0, or fewer than two personas to center on"


@dataclass(frozen=True)
class Measured:
    """Of P personas, in order, at L layers: prompts and replies, centroids of last prompt tokens and of replies' tokens, NaN
    where there is none; contrasts (P, L, D) float32, replies' means under the persona less those of the same tokens without
    a system message; grams (P, L, Q, Q) float64 of the question-wise last-prompt states, centered over questions, or None
    for fewer than FEWEST_QUESTIONS; lacks: persona → why it has none of this; silent: persona → why it has no replies'.

    By other recipes, empty or None where not asked: at, position → centroids of the states there; statements, "I am X" less
    "I am not X"; recipes_lack: position or "statements" → persona → why it has none."""

    prompts: Centroids
    replies: Centroids
    contrasts: np.ndarray
    grams: np.ndarray | None
    questions: int
    lacks: Mapping[str, str]
    silent: Mapping[str, str]
    at: Mapping[str | int, Centroids] = field(default_factory=dict)
    statements: Centroids | None = None
    recipes_lack: Mapping[str | int, Mapping[str, str]] = field(default_factory=dict)


def predictors(found: Measured) -> list[Told]:
    """The predictors of family `geometry`, layer after layer.

    cosine_centered, cosine_raw: of the last-prompt centroids, as geometry.Centroids.cosine has them. cosine_whitened:
    `whitened` of the same. reply_cosine_*: of replies' centroids. contrast_cosine: of contrasts. projection: the
    bystander's replies' centroid, less the mean, on the source's contrast of length 1; in units of the residual stream, so
    to be compared within a layer alone. cka: linear centered kernel alignment of the two personas' question-wise states.

    cosine_centered_at_*: of the centroids at a position. statement_cosine, statement_cosine_centered: of the differences
    between "I am X" and "I am not X", as they are (what "not" does to all of them included) and less their mean."""
    told = []
    questions, lacks, silent = found.questions, found.lacks, {**found.silent, **found.lacks}

    for place, layer in enumerate(found.prompts.layers):

        def add(
            name: str,
            values: np.ndarray,
            why: Mapping[str, str],
            unit: str = "cosine",
            layer: int = layer,
            otherwise: str = FLAT,
        ) -> None:
            told.append(Told(name, "geometry", values, 1, unit, layer, questions, why, otherwise))

        add("cosine_centered", centered(found.prompts, layer), lacks)
        add("cosine_raw", found.prompts.cosine(layer, "raw"), lacks)
        add("cosine_whitened", _whitened(found.prompts, layer), lacks)
        add("reply_cosine_centered", centered(found.replies, layer), silent)
        add("reply_cosine_raw", found.replies.cosine(layer, "raw"), silent)
        contrasts = found.contrasts[:, place].astype(np.float64)
        units = _units(contrasts)
        add("contrast_cosine", np.clip(units @ units.T, -1, 1), silent)
        replies = _less_mean(found.replies, layer)
        add("projection", units @ replies.T, silent, "length of a state")
        if found.grams is None:
            nothing = np.full((len(units), len(units)), np.nan)
            add("cka", nothing, lacks, "0 to 1", otherwise=FEW)
        else:
            add("cka", cka(found.grams[:, place]), lacks, "0 to 1")
        for position, made in found.at.items():
            why = {**found.recipes_lack[position], **lacks}
            add(f"cosine_centered_at_{position}", centered(made, layer), why)
        if found.statements is not None:
            why = {**found.recipes_lack["statements"], **lacks}
            add("statement_cosine", found.statements.cosine(layer, "raw"), why)
            add("statement_cosine_centered", centered(found.statements, layer), why)
    return told


def cka(grams: np.ndarray) -> np.ndarray:
    """(P, P) float64 linear centered kernel alignment of centered Gram matrices (P, Q, Q), 0 to 1:
    ⟨K_a, K_b⟩ / (‖K_a‖ ‖K_b‖), which is ‖X_aᵀ X_b‖² / (‖X_aᵀ X_a‖ ‖X_bᵀ X_b‖) of question-wise states X (Q, D) less their
    mean over questions (Kornblith et al. 2019). It compares how questions lie to each other under two personas, whatever
    direction they moved in together; with few questions it is biased upwards, alike for all pairs. NaN for a K of 0."""
    rows = _units(grams.reshape(len(grams), -1))
    return np.clip(rows @ rows.T, 0, 1)


def gram(states: np.ndarray) -> np.ndarray:
    """(…, Q, Q) float64 inner products of states (…, Q, D) less their mean over the questions."""
    x = states.astype(np.float64)
    x = x - x.mean(axis=-2, keepdims=True)
    return x @ np.swapaxes(x, -1, -2)


def shrinkage(x: np.ndarray) -> float:
    """Ledoit and Wolf's (2004) weight λ of the identity, 0 to 1, in (1 − λ) S + λ (tr S / D) I, for S = XᵀX / n of rows
    x (n, D) that have mean 0. By n × n products: D may be far above n. 0 for rows that are all 0."""
    n, d = x.shape
    inner = x @ x.T
    size = (inner**2).sum() / n**2  # ‖S‖²
    mean = np.trace(inner) / (n * d)
    apart = (size - d * mean**2) / d
    spread = ((np.diag(inner) ** 2).sum() / n - size) / (n * d)
    return float(min(max(spread, 0.0), apart) / apart) if apart > 0 else 0.0


def whitened(x: np.ndarray, among: Sequence[int]) -> np.ndarray:
    """(P, P) float64 cosines of rows x (P, D) in the metric of the personas' own spread:
    c_aᵀ Σ⁻¹ c_b / √(c_aᵀ Σ⁻¹ c_a · c_bᵀ Σ⁻¹ c_b), c less the mean over rows `among`, Σ their covariance shrunk by
    `shrinkage`. A direction in which all personas vary counts less. NaN for rows that are not finite, everywhere where
    Σ has no inverse (no shrinkage, or nothing varies)."""
    x = x.astype(np.float64)
    nothing = np.full((len(x), len(x)), np.nan)
    if len(among) < 2:
        return nothing
    c = x - x[list(among)].mean(axis=0)
    base = c[list(among)]
    share = shrinkage(base)
    floor = share * (base**2).sum() / base.size
    if not floor > 0:
        return nothing
    _, s, axes = np.linalg.svd(base, full_matrices=False)
    inside = c @ axes.T
    outside = c - inside @ axes
    outside[list(among)] = 0.0  # they span the axes; what is left is rounding
    scaled = inside / np.sqrt((1 - share) * s**2 / len(base) + floor)
    rows = _units(np.concatenate([scaled, outside / np.sqrt(floor)], axis=1))
    return np.clip(rows @ rows.T, -1, 1)


def _whitened(made: Centroids, layer: int) -> np.ndarray:
    return whitened(made.layer(layer), _among(made, layer))


def _among(made: Centroids, layer: int) -> list[int]:
    """Rows that the mean is over, but those that are not finite."""
    rows = [made.personas.index(name) for name in made.metadata["centered_on"]]
    return [row for row in rows if np.isfinite(made.layer(layer)[row]).all()]


def _less_mean(made: Centroids, layer: int) -> np.ndarray:
    among, values = _among(made, layer), made.layer(layer).astype(np.float64)
    return values - values[among].mean(axis=0) if len(among) > 1 else np.full_like(values, np.nan)


def _units(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; NaN for one of length 0 or that is not finite."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    good = (length > 0) & np.isfinite(length)
    return np.divide(rows, length, out=np.full_like(rows, np.nan, dtype=np.float64), where=good)
