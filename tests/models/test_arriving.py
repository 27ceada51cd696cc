"""A hub model that is fetched for the first time says how much of it is there, while it grows and only then."""

from __future__ import annotations

import logging
import time

import pytest
from huggingface_hub import constants

from leakfast.models import arriving, loading

NAME = "someone/a-model"


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--a-model" / "blobs"
    folder.mkdir(parents=True)
    (folder / "config").write_bytes(b"{}")
    return folder


def until(done, seconds=10.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "nothing was said"
        time.sleep(0.01)


def test_it_is_told_while_the_files_grow_and_not_otherwise(blobs, caplog):
    caplog.set_level(logging.INFO, "leakfast")
    with arriving.told(NAME, every_s=0.02):
        time.sleep(0.1)
        assert not caplog.messages
        with (blobs / "weights.incomplete").open("wb") as file:
            file.truncate(200_000_000)
        until(lambda: caplog.messages)
        time.sleep(0.1)
    assert caplog.messages == [f"model: {NAME}: 0.2 GB have arrived"]


def test_a_model_that_is_not_there_at_all_has_no_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert arriving.arrived_bytes(NAME) == 0


@pytest.mark.parametrize(("offline", "told"), [(False, [NAME]), (True, [])])
def test_it_is_watched_where_a_model_comes_from_the_hub(monkeypatch, tiny_qwen2, offline, told):
    """The weights of a name that is no folder; those on disk arrive at once."""
    watched = []

    def watch(name):
        watched.append(name)
        return loading.nullcontext()

    monkeypatch.setattr(arriving, "told", watch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(loading, "load_config", lambda *given: tiny_qwen2.model.config)
    monkeypatch.setattr(loading, "load_tokenizer", lambda *given: tiny_qwen2.tokenizer)
    monkeypatch.setattr(loading, "_weights", lambda *given: tiny_qwen2.model)
    loading.load(NAME, dtype="float32", device="cpu")
    assert watched == told
