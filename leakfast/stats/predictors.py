"""Predictors of leakage that the unadapted model gives, beside what was measured: one row a source's adapter and bystander,
one column a predictor and layer. Demands rates, counts and a frame of predictors; leaves the statistics to
`predictors_skill` and `predictors_held_out`.

The frame (folder `predictors` of a run, written by `leakfast predictors`) has source, persona, predictor, family, layer, value,
orientation (+1: larger is closer to the source, −1: smaller is closer). A run without one has its cosines, and what the words
of the prompts tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.stats import confounds, resample, summary, ties, two_way
from leakfast.stats.collect import Collected
from leakfast.stats.pairs import cosines
from leakfast.stats.people import People
from leakfast.stats.ranking import alike
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

REFERENCE = "cosine_centered"
FAMILIES = ("geometry", "output", "text")
LENGTH = ("prompt_tokens", "token_length_difference", "word_length_difference")
WORDS = ("jaccard",)
HEAD: dict[str, Any] = {  # the first columns of the tables about them
    "behavior": pl.String,
    "seed": pl.Int64,
    "source": pl.String,
    "adapter": pl.String,
    "predictor": pl.String,
    "family": pl.String,
    "layer": pl.Int32,
}
FRAME: dict[str, Any] = {
    **dict.fromkeys(("source", "persona", "predictor", "family"), pl.String),
    "layer": pl.Int32,
    "value": pl.Float64,
    "orientation": pl.Int8,
}


def of_run(found: Collected) -> pl.DataFrame:
    """Columns FRAME of a run: its frame of predictors, or where none was made its cosines and what words tell, of the trained
    sources."""
    if found.predictors.height:
        return _as_frame(found.predictors)
    sources = found.rates.filter(role="bystander")["source"].unique(maintain_order=True).to_list()
    return pl.concat([of_cosines(found.pairs), of_text(found.people, sources)])


def of_centroids(centroids: Centroids, sources: list[str]) -> pl.DataFrame:
    """Columns FRAME: centered and raw cosine of each source that has a centroid with every other persona, at each layer."""
    known = [source for source in sources if source in centroids.personas]
    frames = [
        cosines(centroids, layer, known).with_columns(layer=pl.lit(layer, pl.Int32))
        for layer in (centroids.layers if known else ())
    ]
    return of_cosines(pl.concat(frames)) if frames else pl.DataFrame(schema=FRAME)


def of_cosines(table: pl.DataFrame) -> pl.DataFrame:
    """Columns FRAME of a table with source, persona, layer, cosine_centered, cosine_raw."""
    names = ["cosine_centered", "cosine_raw"]
    here = table.select("source", "persona", "layer", *names).unique(
        ["source", "persona", "layer"], maintain_order=True
    )
    long = here.unpivot(names, index=["source", "persona", "layer"], variable_name="predictor")
    long = long.filter(pl.col("source") != pl.col("persona"))
    return _as_frame(long.with_columns(family=pl.lit("geometry"), orientation=pl.lit(1, pl.Int8)))


def of_frame(frame: pl.DataFrame) -> pl.DataFrame:
    """The columns FRAME of a frame of predictors; without rows where it has no columns."""
    return _as_frame(frame) if frame.width else pl.DataFrame(schema=FRAME)


def of_text(people: People, sources: list[str]) -> pl.DataFrame:
    """Columns FRAME, from the personas' prompts (their names where no prompt is known): jaccard (content words in common),
    shared_word, word_length_difference (words of either prompt more than of the other), relation (1 where related_to of the
    persona names the source)."""
    said, _ = confounds.words(people)
    lengths = {name: len(text.split()) for name, text in people.prompts.items()}
    rows: list[tuple] = []
    for source in sources:
        for persona in people.categories:
            if persona == source:
                continue
            a, b = said.get(source), said.get(persona)
            common = len(a & b) / len(a | b) if a and b else None
            rows.append((source, persona, "jaccard", 1, common))
            rows.append((source, persona, "shared_word", 1, None if common is None else float(common > 0)))
            apart = None
            if source in lengths and persona in lengths:
                apart = float(abs(lengths[source] - lengths[persona]))
            rows.append((source, persona, "word_length_difference", -1, apart))
            if people.related_to.get(persona):
                rows.append((source, persona, "relation", 1, float(source in people.related_to[persona])))
    names = ["source", "persona", "predictor", "orientation", "value"]
    kinds = [pl.String, pl.String, pl.String, pl.Int8, pl.Float64]
    frame = pl.DataFrame(rows, schema=dict(zip(names, kinds, strict=True)), orient="row")
    return _as_frame(frame.with_columns(family=pl.lit("text"), layer=pl.lit(None, pl.Int32)))


def _as_frame(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(pl.col(name).cast(kind) for name, kind in FRAME.items())


@dataclass(frozen=True)
class Column:
    """A predictor at a layer (None: it has none)."""

    predictor: str
    family: str
    layer: int | None


@dataclass(frozen=True)
class Compared:
    """One behavior and training seed: n rows, by adapter and persona. x (n, K): each column's value times its orientation,
    NaN where null; leak (n,): `y` times `direction`, so that more of the behavior is larger; hits, total (n,): NaN where
    nothing was counted; asked: of each adapter, its questions (`two_way.Asked`, x of its rows)."""

    behavior: str
    seed: int | None
    y: str
    direction: int
    adapters: list[tuple[str, str]]  # (adapter, source)
    adapter: np.ndarray  # (n,) codes
    persona: np.ndarray  # (n,) names
    category: np.ndarray  # (n,) object
    columns: list[Column]
    x: np.ndarray
    leak: np.ndarray
    hits: np.ndarray
    total: np.ndarray
    asked: list[two_way.Asked]

    def people(self) -> np.ndarray:
        """(n,) personas as whole numbers."""
        return np.unique(self.persona, return_inverse=True)[1].astype(np.int64)

    def one_each(self) -> bool:
        """Whether there are several sources, each with one adapter: they can be pooled."""
        sources = [source for _, source in self.adapters]
        return len(sources) > 1 and len(set(sources)) == len(sources)

    def of(self, number: int) -> two_way.Asked:
        """Questions of adapter `number` with all predictors as x."""
        return replace(self.asked[number], x=self.x[self.adapter == number])


def compared(
    rates: pl.DataFrame, questions: pl.DataFrame, frame: pl.DataFrame, permute: int | None = None
) -> Iterator[Compared]:
    """What is compared, of each behavior and training seed of `rates`. questions: schema `question_counts`; frame: columns
    FRAME. permute: a seed; the personas' labels in what was measured are then shuffled, the same way under all sources
    (`resample.joint_permutations`): predictors stay, and nothing can predict but by chance."""
    trained = rates.filter(role="bystander").sort("adapter", "persona")
    for group in trained.partition_by("behavior", "seed", maintain_order=True) if trained.height else ():
        behavior, seed = group["behavior"][0], group["seed"][0]
        y = summary.outcome(rates, behavior)
        rows = group.filter(pl.col(y).is_not_null())
        if rows.is_empty():
            continue
        columns, x = _values(rows, frame)
        if not columns:
            continue
        made = _compared(rows, questions, y, columns, x)
        if permute is not None:
            drawn = derive_seed("labels of the leakage", permute, behavior, seed)
            made = _shuffled(made, resample.joint_permutations(drawn, made.people(), made.adapter, 1)[0])
        yield made


def _compared(
    rows: pl.DataFrame, questions: pl.DataFrame, y: str, columns: list[Column], x: np.ndarray
) -> Compared:
    behavior = rows["behavior"][0]
    adapters = rows.select("adapter", "source").unique(maintain_order=True).rows()
    code = {adapter: k for k, (adapter, _) in enumerate(adapters)}
    counts = questions.filter(behavior=behavior) if questions.height else questions
    nothing = [
        pl.lit(None, pl.Float64).alias(name)
        for name in ("rate", "delta", "cosine_centered", "cosine_raw")
        if name not in rows.columns
    ]
    whole = rows.with_columns(*nothing, layer=pl.lit(0, pl.Int32))
    asked = [two_way.asked_of(whole.filter(adapter=adapter), counts, [0]) for adapter, _ in adapters]
    counted = {"hits", "total"} <= set(rows.columns)
    sides = [ties.floats(rows[n]) if counted else np.full(rows.height, np.nan) for n in ("hits", "total")]
    direction = sign_of(behavior)
    return Compared(
        behavior=behavior,
        seed=rows["seed"][0],
        y=y,
        direction=direction,
        adapters=adapters,
        adapter=np.array([code[name] for name in rows["adapter"]], np.int64),
        persona=rows["persona"].to_numpy(),
        category=np.array(rows["category"].to_list(), dtype=object),
        columns=columns,
        x=x,
        leak=direction * ties.floats(rows[y]),
        hits=sides[0],
        total=sides[1],
        asked=asked,
    )


def _values(rows: pl.DataFrame, frame: pl.DataFrame) -> tuple[list[Column], np.ndarray]:
    """Columns, in order of family, predictor as the frame has them, and layer; and (n, K) oriented values."""
    known = {family: place for place, family in enumerate(FAMILIES)}
    key = ["predictor", "family", "layer"]
    place = frame.select("predictor").unique(maintain_order=True).with_row_index("_place")
    order = pl.col("family").replace_strict(known, default=len(known), return_dtype=pl.Int64)
    used = frame.filter(pl.col("source").is_in(rows["source"].unique().to_list()))
    columns = (
        used.select(key)
        .unique()
        .join(place, on="predictor")
        .sort(order, "_place", pl.col("layer"))
        .drop("_place")
        .with_row_index("_column")
    )
    cells = used.join(columns, on=key, nulls_equal=True).join(
        rows.select("source", "persona").with_row_index("_row"), on=["source", "persona"]
    )
    x = np.full((rows.height, columns.height), np.nan)
    oriented = cells["value"] * cells["orientation"].cast(pl.Float64)
    x[cells["_row"].to_numpy(), cells["_column"].to_numpy()] = ties.floats(oriented)
    return [Column(*row) for row in columns.select(key).rows()], x


def _shuffled(made: Compared, moved: np.ndarray) -> Compared:
    """What was measured, of row moved[i] in row i; moved stays inside each adapter."""
    asked = []
    for number, one in enumerate(made.asked):
        mine = np.nonzero(made.adapter == number)[0]
        own = moved[mine] - mine[0]
        values = {
            y: side if isinstance(side, str) else (side[0][own], side[1][own], side[2][own])
            for y, side in one.values.items()
        }
        asked.append(replace(one, whole={y: side[own] for y, side in one.whole.items()}, values=values))
    sides = {name: getattr(made, name)[moved] for name in ("leak", "hits", "total")}
    return replace(made, asked=asked, **sides)


def patterns(x: np.ndarray, y: np.ndarray, least: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows (n,), columns) of each set of columns of x (n, K) that are known in the same rows, y (n,) known too."""
    usable = np.isfinite(x) & np.isfinite(y)[:, None]
    for rows, columns in alike(usable):
        if rows.sum() >= least:
            yield rows, columns


def told_of(made: Compared) -> Mapping[str, Any]:
    """The cells that every row of a table begins with."""
    return {"behavior": made.behavior, "seed": made.seed, "y": made.y, "direction": made.direction}
