"""Everything that only a GPU can answer, in one command: builds, runs the GPU tests (engine exactness, kernel
values), then the benches; each part a process of its own with a time limit, so that one failing leaves the others. With
--minutes the parts of a visit (_visit.py) by value. A row is in gpu.jsonl the moment it is told; --write fills the table
of bench/RESULTS.md."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()  # before anything that takes time

import _rows  # noqa: E402
import _running  # noqa: E402
import _visit  # noqa: E402
from _running import ROOT, ROWS_FILE, Clock, Part  # noqa: E402

BEGIN, END = "<!-- gpu -->", "<!-- end of gpu -->"


def gpu_tests() -> list[Path]:
    """Every test file that has a test of tier gpu. Raises ValueError where there is none: pytest would then take all."""
    found = [
        p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")
    ]
    if not found:
        raise ValueError("no test of tier gpu lies under tests/")
    return found


def test_words(python: str) -> list[str]:
    """What runs the GPU tests; each is a row of its own."""
    words = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "_pytest_rows"]
    return [*words, "--import-mode=importlib", *(str(p.relative_to(ROOT)) for p in gpu_tests())]


def parts(mode: str, python: str = sys.executable) -> list[Part]:
    """What is run: mode "full" (the bars as they are stated), "quick" (below ten minutes in all, fewer prompts
    and repeats), "rehearse" (tiny, on a CPU: does it run through?), "visit" (a lent GPU, by value) or
    "rehearse visit"."""

    def bench(name: str, *words: str) -> list[str]:
        return [python, f"bench/bench_{name}.py", *words]

    tests = test_words(python)
    if mode == "visit":
        return _visit.on_gpu(tests, python)
    if mode == "rehearse visit":
        return _visit.rehearsal(tests, python)
    build = [python, "setup.py", "build_ext", "--inplace"]
    tuned = {"LEAKFAST_AUTOTUNE": "1"}
    if mode == "rehearse":
        tiny = ["--shape", "tiny", "--personas", "3", "--repeats", "2", "--dtype", "bfloat16"]
        centroids = bench("centroids", *tiny, "--questions", "4", "--layers", "0,2", "--sizes", "4,8")
        drawn = ["--repeats", "1", "--completions", "8", "--max-new-tokens", "4"]
        return [
            Part("build", [*build, "--dry-run"], 900),
            Part("tests", [*tests, "--collect-only"], 900),
            Part("kernels", bench("kernels", "--rehearse", "--repeats", "2"), 900),
            Part("centroids", [*centroids, "--sample", "6"], 900),
            Part("choices", bench("choices", *tiny, "--items", "4", "--sizes", "2,4"), 900),
            Part("autotune", [*centroids, "--sample", "2"], 900, environment=tuned),
            Part("generate", bench("generate", *drawn), 900),
        ]
    cuda, short = ["--device", "cuda"], mode == "quick"
    few = ["--sample", "111", "--sizes", "64,128,256", "--repeats", "3"] if short else []
    items = ["--items", "60", "--sample", "128", "--sizes", "32,64", "--repeats", "3"] if short else []
    once = [*cuda, "--sample", "40", "--sizes", "128", "--repeats", "3"]
    found = [
        Part("build", build, 120 if short else 300),
        Part("tests", tests, 120 if short else 900),
        Part(
            "kernels", bench("kernels", *cuda, *(["--repeats", "5"] if short else [])), 180 if short else 900
        ),
        Part("centroids", bench("centroids", *cuda, *few), 180 if short else 1800),
        Part("choices", bench("choices", *cuda, *items), 180 if short else 7200),
        Part("autotune", bench("centroids", *once), 120 if short else 900, environment=tuned),
    ]
    if not short:  # starting its three engines takes longer than a quick run has
        found.append(Part("generate", bench("generate", *cuda), 3600))
    return found


def records_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file as one record a bench and part: how the part ended, with what it told at its end, or, where it
    was cut off, with the last of what it told on the way (all the rows of the kernels)."""
    found = []
    for name in dict.fromkeys(row["part"] for row in rows if "part" in row):
        mine = [row for row in rows if row.get("part") == name]
        about = next(
            (row for row in mine if row.get("ended") or ("skipped" in row and "bench" not in row)), None
        )
        about = about or {"part": name, "rc": None, "timed_out": False, "skipped": "killed while it ran"}
        told = [row for row in mine if "bench" in row]
        whole = [row for row in told if "partial" not in row]
        if not whole and told:
            whole = [{**told[-1], "rows": [row for line in told for row in line.get("rows", [])]}]
        found += [{"rc": None, **about, **row} for row in whole] or [{"rc": None, **about}]
    return found


