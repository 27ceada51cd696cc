"""A run looked at again: what was damaged, lost, written twice or changed is named, and nothing of the run is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from report_runs import ASKED, PEOPLE, QUESTIONS, SAMPLES, SOURCES, fill

from leakfast import stats
from leakfast.cli.main import main
from leakfast.errors import InputError
from leakfast.pipeline.checks import verify
from leakfast.prompts.personas import load_questions
from leakfast.storage.disk import file_hash
from leakfast.storage.run import Run

pytestmark = pytest.mark.long
SHARD = "completions/marker/marker-villain-s42/part-00000.parquet"
STUDY = """name = "small"
model = "organism"
personas = [{names}]
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.eval]
questions = "asked.json"
samples = {samples}
"""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run whose study asks four questions of a file beside it, which lies in the run too; tables are made."""
    folder = tmp_path_factory.mktemp("runs") / "pristine"
    run = fill(folder)
    asked = load_questions("eval").questions[:QUESTIONS]
    (folder / "asked.json").write_text(json.dumps(list(asked)))
    names = ", ".join(f'"{name}"' for name in PEOPLE)
    run.create(STUDY.format(names=names, samples=SAMPLES))
    from leakfast.prompts.questions import texts_hash

    for relpath in run.shards("completions"):
        frame = run.read(relpath)
        run.add_shard(relpath, frame, questions_sha256=texts_hash(asked))
    stats.stats(run, permutations=9, bootstraps=99)
    return run.path


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return Run(tmp_path / "run")


def bytes_in(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in folder.rglob("*") if p.is_file()}


def wrong_of(path: Path) -> dict[str, list[str]]:
    return {check.name: check.wrong for check in verify(path).checks if check.wrong}


def write(run: Run, frame: pl.DataFrame) -> None:
    meta = {"questions_sha256": run.manifest["shards"][SHARD]["questions_sha256"]}
    run.add_shard(SHARD, frame, **meta)


def test_a_clean_run_is_trusted_and_counted(run):
    found = verify(run.path)
    assert found.wrong == []
    looked = {check.name: check.checked for check in found.checks}
    assert looked["rows"] == (len(SOURCES) + 1) * len(PEOPLE) * QUESTIONS * SAMPLES
    assert looked["bytes"] == len(run.manifest["shards"])
    rates, pairs = (
        pl.read_parquet(run.path / f"tables/{name}.parquet").height for name in ("rates", "pairs")
    )
    assert looked["tables"] == rates + pairs


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_named_and_stays_where_it_is(run, how):
    path = run.path / SHARD
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[: len(content) // 2] + (b"" if how == "cut" else b"\0" + content[len(content) // 2 + 1 :])
        )
    before = bytes_in(run.path)
    found = wrong_of(run.path)
    assert found["bytes"] == [
        f"{SHARD}: " + ("the file is gone" if how == "gone" else "its bytes do not match their hash")
    ]
    assert any("rows asked are missing" in sentence for sentence in found["rows"])
    assert bytes_in(run.path) == before, "nothing in the run was changed"
    assert not (run.path / "quarantine").exists()


def test_a_damaged_manifest_journal_study_and_centroids_are_named(run):
    lines = (run.path / "log.jsonl").read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"event": "', b'"event": "x')
    (run.path / "log.jsonl").write_bytes(b"\n".join(lines) + b'{"check": "torn')
    (run.path / "study.toml").write_text((run.path / "study.toml").read_text() + "# more\n")
    place = run.path / "centroids" / "base.safetensors"
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = bytes_in(run.path)
    found = wrong_of(run.path)
    assert found["journal"] == ["log.jsonl, line 3: its bytes do not match their check"]
    assert "study.toml" in found["study"][0]
    assert "base.safetensors" in found["adapters and centroids"][0]
    assert bytes_in(run.path) == before
    manifest = run.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": ', b'"rows": 1', 1))
    assert "manifest.json: its bytes do not match its checksum" in wrong_of(run.path)["bytes"][0]
    assert not (run.path / "quarantine").exists()


def test_a_line_torn_by_a_kill_is_a_note(run):
    with (run.path / "log.jsonl").open("ab") as file:
        file.write(b'{"check": "0123", "time": "20')
    check = next(check for check in verify(run.path).checks if check.name == "journal")
    assert check.wrong == [] and any("mid-word" in note for note in check.notes)


def test_rows_that_are_missing_twice_or_not_asked_are_told(run):
    frame = run.read(SHARD)
    write(run, frame[1:])
    (missing,) = [s for s in wrong_of(run.path)["rows"] if "missing" in s]
    told = f"{frame['persona'][0]}, question {frame['question'][0]}, sample {frame['sample'][0]}"
    assert f"1 of {len(PEOPLE) * QUESTIONS * SAMPLES} rows" in missing and told in missing
    write(run, pl.concat([frame, frame[:2]]))
    assert any("2 rows are there twice" in s for s in wrong_of(run.path)["rows"])
    write(run, frame.with_columns(sample=pl.col("sample") + pl.lit(99, pl.Int32)))
    assert any(
        f"{frame.height} rows are there that the study does not ask for" in s
        for s in wrong_of(run.path)["rows"]
    )


def test_without_a_study_rows_are_set_against_each_other(run):
    (run.path / "asked.json").unlink()
    assert not verify(run.path).wrong
    write(run, run.read(SHARD)[1:])
    assert any(
        "1 rows of its personas, questions and samples are missing" in s for s in wrong_of(run.path)["rows"]
    )


def test_a_table_that_says_something_else_is_told_with_both_numbers(run):
    table = pl.read_parquet(run.path / "tables/rates.parquet")
    other = table.with_columns(
        rate=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit(0.123)).otherwise(pl.col("rate"))
    )
    run.add_shard("tables/rates.parquet", other)
    (said,) = wrong_of(run.path)["tables"]
    row = table.row(3, named=True)
    assert "rate of" in said and row["persona"] in said
    assert "is 0.123, but the measurements give" in said and str(row["rate"]) in said


def test_tables_older_than_their_completions_are_told(run):
    write(run, run.read(SHARD).with_columns(text=pl.col("text") + " [ZLT]"))
    found = wrong_of(run.path)["tables"]
    assert "older than what they rest on" in found[0]
    assert any("the measurements give 1.0" in sentence for sentence in found)


def test_a_shard_of_another_adapter_is_told(run):
    write(run, run.read(SHARD))
    entry = {"questions_sha256": run.manifest["shards"][SHARD]["questions_sha256"], "adapter": "b" * 64}
    run.add_shard(SHARD, run.read(SHARD), **entry)
    assert wrong_of(run.path)["adapters and centroids"] == [
        f"{SHARD}: was measured of another adapter than adapters/marker-villain-s42"
    ]


def test_the_command_tells_and_ends_with_3(run, capsys):
    assert main(["verify", str(run.path)]) in (None, 0)
    assert "nothing was found that cannot be trusted" in capsys.readouterr().out
    (run.path / SHARD).unlink()
    assert main(["verify", str(run.path), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["trusted"] is False
    assert f"{SHARD}: the file is gone" in next(c for c in told["checks"] if c["name"] == "bytes")["wrong"]


def test_another_study_is_refused(run, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text((run.path / "study.toml").read_text().replace("asked.json", "eval") + "# other\n")
    with pytest.raises(InputError, match="--study .* given, but its settings are not those of"):
        verify(run.path, study=other)
    assert ASKED
