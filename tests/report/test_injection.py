"""Hostile text wherever a run has text: personas, prompts, completions, judges, adapters, the run's own name. Nothing of it
runs, nothing is fetched, and it shows as it was typed. Payloads only try to set a variable of the page."""

from __future__ import annotations

import polars as pl
import pytest
from browsing import Watched, browser
from report_runs import PEOPLE, fill

from leakfast.inert import inert
from leakfast.report.page import report

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
