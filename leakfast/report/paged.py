"""All completions of a run, found by the page's filters and read a page at a time: a narrow index in memory, texts in
their Parquet files. Demands a reading of a run; a shard that was indexed once is not read again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from leakfast.report.sample import facts, marks, scores
from leakfast.stats.collect import completion_folders
from leakfast.stats.people import read_people
from leakfast.storage import layout
from leakfast.storage.run import Run

MOST = 200  # rows of one answer
LONGEST = 1_000  # characters of a search
WHOLE = "All {total:,} completions that the run holds, read from its files as you ask."
_ORDER = ["persona", "question", "sample"]
_SHOWN = ["adapter", *_ORDER, "hit", "score", "finish", "tokens"]
_INDEX = {
    "persona": pl.String,
    "question": pl.Int32,
    "sample": pl.Int32,
    "hit": pl.Boolean,
    "finish": pl.String,
    "tokens": pl.Int32,
    "row": pl.UInt32,
}
_WORDS = ("behavior", "adapter", "persona", "hit", "finish", "search")
_NUMBERS = ("question", "shortest", "longest", "lowest", "highest")


class File(NamedTuple):
    """A shard by its path and the hash of its bytes."""

    path: Path
    sha256: str


class Asked(NamedTuple):
    """What a page of completions was asked for. words, numbers: the filters that are set, by name."""

    words: dict[str, str]
    numbers: dict[str, float]
    offset: int
    limit: int


def asked(given: Mapping[str, list[str]]) -> Asked:
    """A query's names and values as filters; those left empty ask for everything.

    Raises ValueError, whose words may be shown to whoever asked, for a name or a value that means nothing."""
    known = (*_WORDS, *_NUMBERS, "offset", "limit")
    if any(name not in known or len(values) != 1 for name, values in given.items()):
        raise ValueError(f"each of {', '.join(known)} may be asked for once, and nothing else")
    one = {name: values[0] for name, values in given.items() if values[0] != ""}
    if one.get("hit", "yes") not in ("yes", "no"):
        raise ValueError("hit is yes or no")
    if len(one.get("search", "")) > LONGEST:
        raise ValueError(f"search has at most {LONGEST} characters")
    numbers = {name: _number(name, one[name]) for name in _NUMBERS if name in one}
    offset, limit = (
        _whole(name, one.get(name, otherwise)) for name, otherwise in (("offset", "0"), ("limit", "20"))
    )
    if not 0 < limit <= MOST:
        raise ValueError(f"limit is 1 to {MOST}")
    return Asked({name: one[name] for name in _WORDS if name in one}, numbers, offset, limit)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is a number")
    return value


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{name} is a whole number")
    return int(text)


class Paged:
    """The completions of the adapters that a run's tables name, in the order of the report: adapters, then persona,
    question and sample."""

    def __init__(self, run: Run, adapters: Iterable[str], before: Paged | None = None):
        """adapters: as `behavior/adapter`. before: of an earlier reading of the same run."""
        self.files: list[File] = []
        self._starts: list[int] = []  # rows in the files before each
        self._parts: dict[File, pl.DataFrame] = {}
        known = {} if before is None else before._parts
        judges, wanted, shards = read_people(run)[0].judges, set(adapters), run.manifest["shards"]
        folders, rows = [], 0
        for behavior, adapter in completion_folders(run):
            if f"{behavior}/{adapter}" not in wanted:
                continue
            parts = []
            for relpath in run.shards(layout.completions(behavior, adapter)):
                file = File(run.path / relpath, shards[relpath]["sha256"])
                part = known.get(file)
                self._parts[file] = part = _read(file, behavior) if part is None else part
                parts.append(part.with_columns(file=pl.lit(len(self.files), pl.UInt32)))
                self.files.append(file)
                self._starts.append(rows)
                rows += part.height
            frame = pl.concat(parts)
            judge = judges.get(behavior, (None, 0))[0]
            frame = frame.with_columns(
                adapter=pl.lit(f"{behavior}/{adapter}"),
                behavior=pl.lit(behavior),
                score=scores(run, behavior, adapter, frame, judge),
            )
            folders.append(frame.sort(_ORDER, maintain_order=True))
        empty = {
            **_INDEX,
            "file": pl.UInt32,
            "adapter": pl.String,
            "behavior": pl.String,
            "score": pl.Float64,
        }
        self._index = pl.concat(folders) if folders else pl.DataFrame(schema=empty)

    def told(self) -> dict[str, Any]:
        """What the filters offer, and `rule`: what is here, in words."""
        index = self._index
        return {
            "rule": WHOLE.format(total=index.height),
            "total": index.height,
            "questions": index["question"].unique().sort().to_list(),
            "finishes": index["finish"].drop_nulls().unique().sort().to_list(),
            "scored": index["score"].null_count() < index.height,
        }

    def page(self, wanted: Asked) -> dict[str, Any]:
        """total: how many pass the filters; rows: those from `offset` on, `limit` at most, whole texts and all; marked: where
        in a text stands what was counted (`sample.marks`).

        search looks for its letters in any case in the whole text. Raises OSError or polars' errors where a file that was
        there is gone."""
        found = self._index.filter(*_filters(wanted)) if wanted.words or wanted.numbers else self._index
        needle = wanted.words.get("search")
        if needle is not None:
            found = self._with_text(found, needle)
        rows = found.slice(wanted.offset, wanted.limit)
        texts = self._texts(rows)
        places = rows.select("file", "row").rows()
        told = [
            {
                **row,
                "text": texts[place],
                "left_out": 0,
                "marked": marks(behavior, [texts[place]], [row["hit"]])[0].to_list(),
            }
            for row, place, behavior in zip(
                rows.select(_SHOWN).rows(named=True), places, rows["behavior"], strict=True
            )
        ]
        return {"total": found.height, "rows": told}

    def _with_text(self, found: pl.DataFrame, needle: str) -> pl.DataFrame:
        """Those of the rows whose text holds the needle."""
        lowered = pl.Series([needle]).str.to_lowercase()[0]
        places = found["file"].unique().sort().to_list()
        with ThreadPoolExecutor(4) as pool:
            holding = pool.map(partial(_containing, needle=lowered), (self.files[place] for place in places))
        holds = np.zeros(self._index.height, dtype=bool)
        for place, held in zip(places, holding, strict=True):
            start = self._starts[place]
            holds[start : start + held.len()] = held.to_numpy()
        at = np.array(self._starts, dtype=np.int64)[found["file"].to_numpy()] + found["row"].to_numpy()
        return found.filter(pl.Series(holds[at]))

    def _texts(self, rows: pl.DataFrame) -> dict[tuple[int, int], str]:
        """(file, row) → text."""
        out: dict[tuple[int, int], str] = {}
        for (file,), part in rows.group_by("file", maintain_order=True):
            first, last = part["row"].min(), part["row"].max()
            read = (
                pl.scan_parquet(self.files[file].path, row_index_name="row", glob=False)
                .slice(first, last - first + 1)
                .select(pl.col("row").cast(pl.UInt32), pl.col("text").fill_null(""))
                .filter(pl.col("row").is_in(part["row"].implode()))
                .collect()
            )
            out |= {(file, row): text for row, text in read.rows()}
        return out


def _read(file: File, behavior: str) -> pl.DataFrame:
    """The index of one shard."""
    return (
        pl.scan_parquet(file.path, row_index_name="row", glob=False)
        .with_columns(**facts(behavior))
        .select(pl.col(name).cast(dtype) for name, dtype in _INDEX.items())
        .collect()
    )


@lru_cache(maxsize=2048)
def _containing(file: File, needle: str) -> pl.Series:
    """Whether each row's text holds the needle, which is in lower case."""
    holds = pl.col("text").str.to_lowercase().str.contains(needle, literal=True).fill_null(False)
    return pl.scan_parquet(file.path, glob=False).select(holds).collect().to_series()


def _filters(wanted: Asked) -> list[pl.Expr]:
    """The filters on what the index holds."""
    bounds = {
        "question": lambda value: pl.col("question") == value,
        "shortest": lambda value: pl.col("tokens") >= value,
        "longest": lambda value: pl.col("tokens") <= value,
        "lowest": lambda value: pl.col("score") >= value,
        "highest": lambda value: pl.col("score") <= value,
    }
    same = [
        pl.col(name) == wanted.words[name]
        for name in ("behavior", "adapter", "persona", "finish")
        if name in wanted.words
    ]
    if "hit" in wanted.words:
        same.append(pl.col("hit") == (wanted.words["hit"] == "yes"))
    return same + [bounds[name](value) for name, value in wanted.numbers.items()]
