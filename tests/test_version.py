"""The commit that tables name themselves with: that of the repository the package lies in, changes said."""

from __future__ import annotations

import subprocess

import pytest

from leakfast import version


@pytest.fixture
def repository(tmp_path, monkeypatch):
    package = tmp_path / "leakfast"
    package.mkdir()
    (package / "version.py").write_text("1\n")
    monkeypatch.setattr(version, "__file__", str(package / "version.py"))

    def git(*words):
        told = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *told, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    return git, package


def test_the_commit_is_that_of_the_repository_and_changes_are_said(repository):
    git, package = repository
    assert version.commit() is None  # an installed package
    git("init", "-q")
    assert version.commit() is None  # nothing committed yet
    git("add", "-A")
    git("commit", "-qm", "one")
    at = git("rev-parse", "HEAD")
    assert version.commit() == at
    (package / "version.py").write_text("2\n")
    assert version.commit() == f"{at} with changes"


def test_without_git_there_is_none(repository, monkeypatch):
    git, _ = repository
    git("init", "-q")
    monkeypatch.setenv("PATH", "")
    assert version.commit() is None
