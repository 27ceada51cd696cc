"""What a run shows is made once: a second call draws nothing, and what is damaged, gone, drawn otherwise or made of something
else since is made again, and nothing beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import report_runs

from leakfast.figures import files, of_run
from leakfast.pipeline import finished, shown
from leakfast.pipeline.stages import chosen_of
from leakfast.pipeline.steps import Steps
from leakfast.storage.run import Run
from leakfast.study.config import Study, load_study

pytestmark = pytest.mark.long

KINDS = ("layers", "map")


@pytest.fixture(scope="module", autouse=True)
def two_kinds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_run, "KINDS", KINDS)
        yield


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """A run that was shown, with further questions in a file beside its study."""
    folder = tmp_path_factory.mktemp("shown")
    run = report_runs.fill(folder / "run")
    (folder / "own.toml").write_text('[sets.own]\nquestions = ["Is it late?"]\n')
    study = folder / "study.toml"
    text = (run.path / "study.toml").read_text()
    study.write_text(text.replace('questions = "eval"', 'questions = "eval"\nother_questions = ["own.toml"]'))
    Run(run.path).create(study.read_text())
    finished.once(*asked(folder), lambda: shown.show(Run(run.path), load_study(study), Steps(run)))
    return folder


@pytest.fixture
def folder(once: Path, tmp_path: Path) -> Path:
    """A copy of it; the study, which names the file beside it by its place, is as it was."""
    shutil.copytree(once / "run", tmp_path / "run")
    return tmp_path


def asked(folder: Path) -> tuple[Study, object, Run]:
    study = load_study(folder / "study.toml")
    return study, chosen_of(study, ()), Run(folder / "run")


def shown_again(folder: Path, study: Path) -> tuple[set[str], Steps]:
    """The files of a run that are written when it is shown again."""
    before = times(folder / "run")
    steps = Steps(Run(folder / "run"))
    shown.show(steps.run, load_study(study / "study.toml"), steps)
    after = times(folder / "run")
    return {path for path in after if after[path] != before.get(path)} - {
        ".lock",
        "log.jsonl",
        "manifest.json",
    }, steps


def times(run: Path) -> dict[str, int]:
    found = (path for path in run.rglob("*") if path.is_file() and "quarantine" not in path.parts)
    return {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in found}


def test_a_second_call_makes_nothing(once, folder):
    assert {"report.html", "figures/layers-marker-page.png", "figures/map-page.pdf"} <= times(
        once / "run"
    ).keys()
    written, steps = shown_again(folder, once)
    assert not written and steps.took[shown.SHOWN] is None


def test_pictures_that_are_damaged_gone_or_drawn_otherwise_are_drawn_again(once, folder):
    figures = folder / "run" / "figures"
    (figures / "map-page.pdf").unlink()
    written, _ = shown_again(folder, once)
    assert written == {"figures/map-page.pdf", "figures/map-page.png"}
    (figures / "map-page.png").write_bytes(b"torn")
    written, _ = shown_again(folder, once)
    assert written == {"figures/map-page.pdf", "figures/map-page.png"}
    run = Run(folder / "run")
    other = of_run.draw(run, shown.tables.read(run), ["layers"], of_run.Choices(cosine="raw"))
    files.write(run, next(iter(other)), ["png"])
    written, _ = shown_again(folder, once)
    assert written == {"figures/layers-marker-page.pdf", "figures/layers-marker-page.png"}


def test_pictures_that_a_run_has_no_more_are_set_aside(once, folder, monkeypatch):
    """Those of a behavior that its study dropped went on to whoever the pictures were sent."""
    Run(folder / "run").add_file("figures/scatter-marker-column.png", b"by leakfast plot")
    monkeypatch.setattr(of_run, "KINDS", ("map",))
    monkeypatch.setattr(shown, "source_hash", lambda: "another")
    shown_again(folder, once)
    left = {path.name for path in (folder / "run" / "figures").iterdir()}
    assert left == {"map-page.pdf", "map-page.png", "scatter-marker-column.png"}


def test_other_code_makes_all_of_it_again(once, folder, monkeypatch):
    monkeypatch.setattr(shown, "source_hash", lambda: "another")
    written, _ = shown_again(folder, once)
    assert {"report.html", "figures/layers-marker-page.png", "figures/map-page.pdf"} <= written
    assert not any(path.startswith("tables/") for path in written), "tables follow from what was measured"


def test_a_run_that_is_finished_is_gone_through_no_more(once, folder, monkeypatch):
    study, chosen, _ = asked(once)
    works = []

    def call(asking: Study = study) -> dict[str, float | None]:
        run = Run(folder / "run")

        def work():
            works.append(1)
            return shown.show(run, asking, Steps(run))

        return finished.once(asking, chosen, run, work).stages

    assert set(call().values()) == {None} and not works
    with pytest.MonkeyPatch.context() as patch:
        read = lambda _: "read" if works else pytest.fail("weights were read")  # noqa: E731
        patch.setattr("leakfast.models.loading.folder_fingerprint", read)
        call(study.model_copy(update={"seeds": [43]}))
    assert len(works) == 1, "another study, which was known before the weights were read"
    call()
    assert len(works) == 2, "what the other call finished is not this"
    call()
    assert len(works) == 2
    next((folder / "run" / "completions/marker/base").iterdir()).unlink()
    call()
    assert len(works) == 3, "a shard is gone"
    kept = (once / "own.toml").read_text()
    (once / "own.toml").write_text(kept.replace("late", "early"))
    call()
    assert len(works) == 4, "a file that the study names was edited"
    (once / "own.toml").write_text(kept)
    monkeypatch.setattr(finished, "_weights", lambda study: None)
    call()
    assert len(works) == 5, "nobody knows which weights the name means"
