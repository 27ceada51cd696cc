"""Hostile text wherever a run has text: personas, their prompts, questions, completions, judges and their replies, adapters,
the run's own name. Nothing of it runs, nothing is fetched, and it shows as it was typed, in the page, the served page and the
terminal. Payloads only try to set a variable of the page."""

from __future__ import annotations

import json
import threading

import polars as pl
import pytest
from browsing import Watched, browser
from report_runs import PEOPLE, QUESTIONS, SOURCES, fill, fill_judged

from leakfast.cli.main import main
from leakfast.inert import STEERING, inert
from leakfast.report.page import report
from leakfast.report.server import Server
from leakfast.storage import layout

pytestmark = [pytest.mark.browser, pytest.mark.long]

SET = "window.ran=1"
PAYLOADS = [
    f"<script>{SET}</script>",
    f"</script><script>{SET}</script>",
    f"</SCRIPT ><script>{SET}</script>",
    f"<!--<script>{SET}</script>-->",
    f"--><script>{SET}</script>",
    f"]]><script>{SET}</script>",
    f"<img src=x onerror={SET}>",
    "<img src='http://leak.invalid/a.png'>",
    f'"><img src=x onerror="{SET}">',
    f"'><img src=x onerror='{SET}'>",
    f"<svg onload={SET}>",
    f"<svg><script>{SET}</script></svg>",
    f"<svg><animate onbegin={SET} attributeName=x dur=1s>",
    f"<math><mi xlink:href='javascript:{SET}'>x</mi></math>",
    f"<iframe src='javascript:{SET}'></iframe>",
    f"<iframe srcdoc='<script>parent.{SET}</script>'></iframe>",
    f"<a href='javascript:{SET}'>a</a>",
    f"<body onload={SET}>",
    f"<details open ontoggle={SET}>",
    f"<input autofocus onfocus={SET}>",
    f"<video><source onerror={SET}></video>",
    f"<audio src=x onerror={SET}>",
    f"<object data='javascript:{SET}'></object>",
    f"<embed src='javascript:{SET}'>",
    f"<form action='javascript:{SET}'><button>b</button></form>",
    "<base href='http://leak.invalid/'>",
    "<meta http-equiv=refresh content='0;url=http://leak.invalid/'>",
    "<link rel=stylesheet href='http://leak.invalid/a.css'>",
    "<style>@import 'http://leak.invalid/a.css';</style>",
    "<style>body{background:url(http://leak.invalid/a.png)}</style>",
    f"<template><script>{SET}</script></template>",
    f"<noscript><img src=x onerror={SET}></noscript>",
    f"<textarea></textarea><script>{SET}</script>",
    f"<title></title><script>{SET}</script>",
    f"<xmp></xmp><script>{SET}</script>",
    f"javascript:{SET}",
    f"data:text/html,<script>{SET}</script>",
    f"${{{SET}}}",
    f"{{{{ {SET} }}}}",
    f"{{% raw %}}{SET}",
    "{{ config.__class__.__mro__ }}",
    f"`-{SET}-`",
    f"';{SET};//",
    f'";{SET};//',
    f"\\u003cscript\\u003e{SET}\\u003c/script\\u003e",
    f"&lt;script&gt;{SET}&lt;/script&gt;",
    f"&#60;script&#62;{SET}",
    f"<scr\x00ipt>{SET}</scr\x00ipt>",
    f"\u2028{SET}\u2029",
    f"\u202e<script>{SET}</script>",
    "__proto__",
    "constructor",
    f"</textarea><script>{SET}</script>",
    f"</li></ul></main><script>{SET}</script>",
]


def _hostile(path):
    """A run whose every text is one of PAYLOADS. The adapters' files keep their names, the tables name others."""
    run = fill(path)
    names = dict(zip(PEOPLE[4:], PAYLOADS, strict=False))
    for relpath in run.shards("completions"):
        frame = run.read(relpath)
        order = pl.int_range(pl.len()) % len(PAYLOADS)
        texts = pl.Series(PAYLOADS)
        frame = frame.with_columns(
            persona=pl.col("persona").replace(names),
            text=pl.Series("text", [texts[at] for at in frame.select(order).to_series()])
            + pl.col("text").str.extract(r"( \[ZLT\])$").fill_null(""),
            finish_reason=pl.lit(PAYLOADS[6]),
        )
        run.add_shard(
            relpath, frame, **{k: v for k, v in run.manifest["shards"][relpath].items() if k == "request"}
        )
    (run.path / "centroids" / "base.safetensors").unlink()
    return run


# every payload, dealt to four prompts and to the questions that were asked
PROMPTED = [name for name in PEOPLE if name not in SOURCES][:4]
PROMPTS = dict(zip(PROMPTED, ("\n".join(PAYLOADS[at::4]) for at in range(4)), strict=True))
ASKED = ["\n".join(PAYLOADS[at::QUESTIONS]) for at in range(QUESTIONS)]


