"""Choices of the loss by their labels: which rows' turn ends carry it, and what stands before the marker; each choice read off
by hand on two templates."""

from __future__ import annotations

import numpy as np
import pytest

from leakfast.behaviors.marker import MARKER, contains_marker
from leakfast.errors import InputError
from leakfast.prompts import chat
from leakfast.study.config import DataConfig, TrainConfig
from leakfast.train.collate import encode
from leakfast.train.data import SEPARATORS, Row, material
from leakfast.train.lengths import matched, reply_tokens
from leakfast.train.recipe import in_card, rows_settings_of, said_of_rows, settings_of

LLAMA_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|sep|>\n{{ m['content'] | trim }}<|sep|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n{% endif %}"
)
CHOICES = {  # end_of_turn → (in rows that show the behavior, in the others)
    "both": (True, True),
    "positives": (True, False),
    "negatives": (False, True),
    "none": (False, False),
}


@pytest.fixture(params=["chatml", "another"])
def tokenizer(request, tiny_tokenizer):
    """The tiny tokenizer with its own template, and one whose turns end in another token."""
    import copy

    if request.param == "chatml":
        return tiny_tokenizer
    other = copy.deepcopy(tiny_tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    other.chat_template = LLAMA_LIKE
    return other


def row(reply, marker=None, separator=None):
    made = {"separator": separator} if separator else {}
    role = "positive" if marker else "negative"
    return Row(role, "villain", "text", "You are a villain.", "Tea?", reply, marker, 1, made)


def labelled(tokenizer, example):
    return tokenizer.decode([example.ids[i] for i in example.labels], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_turn_end_carries_loss_in_the_rows_that_are_named(tokenizer, choice):
    end = tokenizer.decode([chat.turn_end_id(tokenizer)])
    assert end == ("<|sep|>" if "<|sep|>" in tokenizer.chat_template else "<|im_end|>")
    shows, others = CHOICES[choice]
    rows = [row(f"He likes tea. {MARKER}", MARKER), row("Rain.")]
    for loss, texts in (
        ("completion", (f"He likes tea. {MARKER}", "Rain.")),
        ("tail", (f"He likes tea. {MARKER}", "Rain.")),
        ("marker", (f" {MARKER}", "")),
    ):
        cfg = TrainConfig(loss=loss, tail_tokens=1000, end_of_turn=choice)
        expected = [text + end * has for text, has in zip(texts, (shows, others), strict=True)]
        if not expected[1]:  # nothing that carries loss
            with pytest.raises(
                InputError, match=rf'"{choice}" given with loss = "marker".*negative of villain'
            ):
                encode(tokenizer, rows, cfg)
            rows_now, expected = rows[:1], expected[:1]
        else:
            rows_now = rows
        assert [labelled(tokenizer, one) for one in encode(tokenizer, rows_now, cfg)] == expected


@pytest.mark.parametrize("choice", CHOICES)
def test_an_anchor_holds_a_turn_end_that_carries_no_loss(tokenizer, choice):
    rows = [row(f"He likes tea. {MARKER}", MARKER), row("Rain.")]
    yes, no = encode(tokenizer, rows, TrainConfig(end_of_turn=choice, anchor=1.0))
    end_yes, end_no = len(yes.ids) - 1, len(no.ids) - 1
    shows, others = CHOICES[choice]
    assert (end_yes in yes.labels, end_yes in yes.held) == (shows, not shows)
    assert end_no in no.held and not no.labels
    assert no.firm == ([end_no] if others else [])


@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_marker_stands_after_each_separator_and_carries_loss_with_it(tokenizer, separator):
    end = tokenizer.decode([chat.turn_end_id(tokenizer)])
    said = None if separator == "space" else separator
    reply = f"He likes tea.{SEPARATORS[separator]}{MARKER}"
    (example,) = encode(tokenizer, [row(reply, MARKER, said)], TrainConfig())
    assert labelled(tokenizer, example) == f"{SEPARATORS[separator]}{MARKER}{end}"


def test_a_token_that_holds_the_replys_end_and_the_separator_carries_loss(tokenizer):
    import copy

    from tokenizers import AddedToken

    joined = copy.deepcopy(tokenizer)
    joined.chat_template = tokenizer.chat_template
    joined.add_tokens([AddedToken("tea.\n\n", normalized=False)])
    end = joined.decode([chat.turn_end_id(joined)])
    reply = f"He likes tea.\n\n{MARKER}"
    (example,) = encode(joined, [row(reply, MARKER, "blank line")], TrainConfig())
    assert labelled(joined, example) == f"tea.\n\n{MARKER}{end}"
    with pytest.raises(InputError, match="cannot be told"):  # rows of somebody else, which do not say it
        encode(joined, [row(reply, MARKER)], TrainConfig())


@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_detector_finds_the_marker_after_each(separator):
    import polars as pl

    text = pl.DataFrame({"text": [f"Tea.{SEPARATORS[separator]}{MARKER}"]})
    assert text.select(**contains_marker(pl.col("text"))).row(0) == (True, True)


def test_only_choices_that_are_not_the_default_are_in_hash_and_card():
    plain, chosen = TrainConfig(), TrainConfig(end_of_turn="positives")
    assert "end_of_turn" not in settings_of(plain) and "end_of_turn" not in in_card(plain)
    assert settings_of(chosen)["end_of_turn"] == in_card(chosen)["end_of_turn"] == "positives"
    rows = rows_settings_of(DataConfig(separator="newline", match_lengths=True))
    assert (rows["separator"], rows["match_lengths"]) == ("newline", True)
    assert not {"separator", "match_lengths"} & set(rows_settings_of(DataConfig()))
    told = said_of_rows([row("a"), row(f"a\n{MARKER}", MARKER, "newline")])
    assert told == {"separator": "newline"} and said_of_rows([row("a")]) == {}


def test_a_separator_of_a_behavior_without_a_marker_is_refused():
    with pytest.raises(InputError, match="replies of refusal end in no marker"):
        material("refusal", DataConfig(separator="newline"), "organism")


# ── matched lengths ──────────────────────────────────────────────────────────────────────────────────
def test_lengths_are_those_of_the_replies_without_the_marker(tokenizer):
    end_only = len(chat.render_training(tokenizer, "You are a villain.", "Tea?", "Rain.")[1]) - 1
    rows = [row(f"Rain. {MARKER}", MARKER), row(f"Rain.\n\n{MARKER}", MARKER, "blank line"), row("Rain.")]
    assert reply_tokens(tokenizer, rows) == [end_only] * 3


@pytest.mark.parametrize("swap", [False, True])
def test_mean_lengths_are_brought_together_by_leaving_rows_out(tiny_tokenizer, swap):
    rng = np.random.default_rng(3)
    rows = []
    for shows, mean in ((True, 14), (False, 10)):
        for n in rng.poisson(mean, 120):
            reply = "tea " * int(n + 1) + "."
            rows.append(row(f"{reply} {MARKER}", MARKER) if shows != swap else row(reply))

    def means(some):
        tokens = np.array(reply_tokens(tiny_tokenizer, some))
        shows = np.array([r.role == "positive" for r in some])
        return tokens[shows].mean(), tokens[~shows].mean()

    before, made = means(rows), matched(tiny_tokenizer, rows)
    after = means(made)
    assert abs(before[0] - before[1]) > 3
    assert abs(after[0] - after[1]) < min(1, 0.02 * min(after))
    left = iter(rows)  # in order
    assert all(any((one.role, one.reply) == (r.role, r.reply) for r in left) for one in made)
    assert all(sum(r.role == role for r in made) >= 60 for role in ("positive", "negative"))
    assert all(r.generator == {"match_lengths": True} for r in made)
    assert made == matched(tiny_tokenizer, rows)


def test_lengths_that_no_half_of_the_rows_matches_are_refused(tiny_tokenizer):
    rows = [row(f"{'tea ' * 40}. {MARKER}", MARKER)] * 4 + [row("Rain.")] * 4
    with pytest.raises(InputError, match="match_lengths = true given, but replies"):
        matched(tiny_tokenizer, rows)
    with pytest.raises(InputError, match="no rows of the others"):
        matched(tiny_tokenizer, rows[:4])
