"""bench/: the GPU's benches rehearsed on a CPU at tiny sizes, one failing part leaves the others, every bench
ends with a line of JSON, and the table holds what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(*words, **more):
    words = [sys.executable, *map(str, words)]
    return subprocess.run(
        words, cwd=ROOT, env={**ENVIRONMENT, **more}, capture_output=True, text=True, check=False
    )


def rehearsed(out, *words):
    (out / "table.md").write_text("before\n<!-- gpu -->\nnothing\n<!-- end of gpu -->\nafter\n")
    more = ("--out", out, "--write", out / "table.md", *words)
    return script("bench/gpu.py", "--rehearse", *more, LEAKFAST_CACHE=str(out))


@pytest.mark.slow
def test_the_whole_run_goes_through(tmp_path):
    out, done = tmp_path, rehearsed(tmp_path)
    assert done.returncode == 0, done.stdout + "".join(p.read_text()[-2000:] for p in out.glob("*.log"))
    records = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert [r["part"] for r in records] == [
        "build",
        "tests",
        "kernels",
        "centroids",
        "choices",
        "autotune",
        "generate",
    ]
    assert all(r["rc"] == 0 and not r["timed_out"] for r in records)
    assert [r.get("bench") for r in records[2:]] == [
        "kernels",
        "centroids",
        "choices",
        "centroids",
        "generate",
    ]
    assert all({"commit", "torch", "device"} <= r.keys() for r in records[2:])
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "bench": "gpu",
        "mode": "rehearse",
        "records": 7,
        "failed": [],
    }


def test_two_parts_of_it_and_the_table_they_fill(tmp_path):
    done = rehearsed(tmp_path, "--only", "kernels", "--only", "centroids")
    assert done.returncode == 0, done.stdout + "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    kernels, _ = (json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())
    ops = {row["op"] for row in kernels["rows"]}
    assert ops == {"centroid_sums", "choice_logprobs", "engine norm", "engine mlp"}
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "nothing" not in text
    assert "| centroids, tiny, bfloat16 | 12 prompts of 50 tokens" in text
    assert "| choice_logprobs, N = 5, D = 64, C = 4 |" in text


def test_what_failed_stands_in_the_table_as_such(gpu, tmp_path):
    hang = gpu.Part(
        "hang", [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"], (1, 1)
    )
    crash = gpu.Part("crash", [sys.executable, "-c", "raise SystemExit(3)"], (60, 60))
    records = [record for part in (hang, crash) for record in gpu.run(part, part.limits_s[0] * 2, tmp_path)]
    assert [(r["part"], r["timed_out"]) for r in records] == [("hang", True), ("crash", False)]
    assert records[0]["wall_s"] < 30
    assert "| hang | not measured: time limit |\n| crash | not measured: rc 3 |" in gpu.table(records)


def test_the_shipped_page_has_the_place_for_the_table(gpu, tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text((ROOT / "bench" / "RESULTS.md").read_text())
    gpu.fill(page, "filled")
    assert "\nfilled\n" in page.read_text()
    with pytest.raises(ValueError, match="needs one"):
        gpu.fill(ROOT / "tests" / "conftest.py", "filled")


def test_what_was_timed_before_the_limit_is_told(gpu, tmp_path):
    turn = '{"bench": "choices", "partial": %d, "seconds": {"engine": {"median": 1.5}}}'
    code = f"import time; print('{turn % 1}'); print('{turn % 2}', flush=True); time.sleep(60)"
    cut = gpu.run(gpu.Part("choices", [sys.executable, "-c", code], (2, 2)), 2, tmp_path)
    assert [r["partial"] for r in cut] == [2]
    words = "| choices | not measured: time limit; after 2 turns, unchecked: engine 1.50 s |"
    assert words in gpu.table(cut)


def test_further_words_reach_their_part(tmp_path):
    done = rehearsed(tmp_path, "--only", "build", "--more", "build=--quiet")
    assert done.returncode == 0, done.stdout
    done = rehearsed(tmp_path, "--only", "build", "--more", "bild=--quiet")
    assert done.returncode == 2 and "there is build, tests" in done.stderr


def test_the_quick_run_has_a_limit_a_part(gpu):
    assert all(part.limits_s[1] <= 180 for part in gpu.parts("quick"))  # --seconds cuts at 580 in all
    assert {p.name for p in gpu.parts("quick")} == {p.name for p in gpu.parts("full")} - {"generate"}


@pytest.mark.parametrize(
    ("words", "field", "rc"),
    [
        (("bench_kernels.py",), "skipped", 0),
        (("bench_centroids.py", "--shape", "tiny", "--layers", "9", "--repeats", "1"), "failed", 1),
    ],
)
def test_a_bench_ends_with_json_in_any_case(words, field, rc):
    done = script(f"bench/{words[0]}", *words[1:])
    assert done.returncode == rc, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert f"bench_{last['bench']}.py" == words[0] and last[field]


def test_the_gpu_run_takes_every_test_file_of_its_tier(gpu):
    taken = {word for part in gpu.parts("quick") if part.name == "tests" for word in part.words}
    there = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "tests").rglob("test_*.py")
        if ".".join(("mark", "gpu")) in p.read_text()
    }
    assert there and there <= taken