def table(records: list[dict[str, Any]]) -> str:
    """The GPU rows of RESULTS.md from the records of a run: what was measured, and nothing else."""
    rows, where = [], ""
    for r in records:
        lost = r["rc"] != 0 and not r.get("rows")  # of the kernels each row says it for itself
        if "failed" in r or "skipped" in r or r.get("timed_out") or lost:
            why = (
                r.get("failed")
                or r.get("skipped")
                or ("time limit" if r.get("timed_out") else f"rc {r['rc']}")
            )
            why = f"wrong: {', '.join(r['wrong'])}" if r.get("wrong") else why
            rows.append((r["part"], f"not measured: {why}{_so_far(r)}"))
            rows += [_kernel(k) for k in r.get("rows", [])]
            continue
        if "device" in r:
            versions = (
                f"torch {r['torch']}, transformers {r['transformers']}, triton {r.get('triton', 'none')}"
            )
            where = f"{r['device']}, {versions}, commit {r['commit']}"
        if r.get("bench") == "smoke":
            rows.append(("checks", f"{r['checks']} hold"))
        elif r.get("bench") == "train":
            rows.append((f"a training step, {r['model']}, {r['dtype']}", _training(r)))
        elif r.get("bench") == "company":
            rows.append((f"a step of {r['adapters']} adapters, {r['model']}, {r['dtype']}", _company(r)))
        elif r.get("bench") == "generate" and r.get("mode") == "visit":
            rows.append(("completions, one draw each", _visited(r)))
        elif r.get("bench") in ("centroids", "choices"):
            rows.append((_title(r), _sentence(r)))
        elif r.get("bench") == "generate":
            rows.append(("completions", _completions(r)))
        elif r.get("bench") == "kernels":
            rows.append(
                (
                    "ceilings of this run",
                    f"copy {r['copy_bytes_s'] / 1e12:.2f} TB/s, bf16 matrix "
                    f"{r['matrix_flop_s'] / 1e12:.0f} TFLOP/s",
                )
            )
            rows += [_kernel(k) for k in r["rows"]]
        else:
            rows.append((r["part"], r.get("last_line", "")))
    body = "\n".join(f"| {left} | {right} |" for left, right in rows)
    return f"{where or 'No device was seen.'}\n\n| | measured |\n|---|---|\n{body}"


