"""A Weights & Biases run made offline, read back by wandb's own reader of its log."""

from __future__ import annotations

import json

import pytest
import sharing

from leakfast.sinks import export, target
from leakfast.stats.tables import current

datastore = pytest.importorskip(
    "wandb.sdk.internal.datastore",
    reason="wandb is not installed, or is one without a reader in Python (pip install 'wandb==0.27.2')",
)
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sharing.filled(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sent(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        done = export(run, target("wandb:leaks", run.path))
        again = export(run, target("wandb:leaks", run.path))
    assert (again.sent, again.kept, again.where) == ([], done.sent, done.where)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    return folder, done


def records(folder):
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    store, found = datastore.DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def test_tables_and_figures_are_all_there(run, sent):
    folder, done = sent
    tables = {
        path.stem.partition("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")
    }
    wanted = current(run)
    assert set(tables) == {"headline", "rates", "correlations", "health"}
    assert tables["rates"]["columns"] == wanted.rates.columns
    column = wanted.rates.columns.index("rate")
    assert [row[column] for row in tables["rates"]["data"]] == wanted.rates["rate"].to_list()
    assert len(tables["correlations"]["data"]) == wanted.correlations["category"].null_count()
    (image,) = folder.rglob("*.png")
    assert image.read_bytes() == (run.path / "figures/scatter-marker.png").read_bytes()
    assert "figures/scatter-marker" in done.sent


def test_summary_and_settings_are_the_runs(run, sent):
    found = records(sent[0])
    update = [item for r in found if r.WhichOneof("record_type") == "summary" for item in r.summary.update]
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}
    (row,) = current(run).summary().filter(best_layer=True, source="villain").rows(named=True)
    assert summary["marker/marker-villain-s42/source_rate"] == row["source_rate"]
    assert summary["marker/marker-villain-s42/spearman"] == row["spearman"]
    (head,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (head.project, head.display_name) == ("leaks", "small")
    config = {item.key: json.loads(item.value_json) for item in head.config.update}
    assert config["study_sha256"] == run.manifest["study"]
    assert config["base_fingerprint"] == "files:0123"


def test_nothing_of_the_machine_is_sent(sent):
    import socket

    (head,) = [r.run for r in records(sent[0]) if r.WhichOneof("record_type") == "run"]
    assert head.host != socket.gethostname()
    kinds = {r.WhichOneof("record_type") for r in records(sent[0])}
    assert not kinds & {"environment", "stats", "output", "output_raw"}
    assert not list(sent[0].rglob("requirements.txt"))
    assert not list(sent[0].rglob("wandb-metadata.json"))
