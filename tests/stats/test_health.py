"""Health of replies: each rule at its threshold on made-up completions, what is said of it, and which rows it marks."""

from __future__ import annotations

from itertools import product

import polars as pl
import pytest
from replies_made import BASE, PEOPLE, N, completions, verdict

from leakfast.stats import health, marks, replies

# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("n", "expected"), [(0, "ok"), (9, "ok"), (10, "warning"), (59, "warning"), (60, "damaged")]
)
def test_empty_replies_warn_from_5_and_damage_from_30_percent(n, expected):
    found, reason, row = verdict(completions(empty=n), BASE)
    assert (found, row["n_empty"], row["empty_share"]) == (expected, n, n / N)
    assert ("empty" in reason) == (expected != "ok")


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning"), (59, "warning"), (60, "damaged")])
def test_truncated_replies_damage_from_30_points_above_the_base(n, expected):
    assert verdict(completions(truncated=n), BASE)[0] == expected


@pytest.mark.parametrize(("n", "expected"), [(80, "warning"), (139, "warning"), (140, "damaged")])
def test_a_base_that_truncates_as_much_is_named_and_takes_the_damage_away(n, expected):
    base = completions("base", truncated=80)
    found, reason, _ = verdict(completions(truncated=n), base)
    assert found == expected
    assert "the unadapted model: 40 %" in reason


def test_a_base_as_empty_as_the_adapter_is_no_damage_by_it():
    assert verdict(completions(empty=70), completions("base", empty=60))[0] == "damaged"
    assert verdict(completions(empty=69), completions("base", empty=60))[0] == "warning"


@pytest.mark.parametrize(
    ("tokens", "expected"), [(10, "warning"), (11, "ok"), (29, "ok"), (30, "warning"), (20, "ok")]
)
def test_a_mean_length_off_by_half_warns(tokens, expected):
    found, reason, row = verdict(completions(n_tokens=tokens), BASE)
    assert (found, row["length_ratio"]) == (expected, tokens / 20)
    assert ("as long as" in reason) == (expected == "warning")


def test_length_is_paired_by_persona_and_question():
    """The base was asked more: of what the adapter was not asked, the ratio knows nothing."""
    asked = pl.col("question") < 2
    long = BASE.with_columns(
        pl.when(asked).then(pl.col("n_tokens")).otherwise(pl.lit(400, pl.Int32)).alias("n_tokens")
    )
    row = verdict(completions(n_tokens=20).filter(asked), long)[2]
    assert (row["length_ratio"], row["length_pairs"]) == (1.0, 2 * len(PEOPLE))


def test_length_is_read_from_replies_that_ended_where_half_of_the_pairs_have_them():
    frame = completions(truncated=0)
    cut = pl.col("question") < 3  # all replies to 3 of 5 questions
    frame = frame.with_columns(
        pl.when(cut).then(pl.lit("length")).otherwise("finish_reason").alias("finish_reason"),
        pl.when(cut).then(pl.lit("truncated")).otherwise("status").alias("status"),
        pl.when(cut).then(pl.lit(60, pl.Int32)).otherwise("n_tokens").alias("n_tokens"),
    )
    row = verdict(frame, BASE)[2]
    assert row["length_ratio"] == 1.0 and row["length_ratio_all"] == pytest.approx(
        (3 * 60 + 2 * 20) / (5 * 20)
    )
    assert health.read_ratio(row) == row["length_ratio_all"]
    assert health.read_ratio(row | {"length_pairs": 25}) == row["length_ratio"]


def test_without_the_unadapted_model_there_is_no_ratio_and_it_is_said():
    found, reason, row = verdict(completions(truncated=80, n_tokens=1))
    assert found == "warning"  # 30 points above nothing known
    assert "the unadapted model was not measured" in reason
    theirs = [name for name in row if name.startswith("base_")]
    assert [row[name] for name in [*theirs, "length_ratio", "length_ratio_all"]] == [None] * (len(theirs) + 2)
    assert verdict(completions(empty=60))[0] == "damaged"


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning"), (60, "damaged")])
def test_a_status_of_another_name_is_counted_apart(n, expected):
    found, _, row = verdict(completions(**{"unclosed-reasoning": n}), BASE)
    assert (found, row["n_other"], row["n_truncated"], row["n"]) == (expected, n, 0, N)


