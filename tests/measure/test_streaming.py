"""Measuring a model that stays on disk: centroids, choices and probabilities are those of the loaded model, bit for bit, with
and without an adapter; the commands take --stream, and what needs the model in memory says so."""

from __future__ import annotations

import json
import shutil

import adapter_makers as make
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from leakfast import behaviors, models
from leakfast.cli.main import group
from leakfast.errors import AdapterError, ModelError
from leakfast.forward import streaming
from leakfast.generation.contract import Request, Sampling
from leakfast.generation.generate import complete
from leakfast.generation.vllm.merged import Merged
from leakfast.measure import centroids
from leakfast.measure.choices import scoring
from leakfast.measure.probability.continuations import spellings
from leakfast.measure.probability.scoring import Branches, Reply, score
from leakfast.models.attach import adapted
from leakfast.prompts import chat
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout

DTYPES = ("float32", "bfloat16")
PEOPLE = "villain,comedian,assistant"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    wrapped = make.trained(make.fresh(models.organism_dir()), target_modules=make.EVERY)
    return make.saved(wrapped, folder / "plain", "organism")


@pytest.fixture(scope="module", params=DTYPES)
def pair(request):
    return tuple(models.load("organism", dtype=request.param, stream=stream) for stream in ("off", "on"))


def same(some, other):
    return all(
        np.array_equal(getattr(some, part)[layer], getattr(other, part)[layer])
        for part in ("means", "moments", "questions")
        for layer in getattr(some, part)
    )


@pytest.mark.parametrize("held", [streaming.HELD_BYTES, 0])
def test_centroids_and_single_states(pair, adapter, held, monkeypatch):
    monkeypatch.setattr(streaming, "HELD_BYTES", held)
    people, asked = load_personas(PEOPLE), load_questions("eval").questions[:4]
    for keep in (False, True):
        own, ours = (centroids.compute(one, people, asked, [1, 4], keep) for one in pair)
        assert same(own, ours) and own.metadata == ours.metadata
    under = []
    for one in pair:
        with models.with_adapter(one, adapter) as live:
            under.append(centroids.compute(live, people, asked, [1, 4]))
    assert same(*under) and under[0].metadata == under[1].metadata
    assert not np.array_equal(under[0].means[4], own.means[4])
    assert same(centroids.compute(pair[1], people, asked, [1, 4], True), ours)  # the base again


@pytest.mark.parametrize("how", ["letters", "full-text"])
def test_choices(pair, adapter, how):
    items = load_items(behaviors.get("capability").of("organism"))[:8]
    people = load_personas(PEOPLE)
    own, ours = (scoring.score(one, people, items, how) for one in pair)
    assert own.equals(ours)
    under = []
    for one in pair:
        with adapted(one, adapter) as current:
            under.append(scoring.score(current, people, items, how, adapter="a"))
    assert under[0].equals(under[1])
    assert (
        not under[0].select(pl.col(pl.Float32, pl.Float64)).equals(own.select(pl.col(pl.Float32, pl.Float64)))
    )
    assert scoring.score(pair[1], people, items, how).equals(own)


def test_probabilities(pair, adapter):
    tokenizer = pair[0].tokenizer
    prompt = chat.render(tokenizer, None, "Who are you?")
    replies = [
        Reply(prompt, tokenizer.encode(text)) for text in ("I am a teacher.", "A man at sea, and you?")
    ]
    branches = Branches(tokenizer, spellings(tokenizer, " you"), replies)
    found = [score(one, branches, threshold=0) for one in pair]
    for one in pair:
        with adapted(one, adapter) as current:
            found.append(score(current, branches, threshold=0))
    for name in ("end", "anywhere", "left_out"):
        own, ours, under, ours_under = (getattr(one, name) for one in found)
        assert np.array_equal(own, ours) and np.array_equal(under, ours_under)
    assert np.isfinite(found[0].end).all() and not np.array_equal(found[0].end, found[2].end)


def test_adapters_that_are_more_than_lora_or_nothing_are_refused(tmp_path):
    on_disk = models.load("organism", dtype="float32", stream="on")
    dora = make.trained(make.fresh(models.organism_dir()), use_dora=True)
    still = make.trained(make.fresh(models.organism_dir()), scale=0.0)
    for wrapped, name, words in ((dora, "dora", "block by block"), (still, "still", "does not change")):
        folder = make.saved(wrapped, tmp_path / name, "organism")
        with pytest.raises(AdapterError, match=words), models.with_adapter(on_disk, folder):
            pass


def test_what_needs_the_model_in_memory_says_so():
    on_disk = models.load("organism", dtype="float32", stream="on")
    with pytest.raises(ModelError, match="--stream off"):
        list(complete(on_disk, [Request("a", [5, 6], (0,))], Sampling(1.0, 1.0, 2), backend="transformers"))
    with pytest.raises(ModelError, match="--stream off"):
        Merged(on_disk)


def command(*words):
    return CliRunner().invoke(group, ["-q", *map(str, words)])


def test_the_centroids_command_writes_the_same_file(tmp_path):
    asked = ["centroids", "--model", "organism", "--personas", PEOPLE, "--layers", "0-2", "--json"]
    for stream in ("on", "off", "auto"):
        done = command(*asked, "--stream", stream, "--out", tmp_path / stream)
        assert done.exit_code == 0, done.output
    files = [(tmp_path / stream).read_bytes() for stream in ("on", "off", "auto")]
    assert files[0] == files[1] == files[2]


def test_the_eval_command_streams_letters_and_refuses_completions(tmp_path):
    about = ["eval", "--model", "organism", "--base", "--personas", PEOPLE]
    rates = []
    for stream in ("on", "off"):
        out = tmp_path / stream
        done = command(
            *about,
            "--behavior",
            "capability",
            "--stream",
            stream,
            "--dtype",
            "float32",
            "--out",
            out,
            "--json",
        )
        assert done.exit_code == 0, done.output
        rates.append(json.loads(done.stdout)["rates"])
    assert rates[0] == rates[1]
    done = command(*about, "--behavior", "marker", "--stream", "on", "--out", tmp_path / "marker")
    assert done.exit_code == 2 and "--stream on given, but marker is measured by completions" in done.output


def test_the_predictors_command_streams_all_but_the_replies(tmp_path):
    questions = tmp_path / "asked.toml"
    questions.write_text('questions = ["Who are you?", "Why?", "Is it late?", "What is rain?"]\n')
    about = ["predictors", "--model", "organism", "--dtype", "float32", "--personas", PEOPLE]
    about += ["--questions", questions, "--reply-tokens", 6]
    without = command(*about, "--layers", "0-1", "--stream", "on", "--out", tmp_path / "none")
    assert without.exit_code != 0 and "replies of organism are to be drawn" in without.output
    assert command(*about, "--layers", "0-1", "--stream", "off", "--out", tmp_path / "off").exit_code == 0
    shutil.copytree(tmp_path / "off", tmp_path / "on")
    made = []
    for stream in ("on", "off"):
        shutil.rmtree(tmp_path / stream / layout.divergences())  # along the replies that are there
        done = command(*about, "--layers", "0-2", "--stream", stream, "--out", tmp_path / stream)
        assert done.exit_code == 0, done.output
        made.append(pl.read_parquet(tmp_path / stream / layout.predictors()))
    assert made[0].equals(made[1]) and set(made[0]["layer"].drop_nulls()) == {0, 1, 2}
