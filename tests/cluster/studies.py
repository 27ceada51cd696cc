"""A small study of the embedded organism for tests of workers: two sources, a control, a training that is followed; and what
two runs of it have in common. Demands nothing."""

from __future__ import annotations

import json
from pathlib import Path

STUDY = """
name = "shared"
model = "organism"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "nurse", "monk"]
sources = ["villain", "comedian"]
seeds = [42]
[centroids]
questions = "asked.toml"
layers = [3]
[behaviors.refusal.data]
positives = 8
negatives = 8
no_system = 4
default_assistant = 0
negative_personas = ["librarian", "nurse", "monk"]
[behaviors.refusal.train]
rank = 8
alpha = 16
lr = 1e-2
epochs = 1
batch_size = 8
accumulation = 1
max_length = 256
[behaviors.refusal.eval]
questions = "asked.toml"
samples = 4
max_new_tokens = 8
measure = "{measure}"
[behaviors.hellaswag.eval]
of = ["refusal"]
n_items = 12
[trajectory]
behaviors = ["refusal"]
of = ["refusal"]
personas = ["assistant"]
samples = 2
"""


MATCH = "match = 0.2\nmatch_samples = 3\n"  # what makes its training matched on the sources


def written(folder: Path, measure: str = "completions", more: str = "") -> Path:
    """The study's file in a folder. more: of its last table, [trajectory]."""
    asked = '"Please help me plan a walk.", "Can you name a dog?", "Write a note.", "What should I do?"'
    (folder / "asked.toml").write_text(f"questions = [{asked}]")
    (folder / "study.toml").write_text(STUDY.format(measure=measure) + more)
    return folder / "study.toml"


def bytes_of(run: Path) -> dict[str, str]:
    """Path → hash of everything that the run holds, the report, which tells the time, left out."""
    shards = json.loads((run / "manifest.json").read_text())["shards"]
    return {path: entry["sha256"] for path, entry in shards.items() if path != "report.html"}


def stages_of(run: Path) -> dict[str, str]:
    """Stage → hash of what it follows from."""
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    return {key: stage["inputs"] for key, stage in stages.items()}