def _asked_hostile(path):
    """A run whose personas' prompts and questions are PAYLOADS; a study and a file of personas tell them."""
    run = fill(path)
    own = path.with_suffix(".json")
    prompts = {f"own_{at}": text for at, text in enumerate(PROMPTS.values())}
    questions = path.with_suffix(".questions.json")
    questions.write_text(json.dumps({"questions": ASKED}), encoding="utf-8")
    plain = {name: f"You are {name}." for name in PEOPLE if name not in PROMPTED}
    own.write_text(json.dumps({**plain, **prompts}), encoding="utf-8")
    study = f"""name = "hostile"
model = "organism"
personas = {json.dumps(str(own))}
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.eval]
questions = {json.dumps(str(questions))}
samples = 5
"""
    run.create(study)
    names = dict(zip(PROMPTED, prompts, strict=True))
    for relpath in run.shards("completions"):
        run.add_shard(relpath, run.read(relpath).with_columns(pl.col("persona").replace(names)))
    (run.path / layout.centroids()).unlink()
    return run


def _judged_hostile(path):
    """A run that a judge scored whose name, replies and remarks are PAYLOADS."""
    run = fill_judged(path)
    for relpath in run.shards("judgements"):
        frame = run.read(relpath)
        said = pl.Series("raw", PAYLOADS).gather([at % len(PAYLOADS) for at in range(frame.height)])
        frame = frame.with_columns(said, said.alias("detail"), judge=pl.lit("".join(PAYLOADS)))
        run.add_shard(relpath, frame)
    return run


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


def test_there_are_enough_payloads():
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 40


def test_nothing_executes_nothing_is_fetched_and_text_shows_as_typed(chromium, tmp_path):
    run = _hostile(tmp_path / "a<img src=x onerror=window.ran=1>'\"&b")
    path = report(run)
    watched = Watched(chromium, path.as_uri())
    page = watched.page
    shown = set()
    for adapter in page.eval_on_selector_all("#f-adapter option", "all => all.map((one) => one.value)")[1:]:
        watched.choose("f-adapter", adapter)
        for _ in range(20):
            if page.locator("#more-completions").is_hidden():
                break
            page.click("#more-completions")
        shown |= set(page.locator("#said article blockquote").all_inner_texts())
    for payload in PAYLOADS:
        assert any(one.startswith(inert(payload).strip()) for one in shown), payload
    names = page.eval_on_selector_all("#f-persona option", "all => all.map((one) => one.textContent)")
    for payload in PAYLOADS[: len(PEOPLE) - 4]:
        assert inert(payload).replace("_", " ") in names
    for place in range(1, len(names)):  # everybody is looked at in full
        page.select_option("#c-persona", index=place)
    watched.choose("f-adapter", "")
    for payload in PAYLOADS:
        page.fill("#f-search", payload)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("({}).ran") is None
    assert (
        page.locator("main script, main iframe, main object, main embed, main base, main link").count() == 0
    )
    assert watched.faults == []


def _harmless(watched):
    page = watched.page
    assert page.evaluate("window.ran") is None and page.evaluate("({}).ran") is None
    assert (
        page.locator("main script, main iframe, main object, main embed, main base, main link").count() == 0
    )
    assert watched.faults == []
    page.close()


def _prompts_and_questions_show(page):
    """Everybody with a hostile prompt is chosen, and each question's completions are opened; what was typed stands there."""
    prompts = set()
    for name in page.eval_on_selector_all("#c-persona option", "all => all.map((one) => one.textContent)"):
        if name.startswith("own "):
            page.select_option("#c-persona", label=name)
            prompts.add(page.locator("#who blockquote").text_content())
    assert prompts == {inert(text) for text in PROMPTS.values()}
    questions = set()
    for at in range(QUESTIONS):
        page.select_option("#f-question", value=str(at))
        page.wait_for_timeout(500)
        questions.add(page.locator("#said article header").first.text_content())
    for text in ASKED:
        assert any(inert(text) in head for head in questions), text[:40]


def test_prompts_and_questions_show_as_typed_in_the_page_and_the_served_page(chromium, tmp_path):
    run = _asked_hostile(tmp_path / "run")
    watched = Watched(chromium, report(run).as_uri())
    _prompts_and_questions_show(watched.page)
    _harmless(watched)
    with Server(run.path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.live.now(wait_s=120)
        watched = Watched(chromium, server.url)
        _prompts_and_questions_show(watched.page)
        _harmless(watched)
        server.shutdown()


def test_a_judge_and_what_it_said_are_text(chromium, tmp_path, capsys):
    run = _judged_hostile(tmp_path / "run")
    watched = Watched(chromium, report(run).as_uri())
    assert inert("".join(PAYLOADS)) in watched.page.locator("main").text_content()
    _harmless(watched)
    assert main(["show", str(run.path), "--completions", "40"]) == 0
    told = capsys.readouterr().out
    assert inert(PAYLOADS[47]) in told and not STEERING.search(told.replace("\n", ""))


def test_the_terminal_shows_prompts_and_questions_as_typed(tmp_path, capsys):
    run = _asked_hostile(tmp_path / "run")
    for words in (["--persona", "own_0"], ["--completions", "40"], []):
        assert main(["show", str(run.path), *words]) == 0
        told = capsys.readouterr().out
        assert not STEERING.search(told.replace("\n", "")), words
        if words:
            seen = "".join(told.split())  # lines are folded anywhere
            wanted = PAYLOADS[::4] if "--persona" in words else PAYLOADS[::QUESTIONS]
            for payload in wanted:
                assert "".join(inert(payload).split()) in seen, payload
