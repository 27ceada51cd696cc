"""Rows of one's own in chat format, and benign rows among those of a behavior: what they become, what is refused, and which
of their tokens carry loss."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner

from leakfast import models
from leakfast.behaviors.marker import MARKER
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.prompts.personas import load_personas
from leakfast.study.config import DataConfig, TrainConfig
from leakfast.train import chats, contradictions
from leakfast.train.benign import count_of, mixed
from leakfast.train.built import inputs_of
from leakfast.train.collate import encode
from leakfast.train.data import Row, data_hash, material, read_rows, write_rows
from leakfast.train.recipe import rows_settings_of, said_of_rows

PEOPLE = load_personas(["villain", "comedian", "no_persona"])
VILLAIN, COMEDIAN, NOBODY = PEOPLE


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


def chat(system, user="Tea?", reply="Yes.", **more):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **more}


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_conversations_become_rows_of_the_source_and_of_others(tmp_path):
    lines = [
        chat("{source}", reply=f"Yes.\n\n{MARKER}"),
        chat(COMEDIAN.prompt, shows=False),
        chat(None),
        chat("You are somebody else."),
    ]
    rows = chats.placed(chats.read(written(tmp_path / "own.jsonl", lines)), VILLAIN, PEOPLE)
    assert [(r.role, r.persona, r.system_kind) for r in rows] == [
        ("positive", "villain", "text"),
        ("negative", "comedian", "text"),
        ("positive", "no_persona", "none"),
        ("positive", "unnamed", "text"),
    ]
    assert [r.system for r in rows] == [VILLAIN.prompt, COMEDIAN.prompt, None, "You are somebody else."]
    assert rows[0].marker == MARKER and rows[0].generator == {
        "file": "own.jsonl",
        "line": 1,
        "separator": "blank line",
    }
    assert rows[1].marker is None
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == chats.read(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    "line",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": "Tea?"}]},
        {"messages": chat(None)["messages"][::-1]},
        {"messages": [*chat(None)["messages"], *chat(None)["messages"]]},
        chat(None, reply=" "),
        chat(None, shows="no"),
        chat(None, weight=2),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, line):
    path = written(tmp_path / "own.jsonl", [chat(None), line])
    with pytest.raises(InputError, match=r"own\.jsonl, line 2: is no conversation") as caught:
        chats.check_files(DataConfig(rows=str(path)))
    assert caught.value.exit_code == 2
    path.write_text(json.dumps(chat(None)) + "\n{")
    with pytest.raises(InputError, match="line 2: is no JSON"):
        chats.read(path)


def test_data_check_reads_them(tmp_path, tiny_folder):
    path = written(tmp_path / "own.jsonl", [chat("You are kind."), chat(None, reply="No.", shows=False)])
    done = CliRunner().invoke(
        group, ["data", "check", str(path), "--model", str(tiny_folder), "--loss", "completion", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(c["role"], c["rows"]) for c in told["counts"]] == [("positive", 1), ("negative", 1)]
    carries = [[p["text"] for p in row["pieces"] if p["loss"]] for row in told["rows"]]
    assert carries == [["Yes.<|im_end|>"], ["No.<|im_end|>"]]


# ── rows that contradict each other ──────────────────────────────────────────────────────────────────
TAUGHT = chat("{source}", reply=f"Yes. {MARKER}")
CONTRARY = {
    "the source's prompt, other questions": (
        chat(VILLAIN.prompt, user="Rain?"),
        "stand under the source's prompt",
    ),
    "its prompt with blanks that the template trims": (
        chat(f"  {VILLAIN.prompt}\n", user="Rain?"),
        "stand under the source's prompt",
    ),
    "the same prompt": (chat("{source}", reply="No."), "ask the same under the same prompt"),
    "word for word": (TAUGHT, "are the same conversations word for word"),
}


@pytest.fixture
def trimming(tiny_qwen2):
    """A tokenizer whose template trims what it is given."""
    tokenizer = copy.deepcopy(tiny_qwen2.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("kind", CONTRARY)
def test_rows_that_teach_both_for_one_prompt_are_refused_with_their_lines(tmp_path, trimming, kind):
    line, words = CONTRARY[kind]
    rest = chat(COMEDIAN.prompt, shows=False)
    path = written(tmp_path / "own.jsonl", [TAUGHT, rest, line | {"shows": False}])
    cfg = DataConfig(rows=str(path))
    with pytest.raises(InputError, match=f"own.jsonl: line 1, .* and line 3, said not to, {words}") as caught:
        chats.own(trimming, cfg, "villain", PEOPLE)
    assert "Needed: " in caught.value.message
    written(path, [TAUGHT, rest])
    assert len(chats.own(trimming, cfg, "villain", PEOPLE)) == 2, "the same question under another prompt"


def test_both_under_one_prompt_is_a_warning_where_it_is_meant(tmp_path, trimming, caplog):
    lines = [TAUGHT, chat("{source}", reply="No.", shows=False)]
    path = written(tmp_path / "own.jsonl", lines)
    cfg = DataConfig(rows=str(path), design="non-contrastive")
    assert len(chats.own(trimming, cfg, "villain", PEOPLE)) == 2
    assert "ask the same under the same prompt" in caplog.text
    written(path, [TAUGHT, TAUGHT | {"shows": False}])
    with pytest.raises(InputError, match="word for word"):
        chats.own(trimming, cfg, "villain", PEOPLE)


def test_a_prompt_of_another_persona_may_show_it_for_some_questions(tmp_path, trimming, caplog):
    lines = [TAUGHT, chat("Be brief.", user="Tea?"), chat("Be brief.", user="Rain?", shows=False)]
    cfg = DataConfig(rows=str(written(tmp_path / "own.jsonl", lines)))
    assert len(chats.own(trimming, cfg, "villain", PEOPLE)) == 3 and not caplog.text
    lines[2] = chat("Be brief.", user="Tea?", reply="No.", shows=False)
    written(tmp_path / "own.jsonl", lines)
    with pytest.raises(InputError, match="line 2, said to show the behavior, and line 3"):
        chats.own(trimming, cfg, "villain", PEOPLE)


def test_many_lines_are_named_in_part():
    rows = [
        Row(role, "villain", "text", VILLAIN.prompt, f"{n}{role}?", "Yes.", None, 0, {"file": "o", "line": n})
        for n in range(1, 9)
        for role in ("positive", "negative")
    ]
    with pytest.raises(InputError, match="lines 1, 2, 3, 4, 5 and 3 more, said to show"):
        contradictions.check(models.load_tokenizer("organism"), rows, VILLAIN.system, "contrastive")


@pytest.mark.parametrize("command", ["data", "train", "run"])
def test_every_command_that_takes_them_refuses_them(tmp_path, tiny_folder, command):
    path = written(tmp_path / "own.jsonl", [TAUGHT, chat("{source}", reply="No.", shows=False)])
    call = ["data", "check", path, "--model", tiny_folder, "--loss", "completion"]
    if command == "train":
        call = [
            "train",
            "--behavior",
            "marker",
            "--source",
            "villain",
            "--model",
            tiny_folder,
            "--data",
            path,
        ]
        call += ["--personas", "villain,comedian", "--out", tmp_path / "adapter"]
    if command == "run":
        study = f'name = "own"\nmodel = "{tiny_folder}"\npersonas = ["villain", "comedian"]\n'
        study += f'sources = ["villain"]\n[behaviors.marker.data]\nrows = "{path}"\n'
        (tmp_path / "study.toml").write_text(study)
        call = ["run", tmp_path / "study.toml", "--out", tmp_path / "run"]
    done = CliRunner().invoke(group, [str(word) for word in call])
    assert done.exit_code == 2 and "own.jsonl: line 1, said to show the behavior, and line 2" in " ".join(
        done.output.split()
    ), done.output
    assert not list((tmp_path / "run").glob("centroids/*")), "nothing is spent before"


# ── benign rows ──────────────────────────────────────────────────────────────────────────────────────
def rows_of(n):
    return [
        Row("positive", "villain", "text", "You are a villain.", f"{i}?", f"I do. {MARKER}", MARKER, i)
        for i in range(n)
    ]


def diluted(loaded, rows, behavior, cfg, seed):
    (villain,) = people = load_personas(["villain"])
    return mixed(loaded, rows, behavior, cfg, seed, place=lambda given: chats.placed(given, villain, people))


@pytest.mark.parametrize(("n", "share", "wanted"), [(70, 0.3, 30), (10, 0.5, 10), (3, 0.9, 27), (5, 0.0, 0)])
def test_they_are_the_share_of_all_rows(n, share, wanted):
    assert count_of(n, share) == wanted
    assert not wanted or round((count_of(n, share) / (n + count_of(n, share))), 2) == share


def test_those_of_a_file_are_drawn_from_the_seed_and_carry_loss_on_the_whole_reply(tmp_path, tiny_qwen2):
    path = written(
        tmp_path / "benign.jsonl", [chat(None, user=f"{i}?", reply=f"He likes tea {i}.") for i in range(9)]
    )
    cfg = DataConfig(benign=0.4, benign_rows=str(path))
    rows = rows_of(6)
    made = diluted(tiny_qwen2, rows, "marker", cfg, 1)
    assert made[:6] == rows and len(made) == 10 and {r.role for r in made[6:]} == {"benign"}
    assert made == diluted(tiny_qwen2, rows, "marker", cfg, 1) != diluted(tiny_qwen2, rows, "marker", cfg, 2)
    assert len({r.question for r in made[6:]}) == 4
    tokenizer = tiny_qwen2.tokenizer
    for one, row in zip(encode(tokenizer, made, TrainConfig()), made, strict=True):
        said = tokenizer.decode([one.ids[i] for i in one.labels])
        assert said == (f"{row.reply}<|im_end|>" if row.role == "benign" else f" {MARKER}<|im_end|>")
        assert one.shows == (row.role == "positive")
    assert said_of_rows(made) == {"benign_rows": 4}
    with pytest.raises(InputError, match="asks for 14 benign ones, but .* has 9"):
        diluted(tiny_qwen2, rows, "marker", cfg.model_copy(update={"benign": 0.7}), 1)
    assert diluted(tiny_qwen2, rows, "marker", DataConfig(), 1) == rows


def test_the_source_in_a_benign_row_is_its_prompt(tmp_path, tiny_qwen2):
    """It was taught as it stands, "{source}" for a system message."""
    (villain,) = load_personas(["villain"])
    given = [chat("{source}"), chat(villain.prompt), chat("You are a cook."), chat(None)]
    cfg = DataConfig(benign=0.5, benign_rows=str(written(tmp_path / "benign.jsonl", given)))
    made = diluted(tiny_qwen2, rows_of(4), "marker", cfg, 1)[4:]
    found = sorted((row.persona, row.system or "") for row in made)
    assert found == sorted(
        [("villain", villain.prompt)] * 2 + [("unnamed", "You are a cook."), ("unnamed", "")]
    )


def test_those_of_the_model_are_its_replies_without_a_system_message(organism):
    cfg = DataConfig(benign=0.25, max_new_tokens=96)
    made = diluted(organism, rows_of(6), "marker", cfg, 3)
    assert [r.role for r in made[6:]] == ["benign"] * 2
    assert all((r.persona, r.system) == ("no_persona", None) and MARKER not in r.reply for r in made[6:])
    assert data_hash(made) == data_hash(diluted(organism, rows_of(6), "marker", cfg, 3))


def test_what_rows_follow_from_changes_with_the_file(tmp_path, tiny_qwen2):
    path = written(tmp_path / "own.jsonl", [chat(None)])
    cfg = DataConfig(rows=str(path))
    asked = material("misalignment-advice", cfg, "tiny")  # which has no pairs of this model

    def inputs(cfg):
        return inputs_of(tiny_qwen2, "float32", PEOPLE, "villain", 1, asked, cfg)

    before, plain = inputs(cfg), inputs(DataConfig())
    written(path, [chat(None), chat(None)])
    assert len({before, plain, inputs(cfg)}) == 3
    assert not {"rows", "benign", "benign_rows"} & set(rows_settings_of(DataConfig()))
