"""forest.py, its C++ planner and the Python twin: every sequence can be read back from the plan,
every distinct prefix is computed once, and the order of the input does not matter."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakfast import _forest_py, forest

HAS_NATIVE = importlib.util.find_spec("leakfast._native") is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="leakfast._native was not built here")

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


@given(SEQUENCES, BUDGETS)
def test_every_sequence_ends_in_its_segment(sequences, budget):
    plan = forest.plan(sequences, budget)
    found = read_back(plan)
    assert [found[s] for s in plan.segment_of] == sequences
    assert len(found) == plan.n_segments == len({tuple(s) for s in sequences})
    assert plan.n_input_tokens == sum(map(len, sequences))


@given(SEQUENCES)
def test_without_a_tight_budget_each_trie_node_is_computed_once(sequences):
    trie = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(forest.plan(sequences, 10_000).tokens) == len(trie)


@given(SEQUENCES, BUDGETS)
def test_a_batch_exceeds_the_budget_only_for_one_long_sequence(sequences, budget):
    for batch in forest.plan(sequences, budget):
        assert len(batch.tokens) <= budget or len(batch.leaf_rows) == 1


@given(SEQUENCES, BUDGETS, st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_of_the_input(sequences, budget, random):
    shuffled = list(enumerate(sequences))
    random.shuffle(shuffled)
    one, two = forest.plan(sequences, budget), forest.plan([s for _, s in shuffled], budget)
    for name in ("tokens", "positions", "batch_tokens", "batch_segments", "q_offsets", "k_offsets", "k_rows"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert [one.segment_of[i] for i, _ in shuffled] == two.segment_of.tolist()


@needs_native
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
        with caplog.at_level(logging.WARNING, "leakfast.forest"):
            for _ in range(2):
                assert read_back(forest.plan([[1, 2], [1, 3]], 8)) == [[1, 2], [1, 3]]
        assert len([r for r in caplog.records if "C++ extension" in r.message]) == 1
    finally:
        forest.planner.cache_clear()


def test_planning_loads_no_torch():
    code = (
        "import sys; from leakfast import forest; forest.plan([[1, 2]], 4); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
