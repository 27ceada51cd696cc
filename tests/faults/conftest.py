"""What tries of whole commands share: the process they are forked from, a study of the organism that is as small as studies
are, and the run of it that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.nursery import Nursery

STUDY = """
name = "small"
model = "organism"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian"]
sources = ["villain"]
[centroids]
questions = "asked.toml"
layers = [3]
[behaviors.refusal.data]
positives = 4
negatives = 4
no_system = 0
default_assistant = 0
negative_personas = ["librarian", "comedian"]
[behaviors.refusal.train]
rank = 4
alpha = 8
lr = 1e-2
epochs = 1
batch_size = 4
accumulation = 1
max_length = 256
[behaviors.refusal.eval]
questions = "asked.toml"
samples = 2
max_new_tokens = 4
"""


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def small_study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "asked.toml").write_text('questions = ["Please help me plan a walk.", "Can you name a dog?"]')
    (folder / "study.toml").write_text(STUDY)
    return folder / "study.toml"


@pytest.fixture(scope="session")
def undisturbed(nursery, small_study) -> Path:
    out = small_study.parent / "undisturbed"
    found = nursery.run(["run", small_study, "--out", out, "--threads", "1"])
    assert found.code == 0, found.said
    print(f"undisturbed: {found.cpu_s:.1f} s of processor time")
    return out
