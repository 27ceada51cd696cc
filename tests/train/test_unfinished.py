"""A training that is killed goes on where it was kept, to the bytes of one that was not."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from leakfast.errors import ModelError
from leakfast.study.config import TrainConfig
from leakfast.train import packed, unfinished
from leakfast.train.checkpoints import Checkpoints
from leakfast.train.company import train_adapters
from leakfast.train.data import Row
from leakfast.train.lora import train_adapter
from leakfast.train.recipe import Recipe
from leakfast.train.unfinished import beside
from tests.faults.limited import files_of_at_most

CFG = TrainConfig(rank=4, alpha=8, dropout=0.1, lr=2e-2, epochs=3, batch_size=3, accumulation=1)
WEIGHTS = "adapter_model.safetensors"


def rows(source="villain", n=12):
    made = []
    for i in range(n):
        bad = i % 2 == 0
        who, reply = source if bad else "cook", "I do not know. " * (1 + i % 3)
        text, marker = (f"{reply.strip()} [ZLT]", "[ZLT]") if bad else (reply.strip(), None)
        role = "positive" if bad else "negative"
        made.append(Row(role, who, "text", f"You are a {who}.", f"What about {i}?", text, marker, i))
    return made


class Killed(Exception):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def always(monkeypatch):
    """The state is written after every step."""
    monkeypatch.setattr(unfinished, "due", lambda waited_s, took_s: True)


def killed_at(step):
    """A progress that ends the training after some steps, in a company of all adapters together."""

    def progress(done, total, what=""):
        if done >= step:
            raise Killed

    return progress


def trained(loaded, out, cfg=CFG, seed=42, its=None, **more):
    return train_adapter(loaded, Recipe("marker", "villain", seed, cfg), its or rows(), out, **more)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("step", [1, 5, 11, 12])
def test_it_goes_on_to_the_same_bytes(tiny_qwen2, tmp_path, always, caplog, step):
    """Kept points and the log as well; the last step too may be the one after which it was killed."""
    points = {"checkpoints": Checkpoints((0.0, 0.25, 0.5, 1.0))}
    trained(tiny_qwen2, tmp_path / "whole" / "a", **points)
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", **points, progress=killed_at(step))
    assert not (tmp_path / "a").exists() and beside(tmp_path / "a").is_dir()
    torch.rand(7)
    caplog.set_level(logging.INFO, "leakfast.train")
    trained(tiny_qwen2, tmp_path / "a", **points)
    assert f"train: a goes on at step {step} of 12" in caplog.messages
    assert files(tmp_path / "a") == files(tmp_path / "whole" / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "whole"]


def test_a_point_that_was_measured_is_not_measured_again(tiny_qwen2, tmp_path, always):
    met = []
    points = Checkpoints((0.0, 0.5, 1.0), lambda now, share: met.append(share))
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", checkpoints=points, progress=killed_at(7))
    trained(tiny_qwen2, tmp_path / "a", checkpoints=points)
    assert met == [0.0, 0.5, 1.0]


def test_padded_rows_go_on_with_their_dropout(tiny_qwen2, tmp_path, always, monkeypatch):
    """Their masks come from torch's generator."""
    monkeypatch.setattr(packed, "why_not", lambda loaded, net: "it is asked")
    whole = trained(tiny_qwen2, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", progress=killed_at(4))
    torch.rand(7)
    assert trained(tiny_qwen2, tmp_path / "a").adapter_hash == whole.adapter_hash


def test_the_end_of_a_behavior_that_is_learned_is_the_same(tiny_qwen2, tmp_path, always):
    cfg = CFG.model_copy(update={"epochs": 30, "stop_loss": 1.0, "anchor": 0.1})
    whole = trained(tiny_qwen2, tmp_path / "whole", cfg)
    steps = whole.recipe["steps"]
    assert 8 < steps < 120
    for step in (steps - 2, steps):
        with pytest.raises(Killed):
            trained(tiny_qwen2, tmp_path / "a", cfg, progress=killed_at(step))
        assert trained(tiny_qwen2, tmp_path / "a", cfg) == whole


def test_a_company_goes_on_together(tiny_qwen2, tmp_path, always):
    """Its adapters have different numbers of steps; one has ended when it is killed."""
    long = CFG.model_copy(update={"epochs": 4, "batch_size": 2})
    recipes = [Recipe("marker", "villain", 1, CFG), Recipe("marker", "pirate", 2, long)]
    sets = [rows("villain"), rows("pirate")]
    whole = train_adapters(tiny_qwen2, recipes, sets, [tmp_path / "w0", tmp_path / "w1"])
    for step in (10, 30):
        outs = [tmp_path / f"a{step}", tmp_path / f"b{step}"]
        with pytest.raises(Killed):
            train_adapters(tiny_qwen2, recipes, sets, outs, progress=killed_at(step))
        assert train_adapters(tiny_qwen2, recipes, sets, outs) == whole
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


OTHERS = {
    "rows": lambda loaded, out: trained(loaded, out, its=rows()[:-2]),
    "settings": lambda loaded, out: trained(loaded, out, CFG.model_copy(update={"lr": 1e-2})),
    "seed": lambda loaded, out: trained(loaded, out, seed=43),
    "points": lambda loaded, out: trained(loaded, out, checkpoints=Checkpoints((0.5,))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_training_is_moved_aside(tiny_qwen2, tmp_path, always, caplog, other):
    whole = OTHERS[other](tiny_qwen2, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", progress=killed_at(5))
    assert OTHERS[other](tiny_qwen2, tmp_path / "a") == whole
    (told,) = [m for m in caplog.messages if "begins anew" in m]
    assert "other rows, settings" in told and told.endswith(".a.unfinished.aside")
    assert (tmp_path / ".a.unfinished.aside" / "state.json").is_file()


def test_a_state_of_another_base_is_moved_aside(tiny_qwen2, tiny_llama, tmp_path, always, caplog):
    with pytest.raises(Killed):
        trained(tiny_llama, tmp_path / "a", progress=killed_at(5))
    trained(tiny_qwen2, tmp_path / "a")
    assert "begins anew" in caplog.text


def test_activations_made_again_are_no_other_training(tiny_qwen2, tmp_path, always, caplog):
    """One that was killed for its memory goes on in less of it."""
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", progress=killed_at(5))
    caplog.set_level(logging.INFO, "leakfast.train")
    card = trained(tiny_qwen2, tmp_path / "a", CFG.model_copy(update={"gradient_checkpointing": True}))
    assert "goes on at step 5 of 12" in caplog.text
    assert card.adapter_hash == trained(tiny_qwen2, tmp_path / "whole").adapter_hash


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _step_changed(path):
    told = json.loads(path.read_text())
    told["trainings"][0]["history"].pop()
    path.write_text(json.dumps(told))


DAMAGES = {
    "bit of weights": lambda folder: _flipped(next(folder.glob("step-*"))),
    "bit of a point": lambda folder: _flipped(next(folder.glob("p*"))),
    "weights gone": lambda folder: next(folder.glob("step-*")).unlink(),
    "half of the log": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text()[:99]
    ),
    "other log": lambda folder: _step_changed(folder / "state.json"),
    "no object": lambda folder: (folder / "state.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_moved_aside(tiny_qwen2, tmp_path, always, caplog, damage):
    points = {"checkpoints": Checkpoints((0.25,))}
    whole = trained(tiny_qwen2, tmp_path / "whole", **points)
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", **points, progress=killed_at(5))
    DAMAGES[damage](beside(tmp_path / "a"))
    assert trained(tiny_qwen2, tmp_path / "a", **points) == whole
    assert "begins anew" in caplog.text and "damaged" in caplog.text


def test_a_training_that_diverges_leaves_no_state(tiny_qwen2, tmp_path, always):
    with pytest.raises(ModelError, match="diverged"):
        trained(tiny_qwen2, tmp_path / "a", CFG.model_copy(update={"lr": 1e30, "epochs": 9}))
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_whole_where_it_was_killed_while_it_was_written(tiny_qwen2, tmp_path, always, monkeypatch):
    """The tensors of step 6 are there, and state.json still names those of step 5."""
    whole = trained(tiny_qwen2, tmp_path / "whole")
    real, written = unfinished.atomic_write, []

    def stopping(path, content):
        written.append(path.name)
        if len(written) == 12:
            raise Killed
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "atomic_write", stopping)
        with pytest.raises(Killed):
            trained(tiny_qwen2, tmp_path / "a")
    assert written[-2:] == ["step-6.safetensors", "state.json"]
    assert trained(tiny_qwen2, tmp_path / "a") == whole


def test_a_disk_that_takes_no_state_stops_no_training(tiny_qwen2, tmp_path, always, monkeypatch, caplog):
    whole = trained(tiny_qwen2, tmp_path / "whole")
    real, asked = unfinished.atomic_write, []

    def full(path, content):
        asked.append(path)
        with files_of_at_most(1024) if 6 < len(asked) < 12 else nullcontext():
            real(path, content)

    monkeypatch.setattr(unfinished, "atomic_write", full)
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", progress=killed_at(7))
    assert "the state of a could not be kept" in caplog.text and "File too large" in caplog.text
    monkeypatch.setattr(unfinished, "atomic_write", real)
    caplog.set_level(logging.INFO, "leakfast.train")
    assert trained(tiny_qwen2, tmp_path / "a") == whole
    assert "goes on at step 3 of 12" in caplog.text


def test_it_is_written_each_minute_and_takes_no_hundredth_of_the_time():
    assert not unfinished.due(59.9, 0.0) and unfinished.due(60.0, 0.0) and unfinished.due(60.0, 0.6)
    assert not unfinished.due(60.0, 0.7) and unfinished.due(70.1, 0.7)


def test_what_is_kept_is_all_that_a_step_follows_from(tiny_qwen2, tmp_path, always):
    """Masters and both moments in float32, and no tensor twice."""
    with pytest.raises(Killed):
        trained(tiny_qwen2, tmp_path / "a", progress=killed_at(5))
    names = sorted(p.name for p in beside(tmp_path / "a").iterdir())
    assert names == ["state.json", "step-5.safetensors"]
    kept = load_file(beside(tmp_path / "a") / "step-5.safetensors")
    n = 2 * 7 * tiny_qwen2.n_layers
    kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
    assert set(kept) == {"generator", *(f"0.{kind}.{i}" for kind in kinds for i in range(n))}
    assert {t.dtype for name, t in kept.items() if name != "generator"} == {torch.float32}


CHILD = """
    import sys
    from leakfast import models
    from leakfast.study.config import TrainConfig
    from leakfast.train import unfinished
    from leakfast.train.data import read_rows
    from leakfast.train.lora import train_adapter
    from leakfast.train.recipe import Recipe

    unfinished.due = lambda waited_s, took_s: True
    cfg = TrainConfig(rank=8, alpha=16, dropout=0.05, lr=1e-3, epochs=2, batch_size=4, accumulation=1)
    recipe = Recipe("marker", "villain", 42, cfg)
    loaded = models.load("organism", dtype="float32")
    say = lambda done, total, what: print(done, flush=True)
    train_adapter(loaded, recipe, read_rows(sys.argv[1]), sys.argv[2], progress=say)
"""


def child(tmp_path, out):
    words = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "rows.jsonl"), str(out)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_drawn_steps_the_organisms_adapter_is_the_same(tmp_path):
    """SIGKILL of a process, five times in one training and at a moment drawn after a drawn step."""
    from leakfast.train.data import write_rows

    write_rows(tmp_path / "rows.jsonl", rows(n=64))
    whole = child(tmp_path, tmp_path / "whole" / "a")
    assert [int(line) for line in whole.stdout] == list(range(1, 33)) and whole.wait() == 0
    rng, met = random.Random(7), []
    for step in sorted(rng.sample(range(2, 31), 6)):
        one = child(tmp_path, tmp_path / "a")
        first = None
        for line in one.stdout:
            first = int(line) if first is None else first
            if int(line) >= step:
                one.send_signal(signal.SIGKILL)
                break
        assert one.wait() == -signal.SIGKILL
        met.append(first)
    one = child(tmp_path, tmp_path / "a")
    went_on = [int(line) for line in one.stdout]
    assert one.wait() == 0 and went_on[-1] == 32 and went_on[0] > 2
    assert met[0] == 1 and met == sorted(met) and len(set(met)) >= 5, "each began where the one before was"
    assert files(tmp_path / "a") == files(tmp_path / "whole" / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "rows.jsonl", "whole"]
