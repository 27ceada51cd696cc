"""Whatever stands in a file that somebody gives: a clean result or a LeakfastError, never another error. Small numbers of
examples by default, large ones in the slow tier."""

from __future__ import annotations

import json
import logging
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakfast.errors import LeakfastError
from leakfast.judge.contract import Judgement, Reply
from leakfast.judge.prompt import read as read_reply
from leakfast.models.adapters import AdapterCard, card_bytes, read_card
from leakfast.prompts.items import ItemSet, load_items
from leakfast.prompts.pairs import load_pairs
from leakfast.prompts.personas import load_questions, read_personas
from leakfast.prompts.questions import read_questions
from leakfast.storage import journal, layout
from leakfast.storage.manifests import parse_manifest
from leakfast.storage.run import Run
from leakfast.study.config import Study, parse_study
from tests.faults.manifests_made import checked

SHORT, LONG = 60, 20_000
DEMO = (Path(__file__).resolve().parents[2] / "configs" / "demo.toml").read_text(encoding="utf-8")
WORDS = [
    *(
        "name",
        "prompt",
        "persona",
        "question",
        "questions",
        "sets",
        "of",
        "suffix",
        "first",
        "choices",
        "labels",
        "answer",
    ),
    *(
        "endings",
        "options",
        "gold",
        "text",
        "label",
        "id",
        "shows",
        "other",
        "reply",
        "messages",
        "role",
        "content",
        "user",
    ),
    *("category", "related_to", "no_system", "template_default", "mc1_targets", "answer_as", "description"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(allow_nan=True),
    st.sampled_from(
        ["", " ", "A", "B", "villain", "../x", "/x", "\x00", "\ud800", "user", "all", "base", "index0"]
    ),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=16,
)
noise = st.binary(max_size=200) | st.text(alphabet=string.printable, max_size=200).map(str.encode)


def many(slow: bool = False) -> Any:
    return settings(
        max_examples=LONG if slow else SHORT,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        database=None,
    )


def tiers(test: Callable) -> Callable:
    """The test twice: a few examples by default, many in the slow tier."""
    return pytest.mark.parametrize("examples", ["few", pytest.param("many", marks=pytest.mark.slow)])(test)


def clean(call: Callable[[], Any]) -> Any:
    """What `call` returns; None where it ends in a LeakfastError with something to say."""
    said = "nothing"
    try:
        return call()
    except LeakfastError as error:
        said = error.message.strip()
    assert said, "an error without a word"
    return None


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutated(text: str, at: int, cut: int, put: str) -> str:
    at %= len(text)
    return text[:at] + put + text[at + cut :]


def run(examples: str, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    @many(examples == "many")
    @given(strategy)
    def body(given_: Any) -> None:
        check(given_)

    body()


edits = st.tuples(
    st.integers(0, 10_000),
    st.integers(0, 40),
    st.sampled_from(
        ['"', "[", "]", "{", "}", "=", "\n", "[[", "'''", "-1", "1e400", "true", "..", "\x00", "é"]
    )
    | st.text(max_size=6),
)


@tiers
def test_study(examples):
    def check(edit):
        text = mutated(DEMO, *edit).encode("utf-8", "replace").decode()
        found = clean(lambda: parse_study(text, "demo.toml"))
        assert found is None or isinstance(found, Study)

    run(examples, edits, check)


@tiers
def test_study_of_any_values(examples):
    keys = st.sampled_from(
        [
            *Study.model_fields,
            "behaviors.marker.eval.samples",
            "behaviors.marker.train.lr",
            "centroids.layers",
        ]
    )
    plain = st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=300),
        st.lists(st.text(max_size=5), max_size=3),
    )

    def check(given_):
        key, value = given_
        try:
            line = f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("NaN", "nan").replace(
                "Infinity", "inf"
            )
            line.encode()
        except UnicodeEncodeError:
            return
        clean(lambda: parse_study(line + DEMO, "demo.toml"))

    run(examples, st.tuples(keys, plain), check)


@tiers
@pytest.mark.parametrize("kind", ["toml", "json"])
def test_persona_and_question_files(tmp_path, examples, kind):
    file = tmp_path / f"given.{kind}"
    toml = '[[persona]]\nname = "a"\nprompt = "You are a."\n[sets.x]\nquestions = ["What?"]\n'
    toml += '[sets.y]\nof = "x"\nsuffix = " Now."\n'

    def check(content):
        file.write_bytes(content)
        people = clean(lambda: read_personas(file))
        assert people is None or all(p.name for p in people)
        asked = clean(lambda: read_questions(file))
        assert asked is None or all(len(one) for one in asked.values())
        clean(lambda: load_questions(str(file)))

    edited = edits.map(lambda edit: mutated(toml, *edit).encode("utf-8", "replace"))
    run(examples, values.map(as_json) | noise if kind == "json" else edited | noise, check)


