"""The packed forward pass: prompts to a prefix forest (forest.py), packed batches through a decoder (packs.py,
attention.py), and states of last tokens at chosen layers (passes.last_token_states). ops.py picks the implementation of
each op. Demands torch and a plain decoder; knows no persona and no behavior."""
