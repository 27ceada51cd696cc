"""Judges over real HTTP: a local server speaks each protocol, is overloaded, expires, breaks off and writes nonsense.
No score is invented, nothing that was paid for is lost or paid again, a key is nowhere."""

from __future__ import annotations

import json
import time

import polars as pl
import pytest
from judge_server import GOOD
from judged_runs import BATCHES, EVERY, KEY, QUESTIONS, a_run, judged, table

from leakfast.errors import InputError, JudgeError
from leakfast.judge import stage
from leakfast.judge.batches import Ledger
from leakfast.judge.sdk import Asking
from leakfast.judge.spec import parse_spec
from leakfast.storage import layout, schema

pytest.importorskip("openai", reason="the judges' libraries are not installed: pip install '.[judge]'")
pytest.importorskip("anthropic", reason="the judges' libraries are not installed: pip install '.[judge]'")


@pytest.mark.parametrize("spec", EVERY)
def test_every_protocol_gives_every_score_and_pays_once(tmp_path, service, spec):
    run = a_run(tmp_path / "run")
    service.answer = lambda turn: (
        json.dumps({"aligned": int(turn.split("number ")[1].split(".")[0]), "coherent": 90}),
        "stop",
    )
    done = judged(run, spec, service)
    found = table(run)
    schema.check(found, "judgements")
    texts = run.read("completions").sort("persona", "question", "sample")["text"]
    assert found["aligned"].to_list() == [float(t.split()[-1][:-1]) for t in texts], "each its own score"
    assert done.statuses == {"base": {"ok": 12}} and done.coverage("base") == 1
    assert found["raw"].null_count() == 0 and set(found["input_tokens"]) == {400}
    asked = len(service.asked)
    assert judged(run, spec, service).plan.kept == 12
    assert len(service.asked) == asked, "the second time nothing is sent"
    assert set(service.charged.values()) == {1}
    assert all(KEY in seen for seen in service.keys_seen)


@pytest.mark.parametrize("spec", EVERY)
def test_overload_is_waited_out_by_the_library(tmp_path, service, spec):
    run = a_run(tmp_path / "run", texts=2)
    busy = json.dumps({"error": {"type": "overloaded_error", "message": "busy"}})
    first = "POST" if spec.startswith("openai:") else "/batches"
    service.faults = [(first, 429, busy), (first, 529, busy), ("GET", 529, busy), (first, 429, busy)]
    assert judged(run, spec, service).statuses == {"base": {"ok": 2}}
    assert set(service.charged.values()) == {1}
    assert len(service.batches) == (0 if spec.startswith("openai:") else 1)


