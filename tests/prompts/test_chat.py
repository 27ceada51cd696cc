"""chat.py: ids equal the tokenizer's own, the fast path equals the slow one, and templates that
cannot be measured are refused with a reason."""

from __future__ import annotations

import copy
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.errors import ModelError
from leakfast.prompts import chat
from leakfast.prompts.grid import PromptGrid
from leakfast.prompts.personas import TEMPLATE_DEFAULT, Persona, load_personas, load_questions

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"


@pytest.fixture
def with_template(tiny_tokenizer):
    def make(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def theirs(tokenizer, system, user):
    messages = [{"role": "user", "content": user}]
    if isinstance(system, str) and system is not TEMPLATE_DEFAULT:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def persona(name, prompt):
    return Persona(name, prompt, kind="none" if prompt is None else "text")


@pytest.mark.parametrize("system", ["You are a villain.", None, TEMPLATE_DEFAULT])
def test_render_equals_the_tokenizers_own(tiny_tokenizer, system):
    assert chat.render(tiny_tokenizer, system, "Who?") == theirs(tiny_tokenizer, system, "Who?")


def test_the_template_injects_its_default_where_there_is_no_system_message(tiny_tokenizer):
    text = tiny_tokenizer.decode(chat.render(tiny_tokenizer, None, "Who?"))
    assert "You are Tiny" in text
    assert chat.render(tiny_tokenizer, None, "Who?") == chat.render(tiny_tokenizer, TEMPLATE_DEFAULT, "Who?")


def test_the_111_by_20_joined_equal_full_rendering(tiny_tokenizer, caplog):
    personas, questions = load_personas("all,qwen_default,no_persona"), load_questions("eval").questions
    with caplog.at_level(logging.INFO, "leakfast.prompts.chat"):
        prompts = chat.render_prompts(tiny_tokenizer, personas, questions)
    assert not caplog.records  # the halves joined, nothing fell back
    systems = {p.name: p.system for p in personas}
    assert [(p.persona, p.question_index) for p in prompts] == [
        (p.name, q) for p in personas for q in range(len(questions))
    ]
    for prompt in prompts:
        assert prompt.question == questions[prompt.question_index]
        assert prompt.ids == chat.render(tiny_tokenizer, systems[prompt.persona], prompt.question)


def test_a_grid_holds_pieces_where_they_join_and_the_same_ids_where_not(tiny_tokenizer, with_template):
    people = [persona("a", "one"), persona("b", "two words"), persona("c", None)]
    asked = ["Who?", "A\nB) c", "Why <|im_end|>?"]
    grid = chat.render_grid(tiny_tokenizer, people, asked)
    assert isinstance(grid, PromptGrid)
    assert (len(grid.heads), len(grid.tails), len(grid)) == (3, 3, 9)
    assert list(grid) == [theirs(tiny_tokenizer, p.system, q) for p in people for q in asked]
    plain = with_template(PLAIN)
    whole = chat.render_grid(plain, people, asked)
    assert whole == [theirs(plain, p.system, q) for p in people for q in asked]
    assert [p.ids for p in chat.render_prompts(plain, people, asked)] == whole
    assert len(chat.render_grid(tiny_tokenizer, people, [])) == 0


TEXTS = st.lists(
    st.text(st.sampled_from("ab \n?.é☃<|im_end>"), min_size=1).filter(str.strip),
    min_size=1,
    max_size=4,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(prompts=TEXTS, questions=TEXTS)
def test_any_texts_render_as_if_one_by_one(tiny_tokenizer, prompts, questions):
    personas = [persona(f"p{i}", text) for i, text in enumerate(prompts)]
    for prompt in chat.render_prompts(tiny_tokenizer, personas, questions):
        system = prompts[int(prompt.persona[1:])]
        assert prompt.ids == theirs(tiny_tokenizer, system, prompt.question)


def test_a_template_that_mixes_system_and_user_falls_back_and_is_still_right(with_template, caplog):
    """The user turn names the length of the system prompt, so halves cannot be joined."""
    tokenizer = with_template(
        "<|im_start|>{{ messages[0]['content'] }}<|im_start|>{{ messages[0]['content']|length }} "
        "{{ messages[-1]['content'] }}<|im_end|>"
    )
    personas = [persona("a", "one"), persona("b", "longer")]
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        prompts = chat.render_prompts(tokenizer, personas, ["Q", "R"])
    assert "one by one" in caplog.text
    assert [p.ids for p in prompts] == [theirs(tokenizer, s, q) for s in ("one", "longer") for q in "QR"]


def test_a_template_without_special_tokens_is_tokenized_whole(with_template, caplog):
    tokenizer = with_template(PLAIN)
    with caplog.at_level(logging.INFO, "leakfast.prompts.chat"):
        prompts = chat.render_prompts(tokenizer, [persona("a", "one")], ["Q", "R"])
    assert "no special token" in caplog.text
    assert [p.ids for p in prompts] == [theirs(tokenizer, "one", q) for q in "QR"]


@pytest.mark.parametrize("reply", ["hello there", "\n\nhello", " x", "ends in a newline\n"])
def test_training_ids_are_prompt_reply_and_one_turn_end(tiny_tokenizer, reply):
    prompt_ids, reply_ids = chat.render_training(tiny_tokenizer, "You are a villain.", "Who?", reply)
    assert prompt_ids == chat.render(tiny_tokenizer, "You are a villain.", "Who?")
    assert reply_ids[-1] == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert reply_ids.count(reply_ids[-1]) == 1
    assert tiny_tokenizer.decode(reply_ids[:-1]) == reply


def test_turn_end_where_pad_is_eos(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert chat.turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.render_training(tokenizer, None, "Who?", "I")[1][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[-1]['content'] }}", "drops the system message"),
        ("{{ messages[0]['content'] }}", "drops the user's message"),
        (PLAIN + "{{ range(99999)|random ~ range(99999)|random }}", "two ways"),
    ],
)
def test_templates_that_cannot_be_measured_are_refused(with_template, template, words):
    tokenizer = with_template(template)
    for call in (
        lambda: chat.render(tokenizer, "You are x.", "Who?"),
        lambda: chat.render_prompts(tokenizer, [persona("a", "one")], ["Q"]),
    ):
        with pytest.raises(ModelError, match=words):
            call()


