"""KL both ways and JS along each other's replies, on the organism: every persona's reply read under all 111 prompts, beside
what a user would run: one pass a pair and question in padded batches of transformers, all logits, log-softmax, F.kl_div.

Both sides take a sample of one question and are scaled to scored replies a second: ours a block of replies under all prompts,
as the command does it; the pairs' side a spread of (reply, prompt) from the same block, the reply's own pass shared."""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from _common import (
    card,
    ending_with_json,
    failed,
    interleaved,
    peak_memory_gb,
    ratio,
    shown,
    surroundings,
    where,
)

PER_BATCH = 32
WHOLE = 111 * 111 * 20  # scored replies of the whole matrix


def drawn(loaded, tokens):
    """Prompts of all personas to one question, and their replies."""
    from leakfast.generation.contract import Sampling, requests_for
    from leakfast.generation.generate import complete
    from leakfast.measure.predictors.divergences import Reply
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas, load_questions

    people, question = load_personas("all"), load_questions("eval").questions[0]
    prompts = chat.render_prompts(loaded.tokenizer, people, [question])
    wanted = requests_for(prompts, 1, 42, "base")
    done = [c for some in complete(loaded, wanted, Sampling(1.0, 1.0, tokens)) for c in some]
    return [list(p.ids) for p in prompts], [Reply(c.request, c.token_ids) for c in done]


def logprobs(loaded, sequences, counts):
    """Log-probabilities before the last counts[i] tokens of each, padded on the right: a list of (n, V)."""
    width = max(map(len, sequences))
    pad = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    logits = loaded.model(input_ids=ids, attention_mask=mask).logits.float()
    return [
        logits[i, len(s) - 1 - n : len(s) - 1].log_softmax(-1)
        for i, (s, n) in enumerate(zip(sequences, counts, strict=True))
    ]


def pairwise(loaded, prompts, replies, cells):
    """(cells, 3) sums along the reply of each (reply, prompt), a batch at a time."""
    found = []
    with torch.inference_mode():
        numbers = sorted({r for r, _ in cells})
        own = {}
        for some in batches(numbers):
            sequences = [[*prompts[replies[r].of], *replies[r].tokens] for r in some]
            own |= dict(
                zip(some, logprobs(loaded, sequences, [len(replies[r].tokens) for r in some]), strict=True)
            )
        for some in batches(cells):
            sequences = [[*prompts[p], *replies[r].tokens] for r, p in some]
            for (r, _), lq in zip(
                some, logprobs(loaded, sequences, [len(replies[r].tokens) for r, _ in some]), strict=True
            ):
                lp = own[r]
                lm = torch.logaddexp(lp, lq) - math.log(2)
                js = (kl(lp, lm) + kl(lq, lm)) / 2
                found.append([kl(lp, lq), kl(lq, lp), js])
    return np.array(found)


def kl(of, under):
    return float(F.kl_div(under, of, reduction="sum", log_target=True))


def batches(things):
    return [things[start : start + PER_BATCH] for start in range(0, len(things), PER_BATCH)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's own choice otherwise")
    parser.add_argument("--reply-tokens", type=int, default=40)
    parser.add_argument(
        "--replies", type=int, help="replies of ours' block (default: as many as a block holds)"
    )
    parser.add_argument("--cells", type=int, default=512, help="(reply, prompt) of the pairs' side")
    arguments = parser.parse_args()
    with ending_with_json("predictors", "cpu"):
        run(arguments)


def run(arguments):
    from leakfast import models
    from leakfast.measure.predictors import divergences

    if arguments.repeats < 5:
        sys.exit("a median needs --repeats 5 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loaded = models.load("organism", dtype="float32")
    prompts, replies = drawn(loaded, arguments.reply_tokens)
    lengths = [len(one.tokens) for one in replies]
    block = replies[divergences.blocks(lengths, len(prompts), 4 * loaded.hidden_size)[0]][: arguments.replies]
    every = [(r, p) for r in range(len(block)) for p in range(len(prompts)) if p != block[r].of]
    cells = every[:: max(1, len(every) // arguments.cells)][: arguments.cells]
    runs = {
        "pairs": lambda: pairwise(loaded, prompts, block, cells),
        "ours": lambda: divergences.along(loaded, prompts, block),
    }
    wall, busy, first = interleaved(
        runs, arguments.repeats, lambda: None, lambda line: print(line, file=sys.stderr)
    )
    tokens = np.array([len(block[r].tokens) for r, _ in cells])[:, None]
    ours = np.array([first["ours"][cell] for cell in cells])
    off = float(np.abs((ours - first["pairs"]) / tokens).max())
    if off > 1e-4:
        failed("predictors", f"the sides differ by {off:.1e} nats a token", "cpu")
        sys.exit(1)
    done = len(block) * len(prompts)
    scale = {"pairs": len(cells), "ours": done}
    record = {"bench": "predictors", "scored_replies": scale, "mean_tokens": float(np.mean(lengths))}
    for name, times in (("wall", wall), ("cpu", busy)):
        each = {side: [t / scale[side] for t in times[side]] for side in scale}
        record[f"ratio_{name}"] = ratio(each["pairs"], each["ours"])
        record[f"whole_matrix_{name}_s"] = {side: float(np.median(each[side])) * WHOLE for side in scale}
    record |= {"largest_difference_nats": off, "peak_gb": peak_memory_gb("cpu"), **surroundings("cpu")}
    lines = [
        ("times as fast, wall", shown(record["ratio_wall"])),
        ("times as fast, CPU seconds", shown(record["ratio_cpu"])),
        ("111 × 111 × 20, CPU seconds", f"{record['whole_matrix_cpu_s']['ours']:.0f}"),
        ("the same in pairs", f"{record['whole_matrix_cpu_s']['pairs']:.0f}"),
        ("largest difference", f"{off:.1e} nats a token"),
        where(record),
    ]
    card("divergences along replies: a block under all prompts, beside a pass a pair", lines, record)


if __name__ == "__main__":
    main()