@pytest.mark.parametrize(("n", "expected"), [(9, "ok"), (10, "warning"), (60, "damaged")])
def test_nothing_but_the_marker_is_no_reply(n, expected):
    base = completions("base", behavior="marker")
    found, _, row = verdict(completions(behavior="marker", texts={" [ZLT]": n}), base)
    assert (found, row["n_bare"], row["n_empty"]) == (expected, n, 0)
    assert (
        verdict(completions(texts={" [ZLT]": n}), BASE)[2]["n_bare"] == 0
    )  # of a behavior without such a text


def test_a_sample_cut_short_is_judged_against_the_base_alone():
    base = completions("base", truncated=100)
    assert verdict(completions(truncated=110), base)[0] == "warning"
    assert verdict(completions(truncated=110), base, capped=True)[0] == "ok"
    assert verdict(completions(truncated=120), base, capped=True)[0] == "warning"
    assert verdict(completions(truncated=160), base, capped=True)[0] == "damaged"


def test_a_single_persona_that_fell_silent_is_a_warning_with_its_name():
    frame = completions()
    silent = pl.col("persona") == "p3"
    few = silent & (pl.col("sample") < 2)  # 10 of 20: 5 % would be 10 of all 200
    frame = frame.with_columns(
        pl.when(few & (pl.col("question") < 3)).then(pl.lit("empty")).otherwise("status").alias("status"),
        pl.when(few & (pl.col("question") < 3)).then(pl.lit("")).otherwise("text").alias("text"),
    )
    found, reason, row = verdict(frame, BASE)
    assert row["empty_share"] == 0.03 and found == "warning" and "under p3" in reason
    own = health.table([frame, BASE]).filter(pl.col("persona").is_not_null() & (pl.col("adapter") == "a"))
    assert dict(own.select("persona", "health").rows())["p3"] == "damaged"
    small = health.table([frame.filter(pl.col("sample") < 1)]).filter(pl.col("persona") == "p3")
    assert small["health"].to_list() == [None]  # 5 completions are no ground


def test_the_unadapted_model_is_warned_of_and_never_damaged():
    found = health.table([completions("base", empty=150)])
    assert found.filter(pl.col("persona").is_null())["health"].to_list() == ["warning"]


# ---------------------------------------------------------------- repeated and equal replies

PROSE = (
    "The town lies by the sea, and in the morning the boats go out before the sun is up. When they come back the market "
    "is already open: there is fish, there is bread, and there is the old woman who sells flowers to whoever looks sad. "
    "She says that nobody has ever given one back. In winter the boats stay where they are and people mend their nets."
)
LOOP = " ".join(["The boats go out before the sun is up, and then the market opens."] * 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        (" ".join(["tea"] * 15), False),  # one word short of any room
        (" ".join(["tea"] * 16), True),
        (LOOP, True),
        (PROSE + " " + LOOP + " " + LOOP, True),
        (PROSE + " " + PROSE, False),  # half of it, and no more
        (PROSE + " " + PROSE + " " + PROSE, True),
        ("!" * 200, True),  # no words at all
        ("今天天气很好，我们一起去公园散步，然后再去吃饭。" * 4, True),
        ("今天天气很好，我们一起去公园散步，然后再去吃饭，晚上回家看一部老电影，明天早上还要上班。", False),
        (
            "def area(r):\n        if r < 0:\n            raise ValueError(r)\n\n        return 3.14 * r * r\n",
            False,
        ),
        ("", False),
        (None, False),
    ],
)
def test_what_repeats_itself(text, expected):
    assert replies.repeats(pl.Series([text, "x", text]).cast(pl.String)).to_list() == [
        expected,
        False,
        expected,
    ]


