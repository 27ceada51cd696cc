#!/usr/bin/env bash
# transformers 5.24.0 (and 5.19.0): texts packed into one row, as DataCollatorWithFlattening gives them, are kept apart by their
# position ids under sdpa and eager attention, but only where the call says use_cache=False. A plain `model(**batch)`, whose
# use_cache is the config's True, lets every text see those packed before it, in training and in evaluation alike.
# Guess beforehand: a cache that nobody reads changes nothing. Seen: the loss of two packed rows is not that of the same two
# one by one; no warning, with the collator's further keys or without.
#   loss of the two rows: 6.641 packed, 5.086 packed with use_cache=False, 5.086 one by one
#   logits of the second text are off by 1.38 of their length, with use_cache=False by less than 1e-06
# Trainer and TRL set use_cache=False by themselves; a loop of one's own that scores packed rows does not.
# Cause: packed rows are looked for only without past key values, and an empty cache has been made by then.
# Versions: transformers 5.24.0, torch 2.13.0; where: transformers/masking_utils.py, _preprocess_mask_arguments.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.24.0
venv/bin/python - <<'PY'
import logging
import warnings

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as theirs

rows = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, 9, 10]},
    {"input_ids": [11, 12, 13, 14], "labels": [-100, 12, 13, 14]},
]
told = []
watching = logging.Handler()
watching.emit = told.append
theirs.get_logger("transformers").addHandler(watching)


@torch.no_grad()
def apart(impl, keys, training, **call):
    """How far logits of the second text, packed behind the first, are from its own alone; the packed loss, and both alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation=impl,
    )
    model = LlamaForCausalLM(config).train(training)
    alone = [model(**{key: torch.tensor([value]) for key, value in row.items()}) for row in rows]
    batch = DataCollatorWithFlattening(**keys)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    packed = model(**batch, **call)
    counted = [sum(label >= 0 for label in row["labels"][1:]) for row in rows]
    loss = sum(n * out.loss for n, out in zip(counted, alone)) / sum(counted)
    own = alone[1].logits[0]
    return float((packed.logits[0, 6:] - own).norm() / own.norm()), float(packed.loss), float(loss)


with warnings.catch_warnings():
    warnings.simplefilter("error")
    for impl in ("sdpa", "eager"):
        for keys in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
            for training in (False, True):
                plain, without = apart(impl, keys, training), apart(impl, keys, training, use_cache=False)
                print(f"{impl}, {len(keys)} further keys, {'training' if training else 'evaluation'}: "
                      f"apart by {plain[0]:.2f}, without a cache {without[0]:.0e}; "
                      f"loss {plain[1]:.3f}, without a cache {without[1]:.3f}, one by one {plain[2]:.3f}")
                assert without[0] < 1e-4 and abs(without[1] - without[2]) < 1e-4, "packed rows are not kept apart at all"
                assert plain[0] > 0.1 and abs(plain[1] - plain[2]) > 0.01, "packed rows are kept apart by a plain call now"
assert not told, [record.getMessage() for record in told]
PY
echo "as stated"