def fill(path: Path, content: str) -> None:
    """`content` between the two marks of a Markdown file; the rest of it stays. ValueError without them."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} needs one {BEGIN} and one {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{content}\n{END}{tail}", encoding="utf-8")


def _so_far(r: dict[str, Any]) -> str:
    """What a part that was cut off had timed until then; nothing was checked of it."""
    times = ", ".join(f"{name} {t['median']:.2f} s" for name, t in r.get("seconds", {}).items())
    return f"; after {r['partial']} turns, unchecked: {times}" if r.get("partial") else ""


def _title(r: dict[str, Any]) -> str:
    tuned = ", LEAKFAST_AUTOTUNE" if r["part"] == "autotune" else ""
    return f"{r['bench']}, {r['shape']}, {r['dtype']}{tuned}"


def _sentence(r: dict[str, Any]) -> str:
    t = r["seconds"]
    job = t.get("sums", t["engine"])
    times = f"engine {job['median']:.2f} s ({job['q25']:.2f}–{job['q75']:.2f})"
    times += f", with every state on the host {t['engine']['median']:.2f} s" if "sums" in t else ""
    one = r.get("ratio_over_one_at_a_time") or r["ratio_a_prompt_over_one_at_a_time"]
    padded = r.get("ratio_over_padded") or r["ratio_a_prompt_over_padded"]
    share = f", {r['fraction_of_peak']:.0%} of 790" if r["fraction_of_peak"] else ""
    fp8 = r.get("fp8")
    low = f"; FP8 {fp8['seconds']['median']:.2f} s ({fp8['agreement']})" if fp8 else ""
    return (
        f"{r['prompts']:,} prompts of {r['tokens_a_prompt']:.0f} tokens ({r['tokens_a_prompt_shared']:.0f} "
        f"computed): {times}, {r['tflops']:.0f} TFLOP/s{share}; {one['median']:.1f}× (i), "
        f"{padded['median']:.1f}× (ii) at {r['padded_batch']} a batch{low}"
    )


def _completions(r: dict[str, Any]) -> str:
    rates = "; ".join(f"{name} {rate['median']:,.0f} tokens/s" for name, rate in r["tokens_per_s"].items())
    overhead = "; ".join(
        f"live LoRA, {n}: {o['median']:.2f}× the time" for n, o in r.get("lora_overhead", {}).items()
    )
    if "ratio_with_starts" in r:
        overhead += f"; merged in place {r['merged_time_over_live']['median']:.2f}× live's time, "
        overhead += f"{r['seconds_a_swap']['median']:.1f} s a swap"
        overhead += f"; with an engine started for each adapter {r['ratio_with_starts']['median']:.1f}×"
    turn = "" if r["interleaved"] else ", one engine after the other"
    return (
        f"{r['completions']:,} of mean {r['tokens_each']:.0f} tokens{turn}: {rates}; {r['ratio']['median']:.1f}× over "
        f"the published settings{'; ' + overhead if overhead else ''}"
    )


def _training(r: dict[str, Any]) -> str:
    others = [f"{o['median']:.2f}× {side}" for side, o in r["over_packed"].items() if side != "packed"]
    return f"packed {r['seconds']['packed']['median']:.3f} s; {', '.join(others)}"


def _company(r: dict[str, Any]) -> str:
    others = [f"{o['median']:.2f}× {side}" for side, o in r["over_together"].items()]
    return f"together {r['seconds']['together']['median']:.3f} s; {', '.join(others)}"


def _visited(r: dict[str, Any]) -> str:
    rates = [f"{way} {rate:,.0f} tokens/s" for way, rate in r["tokens_per_s"].items()]
    return "; ".join(
        [*rates, *(f"{x:.2f}× published, {way}" for way, x in r["ratio_over_published"].items())]
    )


def _kernel(k: dict[str, Any]) -> tuple[str, str]:
    if "failed" in k:
        return k["op"], f"not measured: {k['failed']}"
    sizes = ", ".join(f"{key} = {k[key]:,}" for key in ("P", "N", "D", "C") if key in k)
    if not k["right"]:
        return f"{k['op']}, {sizes}", "a wrong result: no ratio"
    ms = (k["times_ms"].get("ours") or k["times_ms"]["plain"])["median"]
    words = [f"{ms:.3f} ms"]
    words += [
        f"{k[key]:.0%} {name}"
        for key, name in (
            ("of_matrix_rate", "of the matrix rate"),
            ("of_copy_bandwidth", "of copy bandwidth"),
        )
        if key in k
    ]
    words += [f"{value['median']:.2f}× {name}" for name, value in k["ratio"].items()]
    return f"{k['op']}, {sizes}", "; ".join(words)


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with `mode` and `seconds` set."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument(
        "--minutes", type=float, help="a visit to a lent GPU: all the time there is, parts by value"
    )
    made.add_argument("--quick", action="store_true", help="below ten minutes in all")
    made.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU: does it run through?")
    made.add_argument("--seconds", type=float, help="time for everything (default: 580 with --quick)")
    made.add_argument("--only", action="append", help="a part by name; may be repeated")
    made.add_argument(
        "--more",
        action="append",
        default=[],
        metavar="PART=WORDS",
        help='further words for a part, the last said counts: --more "choices=--repeats 2 --sizes 128"',
    )
    made.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "gpu", help="folder of gpu.jsonl and gpu.log"
    )
    made.add_argument(
        "--from",
        dest="rows",
        type=Path,
        metavar="JSONL",
        help="nothing is run: the rows of this file, for --write",
    )
    made.add_argument("--write", type=Path, help="Markdown file whose GPU table is filled")
    options = made.parse_args(words)
    if options.minutes is not None and (options.quick or options.seconds or options.minutes <= 0):
        made.error("--minutes M, above 0, is all the time there is: leave --quick and --seconds out")
    options.mode = "rehearse" if options.rehearse else "quick" if options.quick else "full"
    if options.minutes:
        options.mode = "rehearse visit" if options.rehearse else "visit"
        # what it takes to kill and to write is within the minutes
        options.seconds = 60 * options.minutes - min(2.0, 6 * options.minutes)
    options.seconds = options.seconds or (580 if options.quick else 1e9)
    names = [part.name for part in parts(options.mode)]
    options.more = {
        name: shlex.split(more) for name, _, more in (given.partition("=") for given in options.more)
    }
    if unknown := {*options.more, *(options.only or [])} - {*names}:
        made.error(f"{', '.join(sorted(unknown))} is no part; there is {', '.join(names)}")
    return options


def go(asked: list[Part], options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Every part after the other; the rows of the file. A file of an earlier run in the folder is replaced."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (ROWS_FILE, _running.LOG_FILE):
        (options.out / name).unlink(missing_ok=True)
    head = {"run": options.mode, "minutes": options.minutes, "parts": [part.name for part in asked]}
    _running.keep(options.out, head)
    rows = []
    for part in asked:
        rows += _running.run(part, clock, options.out)
    return rows


def main() -> None:
    options = options_of()
    if options.rows:
        found = table(records_of(_rows.rows_in(options.rows)))
        return fill(options.write, found) if options.write else print(found)
    clock = Clock(options.seconds, _running.behind(BEGAN))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, clock.stop)
    asked = [
        part._replace(words=[*part.words, *options.more.get(part.name, [])])
        for part in parts(options.mode)
        if not options.only or part.name in options.only
    ]
    records = records_of(go(asked, options, clock))
    if options.write:
        fill(options.write, table(records))
    skipped = list(dict.fromkeys(r["part"] for r in records if "skipped" in r))
    cut = [r["part"] for r in records if r.get("timed_out")] if options.minutes else []  # a visit ends so
    failed = [r["part"] for r in records if r["part"] not in skipped and (r["rc"] != 0 or "failed" in r)]
    failed = [name for name in dict.fromkeys(failed) if name not in cut]
    told = {
        "bench": "gpu",
        "mode": options.mode,
        "records": len(records),
        "failed": failed,
        "skipped": skipped,
    }
    _running.say(json.dumps(told))
    return sys.exit(1 if failed or (skipped and not options.minutes) else 0)


if __name__ == "__main__":
    main()
