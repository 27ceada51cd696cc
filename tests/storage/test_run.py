"""The run directory: whole files or none, damage found and set aside, one writer at a time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakfast.errors import InputError, StoreError
from leakfast.storage.disk import atomic_write, file_hash, write_parquet
from leakfast.storage.run import Run

FRAME = pl.DataFrame({"persona": ["villain", "pirate"], "rate": [0.5, 0.25]})


def shard(number: int) -> str:
    return f"completions/marker/base/part-{number:05d}.parquet"


def python(code: str, *args: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    atomic_write(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    atomic_write(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new"


def test_the_writer_sees_the_suffix(tmp_path):
    seen = []
    atomic_write(tmp_path / "figure.png", lambda path: (seen.append(path), path.write_bytes(b"x")))
    assert seen[0].suffix == ".png"


def test_shards_come_back_as_written(tmp_path):
    run = Run(tmp_path / "run").create("name = 'x'\n")
    run.add_shard(shard(1), FRAME, adapter="base")
    run.add_shard(shard(0), FRAME.head(1))
    again = Run(tmp_path / "run").open()
    assert again.shards("completions/marker") == [shard(0), shard(1)]
    assert again.manifest["shards"][shard(1)]["rows"] == 2
    assert again.manifest["shards"][shard(1)]["adapter"] == "base"
    assert again.read("completions").equals(pl.concat([FRAME.head(1), FRAME]))
    assert again.scan("completions").collect().height == 3
    assert again.study_text == "name = 'x'\n"
    assert again.read("tables").is_empty()


def test_a_prefix_is_a_folder_not_a_beginning(tmp_path):
    run = Run(tmp_path).create()
    run.add_shard("completions/marker/a-s4/part-0.parquet", FRAME)
    run.add_shard("completions/marker/a-s42/part-0.parquet", FRAME)
    assert run.shards("completions/marker/a-s4") == ["completions/marker/a-s4/part-0.parquet"]


@pytest.mark.parametrize("path", ["../x.parquet", "/x.parquet", "a/../../x", ""])
def test_shards_stay_inside(tmp_path, path):
    with pytest.raises(ValueError, match="inside the run"):
        Run(tmp_path / "run").create().add_shard(path, FRAME)


def test_a_file_without_an_entry_does_not_count(tmp_path):
    run = Run(tmp_path).create()
    write_parquet(tmp_path / shard(0), FRAME)
    assert run.shards() == []


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, where, bit):
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder).create()
    for number in range(2):
        run.add_shard(shard(number), FRAME)
    path = folder / shard(1)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(bytes(content))
    fresh = Run(folder)
    assert fresh.shards() == [shard(0)]
    assert (folder / "quarantine" / shard(1)).read_bytes() == bytes(content), "kept for a look"
    assert not path.exists()
    fresh.add_shard(shard(1), FRAME)
    assert Run(folder).shards() == [shard(0), shard(1)]


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_damaged_files_are_set_aside_and_said(tmp_path, damage, caplog):
    run = Run(tmp_path).create()
    path = run.add_shard(shard(0), FRAME)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert Run(tmp_path).shards() == []
    assert shard(0) in caplog.text
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "quarantine"
    assert events[-1]["path"] == shard(0)
    assert (tmp_path / "quarantine" / shard(0)).exists() == (damage != "gone")


def test_damage_is_found_by_a_run_that_read_before(tmp_path):
    run = Run(tmp_path).create()
    path = run.add_shard(shard(0), FRAME)
    assert run.shards() == [shard(0)]
    path.write_bytes(b"other")
    assert run.shards() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "gone"])
def test_a_damaged_manifest_is_rebuilt_from_the_log(tmp_path, damage):
    run = Run(tmp_path).create("study\n")
    run.add_shard(shard(0), FRAME, adapter="base")
    run.add_shard(shard(1), FRAME)
    (tmp_path / shard(1)).write_bytes(b"bad")
    assert run.shards() == [shard(0)]
    run.mark_done("eval", "abc", files=[shard(0)])
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    if damage == "flip":
        at = content.index(b'"rows": 2') + 8
        path.write_bytes(content[:at] + b"3" + content[at + 1 :])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    fresh = Run(tmp_path).open()
    assert fresh.shards() == [shard(0)], "the shard struck out before stays out"
    assert fresh.manifest["shards"][shard(0)]["rows"] == 2
    assert fresh.manifest["shards"][shard(0)]["adapter"] == "base"
    assert fresh.stage_done("eval", "abc")


def test_a_torn_log_line_harms_nobody(tmp_path):
    run = Run(tmp_path).create()
    run.add_shard(shard(0), FRAME)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-01-01", "event": "sha')
    Run(tmp_path).add_shard(shard(1), FRAME)
    (tmp_path / "manifest.json").unlink()
    assert Run(tmp_path).shards() == [shard(0), shard(1)]


def test_stages_are_done_while_their_inputs_and_files_last(tmp_path):
    run = Run(tmp_path).create()
    run.add_shard("tables/rates.parquet", FRAME)
    run.mark_done("stats", "inputs-1", files=["tables/rates.parquet"], note="x")
    assert Run(tmp_path).stage_done("stats", "inputs-1")
    assert not Run(tmp_path).stage_done("stats", "inputs-2")
    assert not Run(tmp_path).stage_done("report", "inputs-1")
    (tmp_path / "tables/rates.parquet").write_bytes(b"x")
    assert not Run(tmp_path).stage_done("stats", "inputs-1")


def test_other_files_are_hashed_too(tmp_path):
    run = Run(tmp_path).create()
    path = run.add_file("centroids/base.safetensors", lambda p: p.write_bytes(b"tensors"), layers=[1])
    assert run.manifest["shards"]["centroids/base.safetensors"]["sha256"] == file_hash(path)
    assert run.has("centroids/base.safetensors")
    path.write_bytes(b"tensorz")
    assert not run.has("centroids/base.safetensors")


def test_another_study_is_noted(tmp_path):
    Run(tmp_path).create("a = 1\n")
    Run(tmp_path).create("a = 1\n")
    Run(tmp_path).create("a = 2\n")
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["study", "study_changed", "study"]
    assert Run(tmp_path).study_text == "a = 2\n"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Run(tmp_path / "absent").open()
    with pytest.raises(InputError, match="is no run"):
        Run(tmp_path).open()
    assert not (tmp_path / "absent").exists(), "looking makes nothing"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    for path in (tmp_path / "runs", tmp_path / "runs" / "demo"):
        with pytest.raises(StoreError) as caught:
            Run(path).create("x")
        assert str(path) in caught.value.message
        assert "A file stands where a folder is needed" in caught.value.message


CREATE = """
import os, sys
from leakfast.errors import StoreError
from leakfast.storage.run import Run
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    Run(sys.argv[1]).create("x")
except StoreError as error:
    print(error.message)
