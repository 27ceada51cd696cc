"""What doctor says of this machine, compared with the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from leakfast import doctor, models
from leakfast.cli.main import group


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_versions_are_those_installed(found):
    for package in found["packages"]:
        if package["version"] is None:
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(package["name"])
        else:
            assert package["version"] == importlib.metadata.version(package["name"])
        assert package["use"]


def test_nothing_needed_is_missing_here(found):
    assert [p["name"] for p in found["packages"] if p["required"] and p["version"] is None] == []


def test_every_path_has_a_reason(found):
    paths = {path["what"]: path for path in found["paths"]}
    assert {"device", "forest planner", "attention", "generation"} <= set(paths)
    assert all(path["chosen"] and path["why"] for path in paths.values())
    built = importlib.util.find_spec("leakfast._native") is not None
    assert paths["forest planner"]["chosen"].startswith("C++" if built else "Python")
    assert paths["device"]["chosen"] == ("cuda" if found["gpus"] else "cpu")


def test_the_organism_is_the_one_that_loads(found):
    organism = found["organism"]
    assert organism["path"] == str(models.organism_dir())
    if organism["present"]:
        assert organism["fingerprint"] == models.load("organism", dtype="float32").fingerprint
        assert found["problems"] == []
    else:
        assert organism["fingerprint"] is None
        assert any("leakfast organism build" in problem for problem in found["problems"])


def test_secrets_are_not_shown(monkeypatch):
    monkeypatch.setenv("LEAKFAST_JUDGE_API_KEY", "sentinel-123")
    monkeypatch.setenv("LEAKFAST_RUNS", "elsewhere")
    environment = doctor.examine()["environment"]
    assert environment["LEAKFAST_JUDGE_API_KEY"] == "set"
    assert environment["LEAKFAST_RUNS"] == "elsewhere"
    assert "sentinel-123" not in json.dumps(environment)


def test_the_command_prints_the_same(found):
    command = [sys.executable, "-m", "leakfast", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == (1 if found["problems"] else 0), done.stderr
    told = json.loads(done.stdout)
    assert told["packages"] == found["packages"]
    assert told["paths"] == found["paths"]
    text = CliRunner().invoke(group, ["doctor"]).stdout
    for path in found["paths"]:
        assert path["what"] in text
        assert path["why"] in text
    assert f"torch         {importlib.metadata.version('torch')}" in text
