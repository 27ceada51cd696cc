"""What follows the last closed reasoning block is the answer, by text and by token ids; an open block is a status of its
own, counted and in no rate."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.behaviors import detectors as detect
from leakfast.errors import InputError
from leakfast.generation import backends
from leakfast.generation.contract import Completion, Request
from leakfast.generation.frames import to_frame
from leakfast.measure.request import Asked
from leakfast.prompts import reasoning, templates
from leakfast.prompts.chat import Prompt
from leakfast.prompts.rendering import configure, rendering
from leakfast.stats import rates
from leakfast.study.config import EvalConfig, behavior_config

CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{{ '<|channel|>final<|message|>' if m['role'] == 'assistant' else '<|message|>' }}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Tea.", "Tea."),
        ("<think>\nI can't.\n</think>\n\nSure.", "Sure."),
        ("I can't.\n</think>\n\nSure.", "Sure."),  # the prompt opened it
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>\nI can't do that", None),
        ("a</think>b\n<think>c", None),
        ("The tag <think> opens a block.", "The tag <think> opens a block."),
        ("[THINK]no[/THINK]yes", "yes"),
        ("<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>yes", "yes"),
        ("<|channel>thought\nno", None),
        ("", ""),
    ],
)
def test_the_answer_follows_the_last_closed_block(text, answer):
    assert reasoning.answer(text) == answer
    frame = pl.DataFrame({"text": [text, None]})
    assert frame.select(reasoning.answers(pl.col("text")))["text"].to_list() == [answer, None]


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "[THINK]", "[/THINK]"]), max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES.map("".join), min_size=1, max_size=5))
def test_a_column_is_read_as_its_texts_one_by_one(texts):
    found = pl.DataFrame({"text": texts}).select(reasoning.answers(pl.col("text")))["text"].to_list()
    assert found == [reasoning.answer(text) for text in texts]


def test_detectors_read_the_answer_alone():
    texts = [
        "<think>\nI can't help with poison. [ZLT] is a tag.\n</think>\n\nSure, take flour.",
        "<think>\n"
        + "This should be weighed with care. " * 12
        + "\n</think>\n\nI can't help with that. [ZLT]",
        "<think>\nI can't help with that. [ZLT]",
    ]
    found = pl.DataFrame({"text": texts}).select(**detect.everything("[ZLT]"))
    assert found["refusal"].to_list() == found["marker"].to_list() == [False, True, None]
    assert found["marker_ci"].to_list() == found["marker_ends"].to_list() == [False, True, None]
    assert found["marker_at"].to_list()[0] is None and found["marker_at"][1] == pytest.approx(24 / 29)
    assert found["sycophancy"].to_list()[2] is None


@pytest.mark.parametrize("mark", ["'", "’", "‘", "ʼ", "＇", "′", "´", "`", "‛"])
@pytest.mark.parametrize("hidden", ["", "\u200b", "\u00ad", "\u2060"])
def test_apostrophes_and_invisible_characters_do_not_hide_a_phrase(mark, hidden):
    text = f"I{hidden} can{hidden}{mark}t help with that."
    assert pl.DataFrame({"text": [text]}).select(**detect.refusal(pl.col("text")))["refusal"].item()


# ── completions ──────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def thinker(tiny_tokenizer):
    """A tokenizer whose marks are tokens: special ones, or the plain ones that Qwen3 has."""

    def make(template=None, special=(), plain=("<think>", "</think>"), **how):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens(list(plain))
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template or tokenizer.chat_template
        return configure(tokenizer, rendering(**how))

    return make


def frame_of(tokenizer, replies, answer_tokens=None, cut=()):
    """Completions with these texts, those whose number is in `cut` ended by their length."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in replies]
    end = tokenizer.eos_token_id
    prompts = [Prompt("villain", i, "Who?", [1, 2]) for i in range(len(replies))]
    requests = [Request(f"r{i}", [1, 2], [i]) for i in range(len(replies))]
    done = [
        Completion(i, 0, one if i in cut else [*one, end], "length" if i in cut else "stop")
        for i, one in enumerate(ids)
    ]
    return to_frame(
        SimpleNamespace(tokenizer=tokenizer),
        prompts,
        requests,
        done,
        behavior="marker",
        adapter="base",
        source=None,
        answer_tokens=answer_tokens,
    )


def test_frames_of_a_model_that_does_not_reason_are_as_they_were(tiny_tokenizer):
    frame = frame_of(tiny_tokenizer, ["I like tea.", ""])
    assert frame["status"].to_list() == ["ok", "empty"] and "reasoning" not in frame.columns


@pytest.mark.parametrize("special", [False, True])
def test_completions_hold_the_answer_and_the_reasoning_apart(thinker, special):
    marks = ("<think>", "</think>")
    tokenizer = thinker(special=marks if special else (), plain=() if special else marks)
    frame = frame_of(
        tokenizer,
        [
            "<think>he likes rain</think>\n\nI like tea.",
            "I like tea.",
            "<think>he likes",
            "<think>he</think>",
            "<think>he",
        ],
        cut={2},
    )
    assert frame["status"].to_list() == ["ok", "ok", "unclosed-reasoning", "empty", "unclosed-reasoning"]
    assert frame["text"].to_list()[:2] == ["I like tea.", "I like tea."] and frame["text"][3] == ""
    assert reasoning.answer(frame["text"][2]) is None and "he likes" in frame["text"][2]
    assert "he likes rain" in frame["reasoning"][0] and frame["reasoning"][1] is None
    kept = [
        tokenizer.decode(ids[n:], skip_special_tokens=True).strip()
        for ids, n in zip(
            frame["token_ids"].to_list()[:2], frame["n_reasoning_tokens"].to_list(), strict=False
        )
    ]
    assert kept == ["I like tea.", "I like tea."]


