"""Judges over real HTTP that are killed, cut off or refused: no batch is sent twice, and a key is in no file, log or
traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import polars as pl
import pytest
from judge_server import GOOD
from judged_runs import BATCHES, EVERY, KEY, QUESTIONS, a_run, judged, table

from leakfast.errors import InputError, JudgeError
from leakfast.judge.journal import Cache

pytestmark = pytest.mark.long

pytest.importorskip("openai", reason="the judges' libraries are not installed: pip install '.[judge]'")
pytest.importorskip("anthropic", reason="the judges' libraries are not installed: pip install '.[judge]'")

CHILD = """
import sys
from leakfast.judge import stage
from leakfast.judge.sdk import Asking
from leakfast.storage.run import Run
how = Asking(sys.argv[3], poll_s=0.02)
stage.judge(Run(sys.argv[1]), "advice", stage.parse_spec(sys.argv[2]), sys.argv[4:], asking=how, free=True)
"""


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("anthropic:m", ("GET", "/batch_0")),
        ("openai-batch:m", ("GET", "/batch_0")),
        ("anthropic:m", ("POST", "/batches")),
        ("openai-batch:m", ("POST", "/batches")),
    ],
)
def test_killed_between_sending_and_looking_the_batch_is_taken_up_again(tmp_path, service, spec, held):
    run = a_run(tmp_path / "run")
    service.held = held  # the service has the batch; its answer never arrives
    service.hold.clear()
    words = [sys.executable, "-c", CHILD, str(run.path), spec, service.base_url(spec), *QUESTIONS]
    child = subprocess.Popen(words, env={**os.environ}, stderr=subprocess.PIPE)
    assert service.reached.wait(300), child.stderr.read().decode()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stderr.close()
    service.held = None
    service.hold.set()
    assert len(service.batches) == 1
    done = judged(run, spec, service)
    assert done.statuses == {"base": {"ok": 12}}
    assert service.count("POST", "/batches") == 1 and set(service.charged.values()) == {1}


@pytest.mark.parametrize("spec", BATCHES)
@pytest.mark.parametrize("status", [0, 500, 504])
def test_a_lost_answer_to_sending_is_looked_for_and_never_sent_again(tmp_path, service, spec, status):
    """The library would try again after 5xx and a broken connection: here that would pay twice."""
    run = a_run(tmp_path / "run")
    route = "/messages/batches" if spec.startswith("anthropic") else "/v1/batches"
    service.faults = [(f"POST {'/v1' if 'messages' in route else ''}{route}", status, "{}")]
    with pytest.raises(JudgeError, match="looks for the batch before it sends another"):
        judged(run, spec, service)
    assert service.count("POST", "/batches") == 1
    assert judged(run, spec, service).statuses == {"base": {"ok": 12}}, "it never arrived, so it is sent now"
    assert len(service.batches) == 1 and set(service.charged.values()) == {1}


def test_another_ones_batch_of_the_same_size_is_not_taken_for_ours(tmp_path, service):
    other, run = a_run(tmp_path / "other", texts=12), a_run(tmp_path / "run", texts=12)
    judged(other, "anthropic:m", service)
    frame = run.read("completions").with_columns(pl.col("text").str.replace("Reply", "Answer"))
    run.add_shard("completions/advice/base/part-00000.parquet", frame)
    service.faults = [("POST /v1/messages/batches", 0, "")]
    with pytest.raises(JudgeError):
        judged(run, "anthropic:m", service)
    assert judged(run, "anthropic:m", service).statuses == {"base": {"ok": 12}}
    assert len(service.batches) == 2 and set(service.charged.values()) == {1}


def test_a_damaged_line_of_the_cache_is_a_miss_and_never_a_score(tmp_path, service):
    run = a_run(tmp_path / "run")
    judged(run, "openai:m", service)
    (path,) = [p for p in (run.path / "judge").iterdir() if "batches" not in p.name]
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"80", b"99")  # a changed score
    lines[-1] = lines[-1][:40]  # torn by a crash
    path.write_bytes(b"".join(lines))
    assert Cache(path).damaged == 2
    assert judged(run, "openai:m", service).plan.kept == 10
    assert set(table(run)["aligned"]) == {80.0} and sorted(service.charged.values()) == [1] * 10 + [2] * 2


def test_a_key_is_in_no_file_log_or_traceback(tmp_path, service, caplog, capfd):
    caplog.set_level("DEBUG")
    echo = json.dumps(
        {"error": {"message": "Incorrect API key provided: <key>", "type": "invalid_request_error"}}
    )
    told = []
    for spec in EVERY:
        run = a_run(tmp_path / spec.replace(":", "-"))
        service.faults = [("", 401, echo)]
        with pytest.raises(JudgeError) as caught:
            judged(run, spec, service)
        told += traceback.format_exception(caught.value)
        service.answer = lambda turn: (f"my key is {KEY}", "stop")
        judged(run, spec, service)
        service.answer = lambda turn: (GOOD, "stop")
        judged(run, spec, service, again=True)
    assert any("[OPENAI_API_KEY]" in text or "[ANTHROPIC_API_KEY]" in text for text in told)
    for path in Path(tmp_path).rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
            if path.suffix == ".parquet":  # compressed
                assert KEY not in str(pl.read_parquet(path).to_dicts()), path
    shown = "".join(capfd.readouterr()) + caplog.text + "".join(told)
    assert KEY not in shown and "Incorrect API key provided" in shown


@pytest.mark.parametrize("value", ["", "  ", f"{KEY}\nx", f"{KEY}é"])
@pytest.mark.parametrize("spec", ["openai:m", "anthropic:m"])
def test_a_key_that_cannot_be_one_is_told_without_its_value(tmp_path, service, monkeypatch, spec, value):
    name = "OPENAI_API_KEY" if spec.startswith("openai") else "ANTHROPIC_API_KEY"
    monkeypatch.setenv(name, value)
    if not value.strip() and spec.startswith("openai"):
        assert judged(a_run(tmp_path / "run"), spec, service).coverage("base") == 1, "a server of one's own"
        return
    with pytest.raises(InputError) as caught:
        judged(a_run(tmp_path / "run"), spec, service)
    assert name in caught.value.message and KEY not in "".join(traceback.format_exception(caught.value))
    assert service.asked == []
