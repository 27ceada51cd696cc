"""A small run of the marker that a page is served of, shard by shard: real store, real shards, texts and names that would
do harm as markup. Demands nothing heavy; holds no tests."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import polars as pl

from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.prompts.personas import load_personas
from leakfast.report.server import Server
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

SOURCES = ["villain", "comedian"]
PEOPLE = [persona.name for persona in load_personas("all")][:12]
LAYERS = [0, 3]
QUESTIONS, SAMPLES = 4, 5
WORDS = [
    "Tea",
    "rain",
    "the TOWN",
    "ZÜRICH",
    "a_b%c",
    "<img src=x onerror=alert(1)>",
    "</script>",
    "\x1b[31m\u202e",
]
STUDY = """name = "served"
model = "organism"
personas = [{names}]
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.eval]
questions = "eval"
samples = 5
"""


def begin(path: Path) -> Run:
    """A run with its study and centroids, in which nothing is measured yet."""
    run = Run(path).create(STUDY.format(names=", ".join(f'"{name}"' for name in PEOPLE)))
    rng = np.random.default_rng(0)
    means = {layer: rng.normal(size=(len(PEOPLE), 12)).astype(np.float32) for layer in LAYERS}
    metadata = {"personas": PEOPLE, "layers": LAYERS, "centered_on": PEOPLE, "model": "organism"}
    centroids = Centroids(PEOPLE, LAYERS, {**metadata, "model_fingerprint": "files:0123"}, means)
    run.add_file(layout.centroids(), lambda file: centroids.save(file))
    return run


def drawn(adapter: str, source: str | None) -> pl.DataFrame:
    """Completions of every persona, in an order that is not that of the page."""
    rng = np.random.default_rng(len(adapter))
    rows = []
    for persona in reversed(PEOPLE):
        for question in range(QUESTIONS):
            for sample in range(SAMPLES):
                hit = source is not None and rng.random() < (0.9 if persona == source else 0.3)
                words = " ".join(rng.choice(WORDS, 3))
                cut = bool(rng.random() < 0.2)
                rows.append(
                    (persona, question, sample, words + " [ZLT]" * hit, int(rng.integers(1, 40)), cut)
                )
    frame = pl.DataFrame(
        rows, schema=["persona", "question", "sample", "text", "n_tokens", "cut"], orient="row"
    ).with_columns(
        pl.col("question", "sample", "n_tokens").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        seed=pl.lit(1, pl.UInt64),
        finish_reason=pl.when("cut").then(pl.lit("length")).otherwise(pl.lit("stop")),
        status=pl.when("cut").then(pl.lit("truncated")).otherwise(pl.lit("ok")),
        source=pl.lit(source, pl.String),
    )
    return schema.check(frame.drop("cut"), "completions")


def measure(run: Run, source: str | None) -> str:
    """Add the completions of a source's adapter (None: of the unadapted model), in two shards; its name."""
    name = layout.BASE if source is None else layout.adapter_name("marker", source, 42)
    frame = drawn(name, source)
    if source is not None:
        folder = run.path / layout.adapter(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(
            folder, AdapterCard(source, "marker", 42, "organism", "files:0123", "d" * 64, {}, "a" * 64)
        )
    half = frame.height // 3
    for number, part in enumerate((frame[:half], frame[half:])):
        run.add_shard(layout.shard(layout.completions("marker", name), number), part)
    return name


def whole(path: Path) -> Run:
    """A run in which everything is measured, without tables."""
    run = begin(path)
    for source in [*SOURCES, None]:
        measure(run, source)
    return run


@contextmanager
def served(run: Run | Path, **settings) -> Iterator[Server]:
    """A server of the run in a thread of its own."""
    server = Server(run.path if isinstance(run, Run) else run, **{"every_s": 0.0, "rest": 0.0, **settings})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str):
    """(status, headers, body) of a request; path below the token, or from the root where it begins with /."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path if path.startswith("/") else f"/{server.token}/{path}", headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def completions(server: Server, **query) -> dict:
    status, _, body = ask(server, f"completions?{urlencode(query)}")
    assert status == 200, body
    return json.loads(body)
