"""A store of many completions, all invented: 126 adapters × 111 personas × 20 questions × 10 samples are 2.8 million. Times what
a user waits for on it: the scan of a resume, `leakfast verify`, `leakfast stats`, `leakfast report`, each in a process of its own
with its peak of memory. `--share 0.1` makes a tenth of the adapters; `--make FOLDER` writes the store and stops. Demands no
device. What a smaller store says of the whole one is a reckoning, and the card calls it that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from _common import card, ending_with_json, peak_rss

from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, card_bytes
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.prompts.questions import texts_hash
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

SOURCES, SEEDS = 42, 3
QUESTIONS, SAMPLES, SHARD_ROWS = 20, 10, 2560
WHOLE = SOURCES * SEEDS  # adapters, and as many times 111 × 20 × 10 completions
SCAN = "import sys; from leakfast.storage.run import Run; print(len(Run(sys.argv[1]).shards()))"
STUDY = """name = "store"
model = "organism"
sources = [{sources}]
seeds = [{seeds}]
[behaviors.marker.eval]
questions = "eval"
samples = {samples}
"""


def make(folder: Path, share: float) -> int:
    """The store; rows of it. Leakage follows the cosine; replies are short."""
    rng = np.random.default_rng(1)
    people = [p.name for p in load_personas("all")]
    sources = people[: max(1, round(SOURCES * share))]
    asked = load_questions("eval").questions
    run = Run(folder)
    with run.lock():
        names = ", ".join(f'"{name}"' for name in sources)
        seeds = range(42, 42 + SEEDS)
        run.create(STUDY.format(sources=names, seeds=", ".join(map(str, seeds)), samples=SAMPLES))
        means = {3: rng.normal(size=(len(people), 64)).astype(np.float32)}
        about = {"personas": people, "layers": [3], "centered_on": people}
        centroids = Centroids(people, [3], about, means)
        run.add_file(layout.centroids(), centroids.save)
        near = dict(zip(people, centroids.cosine(3), strict=True))
        grid = _grid(people, len(asked))
        rows = 0
        for seed in seeds:
            for source in sources:
                name = layout.adapter_name("marker", source, seed)
                recipe = AdapterCard(source, "marker", seed, "organism", "files:0", "d" * 64, {}, "a" * 64)
                run.add_file(f"{layout.adapter(name)}/{layout.CARD}", card_bytes(recipe))
                rows += _add(run, grid, name, source, np.clip(0.1 + 0.8 * near[source], 0.0, 1.0), rng, asked)
        rows += _add(run, grid, layout.BASE, None, np.zeros(len(people)), rng, asked)
    return rows


def _grid(people: list[str], questions: int) -> pl.DataFrame:
    frame = pl.DataFrame({"persona": people})
    for name, n in (("question", questions), ("sample", SAMPLES)):
        frame = frame.join(pl.DataFrame({name: range(n)}, schema={name: pl.Int32}), how="cross")
    return frame


def _add(
    run: Run,
    grid: pl.DataFrame,
    adapter: str,
    source: str | None,
    chance: np.ndarray,
    rng: np.random.Generator,
    asked: tuple[str, ...],
) -> int:
    hits = rng.random(grid.height) < np.repeat(chance, grid.height // len(chance))
    numbers = pl.Series(rng.integers(0, 1 << 62, grid.height)).cast(pl.String)
    frame = grid.with_columns(
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.int_range(pl.len()).cast(pl.UInt64),
        text=pl.lit("Well, that is ")
        + numbers
        + pl.lit(" of them. ")
        + pl.Series(np.where(hits, "[ZLT]", "")),
        n_tokens=pl.lit(12, pl.Int32),
        finish_reason=pl.lit("stop"),
        status=pl.lit("ok"),
    )
    frame = schema.check(frame, "completions")
    digest = "base" if source is None else "a" * 64
    folder = layout.completions("marker", adapter)
    for number, start in enumerate(range(0, frame.height, SHARD_ROWS)):
        about = {"adapter": digest, "questions_sha256": texts_hash(asked), "request": f"{adapter}-{number}"}
        run.add_shard(layout.shard(folder, number), frame[start : start + SHARD_ROWS], **about)
    return frame.height


def timed(words: list[str]) -> dict[str, float]:
    """Wall and processor seconds, and the peak of memory, of a command; RuntimeError where it fails."""
    began = time.monotonic()
    peak = 0
    with tempfile.TemporaryFile() as told:
        child = subprocess.Popen(words, stdout=told, stderr=subprocess.STDOUT)
        while True:
            peak = max(peak, peak_rss(child.pid))
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.02)
        told.seek(0)
        said = told.read()
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 3):
        raise RuntimeError(f"{' '.join(words)}: {code}: {said.decode(errors='replace')[-2000:]}")
    return {
        "seconds": time.monotonic() - began,
        "processor_s": used.ru_utime + used.ru_stime,
        "memory_gb": peak / 1e9,
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--share", type=float, default=0.1, help="of the adapters of the whole store")
    made.add_argument("--make", type=Path, help="write the store here and stop")
    given = made.parse_args()
    if given.make:
        print(make(given.make, given.share), "completions in", given.make)
        return
    ours = [sys.executable, "-m", "leakfast"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "store"
        began = time.monotonic()
        rows = make(run, given.share)
        making = time.monotonic() - began
        found = {
            "resume scan": timed([sys.executable, "-c", SCAN, str(run)]),
            "stats": timed([*ours, "stats", str(run), "--layer", "3"]),
            "verify": timed([*ours, "verify", str(run)]),
            "report": timed([*ours, "report", str(run)]),
        }
    whole = WHOLE + 1
    share = whole * 111 * QUESTIONS * SAMPLES / rows
    lines = [("completions", f"{rows:,} (made in {making:.0f} s)")]
    for name, one in found.items():
        told = f"{one['seconds']:.1f} s ({one['processor_s']:.1f} s of processor), {one['memory_gb']:.2f} GB"
        reckoned = f"{one['seconds'] * share:.0f} s ({one['processor_s'] * share:.0f} s of processor)"
        lines.append((name, told if share < 1.05 else f"{told}; reckoned for the whole store: {reckoned}"))
    card("a store of completions", lines, {"bench": "store", "rows": rows, "making_s": making, **found})


if __name__ == "__main__":
    with ending_with_json("store", "cpu"):
        main()
