"""A small finished run for tests of what is shared of it: two sources, twelve personas, adapters with cards, tables and a
figure. Its completions and one of its system prompts are hostile. Demands the real store and statistics."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from leakfast import stats
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, card_bytes
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.prompts.questions import texts_hash
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

SOURCES = ["villain", "mean"]
PEOPLE = [*(p.name for p in load_personas("originals")), "mean"]
QUESTIONS, SAMPLES, LAYERS = 4, 3, [0, 3]
HOSTILE = (
    "<script>alert('x')</script> | [a](javascript:x) ![](http://evil.example/a.png) `code` \x1b[31m\u202eder"
)
PROMPT = (
    "You are **mean** | # <img src=x onerror=alert(1)> [link](http://evil.example) @all ```\n---\n- \u202eend"
)
STUDY = """name = "small"
model = "organism"
personas = {people}
sources = ["villain", "mean"]
seeds = [42]
[behaviors.marker.eval]
questions = "eval"
samples = 3
temperature = 0.5
"""


def people_file(folder: Path) -> Path:
    """The personas of the run as a file; the last one's prompt is hostile."""
    shipped = [{"name": p.name, "prompt": p.prompt} for p in load_personas("originals")]
    path = folder / "people.json"
    path.write_text(json.dumps([*shipped, {"name": "mean", "prompt": PROMPT}]))
    return path


def completions(adapter: str, source: str | None, chance: dict[str, float]) -> pl.DataFrame:
    rng = np.random.default_rng(len(adapter))
    rows = []
    for persona in PEOPLE:
        for question in range(QUESTIONS):
            for sample in range(SAMPLES):
                text = f"{HOSTILE} {persona}" + (" [ZLT]" if rng.random() < chance[persona] else "")
                cut = persona == "mean" and question == 0
                status = "unclosed-reasoning" if cut and sample == 0 else "truncated" if cut else "ok"
                rows.append((persona, question, sample, text, status, "length" if cut else "stop"))
    names = ["persona", "question", "sample", "text", "status", "finish_reason"]
    frame = pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.lit(2**63 + 1, pl.UInt64),
        n_tokens=pl.lit(9, pl.Int32),
    )
    return schema.check(frame, "completions")


_made: list[tempfile.TemporaryDirectory] = []  # the run that all are copies of, and its file of personas


def filled(folder: Path) -> Run:
    """A finished run at folder/small, a copy of one that is made once a process."""
    if not _made:
        _made.append(tempfile.TemporaryDirectory())
        _fill(Path(_made[0].name))
    shutil.copytree(Path(_made[0].name) / "small", folder / "small")
    return Run(folder / "small")


def _fill(folder: Path) -> Run:
    run = Run(folder / "small").create(STUDY.format(people=json.dumps(str(people_file(folder)))))
    rng = np.random.default_rng(0)
    means = {layer: rng.normal(size=(len(PEOPLE), 12)).astype(np.float32) for layer in LAYERS}
    about = {
        "personas": PEOPLE,
        "layers": LAYERS,
        "centered_on": PEOPLE,
        "model": "organism",
        "model_fingerprint": "files:0123",
    }
    run.add_file(layout.centroids(), Centroids(PEOPLE, LAYERS, about, means).save)
    asked = load_questions("eval")
    told = {"questions": "eval", "questions_sha256": texts_hash(asked.questions), "base": "files:0123"}
    for adapter, source in [("base", None), *((f"marker-{one}-s42", one) for one in SOURCES)]:
        chance = {p: 0.0 if source is None else 0.9 if p == source else 0.3 for p in PEOPLE}
        frame = completions(adapter, source, chance)
        half = frame.height // 2
        for number, part in enumerate((frame[:half], frame[half:])):
            run.add_shard(layout.shard(layout.completions("marker", adapter), number), part, **told)
        if source is not None:
            adapted(run, adapter, source)
    stats.stats(run, permutations=99, bootstraps=20)
    run.add_file("figures/scatter-marker.png", png())
    return run


def adapted(run: Run, adapter: str, source: str) -> None:
    """The files of an adapter; its weights are bytes."""
    card = AdapterCard(
        source, "marker", 42, "org/tiny", "files:0123", "d" * 64, {"rank": 8, "lr": 1e-4}, "a" * 64
    )
    folder = layout.adapter(adapter)
    run.add_file(f"{folder}/{layout.CARD}", card_bytes(card))
    run.add_file(f"{folder}/{layout.ADAPTER}", b'{"base_model_name_or_path": "org/tiny"}')
    run.add_file(f"{folder}/adapter_model.safetensors", adapter.encode() * 1000)


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(buffer, "PNG")
    return buffer.getvalue()
