"""bench/: the GPU's benches rehearsed on a CPU at tiny sizes, one failing part leaves the others, every bench
ends with a line of JSON, and the table holds what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
STANDING_IN = ROOT / "tests" / "forward" / "standing_in.py"
VISIT = ["smoke", "centroids", "choices", "kernels", "generate", "train", "company", "tests", "autotune"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCH))  # its neighbours
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCH))


def run(gpu, part, out, seconds=60.0):
    """The records of one part."""
    return gpu.records_of(gpu._running.run(part, gpu.Clock(seconds, time.monotonic()), out))


def rows_of(out):
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def is_gone(pid):
    """Not there, or dead and not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


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
def test_the_whole_run_goes_through(gpu, tmp_path):
    out, done = tmp_path, rehearsed(tmp_path)
    assert done.returncode == 0, done.stdout + "".join(p.read_text()[-2000:] for p in out.glob("*.log"))
    records = gpu.records_of(rows_of(out))
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
        "skipped": [],
        "cut_off": [],
    }


def test_two_parts_of_it_and_the_table_they_fill(gpu, tmp_path):
    done = rehearsed(tmp_path, "--only", "kernels", "--only", "centroids")
    assert done.returncode == 0, done.stdout + "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    kernels, _ = gpu.records_of(rows_of(tmp_path))
    ops = {row["op"] for row in kernels["rows"]}
    between = {"engine norm", "engine mlp", "rope", "gated", "add_norm", "fp8_rows"}
    assert ops == {"centroid_sums", "choice_logprobs", "divergences"} | between
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "nothing" not in text
    assert "| centroids, tiny, bfloat16 | 12 prompts of 50 tokens" in text
    assert "| choice_logprobs, N = 5, D = 64, C = 4 |" in text