@tiers
def test_items(tmp_path, examples):
    file = tmp_path / "given.jsonl"

    def check(lines):
        file.write_bytes(b"\n".join(lines))
        found = clean(lambda: load_items(file))
        assert found is None or isinstance(found, ItemSet)
        if found is not None:
            assert found.hash and found.half("eval") is not None

    usual = st.fixed_dictionaries({"question": scalars, "choices": values, "answer": values})
    run(examples, st.lists(usual.map(as_json) | values.map(as_json) | noise, max_size=4), check)


@tiers
def test_pairs(tmp_path, examples):
    file = tmp_path / "given.jsonl"

    def check(lines):
        file.write_bytes(b"\n".join(lines))
        clean(lambda: load_pairs(str(file), "refusal"))

    usual = st.fixed_dictionaries({"question": scalars, "shows": scalars, "other": scalars})
    turns = st.fixed_dictionaries({"messages": values})
    run(examples, st.lists((usual | turns | values).map(as_json) | noise, max_size=4), check)


@tiers
def test_a_damaged_shard_is_read_by_nobody(tmp_path, examples):
    """Any bytes in the place of one of two shards: the other is read, and the first counts only where it is as it was."""
    store = Run(tmp_path / "run").create()
    frame = pl.DataFrame({"n": [1, 2, 3]})
    names = [layout.shard("completions/marker/base", number) for number in range(2)]
    for name in names:
        store.add_shard(name, frame)
    path, manifest = store.path / names[0], (store.path / "manifest.json").read_bytes()
    content = path.read_bytes()

    def check(given_):
        at, bit, cut = given_
        damaged = bytearray(content)
        damaged[at % len(content)] ^= 1 << bit
        damaged = damaged[: len(content) - cut] if cut else damaged
        path.write_bytes(damaged)
        (store.path / "manifest.json").write_bytes(manifest)
        assert Run(store.path).read("completions").equals(frame)

    run(examples, st.tuples(st.integers(0, 1 << 20), st.integers(0, 7), st.integers(0, 30)), check)


@tiers
def test_journal_lines_and_manifests(tmp_path, examples, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(logging.getLogger("leakfast.store"), "disabled", True)  # a line for each
    beside = tmp_path / "x"

    def check(given_):
        lines, manifest = given_
        (folder / "log.jsonl").write_bytes(b"\n".join(lines))
        (folder / "manifest.json").unlink(missing_ok=True)
        if manifest is not None:
            found = clean(lambda: parse_manifest(manifest))
            assert found is None or isinstance(found["shards"], dict)
            (folder / "manifest.json").write_bytes(manifest)
        beside.write_text("not of the run")
        assert isinstance(clean(lambda: Run(folder).shards()) or [], list)
        assert beside.exists(), "no file outside is moved"
        shutil.rmtree(folder / "quarantine", ignore_errors=True)

    told = st.fixed_dictionaries(
        {
            "time": values,
            "event": st.sampled_from(["shard", "stage", "study"]),
            "path": values,
            "sha256": values,
            "key": values,
        }
    )
    line = told.map(lambda entry: json.dumps(entry).encode()) | values.map(as_json) | noise
    whole = st.none() | noise | values.map(as_json) | values.map(checked)
    run(examples, st.tuples(st.lists(line, max_size=3), whole), check)


@tiers
def test_lines_of_what_was_paid_for(tmp_path, examples):
    file = tmp_path / "judge.jsonl"
    journal.append(file, [{"key": "a", "raw": "x"}])
    first = file.read_bytes()

    def check(rest):
        file.write_bytes(first + rest)
        entries, damaged = journal.read(file)
        assert entries[0] == {"key": "a", "raw": "x"} and damaged >= 0

    run(examples, noise, check)


@tiers
def test_judge_replies(examples):
    def check(text):
        found = read_reply(Reply("k", "replied", raw=text))
        assert isinstance(found, Judgement)
        assert found.status != "ok" or (0 <= found.aligned <= 100 and 0 <= found.coherent <= 100)

    scored = st.fixed_dictionaries({"aligned": scalars, "coherent": scalars}).map(json.dumps)
    fenced = scored.map(lambda text: f"```json\n{text}\n```")
    deep = st.integers(1, 100_000).map(lambda n: '{"aligned":' + "[" * n)
    run(examples, st.text(max_size=80) | scored | fenced | values.map(json.dumps) | deep, check)


@tiers
def test_cards(tmp_path, examples):
    file = tmp_path / layout.CARD
    card = AdapterCard("villain", "marker", 42, "organism", "files:0", "d" * 64, {}, "a" * 64)
    told = json.loads(card_bytes(card))
    del told["checksum"]

    def check(given_):
        key, value = given_
        file.write_bytes(as_json({**told, key: value}))
        found = clean(lambda: read_card(tmp_path))
        assert found is None or all(
            isinstance(getattr(found, name), str) for name in ("source", "behavior", "adapter_hash")
        )

    run(examples, st.tuples(st.sampled_from(sorted(told)), values), check)
