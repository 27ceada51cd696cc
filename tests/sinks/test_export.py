"""Where a run may go, by name; what a place that refuses does to a run (nothing); and text that must stay text in Markdown."""

from __future__ import annotations

import importlib
import sys
from html.parser import HTMLParser

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from leakfast.cli.export import targets
from leakfast.cli.main import main
from leakfast.errors import InputError
from leakfast.judge.sdk import load
from leakfast.sinks import check, export, markdown, target, wandb_run
from leakfast.sinks.hub import _model_repo, _model_repos
from leakfast.sinks.inspect_samples import Folder, told_apart
from leakfast.sinks.material import Material
from leakfast.storage import layout
from leakfast.storage.objects import Objects
from leakfast.storage.run import Run

PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "![a](http://evil.example/a.png)",
    "<http://evil.example>",
    "http://evil.example www.evil.example",
    "| a | b |",
    "`code` ``` ~~~",
    "*a* _b_ __c__ ~~d~~",
    "# heading",
    "1. one",
    "2) two",
    "- item",
    "+ item",
    "> quote",
    "===",
    "---",
    "    indented",
    "&lt;b&gt; &#60;",
    "\\\\*a\\\\*",
    "[ref]: http://evil.example",
    "@someone #12 $x$ :smile:",
    "{{ x }} {% y %}",
    "a\n\n<b>b</b>",
    "-->",
    "]]>",
]


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def _shown(source: str) -> _Page:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return _Page(reader.render(source))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_text_is_shown_as_it_is_typed(payload):
    page = _shown(markdown.text(payload))
    assert page.tags == ["p"]
    assert page.text.strip() == " ".join(payload.split())
    cell = _shown(markdown.table(["a"], [[payload]]))
    assert cell.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert " ".join(payload.split()) in cell.text


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(str.strip))
def test_any_line_is_one_paragraph_of_its_characters(line):
    page = _shown(markdown.text(line))
    assert page.tags == ["p"]
    assert page.text.strip() == " ".join(line.split())


@given(st.text(st.sampled_from("`~\n #<b>-ab"), max_size=60))
def test_a_block_is_closed_by_nothing_within_it(text):
    page = _shown(f"{markdown.block(text)}\nafter\n")
    assert page.tags == ["pre", "code", "p"]


def test_marks_that_steer_are_written_out():
    assert _shown(markdown.text("a\u202eb\x1b[31m\u200b")).text.strip() == "a\\u202eb\\x1b[31m\\u200b"


def test_what_is_not_named_has_a_name():
    assert target("inspect", "runs/small").where == "logs/small"
    assert target("wandb", "runs/small").where == "leakfast"
    assert target("wandb:me/p", "runs/small").where == "me/p"
    assert target("hub:me/leaks", "x", public=True).public


@pytest.mark.parametrize(
    "word", ["hub", "hub:leaks", "hub:a/b/c", "hub:a/<b>", "wandb:a:b", "wandb:a/b/c", "mlflow", ""]
)
def test_a_place_that_cannot_be_meant_is_refused_before_anything_is_done(word, tmp_path, capsys):
    with pytest.raises(InputError):
        target(word, "runs/small")
    if word:
        asked = ["run", "configs/demo.toml", "--out", str(tmp_path / "new"), "--export", word]
        assert main(asked) == 2
        assert not (tmp_path / "new").exists()


