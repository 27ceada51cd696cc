"""Full text of multiple choice under many personas, tokenization included: the forest with choices as branches,
beside lm-evaluation-harness' own HF backend at its best batch size. Real ARC questions, the organism's
tokenizer, random weights of the real shape."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from _common import (
    ROOT,
    card,
    ending_with_json,
    failed,
    interleaved,
    loaded,
    make_model,
    parser,
    ratio,
    shown,
    skipped,
    spread,
    surroundings,
    sync_of,
    where,
)

from leakfast import models
from leakfast.measure.choices.scores import full_text
from leakfast.prompts import chat
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas

ARC = ROOT.parent / "shared" / "data" / "arc" / "arc_challenge_test.jsonl"


def requests_of(tokenizer, personas, items):
    """lm-evaluation-harness' requests, (context, continuation) texts, personas outermost."""
    from lm_eval.api.instance import Instance

    made = []
    for persona in personas:
        for item in items:
            prompt = tokenizer.decode(chat.render(tokenizer, persona.system, item.question))
            for text in item.choices:
                made.append(Instance("loglikelihood", {}, (prompt, text), len(made)))
    return made


def harness(net, tokenizer, requests, size):
    """Sums of log-probabilities by lm-evaluation-harness, (N,) float64."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=net, tokenizer=tokenizer, batch_size=size)
    return np.array([float(value) for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])


def bench(options, dtype: str) -> bool:
    """One dtype: sweep, interleave, check, card. False when the results differ."""
    tokenizer = models.load_tokenizer("organism")
    personas = load_personas("all")[: options.personas]
    items = load_items(options.items_file)[: options.items]
    net = make_model(options.shape, dtype, options.device, options.seed)
    if net.config.vocab_size < len(tokenizer):  # the shape of rehearsals
        net.resize_token_embeddings(len(tokenizer))
    ready = dataclasses.replace(loaded(net, dtype), tokenizer=tokenizer)
    requests = requests_of(tokenizer, personas, items)
    few = requests[: max(options.sizes)]

    def say(text):
        print(f"{dtype}: {text}", file=sys.stderr, flush=True)

    full_text(ready, personas[:1], items[:1])  # warm
    harness(net, tokenizer, few[:2], 1)
    best = options.sizes[0]
    if len(options.sizes) > 1:
        sweep = {size: lambda size=size: harness(net, tokenizer, few, size) for size in options.sizes}
        took, _, _ = interleaved(sweep, 1, sync_of(options.device), lambda _: None)
        best = min(options.sizes, key=lambda size: min(took[size]))
    runs = {
        "harness": lambda: harness(net, tokenizer, requests, best),
        "forest": lambda: full_text(ready, personas, items).logprobs,
    }
    wall, busy, first = interleaved(runs, options.repeats, sync_of(options.device), say)
    mine = first["forest"][~np.isnan(first["forest"])]
    difference = float(np.abs(mine - first["harness"]).max())
    # fp32: the same sums; bfloat16: the harness rounds its logits, so only the forest is near the truth
    good = difference <= (1e-3 if dtype == "float32" else 0.02 * float(np.abs(mine).max()))
    if not good:
        failed("full_text", f"sums differ by {difference:.1e} nats ({dtype})", options.device)
        return False
    over, over_busy = ratio(wall["harness"], wall["forest"]), ratio(busy["harness"], busy["forest"])
    record = {
        "bench": "full_text",
        "shape": options.shape,
        "dtype": dtype,
        "choices": len(requests),
        "harness_batch": best,
        "seconds": {name: spread(values) for name, values in wall.items()},
        "ratio_over_harness": over,
        "ratio_over_harness_cpu_seconds": over_busy,
        "largest_difference_nats": difference,
        **surroundings(options.device),
    }

    lines = [
        ("choices", f"{len(requests):,}: {len(personas)} personas × {len(items)} ARC items"),
        ("harness, best batch", f"{best} of {options.sizes}"),
        ("over the harness", shown(over)),
        ("in CPU seconds", shown(over_busy)),
        ("largest difference", f"{difference:.1e} nats"),
        where(record),
    ]
    card(f"full text, {options.shape}, {dtype}", lines, record)
    return True


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    made.add_argument("--personas", type=int, help="default: 3 on cpu, 20 on cuda")
    made.add_argument("--items", type=int, help="default: 40 on cpu, 100 on cuda")
    made.add_argument("--items-file", type=Path, default=ARC, help="JSONL of items (default: the stored ARC)")
    made.add_argument("--sizes", help="the harness' batch sizes to try; default 1,4,8,16, on cuda 16–128")
    options = made.parse_args()
    missing = [
        name
        for name, there in (
            ("lm-evaluation-harness (pip install -e '.[parity]')", importlib.util.find_spec("lm_eval")),
            (f"items ({options.items_file})", options.items_file.is_file()),
        )
        if not there
    ]
    if missing:
        skipped("full_text", f"not here: {', '.join(missing)}", "cpu")
        return
    cuda = options.device == "cuda"
    options.shape = options.shape or ("qwen2.5-7b" if cuda else "qwen2.5-0.5b")
    options.personas = options.personas or (20 if cuda else 3)
    options.items = options.items or (100 if cuda else 40)
    options.sizes = [int(s) for s in (options.sizes or ("16,32,64,128" if cuda else "1,4,8,16")).split(",")]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = options.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    with ending_with_json("full_text", options.device):
        good = [bench(options, dtype) for dtype in dtypes]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
