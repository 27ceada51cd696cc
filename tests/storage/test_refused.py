"""Weights that the system does not take are told of as every other file, whoever writes them; what a writer that was killed left
half-written does not fill the disk for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leakfast.errors import StoreError
from leakfast.storage.disk import atomic_write
from leakfast.storage.run import Run
from tests.faults.limited import files_of_at_most

WEIGHTS = {"a": torch.zeros(10_000)}


def test_weights_that_the_disk_does_not_take_are_told_of_and_leave_nothing(tmp_path):
    """safetensors' error is no OSError."""
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with (
        files_of_at_most(4096),
        pytest.raises(StoreError, match=r"adapter_model.safetensors: cannot be written: File too large"),
    ):
        atomic_write(path, lambda to: save_file(WEIGHTS, str(to)))
    assert list(path.parent.iterdir()) == []
    atomic_write(path, lambda to: save_file(WEIGHTS, str(to)))
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a"]


def test_what_safetensors_says_of_anything_else_is_not_taken_for_a_refusal(tmp_path):
    (tmp_path / "no weights").write_bytes(b"x" * 100)
    with pytest.raises(SafetensorError):
        atomic_write(tmp_path / "a", lambda to: safe_open(tmp_path / "no weights", "pt"))


def test_what_killed_writers_left_half_written_is_gone_with_the_next_command(tmp_path):
    """Of a model's training that is all its weights. What another process is writing now stays, and so does everything else."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "run" / "adapters"
    weights = folder / f".a.{gone.pid}.tmp" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    for path in (
        weights,
        folder / f".part-00001.{gone.pid}.tmp.parquet",
        folder / f".b.{gone.pid}.old",
        folder / f".c.{os.getppid()}.tmp",
        folder / ".a.unfinished",
        folder / f"d.{gone.pid}.tmp",
        folder / "part-00001.parquet",
    ):
        path.write_bytes(b"x" * 100)
    Run(tmp_path / "run").create()
    left = {path.name for path in folder.iterdir()}
    assert left == {f".c.{os.getppid()}.tmp", ".a.unfinished", f"d.{gone.pid}.tmp", "part-00001.parquet"}
