"""What the vLLM engine does around vLLM, with a stand-in for vLLM itself: requests go in by slices, whatever it raises
is said in leakfast's words, and what it made of the settings is told where it can be."""

from __future__ import annotations

import sys
import types
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from measuring import evaluate

from leakfast.errors import InputError, ModelError
from leakfast.generation import backends, vllm
from leakfast.generation.contract import Request, Sampling, Work
from leakfast.generation.generate import complete, generate
from leakfast.generation.vllm.engine import Engine
from leakfast.generation.vllm.start import EngineDied, Explained, Spec, resolved, start
from leakfast.prompts.personas import load_personas
from leakfast.study.config import EvalConfig

pytestmark = pytest.mark.long


class Rejected(Exception):
    """As vLLM 0.32's validation error: neither ValueError nor RuntimeError."""


class Steps:
    """vLLM's engine as far as a stream asks it: `seats` run, each step finishes `each` of them, first come first."""

    def __init__(self, seats: int, each: int) -> None:
        self.seats, self.each, self.waiting = seats, each, deque()
        self.events: list[tuple[str, int]] = []  # ("add", seed) and ("step", requests there were)
        self.raises: BaseException | None = None
        self.aborted: list[str] = []

    def add_request(self, name, prompt, params, lora_request):
        if not prompt["prompt_token_ids"][0]:
            raise Rejected("token 0 is none")
        self.events.append(("add", params.seed))
        self.waiting.append((name, prompt["prompt_token_ids"], params))

    def step(self):
        if self.raises is not None:
            raise self.raises
        self.events.append(("step", len(self.waiting)))
        return [self.answer(*self.waiting.popleft()) for _ in range(min(self.each, len(self.waiting)))]

    def answer(self, name, ids, params):
        output = SimpleNamespace(token_ids=[params.seed % 97], finish_reason="stop", stop_reason=None)
        return SimpleNamespace(request_id=name, finished=True, prompt_token_ids=ids, outputs=[output])

    def abort_request(self, names):
        self.aborted += names


@pytest.fixture
def made(monkeypatch):
    """(seats, each) → an Engine whose vLLM is Steps."""
    package, sampling_params = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    package.__version__, package.SamplingParams = "0", SimpleNamespace
    sampling_params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=None)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)

    def make(seats: int, each: int) -> Engine:
        monkeypatch.setattr(
            "leakfast.generation.vllm.engine.start",
            lambda spec: SimpleNamespace(llm_engine=Steps(seats, each)),
        )
        return Engine(Spec("it", {"max_num_seqs": seats, "max_model_len": 64}, ()))

    return make


def works(n: int, requests: int, samples: int):
    seeds = iter(range(10**6))
    return [
        Work(
            w,
            None,
            [Request(f"{w}.{r}", [1, 2], [next(seeds) for _ in range(samples)]) for r in range(requests)],
        )
        for w in range(n)
    ]


@pytest.mark.parametrize(("seats", "each"), [(512, 300), (512, 3), (8, 8), (1, 1)])
def test_few_requests_go_in_between_two_steps_while_others_run(made, seats, each):
    engine = made(seats, each)
    asked = works(3, 100, 10)
    done = list(engine.stream(asked, Sampling()))
    events = engine._llm.llm_engine.events
    assert [seed for kind, seed in events if kind == "add"] == list(range(3000)), "in order, with their seeds"
    assert [work.key for work, _ in done] == [0, 1, 2]
    for work, completions in done:
        assert sorted((c.request, c.sample) for c in completions) == [
            (r, s) for r in range(100) for s in range(10)
        ]
        assert all(c.token_ids == [work.requests[c.request].seeds[c.sample] % 97] for c in completions)
    runs, most, added = 0, 0, 0
    for kind, n in events:
        if kind == "add":
            added += 1
            continue
        assert n <= 2 * seats
        most = max(most, added if runs else 0)
        runs, added = n - min(each, n), 0
    assert most <= 64, "a step waits for a slice, not for a shard"
    assert sum(kind == "step" for kind, _ in events) <= 3000 / min(each, 64) + 3, "and seats stay taken"


def test_an_arm_is_put_on_when_all_under_the_one_before_are_whole_and_nothing_is_cached(made, monkeypatch):
    engine, (one, again, other) = made(8, 2), [SimpleNamespace(digest=d, label=d) for d in ("a", "a", "b")]
    events = engine._llm.llm_engine.events
    engine._llm.apply_model = lambda put: put(None)
    engine._llm.reset_prefix_cache = lambda: events.append(("forget", len(waiting))) or True
    waiting = engine._llm.llm_engine.waiting

    def put(self, arm, model):
        events.append(("arm", arm and arm.digest))
        self.arm = arm

    monkeypatch.setattr(engine._steered.__class__, "put", put)
    under = [None, one, again, other, None, None]
    asked = [Work(w.key, None, w.requests, steer=arm) for w, arm in zip(works(6, 5, 1), under, strict=True)]
    done = list(engine.stream(asked, Sampling()))
    assert [work.key for work, _ in done] == list(range(6))
    seen = [event for event in events if event[0] in ("arm", "forget")]
    # each change once, with nothing under way
    assert seen == [("arm", "a"), ("forget", 0), ("arm", "b"), ("forget", 0), ("arm", None), ("forget", 0)]
    places = [i for i, event in enumerate(events) if event[0] == "arm"]
    added = [sum(kind == "add" for kind, _ in events[:place]) for place in places]
    assert added == [5, 15, 20]
    engine._llm.reset_prefix_cache = lambda: False
    with pytest.raises(ModelError, match="prefix cache .* was not reset after a change of steering"):
        list(engine.stream([Work(9, None, asked[0].requests, steer=one)], Sampling()))


