"""Pairs: each source with each bystander at each layer, their cosine in the base model beside the
bystander's rate. Demands a rates table and centroids; leaves correlating to `correlations`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from leakfast.stats.imported import read_imported
from leakfast.storage import layout, schema

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.storage.run import Run


def table(
    rates: pl.DataFrame, centroids: Centroids, related_to: Mapping[str, Collection[str]] | None = None
) -> pl.DataFrame:
    """Schema `pairs` (+ `adapter`, `related`): one row per adapter × bystander × layer.

    Rows of `rates` whose `role` is bystander take part. `cosine_*` is between the base-model centroids
    of source and bystander, float64; null where one of them has no centroid or no direction (length 0),
    so that a correlation can say how many pairs it rests on. `related` says whether the bystander's
    entry in `related_to` (persona → names) names the source; null where there is no entry.
    """
    bystanders = rates.filter(role="bystander")
    names = ["adapter", *schema.columns("pairs")]
    columns = schema.columns("pairs") | {"adapter": pl.String(), "related": pl.Boolean()}
    names.append("related")
    links = [(name, other) for name, others in (related_to or {}).items() for other in others]
    named = pl.DataFrame(links, schema={"persona": pl.String, "source": pl.String}, orient="row").unique()
    bystanders = bystanders.join(
        named.with_columns(related=pl.lit(True)), on=["persona", "source"], how="left", maintain_order="left"
    ).with_columns(
        pl.when(pl.col("persona").is_in(list(related_to or ()))).then(pl.col("related").fill_null(False))
    )
    frames = [pl.DataFrame(schema={name: columns[name] for name in names})]
    known = [s for s in bystanders["source"].unique(maintain_order=True) if s in centroids.personas]
    for layer in centroids.layers if known else ():
        near = cosines(centroids, layer, known)
        joined = bystanders.join(
            near, on=["source", "persona"], how="left", maintain_order="left"
        ).with_columns(layer=pl.lit(layer, dtype=pl.Int32))
        frames.append(joined.select(names))
    return schema.check(pl.concat(frames), "pairs")


def layers_of(run: Run) -> list[int]:
    """The layers that pairs of a run can have, ascending: those of its centroids, else of pairs that were imported. Told before
    anything is counted, so that a layer which no table can have is refused at once."""
    from leakfast.geometry import Centroids

    path = run.path / layout.centroids()
    if path.is_file():
        return sorted(Centroids.load(path).layers)
    stored = read_imported(run, "pairs")
    return [] if stored is None else sorted(stored["layer"].unique())


def cosines(centroids: Centroids, layer: int, sources: list[str]) -> pl.DataFrame:
    """source, persona, cosine_centered, cosine_raw for every persona with a centroid."""
    if len(centroids.metadata["centered_on"]) > 1:
        centered = centroids.cosine(layer, kind="centered")
    else:  # no mean to take away
        centered = np.full((len(centroids.personas),) * 2, np.nan)
    raw = centroids.cosine(layer, kind="raw")
    parts = [
        pl.DataFrame(
            {
                "source": [source] * len(centroids.personas),
                "persona": list(centroids.personas),
                "cosine_centered": centered[row],
                "cosine_raw": raw[row],
            },
            schema=_COSINES,
        )
        for source in sources
        for row in [centroids.personas.index(source)]
    ]
    return pl.concat(parts).with_columns(pl.col("cosine_centered", "cosine_raw").fill_nan(None))


_COSINES = {
    "source": pl.String,
    "persona": pl.String,
    "cosine_centered": pl.Float64,
    "cosine_raw": pl.Float64,
}