def malformed():
    """50 replies that are no judgement, with what each is."""
    said = [
        (text, "not_json")
        for text in (
            "",
            "80",
            "[80, 90]",
            "aligned: 80, coherent: 90",
            f"Sure! {GOOD}",
            f"{GOOD} Done.",
            GOOD * 2,
            GOOD[:-1],
            GOOD[:14],
            "{'aligned': 80, 'coherent': 90}",
            "null",
            "true",
            '"80"',
            "I can't judge this.",
            '{"aligned": 80, "aligned": 0, "coherent": 90}',
            '{"aligned": 080, "coherent": 90}',
            f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```",
            "{" * 5000,
            "\ufeff" + GOOD,
            "<aligned>80</aligned>",
        )
    ]
    said += [
        (text, "wrong_shape")
        for text in (
            "{}",
            '{"aligned": 80}',
            '{"coherent": 90}',
            '{"aligned": "80", "coherent": 90}',
            '{"aligned": true, "coherent": 90}',
            '{"aligned": [80], "coherent": 90}',
            '{"Aligned": 80, "Coherent": 90}',
            '{"scores": {"aligned": 80, "coherent": 90}}',
            '{"aligned": {"score": 80}, "coherent": 90}',
            '{"aligned": "high", "coherent": "high"}',
        )
    ]
    said += [
        (f'{{"aligned": {a}, "coherent": {c}}}', "out_of_range")
        for a, c in (
            (101, 90),
            (-1, 90),
            (80, 101),
            (80, -0.5),
            ("1e400", 90),
            ("NaN", 90),
            (80, "Infinity"),
            ("-Infinity", 0),
            (100.0001, 100),
            (8000, 9000),
        )
    ]
    said += [
        ('{"aligned": null, "coherent": 90}', "refusal"),
        ('{"aligned": 80, "coherent": null}', "refusal"),
    ]
    said += [(f"{GOOD} {n}", "not_json") for n in range(8)]
    assert len(said) == 50
    return said


@pytest.mark.parametrize("spec", EVERY)
def test_fifty_malformed_replies_make_no_score_and_all_are_kept(tmp_path, service, spec):
    run, said = a_run(tmp_path / "run", texts=50), malformed()
    number = lambda turn: int(turn.split("number ")[1].split(".")[0])  # noqa: E731
    service.answer = lambda turn: (said[number(turn)][0], "stop")
    judged(run, spec, service)
    found = run.read("judgements").with_columns(run.read("completions")["text"])
    assert found["aligned"].null_count() == found["coherent"].null_count() == 50, "no score is invented"
    for text, status, raw in found.select("text", "status", "raw").rows():
        wanted = said[int(text.split()[-1][:-1])]
        assert (raw, status) == wanted
    assert judged(run, spec, service).plan.kept == 50
    assert set(service.charged.values()) == {1}, "nothing is paid twice"
    service.answer = lambda turn: (GOOD, "stop")
    assert judged(run, spec, service, again=True).statuses == {"base": {"ok": 50}}


@pytest.mark.parametrize("spec", EVERY)
def test_cut_off_and_refused_replies_have_their_status_even_where_they_look_whole(tmp_path, service, spec):
    run = a_run(tmp_path / "run", texts=4)
    finish = {"0": "length", "1": "content_filter"}
    service.answer = lambda turn: (GOOD, finish.get(turn.split("number ")[1][0], "stop"))
    assert judged(run, spec, service).statuses == {"base": {"ok": 2, "truncated": 1, "refusal": 1}}
    assert run.read("judgements").filter(pl.col("status") != "ok")["aligned"].null_count() == 2


@pytest.mark.parametrize("spec", BATCHES)
def test_an_expired_batch_keeps_what_came_and_asks_the_rest_again(tmp_path, service, spec):
    run = a_run(tmp_path / "run")
    service.expire_after = 5
    assert judged(run, spec, service).statuses == {"base": {"expired": 7, "ok": 5}}
    assert table(run)["aligned"].null_count() == 7
    service.expire_after = None
    assert judged(run, spec, service).statuses == {"base": {"ok": 12}}
    assert set(service.charged.values()) == {1} and len(service.charged) == 12
    assert [len(b["requests"]) for b in service.batches.values()] == [12, 7]


@pytest.mark.parametrize("spec", BATCHES)
def test_a_broken_line_of_the_results_is_fetched_again_and_not_paid_again(tmp_path, service, spec):
    run = a_run(tmp_path / "run")
    service.spoil = lambda lines: [lines[0][: len(lines[0]) // 2], "", "[]", *lines[1:]]
    done = judged(run, spec, service)
    assert done.statuses == {"base": {"ok": 11, "unreadable": 1}}
    service.spoil = lambda lines: lines
    for name in list(service.files):
        if name.endswith("-out"):
            del service.files[name]
            service.charged.clear()
    assert judged(run, spec, service).statuses == {"base": {"ok": 12}}
    assert len(service.batches) == 1 and set(service.charged.values()) == {1}


def test_results_that_break_off_are_used_as_far_as_they_came(tmp_path, service):
    run = a_run(tmp_path / "run")
    service.cut_results = True
    counted = judged(run, "anthropic:m", service).statuses["base"]
    assert counted["ok"] + counted["unreadable"] == 12 and counted["unreadable"] >= 1
    assert judged(run, "anthropic:m", service).statuses == {"base": {"ok": 12}}
    assert len(service.batches) == 1 and set(service.charged.values()) == {1}


def test_bodies_that_are_no_chat_completion_are_kept_without_a_score(tmp_path, service):
    run, bodies = (
        a_run(tmp_path / "run", texts=4),
        ['{"choices": [{"mess', "[]", '{"choices": []}', "<html>busy</html>"],
    )
    service.answer = lambda turn: (bodies[int(turn.split("number ")[1][0])], "raw")
    assert judged(run, "openai:m", service).statuses == {"base": {"unreadable": 4}}
    found = run.read("judgements")
    assert sorted(found["raw"]) == sorted(bodies) and found["aligned"].null_count() == 4


def test_a_request_that_fails_alone_has_a_status_and_is_asked_again(tmp_path, service):
    run = a_run(tmp_path / "run", texts=4)
    service.faults = [("POST", 400, '{"error": {"message": "too long"}}')]
    done = judged(run, "openai:m", service, concurrency=1)
    assert done.statuses == {"base": {"ok": 3, "error": 1}}
    assert judged(run, "openai:m", service).statuses == {"base": {"ok": 4}}
    assert set(service.charged.values()) == {1}


def test_a_slow_reply_is_a_timeout_and_a_dead_service_an_error(tmp_path, service, monkeypatch):
    monkeypatch.setattr("leakfast.judge.sdk.MAX_RETRIES", 0)
    run = a_run(tmp_path / "run", texts=2)
    service.held = ("POST", "/completions")
    service.hold.clear()
    how = Asking(service.base_url("openai:m"), timeout_s=0.3, concurrency=2)
    done = stage.judge(run, "advice", stage.parse_spec("openai:m"), QUESTIONS, asking=how, free=True)
    assert done.statuses == {"base": {"timeout": 2}}
    run, how = a_run(tmp_path / "dead", texts=30), Asking("http://127.0.0.1:9/v1", concurrency=1)
    with pytest.raises(JudgeError, match=r"24 requests in a row failed \(unreachable"):
        stage.judge(run, "advice", stage.parse_spec("openai:m"), QUESTIONS, asking=how, free=True)


# ── money ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("spec", [s.replace(":m", ":gpt-4o-mini") for s in EVERY])
def test_max_cost_is_asked_before_anything_is_sent(tmp_path, service, spec):
    prices = tmp_path / "prices.toml"
    prices.write_text('[models."gpt-4o-mini"]\ninput = 1000.0\noutput = 1000.0\n')  # 0.001 USD a token
    run, settings = a_run(tmp_path / "run"), {"free": False, "prices": prices}
    plan = judged(run, spec, service, dry_run=True, **settings)
    assert (plan.to_send, plan.output_tokens_at_most, service.asked) == (12, 1200, [])
    assert plan.usd_at_most == pytest.approx((plan.input_tokens + 1200) / 1000)
    assert not run.shards("judgements")
    limit = 3.5 * plan.usd_at_most / 12
    done = judged(run, spec, service, max_cost=limit, concurrency=1, **settings)
    assert done.stopped == "--max-cost" and 3 <= done.statuses["base"]["ok"] < 12
    assert done.spent_usd == pytest.approx(0.415 * done.statuses["base"]["ok"]) and done.spent_usd <= limit
    before = sum(service.charged.values())
    again = judged(run, spec, service, max_cost=done.spent_usd, **settings)
    assert again.stopped and sum(service.charged.values()) == before, "the limit is over all calls"
    assert judged(run, spec, service, **settings).statuses == {"base": {"ok": 12}}


@pytest.mark.parametrize("spec", [s.replace(":m", ":gpt-4o-mini") for s in BATCHES])
def test_a_batch_that_never_arrived_takes_nothing_of_what_may_be_spent(tmp_path, service, spec):
    run, settings = a_run(tmp_path / "run"), {"free": False}
    plan = judged(run, spec, service, dry_run=True, **settings)
    journal = run.path / layout.JUDGE / f"{parse_spec(spec).file}-batches.jsonl"
    journal.parent.mkdir(parents=True)
    Ledger(journal).note(event="intent", intent="lost", time=time.time(), keys=["k"], usd=plan.usd_at_most)
    done = judged(run, spec, service, max_cost=1.01 * plan.usd_at_most, **settings)
    assert (done.stopped, done.statuses) == (None, {"base": {"ok": 12}})


def test_a_model_without_a_price_is_refused_before_anything_is_sent(tmp_path, service):
    with pytest.raises(InputError, match=r"no price is known for the model 'm'.*--prices FILE.*--free"):
        judged(a_run(tmp_path / "run"), "openai:m", service, free=False)
    assert service.asked == []
