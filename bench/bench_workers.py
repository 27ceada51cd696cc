"""A study by one process of N threads beside the same by N workers of one thread each, local or actors of a Ray cluster: wall
seconds of `leakfast run` whole, what both made compared, and what `leakfast plan --from` says of the workers' time from the
first run's rates. The organism; no download. Reports ratios alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import card, ending_with_json, ratio, shown, spread, surroundings

_LOOSE = {"manifest.json", "log.jsonl", "report.html"}  # they hold times, hosts, and who made what
_SEEN = ("completions", "choices", "centroids", "adapters", "data", "tables")


def run(words: list[str], threads: int | None = None) -> tuple[float, str]:
    """Seconds of a command of leakfast in a process of its own, and what it printed."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "leakfast", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - began
    if done.returncode not in (0, 3):
        raise RuntimeError(f"leakfast {words[0]}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return took, done.stdout


def files_of(folder: Path) -> dict[str, str]:
    """Path → hash of what a run holds, but for what tells times."""
    found = {}
    for kind in _SEEN:
        for path in sorted((folder / kind).rglob("*")):
            if path.is_file() and path.name not in _LOOSE:
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Times of both ways, interleaved, and of the plan."""
    n = options.workers
    ways = {
        "threads": ["--threads", str(n)],
        "workers": ["--workers", str(n), "--threads", "1", *(["--cluster", "auto"] if options.ray else [])],
    }
    more = ["--only", options.only] if options.only else []
    times: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, dict[str, str]] = {}
    for turn in range(options.repeats):
        for name, words in ways.items():
            out = folder / f"{name}-{turn}"
            took, _ = run(
                ["run", options.study, "--out", str(out), *words, *more], n if name == "threads" else 1
            )
            times[name].append(took)
            made.setdefault(name, files_of(out))
            print(f"{name}, turn {turn + 1}: {took:.1f} s", flush=True)
    unlike = sorted(
        path
        for path in made["threads"].keys() | made["workers"].keys()
        if made["threads"].get(path) != made["workers"].get(path)
    )
    _, told = run(["plan", options.study, "--from", str(folder / "workers-0"), "--workers", str(n), "--json"])
    return {
        "times": times,
        "files": len(made["threads"]),
        "unlike": unlike,
        "plan_s": json.loads(told)["wall_s"],
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--study", default="configs/organism-marker.toml")
    made.add_argument(
        "--only",
        help="as of leakfast run: a part of the study; the plan is then of the whole and not compared",
    )
    made.add_argument("--workers", type=int, default=2)
    made.add_argument(
        "--ray", action="store_true", help="workers are actors of a Ray cluster on this machine"
    )
    made.add_argument("--repeats", type=int, default=1, help="a run takes minutes")
    options = made.parse_args()
    with ending_with_json("workers", "cpu"), tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
        threads, workers = (found["times"][name] for name in ("threads", "workers"))
        of = ratio(workers, threads)
        lines = [
            (f"{options.workers} threads", shown(spread(threads), " s")),
            (f"{options.workers} {'Ray' if options.ray else 'local'} workers", shown(spread(workers), " s")),
            ("workers over threads", shown(of)),
            ("files equal to the bit", f"{found['files'] - len(found['unlike'])} of {found['files']}"),
        ]
        record = {"bench": "workers", "study": options.study, "ratio": of, **found, **surroundings("cpu")}
        if not options.only and found["plan_s"] is not None:
            record["plan_over_measured"] = found["plan_s"] / spread(workers)["median"]
            lines.append(("plan over measured", f"{record['plan_over_measured']:.2f}"))
        card(f"{options.study}: {options.workers} workers beside {options.workers} threads", lines, record)


if __name__ == "__main__":
    main()
