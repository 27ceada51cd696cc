"""A run on a real S3 server is the run in a folder: made, resumed elsewhere, held by one driver, whatever the store does."""

from __future__ import annotations

import json
import logging
import time

import polars as pl
import pytest

from leakfast.errors import InputError, StoreError
from leakfast.storage import lease, mirror, objects
from leakfast.storage.mirror import copy_of, reading_copy, working_copy
from leakfast.storage.objects import ConditionError, Objects, address_of
from leakfast.storage.run import Run
from tests.object_store import SECRET, environment, make_bucket, serving

AT = "s3://bucket/runs/one"
STUDY = 'name = "one"\n'


@pytest.fixture(scope="module")
def server():
    with serving() as told:
        yield told


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    """A server without objects and without faults; this machine's cache is tmp_path/here."""
    import requests

    endpoint, faulty = server
    requests.post(f"{endpoint}/moto-api/reset", timeout=60)
    faulty.__init__(faulty.app)
    for name, value in environment(endpoint, tmp_path / "here").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "WAITS_S", (0.0, 0.0))
    make_bucket()
    return faulty


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go to another machine: one with another cache."""
    return lambda name="there": monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path / name))


@pytest.fixture
def one_try(store, monkeypatch):
    """botocore tries nothing again by itself, so that giving up takes no minute."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def make(run: Run, first: int, last: int) -> None:
    run.create(STUDY)
    for number in range(first, last):
        frame = pl.DataFrame({"row": list(range(number, number + 5))})
        run.add_shard(f"completions/part-{number:05d}.parquet", frame, number=number)
    run.mark_done(f"to {last}", "inputs")


def shards_of(run: Run) -> dict:
    return {path: (entry, (run.path / path).read_bytes()) for path, entry in run.manifest["shards"].items()}


def local(tmp_path, last: int) -> Run:
    run = Run(tmp_path / "local")
    make(run, 0, last)
    return run


def test_an_address_survives_a_path():
    from pathlib import Path

    assert address_of("s3://bucket/a/b/") == address_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert address_of("runs/s3") is None and address_of("/s3:/x") is None


def test_the_server_and_the_client_hold_to_conditions(store):
    some = Objects(AT)
    first = some.put("k", b"one", match=None)
    with pytest.raises(ConditionError):
        some.put("k", b"two", match=None)
    second = some.put("k", b"two", match=first)
    with pytest.raises(ConditionError):
        some.put("k", b"three", match=first)
    with pytest.raises(ConditionError):
        some.put("never put", b"x", match=first)
    found = some.get("k")
    assert (found.content, found.etag, found.whole) == (b"two", second, True)
    assert some.get("never put") is None


def test_another_machine_goes_on(store, elsewhere, tmp_path):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 3)
    elsewhere()
    with working_copy(AT) as folder:
        run = Run(folder)
        assert len(run.shards()) == 3 and run.stage_done("to 3", "inputs")
        assert run.study_text == STUDY
        make(run, 3, 6)
    elsewhere("third")
    run = Run(reading_copy(AT)).open()
    assert shards_of(run) == shards_of(local(tmp_path, 6))
    events = [json.loads(line)["event"] for line in (run.path / "log.jsonl").read_bytes().splitlines()]
    assert events.count("shard") == 6 and events.count("stage") == 2  # the journal of both machines
    assert store.listings == 0


def test_files_come_before_the_manifest_that_names_them(store):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 2)
        order = [path.rpartition("/")[2] for path in store.put]
    first, second = (order.index(f"part-0000{n}.parquet") for n in (0, 1))
    assert "manifest.json" in order[first:second] and "manifest.json" in order[second:]


def test_a_second_driver_is_refused_and_let_in_when_the_lease_is_over(store, elsewhere, monkeypatch, caplog):
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    dead = lease.Lease(Objects(AT))
    monkeypatch.setattr(dead, "_renewing", lambda: None)
    dead._thread._target = lambda: None  # a driver that was killed: it renews nothing
    dead.take()
    elsewhere()
    with pytest.raises(
        StoreError, match=r"another driver \(.*process \d+\) is writing this run; its lease ends in [1-3] s"
    ):
        working_copy(AT).__enter__()
    time.sleep(4.1)
    with caplog.at_level(logging.WARNING), working_copy(AT) as folder:
        make(Run(folder), 0, 1)
    assert "taken over from" in caplog.text
    with pytest.raises(StoreError, match="the lease on this run was lost"):
        dead.check()