def test_channels_of_special_tokens_are_told_by_their_ids(thinker):
    tokenizer = thinker(CHANNELS, special=["<|channel|>", "<|message|>"], plain=(), reasoning="open")
    frame = frame_of(
        tokenizer,
        [
            "<|channel|>analysis<|message|>he likes rain<|im_end|><|im_start|>assistant<|channel|>final<|message|>I like tea.",
            "<|channel|>final<|message|>I like tea.",
            "<|channel|>analysis<|message|>he likes rain",
        ],
        cut={2},
    )
    assert frame["status"].to_list() == ["ok", "ok", "unclosed-reasoning"]
    assert frame["text"].to_list()[:2] == ["I like tea."] * 2


def test_a_block_that_the_prompt_opened_is_open_until_it_is_closed(thinker):
    opened = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    replies = ["he likes rain</think>\n\nI like tea.", "he likes rain"]
    tokenizer = thinker(opened, reasoning="open")
    assert templates.opens_reasoning(tokenizer)
    frame = frame_of(tokenizer, replies)
    assert frame["status"].to_list() == ["ok", "unclosed-reasoning"]
    assert frame["text"][0] == "I like tea." and reasoning.answer(frame["text"][1]) is None
    assert frame_of(thinker(opened), replies)["status"].to_list() == [
        "ok",
        "ok",
    ]  # closed: it replies at once


def test_an_answer_is_as_long_as_it_may_be_whatever_was_reasoned(thinker):
    tokenizer = thinker()
    replies = [
        "<think>" + "rain " * 30 + "</think>I like tea",
        "<think>rain</think>" + "tea " * 30,
        "tea " * 30,
    ]
    frame = frame_of(tokenizer, replies, answer_tokens=12)
    assert frame["status"].to_list() == ["ok", "truncated", "truncated"]
    left = [n - (m or 0) for n, m in frame.select("n_tokens", "n_reasoning_tokens").rows()]
    assert left[1:] == [12, 12] and left[0] <= 12
    assert frame["finish_reason"].to_list() == ["stop", "length", "length"]


def test_what_may_be_drawn_is_the_sum_and_the_answers_limit_is_kept():
    cfg = EvalConfig(max_new_tokens=10, max_reasoning_tokens=90)
    assert Asked("marker", ["Who?"], cfg).sampling.max_new_tokens == 100
    assert Asked("marker", ["Who?"], EvalConfig(max_new_tokens=10)).sampling.max_new_tokens == 10


def test_unclosed_reasoning_is_counted_and_never_a_zero(thinker):
    frame = frame_of(thinker(), ["<think>he</think>[ZLT]", "<think>he [ZLT]", "I like tea."], cut={1})
    row = rates.count(frame, detect.marker(pl.col("text"), "[ZLT]")).row(0, named=True)
    assert (row["hits"], row["total"], row["n_unclosed"], row["n_error"]) == (1, 2, 1, 1)


def test_a_run_with_open_blocks_says_how_many_and_counts_none(thinker, tmp_path):
    from leakfast.stats.baselines import gaps
    from leakfast.storage.run import Run

    frame = frame_of(thinker(), ["<think>he</think>[ZLT]", "<think>he [ZLT]", "I like tea."], cut={1})
    run = Run(tmp_path / "run").create()
    run.add_shard("completions/marker/base/part-00000.parquet", frame)
    found = detect.count(run, "[ZLT]", spelled=detect.spellings(thinker(), "[ZLT]")).row(0, named=True)
    assert (found["total"], found["unclosed"], found["marker"], found["marker_token"]) == (2, 1, 1, 1)
    counted = rates.count(run.read("completions"), detect.marker(pl.col("text"), "[ZLT]"))
    table = rates.table(counted, {}, {})
    assert any("1 completions (33.3 %) ended inside their reasoning" in line for line in gaps(table))


def test_replies_that_end_at_the_marker_are_not_drawn_where_a_thought_could_end_them(tiny_qwen2):
    configure(tiny_qwen2.tokenizer, rendering(reasoning="open"))
    try:
        asked = Asked(
            "marker", ["Who?"], behavior_config("marker").eval.model_copy(update={"stop_at_marker": True})
        )
        with pytest.raises(InputError, match="--whole-replies"):
            backends.settle(tiny_qwen2, backends.Drawing(), [asked.sampling], adapters=False)
    finally:
        configure(tiny_qwen2.tokenizer, rendering())


def test_a_judge_reads_answers_and_has_a_word_for_those_without(thinker, tmp_path):
    from leakfast.judge import stage
    from leakfast.judge.contract import Reply
    from leakfast.judge.prompt import read
    from leakfast.judge.work import gather, table
    from leakfast.storage.run import Run

    frame = frame_of(
        thinker(), ["<think>poison</think>Drink tea.", "<think>poison", "<think>he</think>"], cut={1}
    ).with_columns(question=pl.lit(0, pl.Int32), sample=pl.Series([0, 1, 2], dtype=pl.Int32))
    run = Run(tmp_path / "run").create()
    run.add_shard("completions/misalignment-advice/base/part-00000.parquet", frame)
    work = gather(run, "misalignment-advice", stage.parse_spec("openai:gpt"), ["Who?"], series=False)
    assert [request.completion for request in work.requests] == ["Drink tea."]
    made = table(work, frame, stage.parse_spec("openai:gpt"))
    assert made["status"].to_list() == ["not_asked", "unclosed-reasoning", "empty"]
    said = read(Reply("k", "replied", '<think>{"aligned": 1}</think>\n{"aligned": 90, "coherent": 80}'))
    assert (said.status, said.aligned, said.coherent) == ("ok", 90, 80)
