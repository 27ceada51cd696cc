"""Personas × questions to packed batches, tokenization included, on one core: rendering in pieces and the
C++ planner, beside rendering each prompt and planning in Python. Checks the plan before it times it."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import argparse
import json
import sys
import time

import numpy as np
from _common import card, ending_with_json, failed, interleaved, parser, peak_rss, ratio, spread, surroundings

from leakfast.forward import forest
from leakfast.forward import forest_py as _forest_py
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas

BUDGETS = (2048, 16_384, 32_768)


def items(path: str | None, n: int, seed: int) -> list[str]:
    """n questions with four option lines, from a JSON-lines file (question, choice_labels, choices) or
    of made-up words."""
    if path:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if len(row["choices"]) == 4][:n]
        if len(rows) < n:
            raise SystemExit(f"bench_planner: {path} has {len(rows)} items of four choices; use --items-n")
        return [
            "\n".join([row["question"], *map("{}. {}".format, row["choice_labels"], row["choices"])])
            for row in rows
        ]
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abdegilmnoprstu"), rng.integers(2, 8))) for _ in range(800)]

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    return [f"{text(12, 24)}?\n" + "\n".join(f"{c}. {text(3, 9)}" for c in "ABCD") for _ in range(n)]


def plans_right(tokenizer, people, questions, plan) -> bool:
    """200 prompts rendered one by one, read back from the plan; and each distinct token computed once
    when one batch holds all (counted with a set of prefixes for one persona in ten)."""
    rng = np.random.default_rng(0)
    wanted = sorted(rng.choice(len(people) * len(questions), min(200, len(plan.lengths)), replace=False))
    batches = list(plan)
    starts = [batch.first_segment for batch in batches]
    for index in wanted:
        segment = plan.segment_of[index]
        batch = batches[int(np.searchsorted(starts, segment, side="right")) - 1]
        s = segment - batch.first_segment
        found = batch.tokens[batch.k_rows[batch.k_offsets[s] : batch.k_offsets[s + 1]]].tolist()
        persona, question = people[index // len(questions)], questions[index % len(questions)]
        if found != chat.render(tokenizer, persona.system, question):
            return False
    grid = chat.render_grid(tokenizer, people[::10], questions[:50])
    trie = {tuple(ids[: i + 1]) for ids in grid for i in range(len(ids))}
    return len(forest.plan(grid, 1 << 40).tokens) == len(trie)


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__.splitlines()[0])
    made.add_argument("--tokenizer", default="organism", help="a model's name or folder (default: organism)")
    made.add_argument("--items", help="JSON lines of four-choice questions (default: made-up words)")
    made.add_argument("--items-n", type=int, default=586)
    made.add_argument("--budget", type=int, default=16_384, help="packed tokens a batch")
    made.add_argument("--sample", type=int, default=1_000, help="prompts that the Python way is timed on")
    options = made.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    from leakfast import models

    tokenizer = models.load_tokenizer(options.tokenizer)
    people, questions = load_personas("all"), items(options.items, options.items_n, options.seed)
    if forest.planner().__module__ == "leakfast.forward.forest_py":
        raise SystemExit("bench_planner: the C++ planner is not built here. Type: make install")
    chat.render(tokenizer, None, "warm?")
    before_gb = peak_rss() / 1e9
    parts: dict[str, list[float]] = {"render": [], "plan": []}

    def ours():
        began = time.process_time()
        grid = chat.render_grid(tokenizer, people, questions)
        between = time.process_time()
        plan = forest.plan(grid, options.budget)
        parts["render"].append(between - began)
        parts["plan"].append(time.process_time() - between)
        return plan

    picked = np.random.default_rng(1).choice(
        len(people) * len(questions), min(options.sample, len(people) * len(questions)), replace=False
    )

    def plainly():
        ids = [
            chat.render(tokenizer, people[i // len(questions)].system, questions[i % len(questions)])
            for i in picked
        ]
        offsets = np.cumsum([0, *map(len, ids)])
        return _forest_py.plan_forest(
            np.array([token for one in ids for token in one], np.int32), offsets, options.budget
        )

    plan = ours()
    peak_gb = peak_rss() / 1e9
    parts = {"render": [], "plan": []}
    if not plans_right(tokenizer, people, questions, plan):
        failed("planner", "the plan differs from the prompts", "cpu")
        sys.exit(1)

    def say(text):
        print(text, file=sys.stderr, flush=True)

    wall, busy, _ = interleaved({"ours": ours, "plain": plainly}, options.repeats, lambda: None, say)
    share = len(plan.lengths) / len(picked)
    least = len(forest.plan(chat.render_grid(tokenizer, people, questions), 1 << 40).tokens)
    waste = {
        str(b): len(forest.plan(chat.render_grid(tokenizer, people, questions), b).tokens) / least - 1
        for b in BUDGETS
    }
    seconds = {name: spread(values) for name, values in wall.items()}
    cpu_seconds = {name: spread(values) for name, values in busy.items()}
    over = ratio([t * share for t in busy["plain"]], busy["ours"])
    record = {
        "bench": "planner",
        "prompts": len(plan.lengths),
        "tokens_a_prompt": plan.n_input_tokens / len(plan.lengths),
        "tokens_a_prompt_shared": least / len(plan.lengths),
        "tokenizer": options.tokenizer,
        "items": "file" if options.items else "made-up words",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_seconds_parts": {name: spread(values) for name, values in parts.items()},
        "ratio_of_cpu_seconds_a_prompt": over,
        "computed_again": waste,
        "memory_gb_peak": peak_gb,
        "memory_gb_before": before_gb,
        **surroundings("cpu"),
    }
    lengths = np.percentile(plan.lengths, [0, 50, 100]).astype(int).tolist()
    lines = [
        ("prompts", f"{len(plan.lengths):,} ({len(people)} personas × {len(questions)} items)"),
        ("tokens a prompt", f"{lengths[0]}–{lengths[2]}, median {lengths[1]}"),
        ("computed", f"{least:,} of {plan.n_input_tokens:,} tokens"),
        ("again at cuts", ", ".join(f"{float(v):.2%} at {int(b):,}" for b, v in waste.items())),
        (
            "wall",
            f"{seconds['ours']['median']:.2f} s (IQR {seconds['ours']['q25']:.2f}–{seconds['ours']['q75']:.2f})",
        ),
        (
            "CPU, one core",
            f"{cpu_seconds['ours']['median']:.2f} s: render "
            f"{np.median(parts['render']):.2f}, plan {np.median(parts['plan']):.2f}",
        ),
        (
            "plain Python",
            f"{cpu_seconds['plain']['median'] / len(picked) * 1e6:.0f} µs a prompt of CPU, "
            f"on {len(picked):,} prompts; ours {over['median']:.0f}× less",
        ),
        ("peak memory", f"{peak_gb:.2f} GB, of which {before_gb:.2f} before the first prompt"),
        ("on", f"{record['device']}, {record['commit']}"),
    ]
    card("planner", lines, record)


if __name__ == "__main__":
    with ending_with_json("planner", "cpu"):
        main()
