"""Centroids of a model that stays on disk beside one that is loaded first: resident memory beyond the page cache, and process
start to written file with the files' pages dropped. Random weights of the real shape in bfloat16, written here in shards and
deleted; the organism's tokenizer. Demands Linux (/proc, posix_fadvise) and room on the disk for the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import SHAPES, card, ending_with_json, parser, ratio, shown, skipped, spread, surroundings, where

_SHARD_BLOCKS = 4  # blocks a file
_POOL = 1 << 26  # random numbers that all weights are cut from
_ORGANISM_VOCABULARY = 2048
_PERSONAS = "villain,comedian,assistant,librarian,zelthari_scholar,kindergarten_teacher"


def write_model(folder: Path, shape: str, seed: int) -> int:
    """A Qwen2 of the shape in several safetensors files, N(0, 0.02²) in bfloat16; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    from leakfast.models import organism_dir
    from leakfast.models.streamed import INDEX, skeleton

    folder.mkdir(parents=True, exist_ok=True)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    size = SHAPES[shape] | {"vocab_size": max(SHAPES[shape]["vocab_size"], _ORGANISM_VOCABULARY)}
    config = Qwen2Config(
        **size, max_position_embeddings=32_768, rope_parameters=rope, architectures=["Qwen2ForCausalLM"]
    )
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(organism_dir() / name, folder / name)
    net = skeleton(config, torch.bfloat16)
    draw = torch.Generator().manual_seed(seed)
    pool = (0.02 * torch.randn(_POOL, generator=draw)).to(torch.bfloat16)
    shards: dict[str, dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        number = int(name.split(".")[2]) // _SHARD_BLOCKS + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{number:05d}.safetensors", {})[name] = parameter
    index, total = {}, 0
    for file, parts in shards.items():
        made = {}
        for name, parameter in parts.items():
            if "norm" in name:
                made[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
                continue
            size, start = parameter.numel(), hash_of(name) % _POOL
            turned = pool.roll(-start)
            made[name] = turned.repeat(-(-size // _POOL))[:size].view(parameter.shape).clone()
        save_file(made, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
        total += sum(t.nbytes for t in made.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return total


def hash_of(name: str) -> int:
    """Where in the pool a weight begins."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def drop_pages(folder: Path) -> None:
    """The files' pages leave the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, out: Path, stream: str, words: list[str], threads: int | None) -> dict[str, Any]:
    """One `leakfast centroids` in a process of its own: seconds from its start to its end, and the highest RssAnon and RssFile
    of samples every 20 ms, bytes."""
    asked = ["centroids", "--model", folder, "--stream", stream, "--out", out, *words]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "leakfast", *map(str, asked)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for name, value in resident(process.pid).items():
            peak[name] = max(peak[name], value)
        time.sleep(0.02)
    took = time.perf_counter() - began
    said = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(
            f"--stream {stream}: {said.strip().splitlines()[-1] if said.strip() else 'no word'}"
        )
    return {"seconds": took, "rss_anon_bytes": peak["RssAnon"], "rss_file_bytes": peak["RssFile"]}


def resident(pid: int) -> dict[str, int]:
    """RssAnon and RssFile of a process, bytes; nothing of one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split() for line in lines if line.startswith(("RssAnon:", "RssFile:")))
    return {name.rstrip(":"): int(value) << 10 for name, value, _ in pairs}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--folder", type=Path, help="where the model is written  [default: a temporary folder]")
    made.add_argument("--keep", action="store_true", help="leave the model there, and take one that is there")
    made.add_argument("--personas", default=_PERSONAS)
    made.add_argument("--questions", type=int, default=20, help="of the set `eval`")
    made.add_argument("--layers", default="0-20")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument("--only-streamed", action="store_true", help="memory of the streamed run alone, once")
    args = made.parse_args()
    with ending_with_json("stream", args.device):
        if not sys.platform.startswith("linux") or args.device != "cpu":
            skipped("stream", "memory is read from /proc, of a run on a CPU", args.device)
            return
        folder = args.folder or Path(tempfile.mkdtemp(prefix="leakfast-stream-"))
        try:
            bench(args, folder)
        finally:
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)


def bench(args: Any, folder: Path) -> None:
    from leakfast.prompts.personas import load_questions

    shape = args.shape or "qwen2.5-0.5b"
    if args.keep and (folder / "config.json").is_file():
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    else:
        total = write_model(folder, shape, args.seed)
    asked = load_questions("eval").questions[: args.questions]
    questions = folder / "questions.json"
    questions.write_text(json.dumps(list(asked)))
    words = ["--personas", args.personas, "--questions", str(questions), "--layers", args.layers]
    words += ["--dtype", args.dtype]
    runs: dict[str, list[dict[str, Any]]] = {"on": [], **({} if args.only_streamed else {"off": []})}
    for _ in range(1 if args.only_streamed else args.repeats):
        for stream, found in runs.items():
            drop_pages(folder)
            found.append(measured(folder, folder / f"{stream}.out", stream, words, args.threads))
            print(f"--stream {stream}: {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    if not args.only_streamed and (folder / "on.out").read_bytes() != (folder / "off.out").read_bytes():
        raise SystemExit("the streamed file is not the loaded run's, byte for byte")
    tell(args, shape, total, len(asked), runs)


def tell(args: Any, shape: str, total: int, n_questions: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    record: dict[str, Any] = {
        "bench": "stream",
        "shape": shape,
        "dtype": args.dtype,
        "weights_bytes": total,
        "personas": len(args.personas.split(",")),
        "questions": n_questions,
        "layers": args.layers,
        **surroundings(args.device),
    }
    lines = [where(record), ("weights", f"{total / 2**30:.2f} GiB in files, computed in {args.dtype}")]
    for stream, found in runs.items():
        record[stream] = {key: spread([one[key] for one in found]) for key in found[0]}
        anon = max(one["rss_anon_bytes"] for one in found)
        seconds = shown(record[stream]["seconds"], " s")
        lines.append((f"--stream {stream}", f"at most {anon / 2**30:.2f} GiB beyond page cache, {seconds}"))
    if "off" in runs:
        record["cold_ratio"] = ratio(*([one["seconds"] for one in runs[k]] for k in ("off", "on")))
        lines.append(("cold start", f"loading first takes {shown(record['cold_ratio'])} as long"))
    card(f"Centroids of a model on disk, {shape}", lines, record)


if __name__ == "__main__":
    main()
