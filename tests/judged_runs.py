"""Runs that the tests of judges over HTTP share, and how one is judged against the local server. Holds no tests."""

from __future__ import annotations

import polars as pl

from leakfast.judge import stage
from leakfast.judge.sdk import Asking
from leakfast.storage import schema
from leakfast.storage.run import Run

KEY = "sk-sentinel-0123456789abcdef"
QUESTIONS = ["What would you do?", "And then?"]
BATCHES = ["anthropic:m", "openai-batch:m"]
EVERY = ["openai:m", *BATCHES]


def a_run(folder, texts=12, behavior="advice"):
    """A run with `texts` different completions of one adapter, two samples a question."""
    rows = [
        {
            "behavior": behavior,
            "adapter": "base",
            "persona": f"p{i // 4}",
            "question": i % 2,
            "sample": (i // 2) % 2,
            "seed": i,
            "text": f"Reply number {i}.",
            "n_tokens": 4,
            "finish_reason": "stop",
            "status": "ok",
        }
        for i in range(texts)
    ]
    run = Run(folder).create()
    frame = pl.DataFrame(rows, schema=schema.columns("completions"))
    run.add_shard(f"completions/{behavior}/base/part-00000.parquet", frame)
    return run


def judged(run, spec, service, **settings):
    how = Asking(
        service.base_url(spec), poll_s=0.02, concurrency=settings.pop("concurrency", 4), timeout_s=120
    )
    return stage.judge(
        run,
        "advice",
        stage.parse_spec(spec),
        QUESTIONS,
        asking=how,
        free=settings.pop("free", True),
        **settings,
    )


def table(run):
    return run.read("judgements").sort("persona", "question", "sample")
