"""Completions of a real chat model under one adapter on a CPU, in turn: an earlier build of leakfast (--baseline, a
checkout), ours, transformers' own generate with peft, and vLLM with live LoRA where it is installed. Loading and
starts are left out. Each way is a process of its own (_drawing.py); on a busy machine compare the CPU seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import card, ending_with_json, parser, ratio, shown, skipped, spread, surroundings, where

HERE = Path(__file__).resolve().parent


class Way:
    """A process that draws when it is asked to."""

    def __init__(self, name: str, kind: str, asked: dict[str, Any], path: Path) -> None:
        self.name = name
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(asked["threads"]),
            "PYTHONPATH": str(path),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get(
                "VLLM_CPU_OMP_THREADS_BIND", f"0-{asked['threads'] - 1}"
            ),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "_drawing.py"), kind, json.dumps(asked)],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not asked["loud"] else None,
        )
        self.told = self._answer()

    def ask(self, what: str = "run") -> dict[str, Any]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"the process of {self.name!r} ended with {self.process.wait()}; --loud shows what it says"
            )
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def adapter_of(folder: str, where_to: Path, rank: int = 32) -> str:
    """A LoRA adapter of all seven projections that changes the model a little: B random, 0.005."""
    import torch
    from peft import LoraConfig, get_peft_model

    from leakfast import models

    loaded = models.load(folder, dtype="float32", device="cpu")
    torch.manual_seed(1)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    net = get_peft_model(loaded.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    net.peft_config["default"].base_model_name_or_path = folder
    net.save_pretrained(where_to)
    return str(where_to)


def main(options: Any) -> None:
    from leakfast import models
    from leakfast.errors import ModelError
    from leakfast.models import names

    try:
        folder = models.load_config(options.model) and str(names.place_of(options.model)[1] or options.model)
    except ModelError as error:
        skipped("generate_real", f"{error.message}", "cpu")
        return
    with tempfile.TemporaryDirectory() as scratch:
        asked = {
            "model": folder,
            "adapter": options.adapter or adapter_of(folder, Path(scratch) / "adapter"),
            "dtype": options.dtype,
            "threads": options.threads or 1,
            "personas": options.personas,
            "questions": options.questions,
            "samples": options.samples,
            "max_new_tokens": options.max_new_tokens,
            "batch": options.batch,
            "seed": options.seed,
            "loud": options.loud,
        }
        if asked["dtype"] == "auto":
            from leakfast.models import threads

            asked["dtype"] = "bfloat16" if threads.bfloat16_is_fast() else "float32"
        compared(asked, options)


def compared(asked: dict[str, Any], options: Any) -> None:
    kinds = {"ours": ("leakfast", HERE.parent, asked)}
    if options.baseline:
        before = {**asked, "dtype": options.baseline_dtype or asked["dtype"]}
        kinds = {
            f"earlier build, {before['dtype']}": ("leakfast", options.baseline.resolve(), before),
            **kinds,
        }
    if "transformers" in options.ways:
        kinds["transformers and peft"] = ("transformers", HERE.parent, asked)
    if "vllm" in options.ways and importlib.util.find_spec("vllm"):
        kinds["vllm, live LoRA"] = ("vllm", HERE.parent, asked)
    ways = {name: Way(name, kind, given, path) for name, (kind, path, given) in kinds.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn in range(options.repeats):
        for name, way in ways.items():
            runs[name].append(way.ask())
            last = runs[name][-1]
            print(
                f"turn {turn + 1}, {name}: {last['tokens']} tokens in {last['s']:.1f} s, {last['cpu_s']:.1f} s of CPU",
                flush=True,
            )
    told = ways["ours"].told
    profile = ways["ours"].ask("profile")
    for way in ways.values():
        way.close()
    per_token = {name: [r["s"] / r["tokens"] for r in done] for name, done in runs.items()}
    cpu_per_token = {name: [r["cpu_s"] / r["tokens"] for r in done] for name, done in runs.items()}
    mine = runs["ours"][-1]
    flops = (
        mine["tokens"] * (told["flops_a_token"] + told["head"])
        + told["distinct_prompt_tokens"] * told["flops_a_token"]
    )
    floor_s = flops / profile["rate"] / asked["threads"]
    record = {
        "bench": "generate_real",
        "model": options.model,
        **{
            k: asked[k]
            for k in ("dtype", "threads", "personas", "questions", "samples", "max_new_tokens", "batch")
        },
        "prompt_tokens": told["prompt_tokens"],
        "distinct_prompt_tokens": told["distinct_prompt_tokens"],
        "tokens": {name: done[-1]["tokens"] for name, done in runs.items()},
        "tokens_per_s": {name: spread([1 / x for x in xs]) for name, xs in per_token.items()},
        "tokens_per_cpu_s": {name: spread([1 / x for x in xs]) for name, xs in cpu_per_token.items()},
        "ratio": {name: ratio(xs, per_token["ours"]) for name, xs in per_token.items() if name != "ours"},
        "ratio_cpu": {
            name: ratio(xs, cpu_per_token["ours"]) for name, xs in cpu_per_token.items() if name != "ours"
        },
        "gflops": flops / 1e9 / mine["cpu_s"],
        "product_gflops": profile["rate"] / 1e9,
        "share_of_floor": floor_s / mine["cpu_s"] * asked["threads"],
        "time_by_part": profile["shares"],
        "baseline_commit": _commit(options.baseline),
        **surroundings("cpu"),
    }
    record["threads"] = asked["threads"]
    lines = [
        (
            "drawn",
            f"{told['prompts'] * asked['samples']:,} completions of at most {asked['max_new_tokens']} tokens, "
            f"{asked['dtype']}, one adapter, {asked['threads']} thread(s)",
        ),
        (
            "prompt tokens",
            f"{told['prompt_tokens']:,}, of which {told['distinct_prompt_tokens']:,} are computed",
        ),
    ]
    for name in runs:
        wall, cpu = record["tokens_per_s"][name], record["tokens_per_cpu_s"][name]
        lines.append((name, f"{wall['median']:,.0f} tokens/s, {cpu['median']:,.0f} a CPU second"))
    for name, found in record["ratio_cpu"].items():
        lines.append(
            (
                f"ours over {name}",
                f"{shown(found)} by CPU seconds, {shown(record['ratio'][name])} by the clock",
            )
        )
    lines += [
        (
            "ours",
            f"{record['gflops']:.0f} GFLOP/s, {record['share_of_floor']:.0%} of what products alone allow "
            f"({record['product_gflops']:.0f})",
        ),
        ("its time", ", ".join(f"{part} {share:.0%}" for part, share in profile["shares"].items())),
        where(record),
    ]
    card("Completions of a real model on a CPU", lines, record)


def _commit(folder: Path | None) -> str | None:
    if folder is None:
        return None
    words = ("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument(
        "--model", default="smollm2", help="smollm2 (leakfast fetch smollm2), a folder or a hub id"
    )
    made.add_argument("--adapter", help="peft folder (default: made, rank 32, seven projections)")
    made.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    made.add_argument("--personas", type=int, default=111)
    made.add_argument("--questions", type=int, default=6)
    made.add_argument("--samples", type=int, default=4)
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--batch", type=int, default=640, help="completions at once")
    made.add_argument(
        "--baseline", type=Path, help="checkout of an earlier build (git worktree add DIR COMMIT)"
    )
    made.add_argument("--baseline-dtype", choices=("bfloat16", "float32"), help="what it ran in by default")
    made.add_argument("--ways", default="transformers,vllm", help="beside ours and --baseline")
    made.add_argument("--loud", action="store_true", help="show what the processes say")
    sys.stdout.reconfigure(line_buffering=True)
    with ending_with_json("generate_real", "cpu"):
        main(made.parse_args())
