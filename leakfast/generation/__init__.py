"""Completions: one contract of requests and answers (contract.py), backends behind it (transformers.py, vllm/), and
prompts and adapters to frames (generate.py). Demands token ids, never text; stores nothing."""
