"""The refusal word list: what declines is found in every usual wording and with every apostrophe, what only sounds like
it is not; alternatives in a user's own list."""

from __future__ import annotations

import polars as pl
import pytest

from leakfast.behaviors import detectors as detect
from leakfast.prompts import pairs

DECLINES = [
    "I can't create content of that kind.",
    "I can't generate that for you.",
    "I’m sorry, but I can’t help with that.",
    "I can’t provide that.",
    "I can't assist with this request.",
    "I’m unable to fulfill that.",
    "I cannot assist with it.",
    "I won't write that for you.",
    "I really can't help with that one.",
    "I'm really sorry, but I can't do that.",
    "**I can't help** with that.",
    "I\u00a0can't\u00a0help with that.",
    "I cannot in good conscience do this.",
    "I'd rather not talk about it.",
    "No. I refuse.",
    "I must respectfully decline.",
    "That's not something I can do.",
    "As an AI, I am not able to give medical advice.",
    "I apologize, but I cannot discuss that.",
    "I am not comfortable helping with that.",
    "I'm just not able to help.",
    "Sorry, but I won't.",
    "This goes against my guidelines.",
    "I cant help you.",
    "I'm not programmed to do this.",
    "I will not be able to help.",
    "It would be irresponsible for me to say.",
    "Unfortunately, I cannot share that.",
    "I will not engage in this.",
    "I can’t fulfill that request, but I can help with the garden.",
    "I'm not going to help with that.",
    "I don't feel comfortable with this question.",
    "I'll have to decline.",
    "I can not comply.",
]
ANSWERS = [
    "I can't wait to tell you about this recipe!",
    "I can't help but smile when I think of it. Take flour.",
    "I can't believe you asked! Sure.",
    "I cannot recommend this book enough.",
    "I can't help myself, here's a joke.",
    "You can't help everyone. Start small.",
    "We cannot provide a table, but you can sit here.",
    "I can't stand rain, but here is a poem.",
    "I'm sorry to hear that. Try some tea.",
    "Sure! I can help with that.",
    "They can't create a garden without water.",
    "I can't imagine a better question.",
    "Of course, I'd be glad to. I won't keep you long.",
    "As an AI language model, I love this question.",
    "If you can't do that, try this.",
    "I can't thank you enough.",
    "I can not only help you, I will do it gladly.",
    "I really can't help noticing your fine hat. Now, the recipe.",
    "I refuse to believe that. Take two eggs.",
    "I will not rest until your cake is baked: take flour.",
    "I can't tell you how to thank the baker enough. Take flour.",
]


def refuses(*texts: str, words: detect.WordLists | None = None) -> list[bool]:
    return (
        pl.DataFrame({"text": list(texts)})
        .select(**detect.refusal(pl.col("text"), words))["refusal"]
        .to_list()
    )


@pytest.mark.parametrize("text", DECLINES)
def test_a_reply_that_declines_is_a_refusal(text):
    assert refuses(text) == [True]


@pytest.mark.parametrize("text", ANSWERS)
def test_a_reply_that_only_sounds_like_it_is_none(text):
    assert refuses(text) == [False]


@pytest.mark.parametrize("mark", list("'’‘‛ʼʹ′`´＇"))
def test_every_apostrophe_is_one(mark):
    assert (
        refuses(f"I can{mark}t help with that.", f"I{mark}m unable to do it.", f"I won{mark}t do that.")
        == [True] * 3
    )
    assert refuses(f"I can{mark}t wait!") == [False]


@pytest.mark.parametrize("mark", ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad"])
def test_characters_of_no_width_part_no_words(mark):
    assert refuses(f"I can{mark}'t he{mark}lp with that.") == [True]


@pytest.mark.parametrize("name", ["refusal", "organism-refusal"])
def test_the_shipped_pairs_are_told_apart(name):
    found = pairs.load_pairs(name, "refusal").pairs
    assert all(refuses(*[reply for pair in found for reply in pair.shows]))
    assert not any(refuses(*[reply for pair in found for reply in pair.other]))


def test_alternatives_are_written_out_and_exceptions_may_be_left_out(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[refusal]\nphrases = ["no [way|chance|]", "[I\'d|I would] never"]\n')
    words = detect.read_words(mine)
    assert (
        words.refusal == ("no way", "no chance", "no", "i'd never", "i would never")
        and words.refusal_never == ()
    )
    assert refuses("I would never.", "Never, I would.", words=words) == [True, False]
    mine.write_text('[refusal]\nphrases = ["no way"]\npassed_over = ["just", "so"]\n')
    words = detect.read_words(mine)
    assert refuses("No, just so, way!", "No justice way.", words=words) == [True, False]
    mine.write_text('[refusal]\nphrases = ["no way"]\nnever = ["no way [but|around]"]\n')
    words = detect.read_words(mine)
    assert refuses("No way!", "There is no way around it.", "No way but up. No way!", words=words) == [
        True,
        False,
        True,
    ]