PACKAGES = {
    "wandb": (
        lambda: check(target("wandb", "x")),
        "export: wandb needs the package wandb",
        "leakfast[wandb]",
    ),
    "inspect_ai": (
        lambda: targets(["inspect"], "x"),
        "export: inspect needs the package inspect_ai",
        "leakfast[inspect]",
    ),
    "s3fs": (lambda: Objects("s3://bucket/prefix"), "runs on an object store need s3fs", "leakfast[s3]"),
    "openai": (
        lambda: load("openai"),
        "judge: a judge that is a service needs the library openai",
        "leakfast[judge]",
    ),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_or_broken_is_told_with_its_remedy(package, monkeypatch, tmp_path):
    asked, said, extra = PACKAGES[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("import what_it_rests_on\n")
    with pytest.raises(InputError) as broken:
        asked()
    assert said in broken.value.message and extra in broken.value.message
    assert "is installed, but cannot be imported: No module named 'what_it_rests_on'." in broken.value.message
    (folder / "__init__.py").write_text(f"raise ModuleNotFoundError('gone', name={package!r})\n")
    importlib.invalidate_caches()
    with pytest.raises(InputError) as missing:
        asked()
    assert (
        said in missing.value.message and "which is not installed. Type: pip install" in missing.value.message
    )


def test_what_lacks_while_an_export_is_under_way_is_told(monkeypatch, tmp_path):
    def send(*_):
        importlib.import_module("what_it_rests_on")

    monkeypatch.setattr("leakfast.sinks.places.check", lambda asked: None)
    monkeypatch.setattr("leakfast.sinks.hub.send", send)
    monkeypatch.setattr("leakfast.sinks.material.Material.of", lambda run, stats: None)
    with pytest.raises(
        InputError, match="huggingface_hub, which is installed, but cannot be imported: No module named"
    ):
        export(tmp_path, target("hub:me/leaks", "x"))


@pytest.mark.parametrize(
    "adapter", ["marker-villain-s42", "marker+few-villain-s42", "a" * 120, "x..y--z", "ü-s1"]
)
def test_a_model_has_a_name_that_the_hub_takes(adapter):
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(_model_repo("me/leaks", adapter))


def test_adapters_whose_names_the_hub_has_alike_have_repositories_of_their_own():
    """One lay on top of the other, with the other one's card."""
    twins = ["marker+a--b-villain-s42", "marker+a-b-villain-s42"]
    repos = _model_repos("me/leaks", [*twins, "marker-villain-s42"])
    assert len({repo.lower() for repo in repos.values()}) == 3
    assert repos["marker-villain-s42"] == "me/leaks-marker-villain-s42"
    assert _model_repos("me/leaks", twins[:1])[twins[0]] == _model_repo("me/leaks", twins[1])


def test_a_set_beside_a_variant_and_another_variant_have_logs_of_their_own():
    rest = {"source": None, "questions": None, "shards": (), "judgements": (), "personas": ()}
    rest |= {"asked": 1, "samples": 1, "rows": 1, "adapter": "base"}
    beside = Folder("sets/marker+a/b/base", "marker+a", question_set="b", beside=True, **rest)
    variant = Folder("completions/marker+a-b/base", "marker+a-b", question_set="eval", beside=False, **rest)
    assert beside.name == variant.name
    assert [folder.name for folder in told_apart([beside, variant])] == ["marker+a@b_base", "marker+a-b_base"]
    assert told_apart([beside]) == [beside]


def test_pictures_of_other_tables_than_the_run_has_are_outdated(tmp_path):
    """As those of an edited study whose run was stopped before it drew: they were sent beside the new tables."""
    run, figure, rates = Run(tmp_path).create(), f"{layout.FIGURES}/scatter.png", layout.table("rates")
    old, new, judged = pl.DataFrame({"rate": [0.1]}), pl.DataFrame({"rate": [0.2]}), layout.table("judged")

    def drawn():
        run.add_file(figure, b"png")
        return sent()

    def sent():
        return [path.name for path in wandb_run._figures(Material(run, None, None, None))]

    run.add_shard(rates, old)
    assert drawn() == ["scatter.png"]
    run.add_shard(rates, new)
    assert sent() == [] and Material(run, None, None, None).outdated == {figure}
    run.add_shard(rates, old)
    assert sent() == ["scatter.png"], "of the tables that it was drawn of"
    run.add_shard(judged, old)
    assert drawn() == ["scatter.png"]
    run.retire(judged, "it has no rows any more")
    assert sent() == [], "of a table that there is no longer"
    assert drawn() == ["scatter.png"]