def test_an_engine_that_has_nothing_yet_decodes_on(made):
    engine = made(8, 2)

    def trickle():
        for work in works(3, 4, 1):
            yield work
            yield None

    assert [work.key for work, _ in engine.stream(trickle(), Sampling())] == [0, 1, 2]


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("lora dtype"),
        Rejected("lora dtype"),
        KeyError("lora dtype"),
        RuntimeError("lora dtype"),
    ],
)
def test_whatever_a_step_raises_is_the_engines_death(made, error):
    engine = made(8, 1)
    engine._llm.llm_engine.raises = error
    with pytest.raises(
        EngineDied, match=r"engine of it died: .*lora dtype.*the same command goes on"
    ) as caught:
        list(engine.stream(works(1, 4, 1), Sampling()))
    assert caught.value.__cause__ is error
    assert engine._llm.llm_engine.aborted == [], "nothing is asked of the dead"


def test_a_request_that_is_refused_is_named_and_no_death(made):
    engine = made(8, 1)
    with pytest.raises(ModelError, match="refuses the request of odd: token 0 is none") as caught:
        list(engine.stream([Work(0, None, [Request("odd", [0], [1])])], Sampling()))
    assert not isinstance(caught.value, EngineDied), "another engine would refuse it too"


def test_interruptions_and_leakfasts_own_errors_pass_as_they_are():
    for error in (KeyboardInterrupt(), SystemExit(), InputError("as said")):
        with pytest.raises(type(error)) as caught, Explained(ModelError):
            raise error
        assert caught.value is error
    with pytest.raises(ModelError, match="^AssertionError$"), Explained(ModelError):
        raise AssertionError


def test_a_vllm_that_cannot_be_imported_or_started_is_said(monkeypatch):
    spec = Spec("it", {"max_num_seqs": 1, "max_model_len": 8}, (), otherwise="--backend transformers")

    def missing(name):
        raise ImportError("libcudart.so.13: no such file")

    broken = types.ModuleType("vllm")
    broken.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "vllm", broken)
    with pytest.raises(ModelError, match=r"did not start: .*libcudart.*--backend transformers"):
        start(spec)


@pytest.mark.parametrize("temperature", [2.5, 0.005])
def test_a_temperature_vllm_would_not_draw_at_is_refused_before_anything_starts(
    tiny_qwen2, tmp_path, temperature
):
    said = rf"temperature {temperature:g} given, but vLLM draws at 0 or from 0.01 to 2"
    cfg = EvalConfig(samples=1, max_new_tokens=2, temperature=temperature)
    asked = (tiny_qwen2, tmp_path / "run", [], load_personas("villain"), ["What?"], "marker", cfg, 3)
    with pytest.raises(InputError, match=said):
        evaluate(*asked, base=True, backend="vllm")
    assert not (tmp_path / "run").exists(), "nothing was begun"
    with pytest.raises(InputError, match=said):
        generate(tiny_qwen2, ["What?"], temperature=temperature, backend="vllm")
    with pytest.raises(InputError, match=said):
        complete(tiny_qwen2, [Request("a", [5], [1])], Sampling(temperature, 1.0, 2), backend="vllm")
    for fine in (Sampling(0.0), Sampling(0.01), Sampling(2.0)):
        backends.check_sampling("vllm", fine)
    backends.check_sampling("transformers", Sampling(temperature))


def test_what_vllm_resolved_is_told_as_far_as_it_tells():
    assert resolved(None) == {} and resolved(SimpleNamespace()) == {}
    layer = SimpleNamespace(attn_backend=type("FlashAttentionBackend", (), {}))
    config = SimpleNamespace(
        use_v2_model_runner=True,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        compilation_config=SimpleNamespace(static_forward_context={"0": layer, "1": SimpleNamespace()}),
    )
    assert resolved(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))) == {
        "model_runner": "V2",
        "attention": "FlashAttentionBackend",
        "async_scheduling": False,
    }


@pytest.mark.parametrize(
    ("gpu", "options", "apart"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"data_parallel": 2}, True),
        (False, {"tensor_parallel": 2}, True),
        (True, {"lora": "merged"}, False),
    ],
)
def test_engines_lie_in_a_process_of_their_own_where_it_matters(tiny_qwen2, monkeypatch, gpu, options, apart):
    """On a GPU, unless its weights come from the model here; and where there are several."""
    opened = []

    class Here:
        def __init__(self, *given):
            opened.append(type(self).__name__)

        def close(self):
            opened.append("closed")

    monkeypatch.setattr(backends, "_on_gpu", lambda: gpu)
    monkeypatch.setattr(vllm, "Engine", Here)
    monkeypatch.setattr(vllm, "Parallel", type("Apart", (Here,), {}))
    monkeypatch.setattr(vllm, "spec_of", lambda *given, **settings: Spec("it", {"max_num_seqs": 1}, ()))
    given = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(list(opened)))
    with backends.opened(tiny_qwen2, [], "vllm", options=backends.Options(**options)):
        pass
    assert opened == ["Apart" if apart else "Here", "closed"]
    assert given == [[]], "what the process holds of the GPU is given back before"