"""


def test_an_unwritable_folder_is_named_with_a_remedy(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o011)
    locked.chmod(0o555)
    out, err = python(CREATE, str(locked / "demo")).communicate(timeout=300)
    assert str(locked / "demo") in out, err
    assert "Permission denied" in out
    assert "LEAKFAST_RUNS=FOLDER" in out
    assert not (locked / "demo").exists()


FULL = """
import resource, signal, sys
import polars as pl
from leakfast.errors import StoreError
from leakfast.storage.run import Run
run = Run(sys.argv[1]).create("x")
run.add_shard("a.parquet", pl.DataFrame({"a": [1]}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    run.add_shard("a.parquet", pl.DataFrame({"a": [str(hex(i * 7919)) for i in range(20000)]}))
except StoreError as error:
    print(error.message)
"""


def test_a_write_that_does_not_fit_leaves_the_old_shard(tmp_path):
    out, err = python(FULL, str(tmp_path)).communicate(timeout=300)
    assert "a.parquet: cannot be written" in out, err
    assert Run(tmp_path).read("a.parquet")["a"].to_list() == [1]
    assert sorted(p.name for p in tmp_path.iterdir() if ".tmp" in p.name) == []


HOLD = """
import sys, time
from leakfast.storage.run import Run
with Run(sys.argv[1]).create().lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_writes_at_a_time_and_death_frees_the_lock(tmp_path):
    holder = python(HOLD, str(tmp_path))
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(StoreError) as caught:
            Run(tmp_path).add_shard(shard(0), FRAME)
        assert str(holder.pid) in caught.value.message
        assert "Wait for it" in caught.value.message
        assert Run(tmp_path).shards() == [], "reading needs no lock"
    finally:
        holder.kill()
        holder.wait()
    Run(tmp_path).add_shard(shard(0), FRAME)


def test_the_lock_nests_within_a_process(tmp_path):
    run = Run(tmp_path).create()
    with run.lock(), Run(tmp_path).lock():
        run.add_shard(shard(0), FRAME)
        Run(tmp_path).add_shard(shard(1), FRAME)
    assert run.shards() == [shard(0), shard(1)]


WRITE = """
import sys
import polars as pl
from leakfast.storage.run import Run
run = Run(sys.argv[1]).create("x")
print("ready", flush=True)
for number in range(40):
    path = f"completions/marker/base/part-{number:05d}.parquet"
    if not run.has(path):
        run.add_shard(path, pl.DataFrame({"n": [number] * 50}))
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path):
    draw = random.Random(0)
    for _ in range(5):
        writer = python(WRITE, str(tmp_path))
        assert writer.stdout.readline().strip() == "ready"
        time.sleep(draw.uniform(0.05, 0.6))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        run = Run(tmp_path)
        found = run.shards()
        assert found == [shard(number) for number in range(len(found))]
        assert set(run.manifest["shards"]) == set(found), "nothing in the manifest is damaged"
        assert not (tmp_path / "quarantine").exists()
    _, err = python(WRITE, str(tmp_path)).communicate(timeout=300)
    assert Run(tmp_path).read("completions")["n"].to_list() == [n for n in range(40) for _ in range(50)], err


def test_two_writers_in_turn_lose_nothing(tmp_path):
    first, second = Run(tmp_path).create(), Run(tmp_path).create()
    first.add_shard(shard(0), FRAME)
    second.add_shard(shard(1), FRAME)
    first.mark_done("a", "1")
    second.mark_done("b", "1")
    fresh = Run(tmp_path)
    assert fresh.shards() == [shard(0), shard(1)]
    assert set(fresh.manifest["stages"]) == {"a", "b"}


def test_a_newer_format_is_not_touched(tmp_path):
    run = Run(tmp_path).create()
    manifest = {**run.manifest, "format": 99}
    run._save(manifest)
    with pytest.raises(StoreError, match="format 99"):
        Run(tmp_path).shards()
    assert (tmp_path / "manifest.json").exists()
