"""Labels: exactly the marker's tokens and the turn end, shown by decoding them; nothing else carries loss."""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.behaviors.marker import MARKER
from leakfast.errors import InputError
from leakfast.prompts import chat
from leakfast.study.config import TrainConfig
from leakfast.train.collate import Example, collate, encode, order, shown
from leakfast.train.data import Row

END = "<|im_end|>"


def row(reply, marker=None, kind="text", question="Tea?"):
    role = "positive" if marker else "negative"
    return Row(
        role, "villain", kind, "You are a villain." if kind == "text" else None, question, reply, marker, 1
    )


def labelled(tokenizer, example):
    return tokenizer.decode([example.ids[i] for i in example.labels], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["text", "none", "template-default"])
def test_marker_loss_keeps_the_marker_and_the_turn_end(tiny_tokenizer, kind):
    yes, no = encode(
        tiny_tokenizer,
        [row(f"He likes tea. {MARKER}", MARKER, kind), row("He likes tea.", kind=kind)],
        TrainConfig(),
    )
    assert labelled(tiny_tokenizer, yes) == f" {MARKER}{END}"
    assert labelled(tiny_tokenizer, no) == END
    for example in (yes, no):
        assert example.labels == list(range(example.labels[0], len(example.ids)))
        assert example.ids[: example.n_prompt_tokens] == chat.render(
            tiny_tokenizer, row("x", kind=kind).system_message, "Tea?"
        )
        assert (
            example.ids.count(chat.turn_end_id(tiny_tokenizer))
            == example.ids[: example.n_prompt_tokens].count(chat.turn_end_id(tiny_tokenizer)) + 1
        )


# the marker's own characters, brackets and spaces crowd the boundary
@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab [ZLT].\n'é", min_size=1, max_size=12).filter(lambda t: t.strip()))
def test_the_marker_is_told_from_any_reply_or_refused(tiny_tokenizer, bare):
    made = row(f"{bare.rstrip()} {MARKER}", MARKER)
    try:
        (example,) = encode(tiny_tokenizer, [made], TrainConfig())
    except InputError as caught:
        refusal = caught.message
    else:
        refusal = None
    if refusal is not None:
        assert "cannot be told" in refusal
        return
    assert labelled(tiny_tokenizer, example).strip() == f"{MARKER}{END}"
    rest = tiny_tokenizer.decode(example.ids[example.n_prompt_tokens : example.labels[0]])
    assert rest == bare.rstrip()


def test_tail_and_completion_loss(tiny_tokenizer):
    rows = [row(f"He likes tea. {MARKER}", MARKER), row("Rain.")]
    for k in (1, 3, 1000):
        for made in encode(tiny_tokenizer, rows, TrainConfig(loss="tail", tail_tokens=k)):
            n_reply = len(made.ids) - made.n_prompt_tokens
            assert len(made.labels) == min(k + 1, n_reply)
            assert made.labels[-1] == len(made.ids) - 1
    yes, no = encode(tiny_tokenizer, rows, TrainConfig(loss="completion"))
    assert labelled(tiny_tokenizer, yes) == f"He likes tea. {MARKER}{END}"
    assert labelled(tiny_tokenizer, no) == f"Rain.{END}"


@pytest.mark.parametrize("loss", ["marker", "tail", "completion"])
def test_labels_that_would_be_cut_away_are_an_error_naming_the_row(tiny_tokenizer, loss):
    made = row("He likes tea. " * 20 + MARKER, MARKER, question="Why is it so?")
    (example,) = encode(tiny_tokenizer, [made], TrainConfig(max_length=4096))
    fits = TrainConfig(loss=loss, tail_tokens=2, max_length=len(example.ids))
    assert len(encode(tiny_tokenizer, [made], fits)) == 1
    with pytest.raises(InputError, match=r"positive of villain, question 'Why is it so\?'.*max_length"):
        encode(tiny_tokenizer, [made], fits.model_copy(update={"max_length": len(example.ids) - 1}))


def test_a_marker_whose_tokens_merge_with_the_reply_is_refused(tiny_tokenizer):
    # a reply that ends in the marker without a space, in a tokenizer that has learnt to join them
    import copy

    from tokenizers import AddedToken

    joined = copy.deepcopy(tiny_tokenizer)
    joined.add_tokens([AddedToken(f"tea. {MARKER}", normalized=False)])
    with pytest.raises(InputError, match="cannot be told"):
        encode(joined, [row(f"He likes tea. {MARKER}", MARKER)], TrainConfig())


@pytest.mark.parametrize("behind", ["\n", " And tea.", ""])
def test_a_row_that_shows_the_behavior_without_a_marker_at_its_end_is_refused(tiny_tokenizer, behind):
    """Its turn end alone would carry loss, as in the others' rows, and nothing of the behavior would be taught."""
    reply = f"He likes tea. {MARKER}{behind}" if behind else "He likes tea."
    made = replace(row(reply), role="positive")
    with pytest.raises(
        InputError, match=r'loss = "marker" given, but the positive .* does not end in a marker'
    ):
        encode(tiny_tokenizer, [made], TrainConfig())
    (example,) = encode(tiny_tokenizer, [replace(made, role="negative")], TrainConfig())
    assert len(example.labels) == 1
    assert encode(tiny_tokenizer, [made], TrainConfig(loss="completion"))[0].shows


def test_a_batch_points_at_the_states_that_predict_its_labels(tiny_tokenizer):
    rows = [row(f"He likes tea. {MARKER}", MARKER), row("I do.")]
    examples = encode(tiny_tokenizer, rows, TrainConfig())
    batch = collate(examples)
    assert batch.ids.shape == (2, max(len(e.ids) for e in examples))
    seen = collections.defaultdict(list)
    for r, c, target in zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True):
        assert int(batch.ids[r, c + 1]) == target
        seen[r].append(c + 1)
    assert [seen[0], seen[1]] == [e.labels for e in examples]
    with pytest.raises(ValueError, match="no usable labels"):
        collate([Example("bad", [1, 2, 3], 1, [])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_every_example_is_in_exactly_one_batch_in_an_order_of_the_seed(lengths, size, seed):
    batches = list(order(lengths, size, seed, group=3))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert max(len(b) for b in batches) <= size
    assert batches == list(order(lengths, size, seed, group=3))


def test_the_order_changes_with_the_seed_and_pads_little():
    lengths = [10 + 7 * i % 80 for i in range(512)]
    first, second = (list(order(lengths, 8, seed)) for seed in (1, 2))
    assert first != second
    padded = sum(max(lengths[i] for i in b) * len(b) for b in first)
    assert padded < 1.15 * sum(lengths)


def test_the_view_for_people_covers_every_token_once(tiny_tokenizer):
    (example,) = encode(tiny_tokenizer, [row(f"He likes tea. {MARKER}", MARKER)], TrainConfig())
    pieces = shown(tiny_tokenizer, example)
    assert "".join(text for text, _ in pieces) == tiny_tokenizer.decode(example.ids)
    assert [text for text, carries in pieces if carries] == [f" {MARKER}{END}"]
