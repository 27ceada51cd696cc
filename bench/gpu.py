"""Everything that only a GPU can answer, in one command: builds, runs the GPU tests (engine exactness, kernel
values), then the benches; each part a process of its own with a time limit, so that one failing leaves the
others. Writes gpu.jsonl, one line a record, and with --write the table of bench/RESULTS.md."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- gpu -->", "<!-- end of gpu -->"


class Part(NamedTuple):
    """A command, its time limits in seconds (all, quick), and settings of its environment."""

    name: str
    words: list[str]
    limits_s: tuple[int, int]
    environment: dict[str, str] = {}  # noqa: RUF012


def gpu_tests() -> list[Path]:
    """Every test file that has a test of tier gpu. Raises ValueError where there is none: pytest would then take all."""
    found = [
        p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")
    ]
    if not found:
        raise ValueError("no test of tier gpu lies under tests/")
    return found


def parts(mode: str, python: str = sys.executable) -> list[Part]:
    """What is run: mode "full" (the bars as they are stated), "quick" (below ten minutes in all, fewer prompts
    and repeats) or "rehearse" (tiny, on a CPU: does it run through?)."""

    def bench(name: str, *words: str) -> list[str]:
        return [python, f"bench/bench_{name}.py", *words]

    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib"]
    tests += [str(p.relative_to(ROOT)) for p in gpu_tests()]
    tuned = {"LEAKFAST_AUTOTUNE": "1"}
    if mode == "rehearse":
        tiny = ["--shape", "tiny", "--personas", "3", "--repeats", "2", "--dtype", "bfloat16"]
        centroids = bench("centroids", *tiny, "--questions", "4", "--layers", "0,2", "--sizes", "4,8")
        drawn = ["--repeats", "1", "--completions", "8", "--max-new-tokens", "4"]
        return [
            Part("build", [*build, "--dry-run"], (900, 900)),
            Part("tests", [*tests, "--collect-only"], (900, 900)),
            Part("kernels", bench("kernels", "--rehearse", "--repeats", "2"), (900, 900)),
            Part("centroids", [*centroids, "--sample", "6"], (900, 900)),
            Part("choices", bench("choices", *tiny, "--items", "4", "--sizes", "2,4"), (900, 900)),
            Part("autotune", [*centroids, "--sample", "2"], (900, 900), tuned),
            Part("generate", bench("generate", *drawn), (900, 900)),
        ]
    cuda, short = ["--device", "cuda"], mode == "quick"
    few = ["--sample", "111", "--sizes", "64,128,256", "--repeats", "3"] if short else []
    items = ["--items", "60", "--sample", "128", "--sizes", "32,64", "--repeats", "3"] if short else []
    once = [*cuda, "--sample", "40", "--sizes", "128", "--repeats", "3"]
    found = [
        Part("build", build, (300, 120)),
        Part("tests", tests, (900, 120)),
        Part("kernels", bench("kernels", *cuda, *(["--repeats", "5"] if short else [])), (900, 180)),
        Part("centroids", bench("centroids", *cuda, *few), (1800, 180)),
        Part("choices", bench("choices", *cuda, *items), (7200, 180)),
        Part("autotune", bench("centroids", *once), (900, 120), tuned),
    ]
    if not short:  # starting its three engines takes longer than a quick run has
        found.append(Part("generate", bench("generate", *cuda), (3600, 0)))
    return found


def run(part: Part, limit_s: float, out: Path) -> list[dict[str, Any]]:
    """The records of one part: every line of JSON it printed, or one that says how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **part.environment}
    began, timed_out = time.monotonic(), False
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            part.words,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if child.poll() is None:  # compilers it started go with it
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    text = log.read_text(errors="replace")
    about = {
        "part": part.name,
        "rc": child.returncode,
        "timed_out": timed_out,
        "wall_s": round(time.monotonic() - began, 1),
    }
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    found = [line for line in lines if "partial" not in line] or lines[-1:]  # cut off: what there was by then
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return [{**about, **record} for record in found] or [{**about, "last_line": last}]


def table(records: list[dict[str, Any]]) -> str:
    """The GPU rows of RESULTS.md from the records of a run: what was measured, and nothing else."""
    rows, where = [], ""
    for r in records:
        if "failed" in r or "skipped" in r or r.get("timed_out") or r["rc"] != 0:
            why = (
                r.get("failed")
                or r.get("skipped")
                or ("time limit" if r.get("timed_out") else f"rc {r['rc']}")
            )
            rows.append((r["part"], f"not measured: {why}{_so_far(r)}"))
            continue
        if "device" in r:
            versions = (
                f"torch {r['torch']}, transformers {r['transformers']}, triton {r.get('triton', 'none')}"
            )
            where = f"{r['device']}, {versions}, commit {r['commit']}"
        if r.get("bench") in ("centroids", "choices"):
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


def _kernel(k: dict[str, Any]) -> tuple[str, str]:
    sizes = ", ".join(f"{key} = {k[key]:,}" for key in ("P", "N", "D", "C") if key in k)
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


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
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
    made.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu", help="folder of gpu.jsonl and logs")
    made.add_argument("--write", type=Path, help="Markdown file whose GPU table is filled")
    options = made.parse_args()
    mode = "rehearse" if options.rehearse else "quick" if options.quick else "full"
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + (options.seconds or (580 if options.quick else 1e9))
    more = {name: shlex.split(words) for name, _, words in (given.partition("=") for given in options.more)}
    if unknown := more.keys() - {part.name for part in parts(mode)}:
        made.error(f"--more names {', '.join(unknown)}; there is {', '.join(p.name for p in parts(mode))}")
    records: list[dict[str, Any]] = []
    with (options.out / "gpu.jsonl").open("w") as file:
        for part in parts(mode):
            if options.only and part.name not in options.only:
                continue
            left = ends - time.monotonic()
            if left < 5:
                found = [{"part": part.name, "rc": None, "skipped": "no time left"}]
            else:
                part = part._replace(words=[*part.words, *more.get(part.name, [])])
                found = run(part, min(part.limits_s[mode == "quick"], left), options.out)
            for record in found:
                line = json.dumps(record, sort_keys=True)
                print(line if len(line) < 600 else f"{line[:600]} …", flush=True)
                file.write(line + "\n")
                file.flush()
            records += found
    if options.write:
        fill(options.write, table(records))
    failed = [r["part"] for r in records if r["rc"] != 0 or "failed" in r]
    print(json.dumps({"bench": "gpu", "mode": mode, "records": len(records), "failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
