"""What the engine's test files use: prompts that share prefixes, and its states gathered by prompt. Demands torch and
the engine alone, so that its GPU tests run where the rest of the package's needs are not installed; holds no tests."""

from __future__ import annotations

import torch

from leakfast.forward import passes

PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [9, 8], [1, 2, 3], [1, 2, 9, 9, 9, 9, 9, 9]]


def relative(got, expected):
    return float((torch.linalg.norm(got - expected, dim=-1) / torch.linalg.norm(expected, dim=-1)).max())


def gathered(loaded, sequences, last=1, **settings):
    """{(sequence, position): (D,)} of every state that final_states yields, each exactly once."""
    found = {}
    for batch in passes.final_states(loaded, sequences, last, **settings):
        for row, sequence, position in zip(batch.rows, batch.sequences, batch.positions, strict=True):
            assert (sequence, position) not in found
            found[int(sequence), int(position)] = batch.states[row]
    return found
