"""Triton's interpreter for the kernels' tests: a driver run in a process of its own, because the switch is read when
triton is first imported. Demands torch alone; holds no tests."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import leakfast

ROOT = Path(leakfast.__file__).resolve().parent.parent


def interpreted(driver, given, folder):
    """What the driver makes of the tensors, by name: it reads sys.argv[1] and writes sys.argv[2]. One thread."""
    old = importlib.metadata.version("triton") < "3.7"
    if old and tuple(map(int, importlib.metadata.version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 does not run with numpy 2.4")
    save_file({name: x.contiguous().clone() for name, x in given.items()}, folder / "given")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "LEAKFAST_AUTOTUNE": "1",
        "LEAKFAST_CACHE": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", driver, folder / "given", folder / "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out")
