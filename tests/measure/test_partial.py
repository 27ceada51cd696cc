"""Completions of shards that are not whole yet: a run that is killed while an engine works on several shards draws next to
nothing again, and damaged or foreign lines are drawn again alone."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import standins
import warm
from measuring import evaluate

from leakfast.errors import StoreError
from leakfast.generation import backends, canary
from leakfast.measure import completions as stage
from leakfast.measure import partial as unfinished
from leakfast.prompts.personas import Persona
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

pytestmark = pytest.mark.long

KEYS = ["persona", "question", "sample"]
QUESTIONS = [f"Number {i}?" for i in range(20)]
CFG = EvalConfig(samples=10, max_new_tokens=4)
PEOPLE = [Persona(f"person_{i}", "other", f"You are person {i}.") for i in range(10)]
ROWS, SHARD = 2000, 40

# argv: model, run, kills, engines (0: in this process), completions between kills at most. Each run is a fork of a
# process that has everything imported and loaded
CHILD = """
import os, random, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
import standins, test_partial
from leakfast import models
model, run, (kills, n, most) = sys.argv[1], Path(sys.argv[2]), map(int, sys.argv[3:])
log = Path(str(run) + ".drawn")
log.touch()
loaded = models.load(model, dtype="float32")
chance = random.Random(5)
for number in range(kills + 1):
    aim = log.read_text().count("\\n") + chance.randrange(most // 2, most)
    child = os.fork()
    if child == 0:
        test_partial.drawn_by_standins(loaded, run, n, every_s=0.03)
        os._exit(0)
    while number < kills and log.read_text().count("\\n") < aim:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.001)
    if number < kills:
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if number < kills else 0)
"""


def drawn_by_standins(loaded, run, n, every_s=unfinished._EVERY_S, progress=None):
    """An evaluation with vLLM's contract kept by engines without a model: one in this process, or n in their own."""
    from leakfast.generation.vllm.parallel import Parallel

    @contextmanager
    def opened(*args, **settings):
        spec = standins.spec(f"{run}.drawn", seats=64)
        engine = Parallel(spec, n, standins.Slow) if n else standins.Counted(spec)
        try:
            yield engine
        finally:
            if n:
                engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "SHARD_ROWS", SHARD)
        patch.setattr(unfinished, "_EVERY_S", every_s)
        patch.setattr(backends, "opened", opened)
        patch.setattr(canary, "check_engine", lambda *args: None)
        return evaluate(
            loaded,
            Run(run),
            [],
            PEOPLE,
            QUESTIONS,
            "marker",
            CFG,
            3,
            base=True,
            backend="vllm",
            progress=progress,
        )


def rows(run) -> pl.DataFrame:
    return Run(run).read("completions").sort(KEYS)


def lines_drawn(run) -> list[str]:
    return Path(f"{run}.drawn").read_text().splitlines()


