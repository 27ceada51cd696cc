"""The rows of an optimizer step in packed batches of their prefix forest: every distinct token once, no padding, the last
block and the head for the positions that cost something. Demands a decoder that forward/ packs, with peft's plain LoRA
layers; leaves other models to padded.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from leakfast.errors import ModelError
from leakfast.forward import attention, forest, packs, passes
from leakfast.train import costs
from leakfast.train.layers import Company, Layers
from leakfast.train.parts import Part

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.train.collate import Example

_BUDGET = {
    "cpu": 4096,
    "cuda": 16_384,
}  # packed tokens a pass; fixed, so that bits do not follow from free memory


def why_not(loaded: Loaded, net: Any) -> str | None:
    """Why the rows of this model are padded instead, in a few words; None where they can be packed."""
    from peft.tuners.lora import LoraLayer

    try:
        model = passes.decoder(loaded)
    except ModelError:
        return f"its type, {getattr(loaded.model.config, 'model_type', None)}, is not packed"
    if getattr(model.config, "attention_dropout", 0.0):
        return "it has dropout in its attention"
    inside = {id(m) for m in model.modules()}
    layers = [m for m in net.modules() if isinstance(m, LoraLayer)]
    if any(
        id(m) not in inside or type(m.base_layer) is not torch.nn.Linear or m.lora_variant for m in layers
    ):
        return "its LoRA is more than matrices beside the linear layers of its blocks"
    return None


class Packed:
    """Steps of the model inside `prepared`. recompute: activations of a block are made again in the backward pass."""

    def __init__(
        self, loaded: Loaded, company: Company, *, recompute: bool, budget_tokens: int | None = None
    ) -> None:
        self.company, self.model = company, passes.decoder(loaded)
        self.layers = Layers(self.model, company)
        self.head = loaded.model.get_output_embeddings()
        self.budget = budget_tokens or _BUDGET.get(loaded.device.type, _BUDGET["cpu"])
        self.call = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if recompute else None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model as a packed training step runs it; on leaving, exactly as before."""
        with packs.by_forest(self.model), self.layers.installed():
            yield

    def parts(self, examples: Sequence[Example], step: int) -> Iterator[Part]:
        """What the rows of a step cost, pass by pass."""
        sequences = [one.ids[:-1] for one in examples]  # the last token is predicted, and predicts nothing
        firsts = [min([*one.labels, *one.held]) for one in examples]
        counts = np.array([len(one.ids) - first for one, first in zip(examples, firsts, strict=True)])
        plan = forest.plan(sequences, self.budget)
        stage = packs.stager(
            self.model, plan, np.arange(len(examples)), counts, next(self.model.parameters()).device
        )
        for number, batch in enumerate(plan):
            self.company.steps = [(step, number)]
            yield self._part(stage(batch), examples)

    def _part(self, pack: packs.Pack, examples: Sequence[Example]) -> Part:
        """The costs of one pass."""
        device, ends = pack.rows.device, np.cumsum(pack.counts)
        at: dict[bool, list[int]] = {True: [], False: []}  # labels and held: places among pack.places
        rows: dict[bool, list[int]] = {True: [], False: []}
        targets, firm = [], []
        for member, end in zip(pack.members.tolist(), ends.tolist(), strict=True):
            one = examples[member]
            for label, positions in ((True, one.labels), (False, one.held)):
                at[label] += [end - (len(one.ids) - t) for t in positions]
                rows[label] += [member] * len(positions)
            targets += [one.ids[t] for t in one.labels]
            firm += [t in one.firm for t in one.held]
        with packs.products(self.model):
            states = self._states(pack)
            where = {
                kind: attention.put(pack.places[np.array(p, np.int64)], device) for kind, p in at.items()
            }
            wanted = attention.put(np.array(targets, np.int64), device)
            learned = costs.cross_entropy(states.index_select(0, where[True]), self.head, wanted)
            kept = learned.new_zeros(0)
            if len(firm):
                with torch.no_grad(), self._without_adapters():
                    before = self._states(pack).index_select(0, where[False])
                kept = costs.divergence(states.index_select(0, where[False]), self.head, before)
        counted = (np.array(rows[True], np.int64), np.array(rows[False], np.int64), np.array(firm, bool))
        return Part(learned, kept, *counted, pack.tokens.numel())

    def _states(self, pack: packs.Pack) -> torch.Tensor:
        """Final-normed states (R, D) of the pack's wanted rows."""
        deepest = len(self.model.layers) - 1
        call = self.call if torch.is_grad_enabled() else None
        ((_, states, rows),) = packs.blocks(self.model, pack, [deepest], call)
        return self.model.norm(packs.wanted(states, rows))

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        self.company.off = True
        try:
            yield
        finally:
            self.company.off = False
