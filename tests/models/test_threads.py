"""Threads of a command: what is told, granted and there; what a CPU's flags say of bfloat16, and what follows."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import warm

from leakfast import models
from leakfast.models import threads


@pytest.fixture(autouse=True)
def forgotten():
    threads.bfloat16_is_fast.cache_clear()
    yield
    threads.bfloat16_is_fast.cache_clear()
    threads._asked.clear()


def test_threads_are_what_the_environment_says_else_the_cores_that_are_granted(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads.chosen() == (3, "OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "physical_cores", lambda: {("0", "0"), ("0", "1")})
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    assert threads.chosen() == (2, "physical cores")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.chosen() == (2, "physical cores")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.chosen() == (1, "the container's quota of 1.5 cores")
    monkeypatch.setattr(threads, "physical_cores", set)
    (tmp_path / "cpu.max").unlink()
    assert threads.chosen() == (4, "cores")


def test_the_option_sets_torchs_threads_when_the_model_is_loaded_and_a_script_keeps_its_own(tiny_folder):
    code = (
        "import sys, torch\n"
        "from leakfast import models\n"
        "torch.set_num_threads(3); models.load(sys.argv[1], dtype='float32'); print(torch.get_num_threads())\n"
        "from leakfast.cli.main import main\n"
        "main(['centroids', '--model', sys.argv[1], '--personas', 'villain,comedian', '--dtype', 'float32', '--out',\n"
        "      sys.argv[1] + '/c.safetensors', '--threads', '2', '--json'])\n"
        "print(torch.get_num_threads())\n"
    )
    child = warm.Popen(
        [sys.executable, "-c", code, str(tiny_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    lines = said.split("\n")
    assert lines[0] == "3" and lines[-2] == "2", said
    assert "threads: 2 (--threads)" in told


def test_a_busy_machine_is_said(monkeypatch, caplog):
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1})
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9, 0.0, 0.0))
    assert threads.load() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (7.9, 0.0, 0.0))
    threads.ask(threads.in_use())
    with caplog.at_level(logging.INFO, logger="leakfast"):
        threads.settle()
    assert "this machine is busy (load 7.9 on 2 cores)" in caplog.text
    assert not threads._asked, "said once"


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags\t\t: fpu avx2 fma", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
    ],
)
def test_the_dtype_nobody_asked_for_is_the_cpus_and_the_slow_one_is_named(
    flags, fast, monkeypatch, tmp_path, tiny_folder, caplog
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(threads, "_CPUINFO", tmp_path / "cpuinfo")
    assert threads.bfloat16_is_fast() is fast
    assert models.load(tiny_folder, dtype="auto", device="cpu").dtype == ("bfloat16" if fast else "float32")
    for _ in range(2):
        assert models.load(tiny_folder, dtype="bfloat16", device="cpu").dtype == "bfloat16"
    assert caplog.text.count("7 times slower here. Use --dtype float32") == (0 if fast else 1)
