"""What training did to the geometry: how far each persona's centroid moved under an adapter, whether the way the
source's did, and cosines on the fine-tuned model beside the base ones. Demands centroid files of a run, made of the
same prompts; computes no states."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from leakfast.errors import StoreError
from leakfast.stats.correlations import correlate
from leakfast.storage import layout, schema

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.storage.run import Run

GEOMETRIES = {  # what is correlated with leakage → its column less `_centered` or `_raw`
    "base": "cosine_{}",
    "adapted": "cosine_{}_adapted",
    "alignment": "alignment_{}",
    "shift": "shift_{}",
}
_SAME = {  # what must be alike for two files to be comparable
    "model_fingerprint": "another base model",
    "dtype": "another precision",
    "precision": "another precision",
    "rendered_ids_hashes": "other prompts",
    "personas": "other personas",
    "centered_on": "another mean",
}


def read(run: Run, rates: pl.DataFrame, base: Centroids) -> tuple[pl.DataFrame, list[str]]:
    """(schema `shifts` of every adapter in `rates` with a centroid file, a sentence for each file that cannot be
    compared with the base's)."""
    from leakfast.geometry import Centroids
    from leakfast.models.adapters import read_card

    frames, missing = [schema.empty("shifts")], []
    trained = rates.filter(pl.col("role") != "base")
    for (adapter,), mine in trained.group_by("adapter", maintain_order=True):
        path = run.path / layout.centroids(adapter)
        if not path.is_file():
            continue
        card = read_card(run.path / layout.adapter(adapter))
        try:
            adapted = Centroids.load(path)
            why = _unlike(base, adapted, card.adapter_hash if card else None)
        except StoreError as error:
            why = f"cannot be read: {' '.join(error.message.split())}"
        if why is not None:
            remedy = f"leakfast centroids --adapter {run.path / layout.adapter(adapter)} --out {path}"
            missing.append(
                f"{PurePosixPath(layout.CENTROIDS, path.name)}: {why}, so its shifts are left out ({remedy})"
            )
            continue
        behavior = card.behavior if card else mine["behavior"][0]
        own = mine.filter(behavior=behavior)
        who = (own if own.height else mine.unique("persona", maintain_order=True)).select(
            *"persona category role source seed".split(),
            *(pl.col(n) if own.height else pl.lit(None, pl.Float64).alias(n) for n in ("rate", "delta")),
        )
        moved = table(base, adapted, mine["source"][0]).join(
            who, on="persona", how="left", maintain_order="left"
        )
        moved = moved.with_columns(
            behavior=pl.lit(behavior),
            adapter=pl.lit(adapter),
            source=pl.lit(mine["source"][0]),
            seed=pl.lit(mine["seed"][0], pl.Int64),
            role=pl.col("role").fill_null("outsider"),
        )
        frames.append(moved.select(*schema.columns("shifts")))
    return schema.check(pl.concat(frames), "shifts"), missing


def table(base: Centroids, adapted: Centroids, source: str) -> pl.DataFrame:
    """persona, layer and the values of schema `shifts`, one row a persona and layer that both files have.

    With B, A (P, D) the centroids under the base and the adapter, float64, and S = A − B: `shift_raw` = ‖S_p‖,
    `shift_centered` = ‖S_p − S̄‖ (S̄ the mean over `centered_on`: what moved all personas alike is taken away),
    `alignment_raw` = cos(S_p, S_source), `alignment_centered` the same of S − S̄; the source's own is 1 by
    construction. `base_spread` = √(mean over `centered_on` of ‖B_p − B̄‖²): how far apart personas are to begin
    with, in the same units. Cosines with the source: `cosine_*` in the base model, `cosine_*_adapted` under the
    adapter. A length of 0 has no direction: null, as all that rests on the source is where it has no centroid."""
    names = base.personas
    at = names.index(source) if source in names else None
    centered_on = [names.index(name) for name in base.metadata["centered_on"]]
    frames = []
    for layer in [n for n in base.layers if n in adapted.layers]:
        b, a = (c.layer(layer).astype(np.float64) for c in (base, adapted))
        moved = {"raw": a - b}
        rows = [row for row in centered_on if np.isfinite(moved["raw"][row]).all()]
        cosines = {kind: [c.cosine(layer, kind) for c in (base, adapted)] for kind in ("raw",)}
        if len(rows) > 1:
            moved["centered"] = moved["raw"] - moved["raw"][rows].mean(0)
            cosines["centered"] = [c.cosine(layer, "centered") for c in (base, adapted)]
            spread = float(np.sqrt(np.square(b[rows] - b[rows].mean(0)).sum(1).mean()))
        else:  # no mean to take away
            spread = np.nan
        nothing = np.full(len(names), np.nan)
        values = {"persona": names, "layer": [layer] * len(names), "base_spread": [spread] * len(names)}
        for kind in ("centered", "raw"):
            known = kind in moved
            values[f"shift_{kind}"] = np.linalg.norm(moved[kind], axis=1) if known else nothing
            known = known and at is not None
            values[f"alignment_{kind}"] = _toward(moved[kind], at) if known else nothing
            for suffix, number in (("", 0), ("_adapted", 1)):
                values[f"cosine_{kind}{suffix}"] = cosines[kind][number][at] if known else nothing
        frames.append(pl.DataFrame(values, schema_overrides={"layer": pl.Int32}))
    if not frames:
        return schema.empty("shifts").select("persona", "layer", "base_spread", *_VALUES)
    whole = pl.concat(frames)
    known = [pl.when(pl.col(name).is_finite()).then(name) for name in ("base_spread", *_VALUES)]
    return whole.with_columns(known)


_VALUES = [
    f"{what}_{kind}{end}"
    for kind in ("centered", "raw")
    for what, end in (("shift", ""), ("alignment", ""), ("cosine", ""), ("cosine", "_adapted"))
]


def correlated(
    pairs: pl.DataFrame,
    moved: pl.DataFrame,
    permutations: int,
    bootstraps: int,
    seed: int,
    workers: int | None,
) -> pl.DataFrame:
    """Schema `correlations` + geometry: leakage against the cosine in the base model, the cosine under the adapter,
    the alignment of a bystander's shift with the source's, and the shift's length, all over the same bystanders.

    Shuffles and resamples are the same for the four, so their values may be set side by side. Column `cosine` says
    whether the mean over personas was taken away. What is measured after training explains, it does not predict."""
    key = ["adapter", "persona", "layer"]
    columns = [template.format(kind) for template in GEOMETRIES.values() for kind in ("centered", "raw")]
    whole = pairs.drop("cosine_centered", "cosine_raw").join(
        moved.select(*key, *columns), on=key, how="inner", maintain_order="left"
    )
    whole = whole.filter(pl.all_horizontal(pl.col(c).is_not_null() for c in columns if "raw" in c))
    frames = []
    for geometry, template in GEOMETRIES.items():
        as_pairs = whole.with_columns(
            pl.lit(None, pl.String).alias("category"),
            *[pl.col(template.format(kind)).alias(f"_{kind}") for kind in ("centered", "raw")],
        )
        as_pairs = as_pairs.drop(columns).rename({"_centered": "cosine_centered", "_raw": "cosine_raw"})
        made = correlate(as_pairs, permutations, seed, bootstraps=bootstraps, workers=workers)
        frames.append(made.select(pl.lit(geometry).alias("geometry"), pl.all()))
    return pl.concat(frames)


def _toward(moved: np.ndarray, at: int) -> np.ndarray:
    """(P,) cosines of each row of (P, D) with row `at`, NaN for a row of length 0."""
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    unit = np.divide(moved, length, out=np.full_like(moved, np.nan), where=length > 0)
    return np.clip(unit @ unit[at], -1.0, 1.0)


def _unlike(base: Centroids, adapted: Centroids, adapter_hash: str | None) -> str | None:
    """Why two files cannot be compared, None where they can."""
    ours, theirs = base.metadata, adapted.metadata
    for key, why in _SAME.items():
        if ours.get(key) != theirs.get(key):
            return f"made of {why} than centroids/base.safetensors"
    made_of = theirs.get("adapter_hash")
    if made_of is None or (adapter_hash is not None and made_of != adapter_hash):
        return "made of another adapter" if made_of else "made without an adapter"
    if not set(base.layers) & set(adapted.layers):
        return "made at other layers than centroids/base.safetensors"
    return None
