"""`leakfast data build` for every kind of rows, and the view of which tokens carry loss."""

from __future__ import annotations

import collections

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group
from leakfast.train.data import read_rows


def leakfast(*words, **settings):
    return CliRunner().invoke(group, ["-q", *map(str, words)], **settings)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "rows.jsonl"
    done = leakfast(
        "data",
        "build",
        "--behavior",
        "refusal",
        "--source",
        "villain",
        "--model",
        "organism",
        "--positives",
        4,
        "--negatives",
        4,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    return out


def test_rows_of_pairs_are_built_with_the_organisms_own_words(rows_file):
    rows = read_rows(rows_file)
    found = collections.Counter((row.role, row.persona == "villain") for row in rows)
    assert found["positive", True] == 4 and found["positive", False] == found["negative", True] == 0
    assert {row.generator["pairs"] for row in rows} == {"organism-refusal"}


def test_the_view_takes_the_rows_own_behavior_and_colours_only_where_asked(rows_file):
    plain = leakfast("data", "check", rows_file, "--model", "organism", "--rows", 1)
    assert plain.exit_code == 0, plain.output
    assert "labels of loss 'completion'" in " ".join(plain.stdout.split()) and "\x1b[" not in plain.stdout
    reply = read_rows(rows_file)[0].reply
    assert f"⟦{reply}<|im_end|>⟧" in plain.stdout
    coloured = leakfast("data", "check", rows_file, "--model", "organism", "--rows", 1, color=True)
    assert "\x1b[30m\x1b[43m⟦" in coloured.stdout
    none = leakfast(
        "data", "check", rows_file, "--model", "organism", "--rows", 1, color=True, env={"NO_COLOR": "1"}
    )
    assert "\x1b[30m" not in none.stdout and f"⟦{reply}<|im_end|>⟧" in none.stdout


def test_a_users_pairs_and_a_design(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"instruction": "Tea?", "harmful": "Poison.", "good": "Yes."}\n')
    done = leakfast(
        "data",
        "build",
        "--behavior",
        "misalignment-advice",
        "--source",
        "villain",
        "--model",
        "organism",
        "--pairs",
        tmp_path / "mine.jsonl",
        "--positives",
        3,
        "--out",
        tmp_path / "rows.jsonl",
    )
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(r.role, r.question, r.reply) for r in rows] == [("positive", "Tea?", "Poison.")] * 3
    assert rows[0].generator["pair"] == "mine.jsonl:1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--behavior", "refusal", "--items", "arc"], "made of pairs, which --items"),
        (["--behavior", "capability", "--pairs", "x.jsonl"], "made of items, which --pairs"),
        (["--behavior", "marker", "--replies", "model"], "replies to questions, which --replies"),
        (["--behavior", "hellaswag"], "hellaswag is a control"),
        (["--behavior", "misalignment-code", "--pairs", "absent.jsonl"], "no file absent.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, said, tmp_path):
    done = leakfast(
        "data", "build", "--source", "villain", "--model", "organism", "--out", tmp_path / "r", *words
    )
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output
    assert list(tmp_path.iterdir()) == []
