"""Turns before a question and a prefill of the reply: what prompts then are, on two templates, and what is refused."""

from __future__ import annotations

import copy

import pytest

from leakfast.errors import InputError
from leakfast.measure.centroids import compute
from leakfast.measure.request import Asked, Request
from leakfast.prompts import chat
from leakfast.prompts.conversation import Question, described, told
from leakfast.prompts.grid import PromptGrid
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.prompts.questions import texts_hash
from leakfast.study.config import DataConfig, EvalConfig
from leakfast.train.data import material

ANOTHER = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TURNS = (("Hello?", "Good day."), ("Tea?", "Yes."))
PEOPLE = load_personas(["villain", "comedian", "no_persona"])
SET = """
[sets.plain]
questions = ["Why?", "Who is it?"]
[sets.talk]
questions = ["Why?", "Who is it?"]
turns = [{ user = "Hello?", assistant = "Good day." }, { user = "Tea?", assistant = "Yes." }]
prefill = "I do"
[sets.bytes]
of = "plain"
prefill = [73, 32, 100, 111]
"""


@pytest.fixture(params=["chatml", "another"])
def tokenizer(request, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = tiny_tokenizer.chat_template if request.param == "chatml" else ANOTHER
    return other


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "sets.toml").write_text(SET)
    return lambda name: load_questions(f"{tmp_path / 'sets.toml'}:{name}")


def text(tokenizer, system, question, **how):
    return tokenizer.decode(
        chat.render(tokenizer, system, question, **how), clean_up_tokenization_spaces=False
    )


def test_turns_stand_between_the_persona_and_the_question_and_the_prefill_ends_the_prompt(tokenizer):
    question = Question("Why?", TURNS, "I do")
    between, end = ("\n", "<|im_end|>\n") if tokenizer.chat_template != ANOTHER else (": ", "<|im_end|>")
    said = [
        ("system", "You are a villain."),
        ("user", "Hello?"),
        ("assistant", "Good day."),
        ("user", "Tea?"),
    ]
    said += [("assistant", "Yes."), ("user", "Why?")]
    whole = "".join(f"<|im_start|>{role}{between}{words}{end}" for role, words in said)
    whole += f"<|im_start|>assistant{between}I do"
    assert text(tokenizer, "You are a villain.", question) == whole
    assert text(tokenizer, "You are a villain.", question, reply=True) == whole
    plain = text(tokenizer, "You are a villain.", "Why?")
    assert plain == text(tokenizer, "You are a villain.", Question("Why?")) and "Tea?" not in plain
    prompt, reply = chat.render_training(
        tokenizer, "You are a villain.", Question("Why?", (), "I do"), " not know."
    )
    assert tokenizer.decode(prompt).endswith("I do") and tokenizer.decode(reply) == " not know.<|im_end|>"


def test_a_persona_in_the_user_turn_stands_in_the_first(tiny_tokenizer):
    from leakfast.prompts.rendering import rendering

    own = chat.configure(copy.deepcopy(tiny_tokenizer), rendering(system_role="user"))
    said = text(own, "You are a villain.", Question("Why?", TURNS))
    assert said.index("You are a villain.\n\nHello?") < said.index("Good day.") < said.index("Why?")


def test_a_grid_is_the_prompts_one_by_one(tokenizer, asked):
    questions = asked("talk").questions
    grid = chat.render_grid(tokenizer, PEOPLE, questions)
    assert isinstance(grid, PromptGrid)
    one_by_one = [chat.render(tokenizer, p.system, q) for p in PEOPLE for q in questions]
    assert [list(ids) for ids in grid] == one_by_one
    texts = [[" not", " a"]] * len(questions)
    for found, ids in zip(
        chat.render_continuations(tokenizer, PEOPLE, questions, texts), one_by_one, strict=True
    ):
        assert [tokenizer.decode(its[-n:]) for its, n in found] == [" not", " a"]
        assert all(its[:-n] == ids for its, n in found)


