"""One way of drawing completions of a real model, in a process of its own that bench_generate_real starts and asks in
turn: `python _drawing.py WAY JSON`. Reads a line for each run, answers with one of JSON. Takes whatever leakfast is on
the path, also an earlier one."""

from __future__ import annotations

import cProfile
import importlib
import json
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def part(now: str, *before: str) -> Any:
    """A module of leakfast by its name now, or by one it had in an earlier build."""
    for name in (now, *before):
        try:
            return importlib.import_module(f"leakfast.{name}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"no leakfast.{now} here")


def requests_of(loaded: Any, asked: dict[str, Any]) -> list[Any]:
    personas, chat = part("prompts.personas", "personas"), part("prompts.chat", "chat")
    people = personas.load_personas("all")[: asked["personas"]]
    questions = personas.load_questions("eval").questions[: asked["questions"]]
    prompts = chat.render_prompts(loaded.tokenizer, people, questions)
    return part("generation.contract", "generate").requests_for(
        prompts, asked["samples"], asked["seed"], "bench"
    )


def by_leakfast(loaded: Any, requests: list[Any], asked: dict[str, Any]) -> Callable[[], int]:
    """This path's leakfast with the transformers backend, the adapter put on anew in every run."""
    local = part("generation.transformers", "generate.transformers")
    adapted = part("models.attach", "generate.adapted").adapted
    sampling = part("generation.contract", "generate").Sampling(1.0, 0.95, asked["max_new_tokens"])

    def run() -> int:
        with adapted(loaded, asked["adapter"]) as current:
            blocks = local.complete(current, requests, sampling, batch_completions=asked["batch"])
            return sum(len(c.token_ids) for block in blocks for c in block)

    return run


def by_transformers(loaded: Any, requests: list[Any], asked: dict[str, Any]) -> Callable[[], int]:
    """peft's model and transformers' own generate: prompts by length, padded on the left, samples of each together."""
    import torch
    from peft import PeftModel

    from leakfast.generation.transformers import stop_ids

    stops = stop_ids(loaded)
    net = PeftModel.from_pretrained(loaded.model, asked["adapter"]).eval()
    order = sorted(requests, key=lambda r: len(r.ids))
    size = max(1, asked["batch"] // asked["samples"])

    def run() -> int:
        torch.manual_seed(asked["seed"])
        tokens = 0
        for start in range(0, len(order), size):
            batch = [list(r.ids) for r in order[start : start + size]]
            width = max(map(len, batch))
            ids = torch.tensor([[stops[0]] * (width - len(b)) + b for b in batch])
            mask = torch.tensor([[0] * (width - len(b)) + [1] * len(b) for b in batch])
            with torch.inference_mode():
                out = net.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_p=0.95,
                    top_k=0,
                    max_new_tokens=asked["max_new_tokens"],
                    num_return_sequences=asked["samples"],
                    eos_token_id=list(stops),
                    pad_token_id=stops[0],
                )[:, width:]
            ended = torch.isin(out, torch.tensor(stops)).int()
            tokens += int((ended.cumsum(1) - ended == 0).sum())  # up to the first stop, which counts
        return tokens

    return run


def by_vllm(loaded: Any, requests: list[Any], asked: dict[str, Any]) -> Callable[[], int]:
    """vLLM with the adapter live beside the weights; its start is not timed."""
    from leakfast.generation import backends
    from leakfast.generation.contract import Sampling, Work

    sampling = Sampling(1.0, 0.95, asked["max_new_tokens"])
    adapter = Path(asked["adapter"])
    longest = max(len(r.ids) for r in requests) + asked["max_new_tokens"]
    opened = backends.opened(loaded, [adapter], "vllm", batch_completions=asked["batch"], longest=longest)
    engine = opened.__enter__()  # until the process ends

    def run(_open: object = opened) -> int:
        done = engine.stream([Work(0, adapter, requests)], sampling)
        return sum(len(c.token_ids) for _, block in done for c in block)

    return run


WAYS = {"leakfast": by_leakfast, "transformers": by_transformers, "vllm": by_vllm}
PARTS = {  # what cProfile calls a function → the part of the time it belongs to
    "linear": "products",
    "addmm": "products",
    "_linear_pointwise": "products",
    "bmm": "attention",
    "scaled_dot_product_attention": "attention",
    "topk": "sampling",
    "sort": "sampling",
    "cumsum": "sampling",
    "draw": "sampling",
    "_likeliest": "sampling",
    "_pick": "sampling",
    "amax": "sampling",
    "silu": "activation",
    "softmax": "softmax (attention and sampling)",
}


def profiled(run: Callable[[], int]) -> dict[str, float]:
    """Share of the time in each part, by cProfile."""
    profile = cProfile.Profile()
    profile.runcall(run)
    shares: dict[str, float] = {}
    stats = pstats.Stats(profile).stats
    whole = sum(own for _, _, own, _, _ in stats.values())
    for (_, _, name), (_, _, own, _, _) in stats.items():
        words = name.replace("'", " ").replace("}", " ").replace(".", " ").split()
        part = next((PARTS[word] for word in words if word in PARTS), "the rest")
        shares[part] = shares.get(part, 0.0) + own / whole
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def rate(dtype: str) -> float:
    """FLOP/s of this process's linear layers at the size of a block of SmolLM2's MLP, the best of a few."""
    import torch

    x, w = (torch.randn(n, 576, dtype=getattr(torch, dtype)) for n in (640, 1536))
    best = float("inf")
    with torch.inference_mode():
        for _ in range(12):
            began = time.process_time()
            torch.nn.functional.linear(x, w)
            best = min(best, time.process_time() - began)
    return 2 * 640 * 576 * 1536 / best


def main(way: str, asked: dict[str, Any]) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def tell(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    import torch

    torch.set_num_threads(asked["threads"])
    from leakfast import models

    loaded = models.load(asked["model"], dtype=asked["dtype"], device="cpu")
    requests = requests_of(loaded, asked)
    run = WAYS[way](loaded, requests, asked)
    forest = part("forward.forest", "forest")
    config = loaded.model.config
    tell(
        {
            "ready": True,
            "dtype": loaded.dtype,
            "prompt_tokens": sum(len(r.ids) for r in requests),
            "distinct_prompt_tokens": len(forest.plan([list(r.ids) for r in requests], 1 << 30).tokens),
            "prompts": len(requests),
            "head": 2 * config.vocab_size * config.hidden_size,
            "flops_a_token": 2
            * sum(
                p.numel()
                for n, p in loaded.model.named_parameters()
                if p.ndim == 2 and "embed" not in n and "lm_head" not in n and "lora_" not in n
            ),
        }
    )
    for line in sys.stdin:
        if line.strip() == "profile":
            tell({"shares": profiled(run), "rate": rate(loaded.dtype)})
            continue
        began, busy = time.perf_counter(), time.process_time()
        tokens = run()
        tell({"tokens": tokens, "s": time.perf_counter() - began, "cpu_s": time.process_time() - busy})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], json.loads(sys.argv[2]))
