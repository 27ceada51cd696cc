#!/usr/bin/env bash
# peft 0.21.2: an adapter that stores whole modules (modules_to_save) is loaded onto a base model, and taken off again
# with `unload()`. Guess beforehand: the base model is what it was. Seen: LoRA is gone, but the stored module stays in
# the base's place, so whatever is measured on "the base" afterwards is measured with the adapter's output head.
#   as seen: head of the unloaded model equals the base's: False; equals the adapter's: True
# `delete_adapter` or a copy of the module taken beforehand is what it needs. Versions: peft 0.21.2, transformers 5.19.0.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.19.0 peft==0.21.2
venv/bin/python - <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


trained = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
with torch.no_grad():
    trained.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
trained.save_pretrained("adapter")

model = base()
before = model.lm_head.weight.detach().clone()
unloaded = PeftModel.from_pretrained(model, "adapter").unload()
head = unloaded.lm_head.weight
same, adapters = torch.equal(head, before), torch.equal(head, before + 1.0)
print("head of the unloaded model equals the base's:", same, "; equals the adapter's:", adapters)
assert not same and adapters, "unload() puts the base's module back now"
PY
echo "as stated"