def test_sets_say_it_in_their_file_and_hashes_tell_them_apart(asked):
    talk, plain, given = asked("talk"), asked("plain"), asked("bytes")
    assert [(str(q), q.turns, q.prefill) for q in talk.questions] == [
        (q, TURNS, "I do") for q in plain.questions
    ]
    assert [(q.turns, q.prefill) for q in given.questions] == [((), "I do")] * 2
    assert len({texts_hash(one.questions) for one in (talk, plain, given)}) == 3
    assert described(plain.questions) == list(plain.questions) and told(plain.questions) == {}
    assert texts_hash(["Why?"]) == texts_hash([Question("Why?")])
    assert told(talk.questions) == {"turns": [list(turn) for turn in TURNS], "prefill": "I do"}
    again = copy.deepcopy(talk.questions[0])
    assert (str(again), again.turns, again.prefill) == ("Why?", TURNS, "I do")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("prefill = [195]", r"line 2: the prefill of set 'a' is 1 bytes, of which those from byte 0 on"),
        ("prefill = [73, 226, 130]", "from byte 1 on are no whole character of UTF-8"),
        ('prefill = " "', "the prefill of set 'a' is no text"),
        ("prefill = [256]", "the prefill of set 'a' is no text"),
        ('turns = ["Hello?"]', "turn 0 of set 'a' is no pair"),
        ('turns = [{ user = "Hello?" }]', "turn 0 of set 'a' is no pair"),
        ('turns = "Hello?"', "turn 0 of set 'a' is no pair"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, line, match):
    path = tmp_path / "sets.toml"
    path.write_text(f'\n[sets.a]\nquestions = ["Why?"]\n{line}\n')
    with pytest.raises(InputError, match=match) as caught:
        load_questions(f"{path}:a")
    assert caught.value.exit_code == 2


def test_centroids_and_completions_read_the_same_prompt(tiny_qwen2, asked, tmp_path):
    from leakfast.measure import measure
    from leakfast.storage.run import Run

    made = {name: compute(tiny_qwen2, PEOPLE, asked(name), [0, 1]) for name in ("plain", "talk")}
    hashes = [made[name].metadata["rendered_ids_hashes"] for name in ("plain", "talk")]
    assert hashes[0] != hashes[1] and made["talk"].metadata["prefill"] == "I do"
    run = Run(tmp_path / "run").create()
    cfg = EvalConfig(samples=1, max_new_tokens=5, temperature=0.0)
    with run.lock():
        measure(tiny_qwen2, run, Request([Asked("marker", asked("talk"), cfg)], PEOPLE, base=True))
    frame = run.read("completions/marker")
    (entry,) = [entry for path, entry in run.manifest["shards"].items() if path.startswith("completions/")]
    assert entry["prefill"] == "I do" and entry["turns"] == [list(turn) for turn in TURNS]
    assert entry["questions_sha256"] == texts_hash(asked("talk").questions)
    ids = chat.render(tiny_qwen2.tokenizer, PEOPLE[0].system, asked("talk").questions[0])
    first = frame.filter(persona="villain", question=0).row(0, named=True)
    assert first["n_prompt_tokens"] == len(ids) and not first["text"].startswith("I do")


def test_what_cannot_take_them_says_so(asked, tiny_qwen2, tmp_path):
    from leakfast.measure.probability.openings import Beginnings
    from leakfast.prompts.rendering import rendering

    with pytest.raises(InputError, match="has turns or a prefill, which training rows do not hold"):
        material("marker", DataConfig(questions=f"{tmp_path / 'sets.toml'}:talk"), "organism")
    with pytest.raises(InputError, match="probabilities of openings asked"):
        Beginnings(tiny_qwen2, Asked("refusal", asked("talk"), EvalConfig()), PEOPLE)
    own = chat.configure(copy.deepcopy(tiny_qwen2.tokenizer), rendering(reasoning="open"))
    with pytest.raises(InputError, match='given with reasoning = "open"'):
        chat.render(own, None, asked("talk").questions[0])
