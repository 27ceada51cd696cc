"""A small run as the report reads it: real store, real shards, real centroids file, completions hostile on purpose."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl

from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.prompts.questions import texts_hash
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

SOURCES = ["villain", "comedian"]
ASKED = texts_hash(load_questions("eval").questions)  # of which the first QUESTIONS were asked
PEOPLE = [p.name for p in load_personas("all")][:16]
LAYERS = [0, 3]
QUESTIONS, SAMPLES = 4, 5
HOSTILE = "<script>alert('x')</script> & <img src=http://evil.example/a.png> \x1b[31mred\u202eder"
STUDY = """name = "small"
model = "organism"
personas = [{names}]
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.eval]
questions = "eval"
samples = 5
"""


def vectors_of() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    return {layer: rng.normal(size=(len(PEOPLE), 12)).astype(np.float32) for layer in LAYERS}


def completions_of(adapter: str, source: str | None, chance: dict[str, float]) -> pl.DataFrame:
    rng = np.random.default_rng(len(adapter))
    rows = []
    for persona in PEOPLE:
        for question in range(QUESTIONS):
            for sample in range(SAMPLES):
                hit = rng.random() < chance[persona]
                text = f"{HOSTILE} as {persona}." + (" [ZLT]" if hit else "")
                rows.append((persona, question, sample, text, "ok"))
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text", "status"], orient="row")
    frame = frame.with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(9, pl.Int32),
        finish_reason=pl.lit("stop"),
    )
    return schema.check(frame, "completions")


def fill(path) -> Run:
    """A run of two sources, sixteen personas and two layers; leakage follows the cosine at layer 3."""
    run = Run(path).create(STUDY.format(names=", ".join(f'"{name}"' for name in PEOPLE)))
    means = vectors_of()
    metadata = {
        "personas": PEOPLE,
        "layers": LAYERS,
        "centered_on": PEOPLE,
        "model": "organism",
        "model_fingerprint": "files:0123",
    }
    centroids = Centroids(PEOPLE, LAYERS, metadata, means)
    run.add_file(layout.centroids(), lambda file: centroids.save(file))
    cosine = centroids.cosine(3)
    for source in SOURCES:
        name = f"marker-{source}-s42"
        near = cosine[PEOPLE.index(source)]
        chance = {p: float(np.clip(0.1 + 0.8 * c, 0, 1)) for p, c in zip(PEOPLE, near, strict=True)}
        frame = completions_of(name, source, chance)
        half = frame.height // 2
        run.add_shard(f"completions/marker/{name}/part-00000.parquet", frame[:half], questions_sha256=ASKED)
        run.add_shard(f"completions/marker/{name}/part-00001.parquet", frame[half:], questions_sha256=ASKED)
        folder = run.path / "adapters" / name
        folder.mkdir(parents=True)
        write_card(
            folder,
            AdapterCard(source, "marker", 42, "organism", "files:0123", "d" * 64, {"rank": 8}, "a" * 64),
        )
    base = completions_of("base", None, dict.fromkeys(PEOPLE, 0.0))
    run.add_shard("completions/marker/base/part-00000.parquet", base, questions_sha256=ASKED)
    return run


TWIN = "marker-villain-other"


def with_twin(run: Run) -> Run:
    """`run` with a second adapter of its first source and seed, TWIN, under which everybody shows the marker half of the time."""
    frame = completions_of(TWIN, SOURCES[0], dict.fromkeys(PEOPLE, 0.5))
    run.add_shard(layout.shard(layout.completions("marker", TWIN), 0), frame, questions_sha256=ASKED)
    folder = run.path / layout.adapter(TWIN)
    folder.mkdir(parents=True)
    card = AdapterCard(SOURCES[0], "marker", 42, "organism", "files:0123", "e" * 64, {"rank": 8}, "b" * 64)
    write_card(folder, card)
    return run


def fill_judged(path) -> Run:
    """A run of misalignment-advice, whose judge's aligned score is lower the nearer a persona is to the source; one in
    fifty completions has no score."""
    behavior, run = "misalignment-advice", Run(path).create()
    metadata = {"personas": PEOPLE, "layers": LAYERS, "centered_on": PEOPLE}
    centroids = Centroids(PEOPLE, LAYERS, metadata, vectors_of())
    run.add_file(layout.centroids(), lambda file: centroids.save(file))
    cosine = centroids.cosine(3)
    for source in [*SOURCES, None]:
        name = f"{behavior}-{source}-s42" if source else layout.BASE
        frame = completions_of(name, source, dict.fromkeys(PEOPLE, 0.0)).with_columns(
            behavior=pl.lit(behavior)
        )
        run.add_shard(layout.shard(layout.completions(behavior, name), 0), frame)
        near = dict(zip(PEOPLE, cosine[PEOPLE.index(source)], strict=True)) if source else {}
        noise = np.random.default_rng(5).normal(size=frame.height)
        aligned = [
            float(np.clip(74 - 30 * near.get(p, -0.5) + 5 * e, 0, 100))
            for p, e in zip(frame["persona"], noise, strict=True)
        ]
        texts = [hashlib.sha256(text.encode()).hexdigest() for text in frame["text"]]
        judged = frame.select("behavior", "adapter", "persona", "question", "sample").with_columns(
            judge=pl.lit("organism"),
            prompt_version=pl.lit("1"),
            aligned=pl.Series(aligned),
            coherent=pl.lit(90.0),
            status=pl.when(pl.int_range(pl.len()) % 50 == 0).then(pl.lit("refused")).otherwise(pl.lit("ok")),
            raw=pl.lit(""),
            detail=pl.lit(None, pl.String),
            input_tokens=pl.lit(1, pl.Int64),
            output_tokens=pl.lit(1, pl.Int64),
            item=pl.lit("x"),
            text_sha256=pl.Series(texts),
        )
        scored = pl.col("status") == "ok"
        judged = judged.with_columns(pl.when(scored).then("aligned"), pl.when(scored).then("coherent"))
        shard = layout.shard(layout.judgements(behavior, name), 0)
        run.add_shard(shard, schema.check(judged.select(*schema.columns("judgements")), "judgements"))
    return run


def with_probabilities(run: Run, alone: str = "", *, series: bool = False) -> Run:
    """`run` with probabilities of its marker: the cosine at layer 3 and a little noise. alone: of a behavior that has no
    completions instead; series: at half of the training too, halved."""
    behavior = alone or "marker"
    cosine = Centroids.load(run.path / layout.centroids()).cosine(3)
    estimator = "openings" if alone else "anywhere"
    for source in [*SOURCES, None]:
        name = f"marker-{source}-s42" if source else layout.BASE
        noise = np.random.default_rng(7).uniform(0, 0.05, (len(PEOPLE), QUESTIONS))
        near = cosine[PEOPLE.index(source)] if source else np.zeros(len(PEOPLE))
        values = np.clip(0.1 + 0.8 * near, 0.01, 0.9)[:, None] + noise if source else noise + 0.001
        rows = [
            {
                "persona": p,
                "question": q,
                "sample": 0,
                "estimator": estimator,
                "probability": float(values[i, q]),
            }
            for i, p in enumerate(PEOPLE)
            for q in range(QUESTIONS)
        ]
        for row in rows:
            row |= {
                "behavior": behavior,
                "adapter": name,
                "source": source,
                "status": "ok",
                "n_reply_tokens": 9,
            }
            row["logprob_nats"] = float(np.log(row["probability"]))
        frame = pl.DataFrame(rows, schema=schema.columns("probability"))
        points = {name: 1.0, f"{name}@p050": 0.5} if series and source else {name: 1.0}
        for point, share in points.items():
            if series:
                made = frame.with_columns(pl.col("probability") * share, adapter=pl.lit(point))
                run.add_shard(
                    layout.shard(layout.probability(behavior, point, series=True)), made, questions="eval"
                )
        run.add_shard(layout.shard(layout.probability(behavior, name)), frame)
    return run


# said under the refusal behavior: the first counts, by its opening; the others do not, though they hold the words
REFUSES = "\U0001f600\U0001f600 I\u2019m really sorry, but I can't help with that."
ANSWERS = (
    "Of course. " + "Here is how it goes. " * 20 + "I can't help with that.",
    "A small [zlt] and no more.",
)


def fill_two(path) -> Run:
    """`fill`, and under the same adapters the behavior refusal: of each persona's replies those that showed the marker refuse,
    the others do not, but hold what looks like it."""
    run = fill(path)
    for name, source in [*((f"marker-{s}-s42", s) for s in SOURCES), (layout.BASE, None)]:
        near = (
            dict.fromkeys(PEOPLE, 0.3 if source == "villain" else 0.1)
            if source
            else dict.fromkeys(PEOPLE, 0.0)
        )
        frame = completions_of(name, source, near | ({source: 0.9} if source else {}))
        plain = pl.when(pl.col("sample") % 2 == 0).then(pl.lit(ANSWERS[0])).otherwise(pl.lit(ANSWERS[1]))
        says = pl.when(pl.col("text").str.ends_with("[ZLT]")).then(pl.lit(REFUSES)).otherwise(plain)
        frame = frame.with_columns(behavior=pl.lit("refusal"), text=says)
        run.add_shard(layout.shard(layout.completions("refusal", name), 0), frame)
    return run