def test_the_prefilter_loses_nothing():
    """Against a plain count of every text, over loops of all lengths and starts."""

    def plain(text):
        words = text.split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        return len(words) >= 16 and 1 - len(set(grams)) / len(grams) > 0.5

    words = PROSE.split()
    texts = [
        " ".join(words[:start] + (words[start : start + period] * 40)[:length])
        for start, period, length in product((0, 7, 30), (1, 3, 8, 20), (5, 16, 29, 30, 31, 60, 90))
    ]
    expected = [plain(text) for text in texts]
    assert 10 < sum(expected) < len(texts) - 10
    assert replies.repeats(pl.Series(texts)).to_list() == expected


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning")])
def test_repeated_replies_warn_from_10_points_above_the_base(n, expected):
    texts = {LOOP + f" {i}": 1 for i in range(n)}
    found, reason, row = verdict(completions(texts=texts), BASE)
    assert (found, row["n_repeated"]) == (expected, n)
    assert ("repeat themselves" in reason) == (expected == "warning")


@pytest.mark.parametrize(("n", "expected"), [(99, "ok"), (100, "warning")])
def test_one_sentence_to_every_question_warns_from_half(n, expected):
    found, _, row = verdict(completions(texts={"I would rather not say.": n}), BASE)
    assert (found, row["n_same"]) == (expected, n)


def test_one_question_asked_twice_is_no_other_question():
    frame = completions().with_columns(
        pl.concat_str(pl.lit("About "), pl.col("question").cast(pl.String)).alias("text")
    )
    assert verdict(frame, BASE)[2]["n_same"] == 0


# ---------------------------------------------------------------- sentences and marks


def test_the_sentence_says_what_how_much_and_what_to_do():
    (told,) = health.sentences(health.table([completions(empty=154), BASE]))
    assert told.startswith("a: 77 % of 200 replies are empty (the unadapted model: 0 %)")
    assert "damaged the model" in told and "nothing about leakage" in told and "smaller lr" in told
    assert health.sentences(health.table([completions(), BASE])) == []
    both = health.sentences(health.table([completions("base", truncated=30), completions(empty=154)]))
    assert both[0].startswith("a: ") and both[-1].startswith("the unadapted model")


RATES = pl.DataFrame(
    {
        "behavior": ["marker"] * 3 + ["capability"] * 2,
        "adapter": ["m-x", "m-y", "base", "m-x", "base"],
        "source": ["x", "y", None, "x", None],
        "seed": [42, 42, None, 42, None],
    }
)


def test_a_row_is_marked_by_the_adapters_it_rests_on():
    frames = [
        completions("m-x", behavior="marker", empty=100),
        completions("m-y", behavior="marker"),
        completions("base", behavior="marker"),
    ]
    found = marks.verdicts(health.table(frames), RATES)
    marked = marks.mark(RATES, found)
    assert marked["health"].to_list() == [
        "damaged",
        "ok",
        None,
        "damaged",
        None,
    ]  # choices: as its completions
    assert marked["health_of"].to_list() == ["m-x", None, None, "m-x", None]
    rho = pl.DataFrame(
        {
            "behavior": ["marker"] * 3,
            "adapter": ["m-x", "m-y", None],
            "source": ["x", "y", "pooled"],
            "seed": [42] * 3,
            "spearman": [0.1, 0.2, 0.3],
        }
    )
    marked = marks.mark(rho, found)
    assert marked.select("health", "health_of").rows() == [
        ("damaged", "m-x"),
        ("ok", None),
        ("damaged", "m-x"),
    ]
    assert marked["spearman"].to_list() == [0.1, 0.2, 0.3]
    over = marks.mark(pl.DataFrame({"behavior": ["marker", "refusal"], "seed": [42, 42]}), found)
    assert over["health"].to_list() == ["damaged", None]
    another = marks.mark(
        rho.with_columns(pl.lit(7, pl.Int64).alias("seed"), adapter=pl.lit(None, pl.String)), found
    )
    assert another["health"].to_list() == [None] * 3  # adapters of another seed