def test_a_lease_is_renewed_while_its_driver_works_and_given_up_at_its_end(store, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    with working_copy(AT) as folder:
        time.sleep(4.5)
        elsewhere()
        with pytest.raises(StoreError, match="another driver"):
            working_copy(AT).__enter__()
        make(Run(folder), 0, 1)
    with working_copy(AT) as folder:  # at once
        assert len(Run(folder).shards()) == 1


def test_a_driver_that_lost_its_lease_writes_no_more(store, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 2.0)

    def work() -> None:
        with working_copy(AT) as folder:
            make(Run(folder), 0, 1)
            Objects(AT).put(lease.KEY, b'{"holder": "another", "seconds": 60}')
            time.sleep(2.5)  # its next renewal finds the other's
            make(Run(folder), 1, 2)

    with pytest.raises(StoreError, match="lease on this run was lost"):
        work()
    elsewhere()
    assert len(Run(reading_copy(AT)).shards()) == 1


def test_a_manifest_that_another_one_wrote_is_not_overwritten(store):
    def work() -> None:
        with working_copy(AT) as folder:
            make(Run(folder), 0, 1)
            Objects(AT).put("manifest.json", b"another's")
            make(Run(folder), 1, 2)

    with pytest.raises(StoreError, match="another driver wrote it"):
        work()
    assert Objects(AT).get("manifest.json").content == b"another's"


@pytest.mark.parametrize("fault", ["fail_every", "lose_every"])
def test_one_write_in_ten_fails(store, elsewhere, tmp_path, fault):
    setattr(store, fault, 10)
    with working_copy(AT) as folder:
        make(Run(folder), 0, 20)
    assert store.writes > 40
    elsewhere()
    assert shards_of(Run(reading_copy(AT))) == shards_of(local(tmp_path, 20))


def test_a_store_that_is_slow_and_lists_late(store, elsewhere, tmp_path):
    store.slow_s = 0.1
    with working_copy(AT) as folder:
        make(Run(folder), 0, 3)
    elsewhere()
    assert shards_of(Run(reading_copy(AT))) == shards_of(local(tmp_path, 3))
    assert store.listings == 0


def test_a_store_that_takes_no_more_loses_nothing(store, one_try, elsewhere, tmp_path):
    def work() -> None:
        with working_copy(AT) as folder:
            store.refuse = "part-00002"
            make(Run(folder), 0, 6)

    with pytest.raises(StoreError, match=r"part-00002.parquet: the store did not answer .* 3 times"):
        work()
    assert store.failed >= 3
    store.refuse = ""
    with working_copy(AT) as folder:
        assert len(Run(folder).shards()) == 3  # the third is in the copy, though not in the store
        make(Run(folder), 3, 6)
    elsewhere()
    assert shards_of(Run(reading_copy(AT))) == shards_of(local(tmp_path, 6))


def test_a_copy_that_another_driver_left_behind_takes_what_the_store_has(store, elsewhere, tmp_path):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 2)
    elsewhere()
    with working_copy(AT) as folder:
        Run(folder).retire("completions/part-00000.parquet", "its inputs changed")
        make(Run(folder), 2, 4)
    elsewhere("here")
    with working_copy(AT) as folder:
        assert [path[-13:-8] for path in Run(folder).shards()] == ["00001", "00002", "00003"]


def test_an_object_with_other_bytes_is_made_again(store, elsewhere, caplog):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 2)
    Objects(AT).put("completions/part-00001.parquet", b"damaged")
    elsewhere()
    with caplog.at_level(logging.WARNING), working_copy(AT) as folder:
        assert len(Run(folder).shards()) == 1
        make(Run(folder), 1, 2)
    assert "has other bytes than its manifest says" in caplog.text
    elsewhere("third")
    assert len(Run(reading_copy(AT)).shards()) == 2


def test_what_is_made_in_a_copy_that_is_read_stays_there(store):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 1)
    before = Objects(AT).get("manifest.json").etag
    copy = Run(reading_copy(AT))
    copy.add_shard("tables/rates.parquet", pl.DataFrame({"a": [1]}))
    assert Run(reading_copy(AT)).has("tables/rates.parquet")  # and is still there at the next look
    assert Objects(AT).get("manifest.json").etag == before


def test_replies_that_were_paid_for_are_kept(store, elsewhere):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 1)
        (folder / "judge").mkdir()
        (folder / "judge" / "one.jsonl").write_text("a reply\n")
    elsewhere()
    with working_copy(AT) as folder:
        assert (folder / "judge" / "one.jsonl").read_text() == "a reply\n"


def test_what_was_made_before_an_interruption_is_in_the_store(store, elsewhere):
    def work() -> None:
        with working_copy(AT) as folder:
            make(Run(folder), 0, 2)
            Run(folder).log("the last line")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    elsewhere()
    with working_copy(AT) as folder:  # let in at once
        assert len(Run(folder).shards()) == 2
        assert "the last line" in (folder / "log.jsonl").read_text()


def test_names_that_lead_outside_are_not_fetched(store, elsewhere, tmp_path):
    with working_copy(AT) as folder:
        make(Run(folder), 0, 1)
    for name in ("../evil", "judge/../../evil.jsonl", "/etc/evil"):
        Objects(AT).put(mirror.LOOSE, json.dumps([name, 7]).encode())
        elsewhere(f"at{abs(len(name))}")
        reading_copy(AT)
    assert not list(tmp_path.rglob("evil*"))


def test_no_run_no_bucket_no_credentials(store, monkeypatch, tmp_path):
    with pytest.raises(StoreError, match="holds no manifest.json"):
        reading_copy("s3://bucket/nothing/here")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        working_copy("s3://no-such-bucket/x").__enter__()
    with pytest.raises(InputError, match="a bucket and a prefix"):
        working_copy("s3://bucket").__enter__()
    with pytest.raises(InputError, match="leakfast run. alone"):
        Run("s3://bucket/x").create()


def test_without_credentials_it_says_so(store, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="NoCredentialsError"):
        reading_copy(AT)
    s3fs.S3FileSystem.clear_instance_cache()


def test_credentials_are_in_no_file_object_message_or_log(store, one_try, tmp_path, caplog):
    store.refuse = "part-00001"
    with (
        caplog.at_level(logging.INFO, "leakfast"),
        pytest.raises(StoreError) as refused,
        working_copy(AT) as folder,
    ):
        make(Run(folder), 0, 2)
    with pytest.raises(InputError) as given:
        reading_copy(f"s3://key:{SECRET}@bucket/x")
    texts = [refused.value.message, given.value.message, caplog.text]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    texts += [
        Objects(AT).get(name).content.decode("latin-1") for name in ("manifest.json", "log.jsonl", lease.KEY)
    ]
    assert len(texts) > 6
    assert not any(SECRET in text or "a-key-of-the-tests" in text for text in texts)
    assert copy_of(AT).is_dir()
