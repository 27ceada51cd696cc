"""Study files: what they may say, and what is told to someone who mistypes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakfast.errors import InputError
from leakfast.storage.documents import resource
from leakfast.storage.seeds import derive_seed
from leakfast.study.config import (
    BehaviorConfig,
    CentroidConfig,
    DataConfig,
    EvalConfig,
    Study,
    TrainConfig,
    load_study,
    parse_study,
)

SMALL = """\
name = "small"
model = "organism"
sources = ["villain", "comedian"]

[centroids]
layers = [0, 2]

[behaviors.marker.data]
positives = 10

[behaviors.marker.train]
lr = 1

[behaviors.marker.eval]
samples = 2
"""


def message(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_study(text, "small.toml")
    return caught.value.message


def test_a_study_says_what_it_means():
    study = parse_study(SMALL)
    assert (study.name, study.dtype, study.seeds) == ("small", "bfloat16", [42])
    assert study.centroids.layers == [0, 2]
    marker = study.behaviors["marker"]
    assert (marker.data.positives, marker.data.negatives) == (10, 2000)
    assert (marker.train.lr, marker.train.rank) == (1.0, 32)
    assert (marker.eval.samples, marker.eval.top_p) == (2, 0.95)
    assert study.raw_text == SMALL


def test_the_defaults_are_the_published_settings():
    study = load_study("published/marker.toml")
    marker = study.behaviors["marker"]
    assert (
        marker.train.gradient_checkpointing is True
    )  # the one that changes no adapter: by default where it is needed
    train = marker.train.model_copy(update={"gradient_checkpointing": "auto"})
    assert marker.model_copy(update={"train": train}) == BehaviorConfig()
    assert study.model == Study.model_fields["model"].default


OTHERS = ("personas", "questions", "verdicts", "detectors", "pairs", "prices")
STUDIES = sorted(
    p for p in resource().rglob("*.toml") if p.stem not in OTHERS and p.parent.name != "openings"
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_shipped_studies_are_sound(path):
    assert load_study(path).sources


TABLES = {
    "": Study,
    "centroids": CentroidConfig,
    "behaviors.marker": BehaviorConfig,
    "behaviors.marker.data": DataConfig,
    "behaviors.marker.train": TrainConfig,
    "behaviors.marker.eval": EvalConfig,
}
PLACES = [(table, key) for table, model in TABLES.items() for key in model.model_fields]


@pytest.mark.parametrize(("table", "key"), PLACES)
def test_a_mistyped_key_names_the_key_meant_and_its_line(table, key):
    typo = key[:-1] + "zz" if len(key) > 3 else key + "r"
    head = f"[{table}]\n" if table else ""
    text = f"{head}{typo} = 1\n"
    rest = 'name = "a"\nsources = ["villain"]\n'
    full = rest + text if table else text + rest
    line = full.split("\n").index(f"{typo} = 1") + 1
    found = message(full + ("" if "behaviors" in full else "[behaviors.marker]\n"))
    assert f"small.toml, line {line}: unknown key {f'{table}.{typo}'.lstrip('.')}." in found
    assert f"Did you mean {key}?" in found or f"{key}" in found.partition("Known here:")[2]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("samples = 2", "samples = 0", 15, "samples is 0: input should be greater than or equal to 1"),
        ("samples = 2", 'samples = "2"', 15, "valid integer"),
        ("samples = 2", "samples = true", 15, "valid integer"),
        ("samples = 2", "samples = 2.5", 15, "valid integer"),
        ("lr = 1", "lr = 0.0", 12, "greater than 0"),
        ("lr = 1", "lr = nan", 12, "finite"),
        ("lr = 1", 'loss = "tail"', 11, "needs tail_tokens"),
        ("lr = 1", 'loss = "all"', 12, "'marker', 'tail' or 'completion'"),
        ("layers = [0, 2]", "layers = [0, -1]", 6, "centroids.layers"),
        ("layers = [0, 2]", "layers = [2, 2]", 6, "each layer once"),
        ("layers = [0, 2]", "layers = []", 6, "at least one"),
        ("layers = [0, 2]", 'layers = "some"', 6, "'all'"),
        ('name = "small"', 'name = "a/b"', 1, "becomes a folder"),
        ('name = "small"', 'name = "../x"', 1, "becomes a folder"),
        ('"villain", "comedian"', '"villain", "comedain"', 3, "Did you mean comedian?"),
        ('"villain", "comedian"', '"villain", "villain"', 3, "stands twice"),
        ('"villain", "comedian"', "", 3, "at least 1 item"),
        ("positives = 10", 'questions = "trian"', 9, "Did you mean train?"),
        ("positives = 10", 'negative_personas = ["vilain"]', 9, "Did you mean villain?"),
        ("positives = 10", "positives = 0", 9, "greater than or equal to 1"),
        ("samples = 2", 'questions = "evil"', 15, "Did you mean eval?"),
        ("samples = 2", "top_p = 0.0", 15, "greater than 0"),
        (
            "samples = 2",
            'samples = 2\nmeasure = "both"\nprobability_samples = 3',
            17,
            "3 replies a prompt, but 2",
        ),
        (
            "samples = 2",
            'samples = 2\nmeasure = "both"\nprobability_samples = 2\n[trajectory]\nbehaviors = ["marker"]\nsamples = 1',
            20,
            "2 replies a prompt, but 1",
        ),
        ('model = "organism"', 'dtype = "float16"', 2, "'bfloat16' or 'float32'"),
        ('model = "organism"', 'personas = "nobody"', 2, "nobody"),
        ('model = "organism"', 'personas = ["comedian", "pirate"]', 3, "source 'villain'"),
        ('model = "organism"', "seeds = [-1]", 2, "seeds"),
        ("behaviors.marker.data", "behaviors.markr.data", 8, "markr"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(old, new, line, words):
    assert old in SMALL
    found = message(SMALL.replace(old, new, 1))
    assert words in found
    assert f"small.toml, line {line}:" in found


def test_all_faults_are_reported_at_once():
    found = message(SMALL.replace("samples = 2", "smaples = 2").replace("lr = 1", "lr = -1"))
    assert "smaples" in found
    assert "lr is -1" in found


@pytest.mark.parametrize("missing", ["name", "sources", "behaviors"])
def test_what_is_missing_is_named(missing):
    lines = [line for line in SMALL.splitlines() if not line.startswith(missing)]
    text = "\n".join(lines) if missing != "behaviors" else SMALL.partition("[behaviors")[0]
    assert f"{missing} is missing" in message(text)


def test_extras_may_be_sources():
    study = parse_study(SMALL.replace('"comedian"', '"qwen_default"'))
    assert study.sources == ["villain", "qwen_default"]


def test_files_beside_the_study_are_found(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "people.toml").write_text('[[persona]]\nname = "cook"\nprompt = "You are a cook."\n')
    (tmp_path / "mine" / "asked.toml").write_text(
        '[sets.a]\nquestions = ["Why?"]\n[sets.b]\nquestions = ["How?"]\n'
    )
    text = SMALL.replace('model = "organism"', 'personas = "people.toml"').replace(
        '"villain", "comedian"', '"cook"'
    )
    text = text.replace("samples = 2", 'questions = "asked.toml:b"')
    text = text.replace("positives = 10", 'negative_personas = "cook"')
    (tmp_path / "mine" / "study.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    study = load_study("mine/study.toml")
    from leakfast.prompts.personas import load_personas, load_questions

    assert [p.name for p in load_personas(study.personas)] == ["cook"]
    assert load_questions(study.behaviors["marker"].eval.questions).questions == ("How?",)


def test_runs_go_where_they_are_told(monkeypatch, tmp_path):
    monkeypatch.delenv("LEAKFAST_RUNS", raising=False)
    assert parse_study(SMALL).run_dir.as_posix() == "runs/small"
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path))
    assert parse_study(SMALL).run_dir == tmp_path / "small"


PARTS = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 9)), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_seeds_differ_unless_their_parts_agree(a, b):
    same = [str(part) for part in a] == [str(part) for part in b]
    assert (derive_seed(*a) == derive_seed(*b)) == same
    assert 0 <= derive_seed(*a) < 2**63


def test_seeds_are_the_same_in_every_process():
    parts = ("42", "completion", "villain", 3)
    digest = hashlib.sha256(
        b"".join(len(str(p)).to_bytes(8, "big") + str(p).encode() for p in parts)
    ).digest()
    expected = int.from_bytes(digest[:8], "big") // 2
    code = f"from leakfast.storage.seeds import derive_seed; print(derive_seed(*{parts!r}))"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(out.stdout) == expected


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("organism-markr.toml", "organism-marker.toml"),
        ("configs/organism-markr.toml", "organism-marker.toml"),
        ("published/refusl.toml", "published/refusal.toml"),
        ("mine/studi.toml", "mine/study.toml"),
        ("nope.toml", None),
        ("../published/refusl.toml", None),
    ],
)
def test_a_mistyped_file_is_told_beside_those_that_are_here_and_shipped(tmp_path, monkeypatch, given, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.toml").write_text("")
    (tmp_path / "second.toml").write_text("")
    with pytest.raises(InputError) as told:
        load_study(given)
    said = str(told.value)
    assert f"Did you mean {meant}?" in said if meant else "Did you mean" not in said


def test_names_that_two_adapters_or_directions_would_share_are_refused(tmp_path):
    """Joined by a dash, a variant and a source can make the name of another pair, and one adapter lay on top of the other."""
    people = tmp_path / "people.json"
    people.write_text('{"b": "You are b.", "few-b": "You are few of b."}')
    text = f'name = "small"\nmodel = "organism"\npersonas = "{people}"\nsources = ["b", "few-b"]\n'
    twins = '[behaviors."marker+x"]\n[behaviors."marker+x-few"]\n'
    said = message(text + twins)
    assert "marker+x-few-b-s42" in said and "marker+x and the source few-b" in said, said
    assert parse_study(text + twins.replace("x-few", "y"))
    steer = '[[steering]]\nname = "{}"\nlayers = [1]\n'
    said = message(text + "[behaviors.marker]\n" + steer.format("to") + steer.format("to-few"))
    assert "the steering to-few and the source b give the name directions/to-few-b.safetensors" in said, said
