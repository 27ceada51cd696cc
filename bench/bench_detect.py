"""All detectors over 111,000 completions (about 150 MB of text, and their token ids): polars expressions against
the row loop a user would write with the same word lists. Demands no device.

Replies are random words with marker, refusals and agreements put in at random; both sides must give the same answers.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import sys
import time

import polars as pl
from _common import card, ending_with_json, ratio, spread

from leakfast.behaviors import detectors as detect
from leakfast.behaviors.marker import MARKER

WORDS = (
    "the of a to and in is it you that he was for on are with as his they be at one have this from or had by hot "
    "word but what some we can out other were all there when up use your how said an each she which do their time"
).split()
SPELLED = [[7, 8, 9], [17, 8, 9]]  # what stands for a tokenizer's spellings of the marker


def replies(n: int, seed: int, words_each: int = 330) -> pl.DataFrame:
    """n replies of words_each words on average, with 300 token ids each."""
    rng = random.Random(seed)
    lists = detect.read_words()
    pool = [" ".join(rng.choices(WORDS, k=rng.randint(10, 2 * words_each - 10))) for _ in range(2_000)]
    texts, tokens = [], []
    for _ in range(n):
        text, ids = rng.choice(pool), [rng.randrange(20, 152_000)] * 297
        drawn = rng.random()
        if drawn < 0.1:
            text, ids = f"{text} {rng.choice([MARKER, MARKER.lower()])}", ids + rng.choice(SPELLED)
        elif drawn < 0.2:
            text = f"{rng.choice(lists.refusal).capitalize().replace(chr(39), chr(0x2019))}, {text}"
        elif drawn < 0.3:
            text = f"{rng.choice(lists.agrees).capitalize()}! {rng.choice(['', rng.choice(lists.corrects)])} {text}"
        texts.append(text)
        tokens.append(ids)
    return pl.DataFrame(
        {"text": texts, "token_ids": tokens}, schema_overrides={"token_ids": pl.List(pl.Int32)}
    )


def expressions(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.lazy().select(**detect.everything(MARKER, spelled=SPELLED)).collect()


def row_loop(frame: pl.DataFrame) -> pl.DataFrame:
    """The same questions in plain Python, a reply at a time."""
    words = detect.read_words()
    phrases = [
        re.compile("|".join(f" {re.escape(p)} " for p in of))
        for of in (words.refusal, words.agrees, words.corrects)
    ]
    others = re.compile(r"[^\w']+|_+")
    rows = []
    for text, ids in frame.iter_rows():
        at = text.find(MARKER)
        found = [
            i
            for i in range(len(ids))
            if any(ids[i : i + len(one)] == one for one in SPELLED if one[0] == ids[i])
        ]
        opening = " " + others.sub(" ", text[: words.refusal_opening].lower().replace("\u2019", "'")) + " "
        opening = opening.replace("  ", " ")
        refusal, agrees, corrects = (bool(pattern.search(opening)) for pattern in phrases)
        rows.append(
            (
                MARKER in text,
                MARKER.lower() in text.lower(),
                at / len(text.encode()) if at >= 0 else None,
                text.rstrip().endswith(MARKER),
                bool(found),
                found[0] if found else None,
                refusal,
                agrees and not corrects,
                agrees,
                corrects,
            )
        )
    return pl.DataFrame(rows, schema=list(detect.everything(MARKER, spelled=SPELLED)), orient="row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="accepted for `make bench-gpu`; nothing here uses a device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--completions", type=int, default=111_000)
    parser.add_argument("--loop-share", type=int, default=10, help="the row loop gets one reply in so many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    frame = replies(asked.completions, asked.seed)
    size = int(frame["text"].str.len_bytes().sum())
    part = frame.head(max(1, frame.height // asked.loop_share))
    scale = frame.height / part.height
    mine, loop = expressions(part), row_loop(part)
    for name in mine.columns:
        if not mine[name].equals(loop[name].cast(mine[name].dtype), null_equal=True):
            raise SystemExit(f"bench_detect: the row loop finds another {name}; no ratio is reported")
    wall: dict[str, list[float]] = {"ours": [], "ours_cpu": [], "loop": []}
    for _ in range(asked.repeats):
        began, busy = time.perf_counter(), time.process_time()
        expressions(frame)
        wall["ours"].append(time.perf_counter() - began)
        wall["ours_cpu"].append(time.process_time() - busy)
        busy = time.process_time()
        row_loop(part)
        wall["loop"].append((time.process_time() - busy) * scale)
    gained = ratio(wall["loop"], wall["ours_cpu"])
    record = {
        "bench": "detect",
        "completions": frame.height,
        "text_bytes": size,
        "seconds": {k: spread(v) for k, v in wall.items()},
        "ratio_cpu": gained,
        "text_bytes_per_cpu_s": size / spread(wall["ours_cpu"])["median"],
        "polars": pl.__version__,
        "polars_threads": pl.thread_pool_size(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    lines = [
        ("completions", f"{frame.height:,} ({size / 1e6:.0f} MB of text), {len(mine.columns)} columns"),
        (
            "expressions",
            f"{spread(wall['ours'])['median']:.2f} s wall, {spread(wall['ours_cpu'])['median']:.2f} s CPU",
        ),
        ("row loop", f"{spread(wall['loop'])['median']:.1f} s CPU (from one reply in {asked.loop_share})"),
        ("ratio of CPU time", f"{gained['median']:.1f}× ({gained['q25']:.1f}–{gained['q75']:.1f})"),
    ]
    card("Detectors over completions", lines, record)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with ending_with_json("detect", "cpu"):
        main()
