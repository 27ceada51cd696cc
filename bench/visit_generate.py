"""Published generation beside ours, in the minutes of a lent GPU: one engine as published (128 seats, a merged copy, so
no LoRA), then one of ours with five live adapters; each draw is a row when it is done. Demands vLLM; on a CPU it rehearses
with the organism and the transformers backend. bench_generate.py measures the same in turns, for half an hour."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import SHAPES, ending_with_json, parser, surroundings, tell
from _rows import Lost
from bench_generate import PUBLISHED_SEATS, drawn, trained, works_of

from leakfast.generation.contract import Sampling


class Way(NamedTuple):
    """A draw: its name, its adapters (None: no adapter), how many completions."""

    name: str
    adapters: Sequence[Path | None]
    completions: int


class Side(NamedTuple):
    """An engine: how it is opened inside a stack, its seats, and what is drawn with it, by value."""

    name: str
    opened: Callable[[ExitStack], Any]
    seats: int
    ways: Sequence[Way]


def sides_on_gpu(asked: Any, folder: Path) -> tuple[list[Side], list[list[int]]]:
    """Two engines of random weights of the shape, one after the other, each with nearly all of the memory."""
    from _shaped import Measured, shaped_adapter, shaped_folder, shaped_spec

    from leakfast.generation.vllm.parallel import Parallel
    from leakfast.generation.vllm.widths import Width, device_name, width_for

    rng = np.random.default_rng(asked.seed)
    vocab = SHAPES[asked.shape]["vocab_size"]
    prompts = [rng.integers(100, vocab - 1000, 100).tolist() for _ in range(2220)]
    model = shaped_folder(folder / "model", asked.shape)
    adapters = [shaped_adapter(folder / f"a{i}", asked.shape, asked.rank, i) for i in range(5)]
    width = width_for(device_name(), "bench", "bfloat16", seats=asked.seats, otherwise=640)[0]

    def opened(seats: Any, known: Sequence[Path]) -> Callable[[ExitStack], Any]:
        def start(stack: ExitStack) -> Any:
            engine = Parallel(shaped_spec(model, seats, 108 + asked.max_new_tokens, known, 0.92), 1, Measured)
            stack.callback(engine.close)
            return engine

        return start

    n = asked.completions
    ours = [Way("5 adapters", adapters, n), Way("base", [None], n), Way("1 adapter", adapters[:1], n)]
    return [
        Side("published", opened(Width(PUBLISHED_SEATS), ()), PUBLISHED_SEATS, [published(asked)]),
        Side("ours", opened(width, adapters), width.seats, ours),
    ], prompts


def sides_on_cpu(asked: Any, folder: Path) -> tuple[list[Side], list[list[int]]]:
    """The organism by the transformers backend: whether it runs through, nothing about speed."""
    from leakfast import models
    from leakfast.generation import backends
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas, load_questions

    loaded = models.load("organism", dtype="float32", device="cpu")
    people, questions = load_personas("originals")[:2], load_questions("eval").questions[:2]
    prompts = [list(p.ids) for p in chat.render_prompts(loaded.tokenizer, people, questions)]
    adapters = [trained(loaded, folder / "a0", 0)]
    longest = max(map(len, prompts)) + asked.max_new_tokens

    def opened(known: Sequence[Path]) -> Callable[[ExitStack], Any]:
        def start(stack: ExitStack) -> Any:
            made = backends.opened(loaded, known, "transformers", batch_completions=8, longest=longest)
            return stack.enter_context(made)

        return start

    ours = [Way("1 adapter", adapters, asked.completions), Way("base", [None], asked.completions)]
    return [
        Side("published", opened([]), 8, [published(asked)]),
        Side("ours", opened(adapters), 8, ours),
    ], prompts


def published(asked: Any) -> Way:
    """The slow side, on eight fills of its seats at most."""
    return Way("published", [None], min(asked.completions, 8 * PUBLISHED_SEATS))


def measure(side: Side, prompts: list[list[int]], asked: Any, folder: Path) -> dict[str, float]:
    """Name → tokens a second of what was drawn with one engine; each told as it is there. A draw that breaks, or an
    engine that does not start, is a row that says so."""
    rates: dict[str, float] = {}
    sampling = Sampling(1.0, 0.95, asked.max_new_tokens)
    with Lost() as lost, ExitStack() as stack:
        began = time.perf_counter()
        engine = side.opened(stack)
        known = list(dict.fromkeys(adapter for way in side.ways for adapter in way.adapters))
        warm = min(asked.completions, max(64, asked.completions // 20))
        drawn(engine, works_of(warm, prompts, known), sampling, None)
        started = round(time.perf_counter() - began, 1)
        row({"engine": side.name, "seats": side.seats, "seconds_to_start": started, "warmed_with": warm})
        for way in side.ways:
            about = {"way": way.name, "completions": way.completions, "of": asked.completions}
            with Lost() as broken:
                rates[way.name] = one(engine, way, prompts, sampling, folder, about)
            if broken.why:
                row({**about, "failed": broken.why})
    if lost.why:
        row({"engine": side.name, "failed": lost.why})
    return rates


def one(
    engine: Any, way: Way, prompts: list[list[int]], sampling: Sampling, folder: Path, about: dict[str, Any]
) -> float:
    """Draws, tells its row, returns tokens a second. Ours keeps shards as they finish, published nothing."""
    kept = None if way.name == "published" else folder / f"run {way.name}"
    began = time.perf_counter()
    tokens = drawn(engine, works_of(way.completions, prompts, way.adapters), sampling, kept)
    seconds = time.perf_counter() - began
    row({**about, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds})
    return tokens / seconds


def row(record: dict[str, Any]) -> None:
    tell({"bench": "generate", "mode": "visit", "partial": 1, **record})


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--completions", type=int, help="of each of our ways (default: 3072 on cuda, 8 on cpu)")
    made.add_argument("--max-new-tokens", type=int, help="default: 512 on cuda (mean 300), 4 on cpu")
    made.add_argument("--seats", type=int, help="ours (default: tuned or the table's)")
    made.add_argument("--rank", type=int, default=32)
    asked = made.parse_args()
    cuda = asked.device == "cuda"
    asked.shape = asked.shape or "qwen2.5-7b"
    asked.completions = asked.completions or (3072 if cuda else 8)
    asked.max_new_tokens = asked.max_new_tokens or (512 if cuda else 4)
    with ending_with_json("generate", asked.device), tempfile.TemporaryDirectory() as name:
        sides, prompts = (sides_on_gpu if cuda else sides_on_cpu)(asked, Path(name))
        rates: dict[str, float] = {}
        for side in sides:
            rates |= measure(side, prompts, asked, Path(name))
        base = rates.get("published")
        over = {way: rate / base for way, rate in rates.items() if base and way != "published"}
        wanted = [way.name for side in sides for way in side.ways]
        tell(
            {
                "bench": "generate",
                "mode": "visit",
                "shape": asked.shape if cuda else "organism",
                "interleaved": False,
                "draws_each": 1,
                "tokens_per_s": rates,
                "ratio_over_published": over,
                "not_measured": [way for way in wanted if way not in rates],
                **surroundings(asked.device),
            }
        )
    raise SystemExit(0 if len(rates) == len(wanted) else 1)


if __name__ == "__main__":
    main()
