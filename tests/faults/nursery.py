"""Commands of leakfast as forks of one process that has loaded the libraries, so that a try costs its work and not seconds of
imports. Each is a process like any: it can be killed, refused its writes, and given a clock that jumps. Demands fork; holds no
tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.clock import can_jump, library

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 3600.0  # for a command, on a machine that has much else to do
_PROGRAM = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
import matplotlib.pyplot, numba, peft, polars, scipy.stats, transformers
import leakfast.cli.run, leakfast.cli.stats, leakfast.cli.verify, leakfast.figures.files, leakfast.generation.transformers
import leakfast.measure.stage, leakfast.pipeline.stages, leakfast.report, leakfast.stats, leakfast.train.lora
from leakfast.cli.main import main

for line in sys.stdin:
    asked = json.loads(line)
    if "look" in asked:
        pid, status, used = os.wait4(asked["look"], os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps([code, used.ru_utime + used.ru_stime]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    said = os.open(asked["said"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        exec(asked["before"])
        code = main(asked["words"])
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


@dataclass
class Ended:
    """How a command ended: its exit code, what it said, its processor seconds."""

    code: int
    said: str
    cpu_s: float


class Nursery:
    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        if can_jump():
            env["LD_PRELOAD"] = str(library(folder))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def start(self, words: Sequence[object], before: str = "") -> Command:
        """`leakfast WORDS` in a process of its own; before: what it does first, Python."""
        self.number += 1
        said = self.folder / f"said-{self.number}"
        asked = {"words": list(map(str, words)), "before": before, "said": str(said)}
        return Command(self, int(self.ask(asked)), said)

    def run(self, words: Sequence[object], before: str = "") -> Ended:
        return self.start(words, before).ended()

    def ask(self, asked: dict) -> str:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has ended"
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Command:
    def __init__(self, nursery: Nursery, pid: int, said: Path) -> None:
        self.nursery, self.pid, self.said = nursery, pid, said
        self._ended: Ended | None = None

    def poll(self) -> Ended | None:
        if self._ended is None:
            code, cpu_s = json.loads(self.nursery.ask({"look": self.pid}))
            if code is not None:
                self._ended = Ended(code, self.said.read_text(errors="replace"), cpu_s)
        return self._ended

    def ended(self) -> Ended:
        limit = time.monotonic() + LIMIT_S
        while self.poll() is None:
            assert time.monotonic() < limit, self.said.read_text(errors="replace")
            time.sleep(0.05)
        return self._ended
