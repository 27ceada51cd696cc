"""Weights that the system does not take are told of as every other file, whoever writes them."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leakfast.errors import StoreError
from leakfast.storage.disk import atomic_write
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