def test_what_failed_stands_in_the_table_as_such(gpu, tmp_path):
    hang = gpu.Part("hang", [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"], 2)
    crash = gpu.Part("crash", [sys.executable, "-c", "raise SystemExit(3)"], 60)
    records = [record for part in (hang, crash) for record in run(gpu, part, tmp_path)]
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
    cut = run(gpu, gpu.Part("choices", [sys.executable, "-c", code], 2), tmp_path)
    assert [r["partial"] for r in cut] == [2]
    words = "| choices | not measured: time limit; after 2 turns, unchecked: engine 1.50 s |"
    assert words in gpu.table(cut)


def test_further_words_reach_their_part(tmp_path):
    done = rehearsed(tmp_path, "--only", "build", "--more", "build=--quiet")
    assert done.returncode == 0, done.stdout
    done = rehearsed(tmp_path, "--only", "build", "--more", "bild=--quiet")
    assert done.returncode == 2 and "there is build, tests" in done.stderr


def test_the_quick_run_has_a_limit_a_part(gpu):
    assert all(part.limit_s <= 180 for part in gpu.parts("quick"))  # --seconds cuts at 580 in all
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


# ── a visit: --minutes ───────────────────────────────────────────────────────────────────────────────
def test_a_visit_and_its_rehearsal_have_the_same_parts_by_value(gpu, monkeypatch):
    monkeypatch.setattr(gpu._visit, "has_native", lambda: True)
    for mode in ("visit", "rehearse visit"):
        assert [part.name for part in gpu.parts(mode)] == VISIT
        assert all((ROOT / p.words[1]).is_file() for p in gpu.parts(mode) if p.words[1].endswith(".py"))
    monkeypatch.setattr(gpu._visit, "has_native", lambda: False)
    assert [part.name for part in gpu.parts("visit")] == ["build", *VISIT]


def test_the_page_reckons_as_the_parts_do(gpu):
    page = (ROOT / "docs" / "gpu-visit.md").read_text()
    for part in gpu._visit.on_gpu(["python", "-m", "pytest"]):
        assert f"| `{part.name}` |" in page
        line = next(line for line in page.splitlines() if line.startswith(f"| `{part.name}` |"))
        assert line.endswith(f"| {part.reckoned_s} | {part.limit_s} |"), line


@pytest.mark.parametrize("name", VISIT)
def test_the_clock_runs_out_in_each_part(gpu, tmp_path, name):
    part = next(part for part in gpu.parts("rehearse visit") if part.name == name)
    began, clock = time.monotonic(), gpu.Clock(0.7, time.monotonic())  # torch alone takes longer to import
    first = gpu._running.run(part, clock, tmp_path)
    last = gpu._running.run(gpu.Part("after", [], 9), clock, tmp_path)
    assert time.monotonic() - began < 10
    assert first[0]["part"] == name and first[0]["begins_with_s_left"] <= 0.7
    assert first[-1] | {"wall_s": 0, "last_line": ""} == {
        "part": name,
        "ended": True,
        "rc": -9,
        "timed_out": True,
        "why": "the time is over",
        "wall_s": 0,
        "last_line": "",
    }
    assert last == [{"part": "after", "skipped": "the time is over"}]
    assert len(list(tmp_path.iterdir())) <= 8


def test_what_a_part_started_is_killed_with_it_and_what_had_not_run_says_so(tmp_path):
    pid, out = tmp_path / "pid", tmp_path / "out"
    done = script(STANDING_IN, f"starter:{pid}", "--minutes", 0.05, "--out", out)
    assert is_gone(int(pid.read_text())) and done.returncode == 0
    assert rows_of(out)[-2]["timed_out"]
    assert rows_of(out)[-1] == {"part": "after", "skipped": "the time is over"}


def killed_at_a_random_moment(folder):
    """Kills the process group of a run of stand-ins (180 numbered rows) soon after a row drawn by the folder's name; what is
    in the file, what its parts had printed. A row and not a time, so that a quick machine is as often in the midst of it."""
    folder.mkdir()
    draw, seen, out = random.Random(folder.name), folder / "seen", folder / "out"
    words = [sys.executable, STANDING_IN, f"counting:{seen}", "--minutes", "0.5", "--out", out]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True, env=ENVIRONMENT)
    reader = threading.Thread(target=child.stdout.read)  # a full pipe would hold it up
    reader.start()
    row = draw.randrange(190)  # the last ten: after its end
    while child.poll() is None and not (seen.exists() and seen.read_text().count("\n") > row):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    with suppress(ProcessLookupError):  # it may have ended
        os.killpg(child.pid, signal.SIGKILL)
    reader.join(timeout=30)  # to the end of what the process behind says: it has ended
    child.wait()
    return rows_of(out), [line.split() for line in seen.read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere than on Linux there is no process behind")
def test_killed_at_a_random_moment_every_row_that_was_printed_is_there(tmp_path):
    folders, cut = [tmp_path / str(attempt) for attempt in range(20)], 0
    with ThreadPoolExecutor(4) as beside:  # most of a run is its waiting between two rows
        found = list(beside.map(killed_at_a_random_moment, folders))
    for folder, (rows, printed) in zip(folders, found, strict=True):
        kept = {(row["part"], str(row["n"])) for row in rows if "n" in row}
        assert {tuple(one) for one in printed} <= kept
        assert len(kept) == sum("n" in row for row in rows)  # none twice
        ends = [row for row in rows if row.get("ended") or ("skipped" in row)]
        assert [row["part"] for row in ends] == ["a", "b", "c"]
        cut += any(row.get("why") == "stopped by SIGTERM" for row in ends)
        assert len(list((folder / "out").iterdir())) <= 3
    assert cut >= 5  # some of the moments were in the midst of it


def test_a_part_whose_package_is_missing_says_which(gpu, tmp_path):
    part = gpu.Part("tests", [sys.executable, "-c", "raise SystemExit(3)"], 60, ("json", "no_such_package"))
    (record,) = run(gpu, part, tmp_path)
    assert record["missing"] == ["no_such_package"] and "no_such_package" in record["skipped"]
    assert "| tests | not measured: needs no_such_package, which" in gpu.table([record])


def test_a_path_that_was_set_stays_behind_the_source(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried/one:/carried/two")
    code = "import os, json; print(json.dumps({'path': os.environ['PYTHONPATH']}))"
    (record,) = run(gpu, gpu.Part("path", [sys.executable, "-c", code], 60), tmp_path)
    told = next(row["path"] for row in rows_of(tmp_path) if "path" in row).split(":")
    assert record["rc"] == 0 and told[0] == str(ROOT) and told[-2:] == ["/carried/one", "/carried/two"]


def test_too_little_time_left_is_said_and_a_shorter_part_runs(gpu, tmp_path):
    long = gpu.Part("long", [sys.executable, "-c", ""], 60, least_s=1000)
    (record,) = run(gpu, long, tmp_path)
    assert record["skipped"] == "60 s left, 1000 s needed"
    (record,) = run(gpu, gpu.Part("short", [sys.executable, "-c", ""], 60), tmp_path)
    assert record["rc"] == 0 and not record["timed_out"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the peak of this process alone is known, by getrusage"
)
def test_the_peak_of_a_process_is_its_own(tmp_path):
    """By getrusage a process has at least the peak of the one that started it."""
    code = f"""import json, subprocess, sys
sys.path.insert(0, {str(BENCH)!r})
from _common import peak_rss
if len(sys.argv) > 1:
    print(peak_rss(), flush=True)
    sys.stdin.read()
    sys.exit()
held = b"x" * (400 << 20)
child = subprocess.Popen([sys.executable, __file__, "child"], stdin=-1, stdout=-1, text=True)
own, seen = int(child.stdout.readline()), peak_rss(child.pid)
child.communicate("")
print(json.dumps([peak_rss(), own, seen, peak_rss(child.pid)]))"""
    (tmp_path / "peaks.py").write_text(code)
    done = script(str(tmp_path / "peaks.py"))
    mine, own, seen, gone = (size / 2**20 for size in json.loads(done.stdout.splitlines()[-1]))
    assert mine > 400 and 0 < own < 300 and own <= seen < 300 and gone == 0


def test_half_a_line_and_numbers_that_are_not_finite(gpu, tmp_path):
    code = """print('{"bench": "x", "error": NaN}'); print('{"bench": "x", "hal', end="")"""
    run(gpu, gpu.Part("x", [sys.executable, "-c", code], 60), tmp_path)
    told = [row for row in rows_of(tmp_path) if "bench" in row]
    assert told == [{"bench": "x", "part": "x", "error": None, "not_finite": ["error"]}]
    assert "NaN" not in (tmp_path / "gpu.jsonl").read_text()


def test_a_row_of_the_kernels_that_breaks_loses_itself_only(tmp_path):
    code = f"""import sys; sys.path.insert(0, {str(BENCH)!r}); sys.argv = ["x", "--rehearse", "--repeats", "1"]
import bench_kernels as b
def broken(*_): raise RuntimeError("out of luck")
b.bench_centroids = broken
b.main()"""
    done = script("-c", code)
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and len(last["rows"]) == 12
    assert [r["failed"] for r in last["rows"] if "failed" in r] == ["RuntimeError: out of luck"]
    assert sum(r["right"] for r in last["rows"]) == 11


def test_a_check_that_fails_says_so_and_the_next_one_runs(tmp_path):
    code = f"""import sys; sys.path.insert(0, {str(BENCH)!r}); sys.argv = ["x", "--rehearse"]
import smoke, torch
from leakfast.forward import ops
right = ops.divergences
ops.divergences = lambda *given, **how: tuple(x + 1e-2 for x in right(*given, **how))
def broken(*_, **__): raise RuntimeError("no kernel")
ops.centroid_sums = broken
smoke.engine = lambda *_: {{"ok": True}}
smoke.main()"""
    done = script("-c", code)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [row["check"] for row in rows if row.get("ok") is False]
    assert done.returncode == 1 and wrong == rows[-1]["wrong"], done.stderr
    assert sorted({name.split()[0] for name in wrong}) == ["centroid_sums", "divergences"]
    assert next(row for row in rows if row.get("failed"))["failed"] == "RuntimeError: no kernel"


@pytest.mark.slow
def test_the_rehearsal_of_a_visit_ends_in_its_minutes(gpu, tmp_path):
    began = time.monotonic()
    done = script("bench/gpu.py", "--rehearse", "--minutes", 2, "--out", tmp_path)
    assert time.monotonic() - began < 130
    rows = rows_of(tmp_path)
    assert done.returncode == 0, done.stdout
    assert [r["part"] for r in rows if r.get("ended") or (r.get("skipped") and "bench" not in r)] == VISIT
    printed = [line for line in (tmp_path / "gpu.log").read_text().splitlines() if line.startswith("{")]
    assert {json.dumps(row, sort_keys=True) for row in rows} >= {*printed} - {printed[-1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.jsonl", "gpu.log"]
