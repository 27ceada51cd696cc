"""A reading of a run beside the process that writes it: one moment, whole, and nothing touched."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from leakfast.errors import StoreError
from leakfast.storage import layout
from leakfast.storage.reading import Reading, version
from leakfast.storage.run import Run

FRAME = pl.DataFrame({"a": [1, 2, 3]})


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run").create()
    run.add_shard("completions/one.parquet", FRAME)
    return run


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in path.rglob("*")
    }


def test_it_reads_what_the_run_reads(run):
    assert Reading(run.path).open().read("completions").equals(FRAME)
    assert Reading(run.path).manifest == run.manifest


def test_shards_that_come_later_are_not_in_it_and_change_the_version(run):
    reading = Reading(run.path)
    assert reading.shards() == ["completions/one.parquet"]
    assert reading.version == version(run.path)
    run.add_shard("completions/two.parquet", FRAME)
    assert reading.shards() == ["completions/one.parquet"]
    assert reading.version != version(run.path)
    assert Reading(run.path, reading).shards() == ["completions/one.parquet", "completions/two.parquet"]


def test_a_shard_of_other_bytes_counts_as_absent_and_stays_where_it_is(run):
    reading = Reading(run.path)
    assert reading.has("completions/one.parquet")
    (run.path / "completions/one.parquet").write_bytes(b"other")
    before = tree(run.path)
    assert not Reading(run.path, reading).has("completions/one.parquet")
    assert not reading.has("completions/one.parquet")
    assert tree(run.path) == before


def test_a_damaged_manifest_is_told_by_the_log_and_stays(run):
    (run.path / layout.MANIFEST).write_bytes(b"{")
    before = tree(run.path)
    assert Reading(run.path).shards() == ["completions/one.parquet"]
    assert tree(run.path) == before


def test_nothing_can_be_written_through_it_even_while_the_run_is_locked(run):
    before = tree(run.path)
    reading = Reading(run.path)
    for write in (
        lambda: reading.add_shard("b.parquet", FRAME),
        lambda: reading.add_file("b.txt", b""),
        lambda: reading.mark_done("stats", "0"),
        lambda: reading.log("event"),
        lambda: reading.retire("completions/one.parquet", "why"),
        lambda: reading.create("name = 'other'"),
    ):
        with pytest.raises(StoreError, match="opened to be read"):
            write()
    assert {k: v for k, v in tree(run.path).items() if not k.endswith(".tmp")} == before
    with run.lock():
        assert reading.read("completions").equals(FRAME)


def test_of_what_is_no_run_the_version_is_one_and_the_same(tmp_path):
    assert version(tmp_path) == version(tmp_path / "nothing")
