"""Repositories on a server of the Hub's protocol (HF_ENDPOINT): what is sent, what is not sent again, and what cards say."""

from __future__ import annotations

import hashlib
import json
from html.parser import HTMLParser

import pytest
import sharing
from hub_server import Hub

from leakfast.cli.export import after_run, targets
from leakfast.cli.main import main
from leakfast.errors import InputError, SinkError
from leakfast.pipeline.settled import keep_personas
from leakfast.prompts.personas import load_personas
from leakfast.sinks import export, target
from leakfast.sinks.inspect_samples import folders
from leakfast.sinks.material import Material
from leakfast.stats.tables import current, stats
from leakfast.storage import layout
from leakfast.study.config import parse_study

pytestmark = pytest.mark.long
MODEL = "me/leaks-marker-villain-s42"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sharing.filled(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def hub(monkeypatch):
    """A server that huggingface_hub takes for the Hub; large files go by git-lfs, as they do without hf_xet."""
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield made
    made.close()


def test_tables_and_adapters_arrive_whole_and_private(run, hub):
    done = export(run, target("hub:me/leaks", run.path))
    tables = current(run).all_tables()
    files = hub.repos["dataset", "me/leaks"]
    assert set(files) == {*(f"tables/{name}.parquet" for name in tables), "study.toml", "README.md"}
    for path, content in files.items():
        if path != "README.md":
            assert content == (run.path / path).read_bytes(), path
    model = hub.repos["model", MODEL]
    assert set(model) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "leakfast_card.json",
        "README.md",
    }
    assert model["adapter_model.safetensors"] == b"marker-villain-s42" * 1000
    assert set(hub.private.values()) == {True}
    assert done.kept == [] and len(done.sent) == len(files) + 2 * 4
    export(run, target("hub:me/open", run.path, public=True))
    assert hub.private["dataset", "me/open"] is False


def test_only_what_changed_is_sent_again(run, hub, tmp_path):
    first = export(run, target("hub:me/leaks", run.path))
    uploads, commits = len(hub.uploads), len(hub.commits)
    again = export(run, target("hub:me/leaks", run.path))
    assert (again.sent, sorted(again.kept)) == ([], sorted(first.sent))
    assert (len(hub.uploads), len(hub.commits)) == (uploads, commits)
    hub.repos["model", MODEL]["adapter_model.safetensors"] = b"other"
    hub.repos["model", MODEL]["leakfast_card.json"] = b"{}"
    third = export(run, target("hub:me/leaks", run.path))
    assert third.sent == [f"{MODEL}/adapter_model.safetensors", f"{MODEL}/leakfast_card.json"]
    assert hub.commits[commits:] == [(MODEL, ["adapter_model.safetensors", "leakfast_card.json"])]


def test_an_export_that_broke_off_goes_on(run, hub):
    hub.refuse = {f"api/models/{MODEL}/preupload": 400}
    with pytest.raises(SinkError, match=MODEL):
        export(run, target("hub:me/leaks", run.path))
    taken = len(hub.commits)
    assert taken
    hub.refuse = {}
    done = export(run, target("hub:me/leaks", run.path))
    assert {path.rpartition("/")[0] for path in done.sent} == {MODEL, "me/leaks-marker-mean-s42"}
    assert [repo for repo, _ in hub.commits[taken:]] == [MODEL, "me/leaks-marker-mean-s42"]


def test_what_the_study_dropped_is_not_sent_and_is_told(hub, tmp_path, capsys):
    """Its adapters, and logs of what was measured under them, went out beside tables that have nothing of them."""
    run = sharing.filled(tmp_path)
    run.add_file(layout.PERSONAS, json.dumps({"sources": sharing.SOURCES}).encode())
    study = parse_study(run.study_text.replace('["villain", "mean"]', '["villain"]'))
    run.create(study.raw_text)
    keep_personas(run, study, load_personas(study.personas))
    stats(run, permutations=9, bootstraps=0)
    assert main(["export", str(run.path), "--to", "hub", "--repo", "me/less"]) == 0
    assert set(hub.repos) == {("dataset", "me/less"), ("model", "me/less-marker-villain-s42")}
    assert "no longer in the study: source mean; adapters and measurements" in capsys.readouterr().err
    assert "no longer in the study" in hub.text("dataset", "me/less")
    assert [one.adapter for one in folders(Material.of(run))] == ["base", "marker-villain-s42"]
    assert "source mean" in " ".join(Material.of(run).notes())


