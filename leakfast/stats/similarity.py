"""Similarity of personas' prompts from elsewhere (a sentence embedding, say), to be held against the
cosine. Demands a CSV or Parquet file of one of two shapes; embeds nothing itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from leakfast.errors import InputError

SHAPES = (
    "CSV or Parquet with either the columns source, persona, similarity (a row a pair), or the column persona "
    "and one number column for each dimension (a row a persona; the cosine of the vectors is taken)"
)
_COLUMNS = {"source": pl.String, "persona": pl.String, "similarity": pl.Float64}


def read(path: str | Path) -> pl.DataFrame:
    """source, persona, similarity of every pair in a file of one of SHAPES.

    Raises InputError naming what was found for any other shape: another file type or column, a value that
    is no finite number, a pair or persona that stands twice, a vector of length 0."""
    path = Path(path)
    table = _table(path)
    if "persona" not in table.columns or table.schema["persona"] != pl.String:
        raise InputError(f"embeddings: {path} has the columns {_shown(table)}. Needed: {SHAPES}.")
    if "similarity" in table.columns or "source" in table.columns:
        if set(table.columns) != set(_COLUMNS) or table.schema["source"] != pl.String:
            raise InputError(f"embeddings: {path} has the columns {_shown(table)}. Needed: {SHAPES}.")
        numbers, key = ["similarity"], ["source", "persona"]
    else:
        numbers, key = [name for name in table.columns if name != "persona"], ["persona"]
    wrong = [name for name in numbers if not table.schema[name].is_numeric()]
    if wrong or not numbers:
        found = f"column {wrong[0]} holds {table.schema[wrong[0]]}" if wrong else "there is no number column"
        raise InputError(f"embeddings: {path}: {found}. Needed: {SHAPES}.")
    values = table.select(pl.col(numbers).cast(pl.Float64)).to_numpy()
    if not np.isfinite(values).all() or table.select(pl.col(key).is_null()).to_numpy().any():
        row = int(np.nonzero(~np.isfinite(values).all(axis=1))[0][0]) if not np.isfinite(values).all() else 0
        raise InputError(
            f"embeddings: {path}: row {row + 1} holds an empty cell or a value that is no finite number. "
            "Leave a pair or persona that is not known out."
        )
    twice = table.select(key).is_duplicated()
    if twice.any():
        name = ", ".join(table.select(key).filter(twice).row(0))
        raise InputError(f"embeddings: {path}: {name} stands twice. Keep one row.")
    if key == ["source", "persona"]:
        return table.select(pl.col(name).cast(kind) for name, kind in _COLUMNS.items())
    length = np.linalg.norm(values, axis=1, keepdims=True)
    people = table["persona"].to_list()
    if not length.all():
        name = people[int(np.nonzero(length[:, 0] == 0)[0][0])]
        raise InputError(f"embeddings: {path}: the vector of {name} has length 0. Leave that persona out.")
    near = np.clip((values / length) @ (values / length).T, -1, 1)
    told = {
        "source": np.repeat(people, len(people)),
        "persona": people * len(people),
        "similarity": near.ravel(),
    }
    return pl.DataFrame(told, schema=_COLUMNS)


def _table(path: Path) -> pl.DataFrame:
    readers = {".csv": pl.read_csv, ".parquet": pl.read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"embeddings: {path} ends in {path.suffix or 'nothing'}. Needed: {SHAPES}.")
    try:
        return readers[path.suffix.lower()](path)
    except FileNotFoundError:
        raise InputError(f"embeddings: there is no file {path}. Check the path.") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"embeddings: {path} cannot be read ({why}). Needed: {SHAPES}.") from None


def _shown(table: pl.DataFrame) -> str:
    names = ", ".join(table.columns[:6])
    return f"{names}, … ({len(table.columns)} in all)" if len(table.columns) > 6 else names
