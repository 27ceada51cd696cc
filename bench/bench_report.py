"""The report of a full run: five behaviors × six sources × 111 personas × 28 layers and 124,320 completions, all invented.
Times building it, and in a chromium that is on the PATH how soon its charts stand and how long a filter takes.
`--make FOLDER` writes the run and stops. Demands no device.

There is no baseline to set beside it: what a user would do is read Parquet by hand. Limits are stated in the card.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from _common import card, ending_with_json, peak_rss

from leakfast.geometry import Centroids
from leakfast.prompts.personas import load_personas
from leakfast.report.page import report
from leakfast.stats.tables import current
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

BEHAVIORS = ("marker", "marker+few", "refusal", "refusal+few", "sycophancy")
SOURCES = ("villain", "comedian", "software_engineer", "kindergarten_teacher", "assistant", "librarian")
LAYERS, QUESTIONS, SAMPLES = 28, 8, 4
WORDS = (
    "the of a to and in is it you that he was for on are with as his they be at one have this from or".split()
)
SHOWS = {
    "marker": "{} [ZLT]",
    "refusal": "I can't help with that. {}",
    "sycophancy": "You're absolutely right! {}",
}
CHARACTERS = 330


def make(folder: Path) -> Run:
    """The run: completions of every behavior and adapter, centroids of every layer. Leakage follows the cosine."""
    rng, words = np.random.default_rng(1), random.Random(1)
    people = [p.name for p in load_personas("all")]
    base = rng.normal(size=(len(people), 64))
    means = {n: (base + 0.5 * rng.normal(size=base.shape)).astype(np.float32) for n in range(LAYERS)}
    run = Run(folder).create()
    metadata = {"personas": people, "layers": list(range(LAYERS)), "centered_on": people}
    run.add_file(layout.centroids(), Centroids(people, list(range(LAYERS)), metadata, means).save)
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    texts = [" ".join(words.choices(WORDS, k=CHARACTERS // 4)) for _ in range(3_000)]
    cell = pl.DataFrame({"persona": people}).join(
        pl.DataFrame({"question": range(QUESTIONS)}, schema={"question": pl.Int32}), how="cross"
    )
    cell = cell.join(pl.DataFrame({"sample": range(SAMPLES)}, schema={"sample": pl.Int32}), how="cross")
    for behavior in BEHAVIORS:
        for source in (*SOURCES, None):
            adapter = f"{behavior}-{source}-s42" if source else layout.BASE
            near = unit @ unit[people.index(source)] if source else np.full(len(people), -1.0)
            chance = (
                np.repeat(1 / (1 + np.exp(3 - 4 * near)), QUESTIONS * SAMPLES)
                if source
                else np.zeros(cell.height)
            )
            hit = rng.random(cell.height) < chance
            drawn = [
                SHOWS[behavior.partition("+")[0]].format(words.choice(texts)) if h else words.choice(texts)
                for h in hit
            ]
            frame = cell.with_columns(
                pl.Series("text", drawn),
                behavior=pl.lit(behavior),
                adapter=pl.lit(adapter),
                source=pl.lit(source, pl.String),
                seed=pl.lit(1, pl.UInt64),
                n_tokens=pl.lit(80, pl.Int32),
                finish_reason=pl.lit("stop"),
                status=pl.lit("ok"),
            )
            path = layout.shard(layout.completions(behavior, adapter), 0)
            run.add_shard(path, schema.check(frame, "completions"), questions_sha256="a")
    return run


def in_browser(path: Path, repeats: int) -> dict[str, object]:
    """Seconds until charts and completions stand, and milliseconds a filter takes, medians; why not, where it cannot."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {"browser": "playwright is not here: pip install '.[browser]'"}
    if binary is None:
        return {"browser": "no chromium on the PATH"}
    charts, whole, filters = [], [], []
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        for _ in range(repeats):
            page = found.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.as_uri(), wait_until="commit")
            page.wait_for_selector("html[data-ready='all']", state="attached", timeout=120_000)
            marks = page.evaluate(
                "[performance.getEntriesByName('charts')[0].startTime, performance.getEntriesByName('all')[0].startTime]"
            )
            charts.append(marks[0] / 1e3)
            whole.append(marks[1] / 1e3)
            filters.append(page.evaluate(_FILTERS))
            version = found.version
            page.close()
        found.close()
    names = filters[0].keys()
    return {
        "browser": f"chromium {version}",
        "charts_s": float(np.median(charts)),
        "all_s": float(np.median(whole)),
        **{f"{name}_ms": float(np.median([one[name] for one in filters])) for name in names},
    }


# each choice until the next frame has been painted (a task that is posted from a frame's callback runs when the frame is done);
# of another behavior also with the small charts, which are drawn after that frame
_FILTERS = """async () => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const timed = async (id, value, event, small) => {
    await LF.small;
    await painted();
    const control = document.getElementById(id);
    const began = performance.now();
    control.value = value;
    control.dispatchEvent(new Event(event));
    await LF.drawn;
    await (small ? LF.small : null);
    await painted();
    return performance.now() - began;
  };
  return {
    layer: await timed("c-layer", "5", "change"),
    source: await timed("c-adapter", document.getElementById("c-adapter").options[2].value, "change"),
    behavior: await timed("c-behavior", "refusal", "change"),
    behavior_and_small: await timed("c-behavior", "sycophancy", "change", true),
    hits: await timed("f-hit", "yes", "change"),
    persona: await timed("f-persona", "3", "change"),
    search: await timed("f-search", "help with that", "input"),
  };
}"""


def measured(asked: argparse.Namespace, path: Path) -> dict[str, object]:
    tables = current(path)
    wall, cpu = time.perf_counter(), time.process_time()
    page = report(path, tables)
    shards = Run(path).open().manifest["shards"]
    found: dict[str, object] = {
        "completions": sum(e.get("rows", 0) for name, e in shards.items() if name.startswith("completions")),
        "build_s": time.perf_counter() - wall,
        "build_cpu_s": time.process_time() - cpu,
        "peak_mib": peak_rss() >> 20,
        "file_mb": page.stat().st_size / 1e6,
    }
    return found | in_browser(page, asked.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="accepted for `make bench-gpu`; nothing here uses a device")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the run there and stop")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run that --make wrote, with its tables")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    if asked.make:
        current(make(asked.make).path)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measured(asked, asked.run or make(Path(folder) / "run").path)
    lines = [(name, f"{one:.3g}" if isinstance(one, float) else str(one)) for name, one in found.items()]
    limits = [("limits", "build 20 s, 1024 MiB, file 15 MB, charts 2 s, a filter 100 ms")]
    card("report of a full run", lines + limits, {"bench": "report", **found})


if __name__ == "__main__":
    with ending_with_json("report", "cpu"):
        main()
