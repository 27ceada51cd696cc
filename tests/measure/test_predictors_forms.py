"""Predictors against closed forms: how replies are cut into blocks, CKA of features, Ledoit and Wolf's covariance, texts."""

from __future__ import annotations

import numpy as np
import pytest

from leakfast.measure.predictors import divergences, geometry
from leakfast.measure.predictors.request import Request
from leakfast.measure.predictors.stage import predictors
from leakfast.prompts.personas import Persona
from leakfast.storage.run import Run


def value(frame, source, persona, predictor):
    return frame.filter(source=source, persona=persona, predictor=predictor)["value"].item()


def test_blocks_hold_every_reply_once_and_no_more_than_they_may():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    found = divergences.blocks(lengths, prompts=10, state_bytes=4, most=320)
    assert [k for span in found for k in range(len(lengths))[span]] == list(range(len(lengths)))
    sizes = [40 * sum(lengths[span]) for span in found]
    assert all(size <= 320 or len(lengths[span]) == 1 for size, span in zip(sizes, found, strict=True))
    assert all(
        size + 40 * lengths[span.stop] > 320 for size, span in zip(sizes, found[:-1], strict=False)
    )  # no smaller than need be
    assert divergences.blocks([], 10, 4) == []


def test_cka_is_that_of_features_one_for_turned_states_and_less_for_others():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(6, 9)), draw.normal(size=(6, 9))
    turn = np.linalg.qr(draw.normal(size=(9, 9)))[0]
    states = np.stack([x, 3 * x @ turn + draw.normal(size=9), y]).astype(np.float32)
    found = geometry.cka(geometry.gram(states))
    assert found[0, 1] == pytest.approx(1, abs=1e-6)
    a, b = (z - z.mean(0) for z in (x, y))
    size = np.linalg.norm
    expected = size(a.T @ b) ** 2 / (size(a.T @ a) * size(b.T @ b))
    assert found[0, 2] == pytest.approx(expected, abs=1e-6) and expected < 0.9
    flat = geometry.cka(geometry.gram(np.stack([x, np.ones_like(x)])))
    assert np.isnan(flat[0, 1])


def test_whitening_is_by_the_shrunk_covariance_of_ledoit_and_wolf():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(7, 12)) * np.linspace(0.2, 3, 12)
    among = [0, 1, 2, 4, 6]
    base = x[among] - x[among].mean(0)
    n, d = base.shape
    s = base.T @ base / n
    mean = np.trace(s) / d
    apart = ((s - mean * np.eye(d)) ** 2).sum() / d  # as the paper writes them
    spread = sum(((np.outer(row, row) - s) ** 2).sum() for row in base) / n**2 / d
    share = min(spread, apart) / apart
    assert 0 < share < 1
    assert geometry.shrinkage(base) == pytest.approx(share, rel=1e-9)
    inverse = np.linalg.inv((1 - share) * s + share * mean * np.eye(d))
    c = x - x[among].mean(0)
    metric = c @ inverse @ c.T
    length = np.sqrt(np.diag(metric))
    assert geometry.whitened(x, among) == pytest.approx(metric / np.outer(length, length), abs=1e-9)
    assert np.isnan(geometry.whitened(np.ones((3, 4)), [0, 1, 2])).all()


def test_texts_are_compared_as_texts(tiny_qwen2, tmp_path):
    people = [
        Persona("a", "You are a small villain."),
        Persona("b", "You are a villain of this town", related_to=("a",)),
        Persona("c", "Librarian", related_to=("b",)),
        Persona("d", None, kind="none"),
    ]
    found = predictors(tiny_qwen2, Run(tmp_path / "run"), Request(people, ["Who are you?"], reply_tokens=2))
    assert value(found, "a", "b", "jaccard") == pytest.approx(1 / 3)  # small, villain, town
    assert value(found, "a", "b", "shared_word") == 1 and value(found, "a", "c", "shared_word") == 0
    assert value(found, "a", "b", "relation") == 1 and value(found, "a", "c", "relation") == 0
    assert value(found, "b", "a", "relation") is None  # nothing is said of whom a is related to
    ids = {p.name: tiny_qwen2.tokenizer.encode(p.prompt or "", add_special_tokens=False) for p in people}
    assert value(found, "a", "b", "token_length_difference") == abs(len(ids["a"]) - len(ids["b"]))
    assert value(found, "a", "b", "prompt_tokens") == len(ids["b"])
    assert value(found, "a", "b", "edit_distance") == value(found, "b", "a", "edit_distance")
    weight = tiny_qwen2.model.get_input_embeddings().weight
    rows = np.array([weight[ids[n]].double().mean(0).numpy() for n in "abc"])
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert value(found, "a", "c", "embedding_similarity") == pytest.approx(rows[0] @ rows[2], abs=1e-6)
    silent = found.filter(predictor="jaccard", persona="d")
    assert silent["value"].null_count() == 3 and silent["reason"].str.contains("without a system").all()
    assert found.filter(family="text")["questions"].null_count() == found.filter(family="text").height
