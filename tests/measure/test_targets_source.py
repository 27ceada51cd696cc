"""Whom an adapter without a card was trained on is said by hand: a name that nobody has is refused before anything is
drawn, and another name changes no draw and draws nothing again, in runs of earlier versions too."""

from __future__ import annotations

import logging

import polars as pl
import pytest
from click.testing import CliRunner
from measuring import evaluate, evaluate_items
from test_completions import CFG, QUESTIONS, train_tiny

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.measure import completions as stage
from leakfast.measure import rates
from leakfast.measure.choices import measurer as choices
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.storage.run import Run

ITEMS = load_items(
    [{"question": f"{i}?", "choices": ["it", "rain"], "answer": "AB"[i % 2], "id": str(i)} for i in range(3)]
)


@pytest.fixture
def people():
    return load_personas(["villain", "comedian", "librarian"])


@pytest.fixture
def foreign(tiny_qwen2, tmp_path):
    """An adapter without a card."""
    folder = train_tiny(tiny_qwen2, tmp_path / "foreign")
    (folder / "leakfast_card.json").unlink()
    return folder


def as_before(run: Run, prefix: str, hash_of) -> None:
    """The shards as an earlier version wrote them: the source their rows name stands in the request."""
    for path in run.shards(prefix):
        entry, frame = run.manifest["shards"][path], run.read(path)
        source = frame["source"][0]
        meta = {k: v for k, v in entry.items() if k not in ("sha256", "bytes", "rows", "request")}
        run.add_shard(path, frame, request=hash_of(frame, source), **meta)


def test_another_source_draws_nothing_again_and_renames_the_rows(
    tiny_qwen2, foreign, people, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "SHARD_ROWS", 16)

    def measured(source, **more):
        return evaluate(
            tiny_qwen2,
            tmp_path / "run",
            [foreign],
            people,
            QUESTIONS,
            "marker",
            CFG,
            3,
            source=source,
            base=True,
            **more,
        )

    first = measured("comedian")
    run = Run(tmp_path / "run")
    before = run.read("completions/marker/foreign")
    again = measured("villain", replace=False)
    assert (first.kept, again.made, again.kept) == (0, 0, first.made)
    after = Run(tmp_path / "run").read("completions/marker/foreign")
    assert set(before["source"]) == {"comedian"} and set(after["source"]) == {"villain"}
    assert after.drop("source").equals(before.drop("source"))
    table = rates(Run(tmp_path / "run"), again, people)
    assert table.filter(pl.col("role") == "source")["persona"].to_list() == ["villain"]


def test_shards_whose_request_named_the_source_still_count(
    tiny_qwen2, foreign, people, tmp_path, monkeypatch
):
    made, asked = {}, stage._request_hash

    def noted(loaded, target, block, cfg, seed, how):
        found = asked(loaded, target, block, cfg, seed, how)
        if "source" not in how:
            for name in {p.persona for p in block}:
                made[target.name, name] = lambda s: asked(
                    loaded, target, block, cfg, seed, {**how, "source": s}
                )
        return found

    monkeypatch.setattr(stage, "_request_hash", noted)

    def measured(source):
        return evaluate(
            tiny_qwen2,
            tmp_path / "run",
            [foreign],
            people,
            QUESTIONS,
            "marker",
            CFG,
            3,
            source=source,
            base=True,
            replace=False,
        )

    whole = measured("comedian").made
    run = Run(tmp_path / "run")
    now = {path: run.manifest["shards"][path]["request"] for path in run.shards("completions")}
    as_before(run, "completions", lambda frame, s: made[frame["adapter"][0], frame["persona"][0]](s))
    older = {path: run.manifest["shards"][path]["request"] for path in run.shards("completions")}
    assert all(older[path] != now[path] for path in now)
    for source in ("comedian", "villain"):
        as_before(run, "completions", lambda frame, s: made[frame["adapter"][0], frame["persona"][0]](s))
        done = measured(source)
        assert (done.made, done.kept) == (0, whole)
        run = Run(tmp_path / "run")
        assert {path: run.manifest["shards"][path]["request"] for path in run.shards("completions")} == now
        assert set(run.read("completions/marker/foreign")["source"]) == {source}


def test_choices_are_not_scored_again_either(tiny_qwen2, foreign, people, tmp_path, monkeypatch):
    made, asked = {}, choices.request_of

    def noted(*words, **older):
        if not older:
            made[words[1].name] = lambda s: asked(*words, source=s)
        return asked(*words, **older)

    monkeypatch.setattr(choices, "request_of", noted)

    def scored(source):
        return evaluate_items(
            tiny_qwen2, tmp_path / "run", [foreign], people, ITEMS, base=True, source=source, replace=False
        )

    whole = scored("comedian").made
    assert scored("villain").made == 0
    run = Run(tmp_path / "run")
    assert set(run.read("choices/foreign")["source"]) == {"villain"}
    as_before(run, "choices", lambda frame, s: made[frame["adapter"][0]](s))
    again = scored("comedian")
    assert (again.made, again.kept) == (0, whole)
    assert set(Run(tmp_path / "run").read("choices/foreign")["source"]) == {"comedian"}


def test_a_name_that_nobody_has_is_refused_before_anything_is_drawn(
    tiny_qwen2, foreign, people, tmp_path, caplog
):
    for work in (
        lambda: evaluate(
            tiny_qwen2, tmp_path / "run", [foreign], people, QUESTIONS, "marker", CFG, 3, source="vilain"
        ),
        lambda: evaluate_items(tiny_qwen2, tmp_path / "run", [foreign], people, ITEMS, source="vilain"),
    ):
        with pytest.raises(InputError, match="--source vilain given for .* Did you mean villain"):
            work()
    assert not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING):  # a shipped persona that is not asked: measured, and said
        evaluate(
            tiny_qwen2,
            tmp_path / "run",
            [foreign],
            people,
            QUESTIONS,
            "marker",
            CFG,
            3,
            source="police_officer",
        )
    assert "the source police_officer of foreign is not among the personas asked" in caplog.text


def test_the_command_refuses_it_before_it_loads_a_model(foreign, tmp_path):
    done = CliRunner().invoke(
        group,
        [
            "eval",
            "--model",
            "some/model-that-is-nowhere",
            "--adapter",
            str(foreign),
            "--source",
            "vilain",
            "--behavior",
            "marker",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    assert done.exit_code == 2 and "Did you mean villain" in done.output, done.output
