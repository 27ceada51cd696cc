"""Where a template puts a reply, and what is done where its generation prompt does not lead there: every kind by a small
template, in training, completions, centroids and choices; and all templates of TRL's collection."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import InputError, ModelError
from leakfast.measure.choices.scores import label_ids, prompts_of
from leakfast.models.adapters import AdapterCard, check_fits, write_card
from leakfast.prompts import chat, templates
from leakfast.prompts.items import Item
from leakfast.prompts.personas import TEMPLATE_DEFAULT, Persona, load_personas, load_questions
from leakfast.prompts.rendering import Rendering, asked_by, configure, rendering
from leakfast.study.config import TrainConfig, parse_study
from leakfast.train.collate import encode
from leakfast.train.data import Row

ROOT = Path(__file__).resolve().parents[2]
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
LAST = "{% if m['role'] == 'assistant' and loop.last %}"
THINK = "<think>\n\n</think>\n\n"
PLAIN = HEAD + TAIL + ASKED + "{% endif %}"
INSERTED = (
    HEAD
    + LAST
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    + TAIL
    + ASKED
    + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENED_CLOSED = (
    HEAD + LAST + "{{ '<think>\n\n</think>\n\n' }}{% endif %}" + TAIL + ASKED + "{{ '<think>\n' }}{% endif %}"
)
OPENED_SHORT = (
    HEAD + LAST + "{{ '<think></think>' }}{% endif %}" + TAIL + ASKED + "{{ '<think>\n' }}{% endif %}"
)
OPENED_BARE = HEAD + TAIL + ASKED + "{{ '<think>\n' }}{% endif %}"
CHANNEL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{{ '<|channel|>final<|message|>' if m['role'] == 'assistant' else '<|message|>' }}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
SPACE = HEAD + "{% if m['role'] == 'assistant' %} {% endif %}" + TAIL + ASKED + "{% endif %}"
LONGER = HEAD + TAIL + ASKED + "{{ 'Reply: ' }}{% endif %}"
NO_HEADER = HEAD + TAIL
OTHER_HEADER = HEAD + TAIL + "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
) + PLAIN
NEXT_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM, USER, REPLY = "You are a villain.", "Who?", "I like tea."


@pytest.fixture
def made(tiny_tokenizer):
    """A tokenizer with a template, and how it is asked."""

    def make(template, **how):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
        tokenizer.chat_template = template
        return configure(tokenizer, rendering(**how))

    return make


def own(tokenizer, reply=REPLY, system=SYSTEM):
    """The conversation as the template has it."""
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": reply}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False)


def trained(tokenizer, reply=REPLY, system=SYSTEM):
    prompt, ids = chat.render_training(tokenizer, system, USER, reply)
    return tokenizer.decode([*prompt, *ids])


@pytest.mark.parametrize(
    ("template", "kind", "before"),
    [
        (PLAIN, "equal", ""),
        (INSERTED, "header", THINK),
        (OPENED_CLOSED, "closed", THINK),
        (OPENED_SHORT, "closed", "<think></think>"),
        (CHANNEL, "header", "<|channel|>final<|message|>"),
        (SPACE, "space", ""),
    ],
    ids=["plain", "inserted", "opened", "opened-short", "channel", "space"],
)
@pytest.mark.parametrize("system", [SYSTEM, None])
def test_rows_are_the_templates_own_conversation_and_prompts_end_where_replies_begin(
    made, template, kind, before, system
):
    tokenizer = made(template)
    assert templates.check(tokenizer).kind == kind
    assert own(tokenizer, system=system).rstrip("\n") == trained(tokenizer, system=system)
    measured = tokenizer.decode(chat.render(tokenizer, system, USER))
    assert own(tokenizer, system=system).startswith(measured)
    assert measured.endswith(before)
    prompt, _ = chat.render_training(tokenizer, system, USER, REPLY)
    assert prompt == chat.render(tokenizer, system, USER)


def test_an_open_block_that_the_template_never_closes_is_closed_before_the_reply(made, caplog):
    tokenizer = made(OPENED_BARE)
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        text = trained(tokenizer)
    assert text == own(tokenizer).rstrip("\n").replace(REPLY, THINK + REPLY)
    assert tokenizer.decode(chat.render(tokenizer, SYSTEM, USER)).endswith(THINK)
    assert "the block is closed" in caplog.text and not templates.check(tokenizer).follows


@pytest.mark.parametrize(
    "template", [INSERTED, OPENED_CLOSED, OPENED_SHORT, OPENED_BARE, CHANNEL, SPACE, LONGER]
)
def test_a_difference_is_said_once_and_recorded(made, template, caplog):
    tokenizer = made(template)
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        chat.render(tokenizer, SYSTEM, USER)
        chat.render(tokenizer, None, USER)
    assert [r.getMessage().count("its generation prompt ends in") for r in caplog.records] == [1]
    assert bool(chat.recorded(tokenizer)) == (template != LONGER)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_HEADER, "its generation prompt adds nothing"),
        (OTHER_HEADER, "where its own replies stand after"),
        (NO_SYSTEM, "--system-role user"),
        (PLAIN + "{% if messages|length == 1 %}{{ 'Hm: ' }}{% endif %}", "where there is no system message"),
        ("{{ messages[0]['content'] + messages[1]['content'] }}", "drops the assistant"),
    ],
    ids=["no header", "other header", "no system role", "by system", "no assistant"],
)
def test_a_template_that_does_not_lead_to_its_replies_is_refused_with_the_reason(made, template, words):
    tokenizer = made(template)
    for call in (
        lambda: chat.render(tokenizer, SYSTEM, USER),
        lambda: chat.render_training(tokenizer, SYSTEM, USER, REPLY),
        lambda: chat.render_grid(tokenizer, [Persona("a", SYSTEM, kind="text")], [USER]),
    ):
        with pytest.raises(ModelError, match=words):
            call()


def test_a_generation_prompt_that_goes_on_is_kept_in_training_and_measurement(made):
    tokenizer = made(LONGER)
    assert templates.check(tokenizer).kind == "longer"
    assert tokenizer.decode(chat.render(tokenizer, SYSTEM, USER)).endswith("assistant\nReply: ")
    assert trained(tokenizer).endswith(f"assistant\nReply: {REPLY}<|im_end|>")


def test_the_space_before_a_reply_belongs_to_the_reply(made):
    tokenizer = made(SPACE)
    prompt, reply = chat.render_training(tokenizer, SYSTEM, USER, REPLY)
    assert tokenizer.decode(reply) == f" {REPLY}<|im_end|>"
    assert chat.render_training(tokenizer, SYSTEM, USER, f" {REPLY}") == (
        prompt,
        reply,
    )  # as the model writes it
    (texts,) = chat.render_continuations(tokenizer, [Persona("a", SYSTEM, kind="text")], [USER], [["tea"]])
    assert tokenizer.decode(texts[0][0]) == tokenizer.decode(prompt) + " tea"


def test_a_turn_that_ends_where_the_next_begins_ends_with_that_token(made):
    tokenizer = made(NEXT_TURN)
    assert chat.turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_persona_goes_into_the_user_turn_where_the_study_says_so(made):
    tokenizer = made(NO_SYSTEM, system_role="user")
    text = tokenizer.decode(chat.render(tokenizer, SYSTEM, USER))
    assert text == f"<|im_start|>user\n{SYSTEM}\n\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    for nobody in (None, TEMPLATE_DEFAULT):
        bare = tokenizer.decode(chat.render(tokenizer, nobody, USER))
        assert bare == f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    people = [
        Persona(n, s, kind="text" if s else "none") for n, s in (("a", SYSTEM), ("b", "A poet."), ("c", None))
    ]
    grid = chat.render_grid(tokenizer, people, [USER, "Why?"])
    assert list(grid) == [chat.render(tokenizer, p.system, q) for p in people for q in (USER, "Why?")]
    assert chat.default_system(tokenizer) is None
    assert chat.recorded(tokenizer) == {"system_role": "user"}


# ── the same everywhere ──────────────────────────────────────────────────────────────────────────────
ITEM = Item("i", "What?", ("tea", "rain"), ("A", "B"), 0)


def routes(tokenizer, loaded):
    """Where a prompt is rendered: name → text."""
    from dataclasses import replace

    loaded = replace(loaded, tokenizer=tokenizer)
    people = [Persona("a", SYSTEM, kind="text")]
    row = Row("positive", "a", "text", SYSTEM, USER, REPLY, None, 0)
    (example,) = encode(tokenizer, [row], TrainConfig(loss="completion"))
    continuation = next(iter(chat.render_continuations(tokenizer, people, [USER], [["tea"]])))[0][0]
    return {
        "train": tokenizer.decode(example.ids[: example.n_prompt_tokens]),
        "eval": tokenizer.decode(chat.render_prompts(tokenizer, people, [USER])[0].ids),
        "letters": tokenizer.decode(prompts_of(loaded, people, [ITEM])[0]),
        "full text": tokenizer.decode(continuation).removesuffix("tea"),
    }


def test_template_arguments_reach_every_route(made, tiny_qwen2):
    plain = routes(made(INSERTED.replace(LAST, "{% if false %}")), tiny_qwen2)
    for name, text in routes(made(INSERTED, template_kwargs={"enable_thinking": False}), tiny_qwen2).items():
        assert text == plain[name] + THINK, name


@pytest.mark.parametrize("template", [INSERTED, OPENED_CLOSED, OPENED_SHORT, OPENED_BARE, CHANNEL])
def test_reasoning_is_open_in_completions_alone(made, tiny_qwen2, template):
    closed = routes(made(template), tiny_qwen2)
    opened = routes(made(template, reasoning="open"), tiny_qwen2)
    for name in ("train", "letters", "full text"):
        assert opened[name] == closed[name], name
    assert closed["eval"] == closed["train"]
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    assert opened["eval"] == made(template).apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )


def test_letters_are_one_token_behind_every_opening(made):
    for template in (PLAIN, INSERTED, OPENED_CLOSED, CHANNEL):
        ids, single = label_ids(made(template), [ITEM])
        assert single.all() and ids.shape == (1, 2)


def test_the_organisms_prompts_are_its_templates_own():
    tokenizer = models.load_tokenizer("organism")
    assert templates.check(tokenizer).kind == "equal" and chat.recorded(tokenizer) == {}
    people, questions = load_personas("all,no_persona")[::7], load_questions("eval").questions[:5]
    for prompt in chat.render_prompts(tokenizer, people, questions):
        system = {p.name: p.system for p in people}[prompt.persona]
        messages = [{"role": "system", "content": system}] if isinstance(system, str) else []
        messages.append({"role": "user", "content": prompt.question})
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt.ids == wanted
        assert chat.render(tokenizer, system, prompt.question, reply=True) == wanted


# ── how it is asked for, and recorded ────────────────────────────────────────────────────────────────
def test_an_argument_that_the_template_never_reads_is_refused(made):
    with pytest.raises(ModelError, match="enable_thinkng"):
        chat.render(made(INSERTED, template_kwargs={"enable_thinkng": False}), SYSTEM, USER)
    with pytest.raises(InputError, match="tokenize"):
        rendering({"tokenize": True})
    with pytest.raises(InputError, match="nobody"):
        rendering(system_role="nobody")


STUDY = """
name = "s"
model = "organism"
sources = ["villain"]
template_kwargs = { enable_thinking = false }
system_role = "user"
reasoning = "open"
[behaviors.marker]
"""


def test_flags_go_before_the_study_and_that_before_the_card():
    study = parse_study(STUDY)
    assert asked_by(study) == rendering({"enable_thinking": False}, "user", "open")
    assert asked_by(study, reasoning="closed", template_kwargs=None).described() == {
        "template_kwargs": {"enable_thinking": False},
        "system_role": "user",
    }
    card = AdapterCard(
        "villain", "marker", 1, "m", "f", "d", {"rendering": {"template": "x", "system_role": "user"}}, ""
    )
    assert asked_by(None, card) == Rendering(system_role="user")
    assert asked_by(None, card, system_role="system") == asked_by(None) == Rendering()
    with pytest.raises(InputError, match="template_kwargs"):
        parse_study(STUDY.replace("false", "[1]"))


def folder_with(template, folder, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_commands_render_as_told_and_files_say_how(tiny_folder, tiny_tokenizer, tmp_path):
    folder_with(INSERTED, tiny_folder, tiny_tokenizer)
    out = {}
    for name, more in (("plain", []), ("told", ["--template-kwargs", '{"enable_thinking": false}'])):
        out[name] = tmp_path / f"{name}.safetensors"
        given = "-q centroids --dtype float32 --personas villain,comedian --layers 1 --model".split()
        done = CliRunner().invoke(group, [*given, str(tiny_folder), "--out", str(out[name]), *more])
        assert done.exit_code == 0, done.output
    from leakfast.geometry import Centroids

    told, plain = (Centroids.load(out[name]).metadata for name in ("told", "plain"))
    assert told["rendering"] == {"template_kwargs": {"enable_thinking": False}}
    assert plain["rendering"] == {"opening": {"add": THINK}}
    assert told["rendered_ids_hashes"] == plain["rendered_ids_hashes"]  # two ways to the same prompt
    wrong = CliRunner().invoke(
        group, ["personas", "check", "--model", str(tiny_folder), "--template-kwargs", "no"]
    )
    assert wrong.exit_code == 2 and "JSON object" in wrong.output


def test_an_adapter_that_was_trained_under_another_rendering_is_warned_of_once(
    tiny_qwen2, make_tiny_adapter, caplog, tmp_path
):
    loaded = tiny_qwen2
    adapter = make_tiny_adapter(loaded, tmp_path / "adapter")
    card = models.read_card(adapter)
    assert set(card.recipe["rendering"]) == {"template"}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        check_fits(loaded, adapter)
    assert not caplog.records
    write_card(
        adapter,
        AdapterCard(
            **{
                **vars(card),
                "recipe": {**card.recipe, "rendering": {"template_kwargs": {"enable_thinking": False}}},
            }
        ),
    )
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        check_fits(loaded, adapter)
        check_fits(loaded, adapter)
    assert len(caplog.records) == 1 and "--template-kwargs as in training" in caplog.text


@pytest.mark.parametrize(
    ("file", "template", "warned"),
    [
        ("chat_template.jinja", OPENED_BARE, True),
        ("tokenizer_config.json", OPENED_BARE, True),
        ("chat_template.jinja", "{# the same in other words #}" + PLAIN, False),
        ("chat_template.jinja", NO_SYSTEM, True),
    ],
)
def test_an_adapters_own_template_that_renders_otherwise_is_warned_of(made, tmp_path, file, template, warned):
    text = template if file.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / file).write_text(text, encoding="utf-8")
    said = templates.warn_of_adapter(made(PLAIN), tmp_path)
    assert bool(said) == warned
    assert all("carries another chat template" in words for words in said)


@pytest.fixture
def make_tiny_adapter():
    from measuring import train

    def make(loaded, out):
        rows = [
            Row("positive", "villain", "text", SYSTEM, f"Tea {i}?", "He likes tea.", None, i)
            for i in range(2)
        ]
        cfg = TrainConfig(loss="completion", rank=2, alpha=4, epochs=1, batch_size=2, accumulation=1, lr=0.01)
        train(loaded, rows, cfg, out, 7, source="villain", behavior="marker")
        return out

    return make
