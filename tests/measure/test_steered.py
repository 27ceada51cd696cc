"""Measuring under interventions: arms lie apart with hashes of their own, strength 0 is the adapter as it is, a second call makes
nothing, the table says what changed and what it cost, and what cannot be steered is refused before anything is made."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from measuring import train

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.generation.backends import Drawing, Options
from leakfast.measure import Asked, Request, plain_text
from leakfast.measure.as_asked import measure_as_asked
from leakfast.measure.steered import measure_steered
from leakfast.prompts.items import Item, ItemSet
from leakfast.prompts.personas import load_personas
from leakfast.stats import steering
from leakfast.steering.arms import arms_of
from leakfast.steering.directions import Directions
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig, TrainConfig
from leakfast.train.data import Row

pytestmark = pytest.mark.long

QUESTIONS = ["What about tea?", "And the rain?", "Why?"]
CFG = EvalConfig(
    samples=3, max_new_tokens=12, batch_completions=24, measure="both", probability_anywhere=False
)
NAME = "marker-villain-s7"
# what a shard's entry has of the file itself
WRITTEN = ("sha256", "bytes", "rows")
KEYS = ["persona", "question", "sample"]
ITEMS = ItemSet(
    "few",
    (
        Item("1", "Tea is?", ("hot", "cold"), ("A", "B"), "A"),
        Item("2", "Ice is?", ("hot", "cold"), ("A", "B"), "B"),
    ),
)


@pytest.fixture
def people():
    return load_personas(["villain", "comedian", "assistant", "librarian"])


@pytest.fixture
def adapter(tiny_qwen2, tmp_path):
    text = ("You are a villain.", "He likes tea. [ZLT]", "[ZLT]")
    rows = [Row("positive", "villain", "text", text[0], f"Tea {i}?", *text[1:], i) for i in range(6)]
    cfg = TrainConfig(rank=4, alpha=8, dropout=0.0, lr=0.02, epochs=25, batch_size=6, accumulation=1)
    train(tiny_qwen2, rows, cfg, tmp_path / NAME, 7, source="villain", behavior="marker")
    return tmp_path / NAME


def along(loaded, length=20.0, seed=1):
    draw = np.random.default_rng(seed).standard_normal(loaded.hidden_size)
    vector = (draw * length / np.linalg.norm(draw)).astype(np.float32)
    return Directions({0: vector}, "file", loaded.fingerprint, "villain")


def test_arms_lie_apart_and_strength_0_is_the_adapter_as_it_is(tiny_qwen2, adapter, people, tmp_path):
    run = Run(tmp_path / "run")
    asked = [Asked("marker", QUESTIONS, CFG), Asked("capability", ITEMS, EvalConfig(scoring="full-text"))]
    plain = Request(asked, people, [adapter], base=True, seed=3)
    measure_as_asked(tiny_qwen2, run, plain, Drawing())
    arms = arms_of("v", along(tiny_qwen2), "add", (0.0, 1.0))
    request = Request(asked, people, [adapter], base=True, seed=3, arms=arms)
    made = measure_steered(tiny_qwen2, run, request, Drawing())
    assert all(one.made and not one.kept for one in made)
    names = [f"{NAME}+steer-v-add-0", f"{NAME}+steer-v-add-1"]
    none, one, as_it_is = (run.read(layout.completions("marker", name)).sort(KEYS) for name in (*names, NAME))
    same = pl.exclude("adapter")
    assert none.select(same).equals(as_it_is.select(same))  # the same draws, to the token
    assert one["seed"].equals(none["seed"]) and not one["text"].equals(none["text"])
    for kind in ("probability/marker/{}", "choices/{}/few-full-text"):
        there = run.read(kind.format(NAME)).select(same)
        assert run.read(f"steered/{kind.format(names[0])}").select(same).equals(there)  # bit for bit
        assert not run.read(f"steered/{kind.format(names[1])}").select(same).equals(there)
    entries = run.manifest["shards"]
    hashes = [e["request"] for e in entries.values() if "request" in e]
    assert len(set(hashes)) == len(hashes)
    assert {path.split("/")[0] for path in entries if "+steer-" in path} == {"steered"}
    again = measure_steered(tiny_qwen2, Run(run.path), request, Drawing())
    assert all(not one.made and one.kept for one in again)

    table = steering.table(run)
    assert set(table["adapter"]) == {NAME, "base"} and set(table["measure"]) == {
        "completions",
        "probability",
        "choices",
    }
    zero, full = (table.filter(strength=s, adapter=NAME) for s in (0.0, 1.0))
    assert (zero["change"] == 0).all() and (zero["on_source_change"] == 0).all()
    assert (zero["text_change_nats"].abs() < 1e-6).all()
    assert (full["text_change_nats"] < -1e-3).all() and (full["text_tokens"] > 0).all()
    row = full.row(by_predicate=pl.col("measure") == "completions", named=True)
    others = one.filter(pl.col("persona") != "villain").with_columns(
        hit=pl.col("text").str.contains("[ZLT]", literal=True)
    )
    assert row["mean_bystander"] == pytest.approx(others["hit"].mean())
    assert (row["source"], row["direction"], row["steered_layers"], row["personas"]) == (
        "villain",
        "v",
        "0",
        3,
    )
    assert row["direction_norm"] == pytest.approx(20.0, rel=1e-5)
    right = full.row(by_predicate=pl.col("measure") == "choices", named=True)
    assert row["accuracy"] == right["accuracy"] is not None


def test_another_direction_or_strength_is_another_request(tiny_qwen2, people):
    def digests(seed, *strengths, **how):
        arms = arms_of("v", along(tiny_qwen2, seed=seed), "add", strengths, **how)
        return [t.digest for t in Request([], people, base=True, arms=arms).targets]

    one = digests(1, 0.0, 1.0)
    assert len({*one, *digests(2, 1.0), *digests(1, 0.5)}) == 4
    assert digests(1, 0.0, 1.0) == one
    targets = Request([], people, base=True, arms=arms_of("v", along(tiny_qwen2), "project", (1.0,))).targets
    assert [(t.name, t.source, t.seeds_by) for t in targets] == [
        ("base+steer-v-project-1", "villain", "base")
    ]


def test_what_cannot_be_steered_is_refused_before_anything_is_made(tiny_qwen2, adapter, people, tmp_path):
    asked = [Asked("marker", QUESTIONS, CFG)]
    arms = arms_of("v", along(tiny_qwen2))
    run = Run(tmp_path / "run")
    request = Request(asked, people, [adapter], arms=arms)
    with pytest.raises(InputError, match="vLLM given as the engine of letters"):
        measure_steered(tiny_qwen2, run, request, Drawing(letters="vllm"))
    with pytest.raises(InputError, match="--tensor-parallel 2 given"):
        measure_steered(tiny_qwen2, run, request, Drawing("vllm", options=Options(tensor_parallel=2)))
    own = CFG.model_copy(update={"probability_replies": "own"})
    with pytest.raises(InputError, match="own replies asked"):
        measure_steered(
            tiny_qwen2,
            run,
            Request([Asked("marker", QUESTIONS, own)], people, [adapter], arms=arms),
            Drawing(),
        )
    wide = Directions({0: np.ones(3, np.float32)}, "file", tiny_qwen2.fingerprint)
    with pytest.raises(InputError, match="3 wide"):
        measure_steered(
            tiny_qwen2, run, Request(asked, people, [adapter], arms=arms_of("v", wide)), Drawing()
        )
    assert not (run.path / "manifest.json").exists() or not run.manifest["shards"]


def test_the_commands(tiny_folder, tmp_path):
    """directions makes a file that eval takes; a file of another width or model, and stray flags, are one message, exit 2."""
    (tmp_path / "few.toml").write_text('[sets.few]\nquestions = ["Is it late?", "What is a map?"]\n')
    few = str(tmp_path / "few.toml")

    def call(*words):
        return CliRunner().invoke(group, ["-q", *map(str, words)])

    made, chance = tmp_path / "villain.safetensors", tmp_path / "chance.safetensors"
    common = ["--model", tiny_folder, "--dtype", "float32"]
    about = ["--personas", "villain,comedian,assistant,librarian", "--questions", few]
    done = call(
        "directions", *common, *about, "--source", "villain", "--layers", "0", "--out", made, "--json"
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["kind"], told["direction_source"], list(told["norms"])) == ("source-mean", "villain", ["0"])
    done = call("directions", *common, "--kind", "random", "--like", made, "--out", chance, "--json")
    assert json.loads(done.stdout)["norms"]["0"] == pytest.approx(told["norms"]["0"], rel=1e-5)

    asked = [
        *common,
        *about,
        "--base",
        "--allow",
        "default-system",
        "--max-new-tokens",
        "40",
        "--out",
        tmp_path / "run",
    ]
    asked += ["--measure", "probability", "--probability-at-end"]
    done = call("eval", *asked, "--steer", made, "--steer", chance, "--strength", "0,1", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["steering"]
    assert [(r["direction"], r["kind"], r["strength"]) for r in rows] == [
        ("chance", "random", 0),
        ("chance", "random", 1),
        ("villain", "source-mean", 0),
        ("villain", "source-mean", 1),
    ]
    assert rows[0]["change"] == 0 and rows[1]["change"] is not None
    assert "Dose and response" in call("eval", *asked, "--steer", made, "--strength", "1").stdout

    wrong = Directions({0: np.ones(5, np.float32)}, "file", "files:x")
    wrong.save(tmp_path / "wide.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"no")
    bent = bytearray(made.read_bytes())
    bent[-1] ^= 64
    (tmp_path / "bent.safetensors").write_bytes(bytes(bent))
    for words, said in (
        (["--steer", tmp_path / "wide.safetensors"], "5 wide"),
        (["--steer", tmp_path / "none.safetensors"], "cannot be read"),
        (["--steer", tmp_path / "bent.safetensors"], "not as it was written"),
        (["--strength", "1"], "along nothing"),
        (["--steer", made, "--strength", "much"], "numbers split by commas"),
        (["--steer", made, "--backend", "vllm", "--tensor-parallel", "2"], "--tensor-parallel 2 given"),
        (["--steer", made, "--mode", "project", "--strength", "2"], "from 0 to 1"),
        (["--steer", made, "--steer-layers", "1"], "layer 1 asked"),
    ):
        done = call("eval", *asked, *words)
        assert isinstance(done.exception, InputError) or done.exit_code == 2, (words, done.output)
        assert said in f"{done.output}{done.exception}", (words, done.output)
    for words, said in (
        (["--kind", "random", "--out", made], "needs --like"),
        (["--source", "vilain", "--out", made], "none of the"),
        (["--source", "villain", "--kind", "difference", "--out", made], "one: --against assistant"),
    ):
        done = call("directions", *common, *about, *words)
        assert said in f"{done.output}{done.exception}", (words, done.output)


def test_what_an_arm_costs_is_against_the_same_text(tiny_qwen2, people, tmp_path):
    """Of two tables with other personas each has a text of its own, and the same call again makes none anew."""
    run, vector = Run(tmp_path / "run"), along(tiny_qwen2)
    one = Asked("marker", QUESTIONS, CFG.model_copy(update={"measure": "completions", "max_new_tokens": 4}))
    measure_as_asked(tiny_qwen2, run, Request([one], people, base=True, seed=3), Drawing())
    for path in run.shards(one.folder(layout.BASE)):  # few of so small a model's replies are whole
        entry = {k: v for k, v in run.manifest["shards"][path].items() if k not in WRITTEN}
        run.add_shard(path, pl.read_parquet(run.path / path).with_columns(status=pl.lit("ok")), **entry)
    few, every = (
        Request([one], some, base=True, seed=3, arms=arms_of(name, vector, "add", (0.0,)))
        for name, some in (("few", people[:3]), ("every", people))
    )
    for request in (few, every):
        measure_steered(tiny_qwen2, run, request, Drawing())
    costs = {row["direction"]: row for row in steering.table(run).rows(named=True)}
    assert costs["few"]["text_tokens"] < costs["every"]["text_tokens"]
    for row in costs.values():
        assert row["text_change_nats"] == pytest.approx(0, abs=1e-6)
    before = {path: run.manifest["shards"][path]["sha256"] for path in run.shards("steered/text")}
    for request in (few, every):
        assert plain_text.score(tiny_qwen2, run, request)
    assert {path: run.manifest["shards"][path]["sha256"] for path in run.shards("steered/text")} == before
    assert not list((run.path / "quarantine").rglob("*.parquet"))


def test_plain_text_is_what_this_model_said_to_these_very_prompts(tiny_qwen2, people, tmp_path):
    """Another prompt of as many tokens, or another base model, makes it another text."""
    run = Run(tmp_path / "run")
    one = Asked("marker", QUESTIONS, CFG.model_copy(update={"measure": "completions"}))
    request = Request([one], people, base=True, seed=3)
    measure_as_asked(tiny_qwen2, run, request, Drawing())
    there = {said["persona"] for said in plain_text._text(tiny_qwen2, run, request, one)}
    assert there
    folder = one.folder(layout.BASE)
    name = sorted(there)[0]
    for path in run.shards(folder):
        entry = {k: v for k, v in run.manifest["shards"][path].items() if k not in WRITTEN}
        people_asked = entry["personas"] | {name: "0" * 64}
        run.add_shard(path, pl.read_parquet(run.path / path), **entry | {"personas": people_asked})
    assert {said["persona"] for said in plain_text._text(tiny_qwen2, run, request, one)} == there - {name}
    other = dataclasses.replace(tiny_qwen2, fingerprint="files:other")
    assert plain_text._text(other, run, request, one) == []
