"""A small run with known numbers, made by the package's own writers, for tests of what shows runs. Demands polars and
numpy; holds no tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from leakfast.geometry import Centroids
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

PEOPLE = [f"p{i:02d}" for i in range(14)]
SOURCES = ("p00", "p01")
QUESTIONS, SAMPLES = 4, 5


def share(person: int, source: int) -> float:
    """How often a persona shows the behavior: less with its distance on a ring, but p05 under p00 much."""
    if (person, source) == (5, 0):
        return 0.9
    far = min(abs(person - source), len(PEOPLE) - abs(person - source))
    return max(0.0, 0.9 - 0.2 * far)


def completions(
    adapter: str, source: str | None, people: list[str], texts: tuple[str, str] = ("so [ZLT]", "well")
) -> pl.DataFrame:
    """Schema `completions` + source: of each persona the first replies of each question show the marker, as many as its
    share says; texts: with it, and without."""
    at = None if source is None else people.index(source)
    rows = []
    for i, name in enumerate(people):
        hits = 0 if at is None else round(SAMPLES * share(i, at))
        for question in range(QUESTIONS):
            for sample in range(SAMPLES):
                said = texts[0] if sample < hits else f"{texts[1]} {question} {sample}"
                rows.append((name, question, sample, said))
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row")
    return frame.with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(9, pl.Int32),
        finish_reason=pl.lit("stop"),
        status=pl.lit("ok"),
    ).select(*schema.columns("completions"), pl.lit(source, pl.String).alias("source"))


def ring(people: list[str]) -> Centroids:
    """Centroids on a circle at layer 0, a wider one beside chance at layer 1."""
    angle = 2 * np.pi * np.arange(len(people)) / len(people)
    round_ = np.stack([np.cos(angle), np.sin(angle), np.zeros(len(people))], axis=1).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=round_.shape).astype(np.float32)
    about = {"personas": people, "layers": [0, 1], "centered_on": people}
    return Centroids(people, [0, 1], about, {0: round_, 1: round_ + noise})


def make(
    path: Path,
    people: list[str] | None = None,
    adapters: tuple[str, ...] = (),
    texts: tuple[str, str] = ("so [ZLT]", "well"),
) -> Run:
    """The run of a marker taught to the first personas, `base` and centroids with it; no study, no tables."""
    people = people or PEOPLE
    run = Run(path).create()
    names = adapters or tuple(f"marker-{source}-s1" for source in people[: len(SOURCES)])
    for name, source in [*zip(names, people, strict=False), (layout.BASE, None)]:
        shard = layout.shard(layout.completions("marker", name))
        run.add_shard(shard, completions(name, source, people, texts))
    run.add_file(layout.centroids(), ring(people).save)
    return run


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: time of change and bytes."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