@pytest.mark.parametrize(("kills", "n", "most", "cost"), [(20, 0, 120, 30), (3, 2, 400, 120)])
def test_a_kill_costs_less_than_a_shard_while_several_are_open(
    tiny_qwen2, tiny_folder, tmp_path, kills, n, most, cost
):
    """Killed at random moments with 128 completions of several open shards in each engine: a kill costs what was drawn in
    the last moments, on its way or after it (engines in processes of their own tell 16 completions at once). Without
    what is kept of open shards it would cost all that was drawn since the last kill, 90 and 300."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", CHILD, str(tiny_folder), str(run), str(kills), str(n), str(most)]
    child = warm.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    drawn_by_standins(tiny_qwen2, tmp_path / "whole", 0)
    keys = [*KEYS, "seed", "token_ids", "finish_reason", "status"]
    assert rows(run).select(keys).equals(rows(tmp_path / "whole").select(keys)), "none missing, none twice"
    assert rows(run).height == ROWS == len(set(lines_drawn(run)))
    redone = len(lines_drawn(run)) - ROWS
    assert 0 < redone <= kills * cost, f"{redone} of {ROWS} drawn again after {kills} kills"
    assert not list(run.rglob("*.open"))


@pytest.fixture
def begun(tiny_qwen2, tmp_path):
    """A run that was interrupted with several shards open."""
    run = tmp_path / "run"

    def progress(done, total, what):
        if done >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn_by_standins(tiny_qwen2, run, 0, progress=progress)
    assert len(list(run.rglob("*.open"))) > 3 and len(lines_drawn(run)) <= 110
    return run


def test_an_interrupted_run_goes_on_from_its_open_shards(tiny_qwen2, begun):
    kept = len(lines_drawn(begun))
    done = drawn_by_standins(tiny_qwen2, begun, 0)
    assert (done.kept, done.made) == (kept, ROWS - kept)
    assert len(lines_drawn(begun)) == ROWS and rows(begun).height == ROWS
    assert not list(begun.rglob("*.open"))


def test_damaged_lines_are_drawn_again_and_no_others(tiny_qwen2, begun, caplog):
    path = sorted(begun.rglob("*.open"))[0]
    content = path.read_bytes().splitlines(keepends=True)
    content[1] = content[1].replace(b"10", b"11") if b"10" in content[1] else b"torn" + content[1]
    path.write_bytes(b"".join(content)[:-9])
    before = len(lines_drawn(begun))
    drawn_by_standins(tiny_qwen2, begun, 0)
    assert "2 damaged lines" in caplog.text
    assert len(lines_drawn(begun)) == ROWS + 2 and before < ROWS
    assert rows(begun).select(KEYS).is_duplicated().sum() == 0 and rows(begun).height == ROWS


def test_what_another_request_left_is_not_taken(tiny_qwen2, begun, caplog, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CFG", CFG.model_copy(update={"temperature": 0.7}))
    before = len(lines_drawn(begun))
    done = drawn_by_standins(tiny_qwen2, begun, 0)
    assert "by another request" in caplog.text
    assert done.made == ROWS and len(lines_drawn(begun)) == before + ROWS


def test_a_shard_whose_last_completion_was_kept_is_written_without_an_engine(tiny_qwen2, begun):
    drawn_by_standins(tiny_qwen2, begun, 0)
    run = Run(begun)
    first = run.shards("completions")[0]
    frame, entry = pl.read_parquet(begun / first), run.manifest["shards"][first]
    (begun / first).unlink()
    lines = [
        {"shard": entry["request"], "at": [i // 10, i % 10], "token_ids": ids.to_list(), "finish_reason": why}
        for i, (ids, why) in enumerate(frame.select("token_ids", "finish_reason").iter_rows())
        for ids in [pl.Series(ids)]
    ]
    unfinished.journal.append(begun / f"{first}.open", lines)
    before = len(lines_drawn(begun))
    done = drawn_by_standins(tiny_qwen2, begun, 0)
    assert done.made == 0 and len(lines_drawn(begun)) == before
    assert pl.read_parquet(begun / first).equals(frame) and not (begun / f"{first}.open").exists()


def test_lines_that_belong_to_no_open_shard_are_removed(tiny_qwen2, begun):
    """A crash between a shard's entry in the manifest and the end of its lines leaves them."""
    drawn_by_standins(tiny_qwen2, begun, 0)
    left = begun / f"{Run(begun).shards('completions')[0]}.open"
    left.write_text("")
    assert drawn_by_standins(tiny_qwen2, begun, 0).made == 0
    assert not left.exists()


def test_a_full_disk_stops_with_what_to_do_and_loses_the_torn_line_alone(tiny_qwen2, begun, monkeypatch):
    """It is full after half a line of the second shard that is written: the first one's lines and those before stay."""
    whole, written = unfinished.journal.append, []

    def full(path, entries):
        written.append(len(entries))
        if len(written) != 2:
            whole(path, entries)
            return
        whole(path, entries[:1])
        path.write_bytes(path.read_bytes()[:-20])
        raise StoreError(f"{path}: cannot be written: No space left on device. Free some space.")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.journal, "append", full)
        with pytest.raises(StoreError, match="Free some space"):
            drawn_by_standins(tiny_qwen2, begun, 0, every_s=0.05)
    assert len(written) > 2, "what is left is written when the run ends, to the shard that failed too"
    before = len(lines_drawn(begun))
    drawn_by_standins(tiny_qwen2, begun, 0)
    assert before < ROWS and rows(begun).height == ROWS
    assert len(lines_drawn(begun)) <= ROWS + 1, "the torn one alone is drawn again"


def test_transformers_draws_a_shard_whole(tiny_qwen2, tmp_path, monkeypatch):
    """Its draws depend on those beside them, so that what is left of a shard would be drawn otherwise."""
    monkeypatch.setattr(stage, "SHARD_ROWS", 16)
    people, cfg = PEOPLE[:2], EvalConfig(samples=4, max_new_tokens=3, batch_completions=4)

    def progress(done, total, what):
        if done >= 8:
            raise KeyboardInterrupt

    def measured(progress=None):
        return evaluate(
            tiny_qwen2,
            Run(tmp_path),
            [],
            people,
            QUESTIONS[:4],
            "marker",
            cfg,
            3,
            base=True,
            progress=progress,
        )

    with pytest.raises(KeyboardInterrupt):
        measured(progress)
    assert not list(tmp_path.rglob("*.open"))
    done = measured()
    assert done.made == 32 and json.loads((tmp_path / "manifest.json").read_text())["shards"]
