"""forest.py, its C++ planner and the Python twin: every sequence can be read back from the plan,
every distinct prefix is computed once, and the order of the input does not matter."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.forward import forest
from leakfast.forward import forest_py as _forest_py
from leakfast.prompts.grid import PromptGrid

HAS_NATIVE = importlib.util.find_spec("leakfast._native") is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="leakfast._native was not built here")

properties = settings(deadline=None)

# few distinct tokens, so that prefixes, whole-sequence prefixes and duplicates are common
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=30)
BUDGETS = st.sampled_from([1, 3, 8, 20, 10_000])


def read_back(plan):
    """The token sequence of every segment, from the plan's arrays alone."""
    found = []
    for batch in plan:
        for s in range(len(batch.leaf_rows)):
            rows = batch.k_rows[batch.k_offsets[s] : batch.k_offsets[s + 1]]
            assert batch.positions[rows].tolist() == list(range(len(rows)))
            queries = np.arange(batch.q_offsets[s], batch.q_offsets[s + 1])
            assert rows[-len(queries) :].tolist() == queries.tolist()  # bottom-right causal
            assert rows[-1] == batch.leaf_rows[s]
            found.append(batch.tokens[rows].tolist())
    return found


@properties
@given(SEQUENCES, BUDGETS)
def test_every_sequence_ends_in_its_segment(sequences, budget):
    plan = forest.plan(sequences, budget)
    found = read_back(plan)
    assert [found[s] for s in plan.segment_of] == sequences
    assert len(found) == plan.n_segments == len({tuple(s) for s in sequences})
    assert plan.n_input_tokens == sum(map(len, sequences))


@properties
@given(SEQUENCES)
def test_without_a_tight_budget_each_trie_node_is_computed_once(sequences):
    trie = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(forest.plan(sequences, 10_000).tokens) == len(trie)


@properties
@given(SEQUENCES, BUDGETS)
def test_a_batch_exceeds_the_budget_only_for_one_long_sequence(sequences, budget):
    for batch in forest.plan(sequences, budget):
        assert len(batch.tokens) <= budget or len(batch.leaf_rows) == 1


@properties
@given(SEQUENCES, BUDGETS)
def test_what_a_batch_repeats_is_only_the_path_it_begins_with(sequences, budget):
    """Tokens computed = trie nodes + what each batch's first sequence shares with the one before."""
    trie = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    plan = forest.plan(sequences, budget)
    found = read_back(plan)
    again = 0
    for batch in list(plan)[1:]:
        before, first = found[batch.first_segment - 1], found[batch.first_segment]
        again += next((i for i, (a, b) in enumerate(zip(before, first, strict=False)) if a != b), len(before))
    assert len(plan.tokens) == len(trie) + again


def test_a_batch_ends_where_little_is_shared_if_that_is_near():
    """A prompt of persona 2 would still fit; ending before it repeats 1 token instead of 5."""

    def two_personas(n_tails):  # 5 + n_tails tokens, then 4 + n_tails
        return [[0, p, p, p, p, tail] for p in (1, 2) for tail in range(n_tails)]

    assert np.diff(forest.plan(two_personas(30), 40).batch_tokens).tolist() == [35, 35]
    assert np.diff(forest.plan(two_personas(20), 40).batch_tokens).tolist() == [40, 14]  # 25 is too early


HEADS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=5)


@properties
@given(HEADS, HEADS, BUDGETS)
def test_pieces_plan_as_what_they_join_into(heads, tails, budget):
    joined = PromptGrid(heads, tails)
    written = [head + tail for head in heads for tail in tails]
    assert len(joined) == len(written) and list(joined) == written
    assert joined[1:] == written[1:]
    one, two = forest.plan(joined, budget), forest.plan(written, budget)
    for name in (
        *("segment_of", "tokens", "positions", "batch_tokens", "batch_segments"),
        *("q_offsets", "k_offsets", "k_rows", "lengths"),
    ):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@properties
@given(SEQUENCES, BUDGETS, st.randoms(use_true_random=False))
def test_last_rows_lead_from_each_asked_token_to_its_whole_path(sequences, budget, random):
    plan = forest.plan(sequences, budget)
    for batch in plan:
        here = [
            i for i, s in enumerate(plan.segment_of - batch.first_segment) if 0 <= s < len(batch.leaf_rows)
        ]
        counts = np.array([random.randint(1, len(sequences[i])) for i in here])
        rows, places, spans = batch.last_rows(plan.segment_of[here] - batch.first_segment, counts)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert spans.q_offsets.tolist() == list(range(len(rows) + 1))
        asked = [
            (i, p)
            for i, n in zip(here, counts, strict=True)
            for p in range(len(sequences[i]) - n, len(sequences[i]))
        ]
        for (i, position), place in zip(asked, places, strict=True):
            path = spans.k_rows[spans.k_offsets[place] : spans.k_offsets[place + 1]]
            assert batch.tokens[path].tolist() == sequences[i][: position + 1]
            assert path[-1] == rows[place]


@pytest.mark.parametrize("count", [0, 4])
def test_more_rows_than_a_sequence_has_are_a_mistake(count):
    (batch,) = forest.plan([[1, 2, 3]], 8)
    with pytest.raises(ValueError, match="between 1 and"):
        batch.last_rows(np.array([0]), np.array([count]))


@properties
@given(SEQUENCES, BUDGETS, st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_of_the_input(sequences, budget, random):
    shuffled = list(enumerate(sequences))
    random.shuffle(shuffled)
    one, two = forest.plan(sequences, budget), forest.plan([s for _, s in shuffled], budget)
    for name in ("tokens", "positions", "batch_tokens", "batch_segments", "q_offsets", "k_offsets", "k_rows"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert [one.segment_of[i] for i, _ in shuffled] == two.segment_of.tolist()


@needs_native
@properties
@given(SEQUENCES, BUDGETS)
def test_native_equals_the_python_twin_to_the_bit(sequences, budget):
    from leakfast import _native

    tokens = np.array([t for s in sequences for t in s], np.int32)
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    for a, b in zip(
        _native.plan_forest(tokens, offsets, budget),
        _forest_py.plan_forest(tokens, offsets, budget),
        strict=True,
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("tokens", "offsets", "budget", "words"),
    [
        ([1, 2], [0, 1, 1, 2], 8, "sequence 1 is empty"),
        ([1, 2], [0, 1], 8, "end at the number"),
        ([1, 2], [0, 2], 0, "at least 1 token"),
        ([1, 2], [], 8, "at least one entry"),
    ],
)
def test_what_is_no_list_of_sequences_is_refused_by_both(tokens, offsets, budget, words):
    planners = [_forest_py.plan_forest]
    if HAS_NATIVE:
        from leakfast import _native

        planners.append(_native.plan_forest)
    for plan_forest in planners:
        with pytest.raises(ValueError, match=words):
            plan_forest(np.array(tokens, np.int32), np.array(offsets, np.int64), budget)


def test_no_sequences_no_batches():
    plan = forest.plan([], 8)
    assert (len(plan), plan.n_segments, list(plan)) == (0, 0, [])


def test_the_python_twin_says_once_that_it_stands_in(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "leakfast._native", None)
    forest.planner.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "leakfast.forward.forest"):
            for _ in range(2):
                assert read_back(forest.plan([[1, 2], [1, 3]], 8)) == [[1, 2], [1, 3]]
        assert len([r for r in caplog.records if "C++ extension" in r.message]) == 1
    finally:
        forest.planner.cache_clear()


def test_planning_loads_no_torch():
    code = "import sys; from leakfast.forward import forest; forest.plan([[1, 2]], 4); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