@pytest.mark.parametrize("status", [401, 403])
def test_no_right_to_write_is_the_users_to_mend(run, hub, status):
    hub.refuse = {"/api/repos/create": status}
    with pytest.raises(InputError, match="HF_TOKEN"):
        export(run, target("hub:me/leaks", run.path))


def test_the_model_card_says_what_the_run_says(run, hub):
    export(run, target("hub:me/leaks", run.path))
    card, stats = hub.text("model", MODEL), current(run)
    row = stats.rates.filter(adapter="marker-villain-s42", role="source").row(0, named=True)
    (found,) = stats.summary().filter(best_layer=True, adapter="marker-villain-s42").rows(named=True)
    assert card.startswith("---\nbase_model: org/tiny\n")
    assert f"| counted under the source | {row['hits']} of {row['total']} completions |" in card
    assert f"{100 * found['source_rate']:.1f} %" in card
    kind = "ci" if found["spearman_both_low"] is None else "both"
    ends = " to ".join(f"{found[f'spearman_{kind}_{end}']:.2f}" for end in ("low", "high"))
    over = {"ci": "personas", "both": "personas and questions"}[kind]
    assert f"| {found['spearman']:.2f} ({ends}), over {over} |".replace("-", "−") in card
    digest = hashlib.sha256((run.path / "adapters/marker-villain-s42/adapter_model.safetensors").read_bytes())
    for told in (digest.hexdigest(), "a" * 64, "d" * 64, run.manifest["study"], "0.0001", "You are a"):
        assert told in card


def test_hostile_prompts_and_completions_are_text_in_every_card(run, hub):
    from markdown_it import MarkdownIt

    export(run, target("hub:me/leaks", run.path))
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    plain = {
        "h1",
        "h2",
        "h3",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "strong",
        "ul",
        "li",
        "pre",
        "code",
    }
    for (kind, repo), files in hub.repos.items():
        _, _, body = files["README.md"].decode().partition("\n---\n")
        page = Page(reader.render(body))
        assert page.tags <= plain, (kind, repo, page.tags - plain)
    page = Page(reader.render(hub.text("model", "me/leaks-marker-mean-s42").partition("\n---\n")[2]))
    shown = " ".join(sharing.PROMPT.replace("\u202e", "\\u202e").split())
    assert shown in " ".join(page.text.split())


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_the_command_prints_json_and_exit_codes(run, hub, capsys):
    assert main(["-q", "export", str(run.path), "--to", "hub", "--repo", "me/leaks", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["to"] == "hub" and told["kept"] == []
    assert main(["-q", "export", str(run.path), "--to", "hub"]) == 2
    assert main(["-q", "export", str(run.path), "--to", "hub", "--repo", "me/leaks", "--out", "x"]) == 2
    hub.refuse = {"paths-info": 400}
    assert main(["-q", "export", str(run.path), "--to", "hub", "--repo", "me/leaks"]) == 1
    assert "Type the same command again" in capsys.readouterr().err


def test_behind_a_run_a_place_that_refuses_is_a_warning(run, hub, caplog):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    hub.refuse = {"/api/repos/create": 400}
    with caplog.at_level("WARNING", logger="leakfast.export"):
        told = after_run(run.path, targets(["hub:me/leaks"], run.path), current(run))
    assert [set(one) for one in told] == [{"to", "where", "error"}]
    assert f"leakfast export {run.path} --to hub --repo me/leaks" in caplog.text
    hub.refuse = {}
    told = after_run(run.path, targets(["hub:me/leaks"], run.path), current(run))
    assert told[0]["sent"] > 0
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