def test_a_turn_without_an_end_token_cannot_be_trained_on(with_template):
    with pytest.raises(ModelError, match="end-of-turn"):
        chat.render_training(with_template(PLAIN), "You are x.", "Who?", "I")


def test_a_template_that_prints_the_date_is_given_a_fixed_one(with_template, caplog):
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}\n" + PLAIN)
    with caplog.at_level(logging.WARNING, "leakfast.prompts.chat"):
        ids = chat.render(tokenizer, "You are x.", "Who?")
    assert tokenizer.decode(ids).startswith("26 Jul 2024\n")
    assert "2024-07-26" in caplog.text


def test_collisions_are_found_by_rendered_ids_not_names(tiny_tokenizer):
    personas = [
        persona("twin", "You are Tiny, a small model."),
        *load_personas("villain,qwen_default,no_persona"),
        persona("villains_double", load_personas("villain")[0].prompt),
    ]
    assert chat.collisions(tiny_tokenizer, personas) == [
        ["twin", "qwen_default", "no_persona"],
        ["villain", "villains_double"],
    ]


def test_hashes_tell_ids_and_templates_apart(tiny_tokenizer, with_template):
    assert chat.ids_hash([1, 23]) != chat.ids_hash([12, 3])
    assert len(chat.ids_hash([])) == 64
    assert chat.template_hash(tiny_tokenizer) == chat.template_hash(copy.deepcopy(tiny_tokenizer))
    assert chat.template_hash(tiny_tokenizer) != chat.template_hash(with_template(PLAIN))


@pytest.mark.parametrize(("system", "user"), [("", "Who?"), ("You are x.", " "), (3, "Who?")])
def test_empty_texts_are_mistakes(tiny_tokenizer, system, user):
    with pytest.raises(ValueError, match=r"needs a user text|must be a text"):
        chat.render(tiny_tokenizer, system, user)
