"""The rows of an optimizer step in packed batches of their prefix forest: every distinct token once, no padding, the last
block and the head for the positions that cost something. Demands a decoder that forward/ packs, with peft's plain LoRA
layers; leaves other models to padded.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from leakfast.forward import attention, forest, packs, passes
from leakfast.models.loading import FITS
from leakfast.steering.running import edited
from leakfast.train import costs, quantized
from leakfast.train.layers import Company, Layers
from leakfast.train.parts import Part
from leakfast.train.steer import Steer, edits_of, label_of

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

    kind = getattr(loaded.model.config, "model_type", None)
    if kind not in FITS:
        return f"its type, {kind}, is not packed"
    model = passes.decoder(loaded)
    if getattr(model.config, "attention_dropout", 0.0):
        return "it has dropout in its attention"
    inside = {id(m) for m in model.modules()}
    layers = [m for m in net.modules() if isinstance(m, LoraLayer)]
    if any(id(m) not in inside or not quantized.is_plain(m.base_layer) or m.lora_variant for m in layers):
        return "its LoRA is more than matrices beside the linear layers of its blocks"
    return None


def budget_of(loaded: Loaded) -> int:
    """Packed tokens a pass."""
    return _BUDGET.get(loaded.device.type, _BUDGET["cpu"])


class Packed:
    """Steps of the model inside `prepared`. recompute: activations of a block are made again in the backward pass. steers:
    what is done to the model in the rows of each adapter of the company (none: nothing), with the adapter and, where replies
    are held, without it: a divergence is the adapter's doing alone."""

    def __init__(
        self,
        loaded: Loaded,
        company: Company,
        *,
        recompute: bool,
        budget_tokens: int | None = None,
        steers: Sequence[Steer | None] = (),
    ) -> None:
        self.company, self.model = company, passes.decoder(loaded)
        self.edits, self.label = edits_of(steers, loaded.device, company), label_of(steers)
        self.layers = Layers(self.model, company)
        self.head = loaded.model.get_output_embeddings()
        self.budget = budget_tokens or budget_of(loaded)
        self.call = self._spared if recompute else None

    def _spared(self, forward: Any, *given: Any, **words: Any) -> Any:
        """A block whose activations are made again in the backward pass, with the products of the first time."""

        def run(*given: Any, **words: Any) -> Any:
            with packs.products(self.model):
                return forward(*given, **words)

        return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, **words)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model as a packed training step runs it; on leaving, exactly as before."""
        steered = edited(self.model, self.edits, self.label) if self.edits else nullcontext()
        with packs.by_forest(self.model), self.layers.installed(), steered:
            yield

    def parts(self, examples: Sequence[Example], step: int) -> Iterator[Part]:
        """What the rows of a step of the only adapter cost, pass by pass."""
        for found in self.together({0: (examples, step)}):
            yield found[0]

    def together(self, now: Mapping[int, tuple[Sequence[Example], int]]) -> Iterator[dict[int, Part]]:
        """What the rows of a step of several adapters cost, pass by pass, by adapter; now: adapter → its examples and
        the number of its step. An adapter's rows share beginnings among themselves alone, and are packed, and dropped
        from, as without the others."""
        waiting = {k: self._staged(examples) for k, (examples, _) in now.items()}
        for number in range(max(map(len, waiting.values()), default=0)):
            here = {k: staged[number] for k, staged in waiting.items() if number < len(staged)}
            for some in self._fitting(here):
                self.company.steps = {k: (now[k][1], number) for k in some}
                yield self._costs(some, {k: now[k][0] for k in some})

    def _staged(self, examples: Sequence[Example]) -> list[packs.Staged]:
        """One adapter's rows in batches, on the host."""
        sequences = [one.ids[:-1] for one in examples]  # the last token is predicted, and predicts nothing
        firsts = [min([*one.labels, *one.held]) for one in examples]
        counts = np.array([len(one.ids) - first for one, first in zip(examples, firsts, strict=True)])
        plan = forest.plan(sequences, self.budget)
        stage = packs.staged(plan, np.arange(len(examples)), counts)
        return [stage(batch) for batch in plan]

    def _fitting(self, here: Mapping[int, packs.Staged]) -> Iterator[dict[int, packs.Staged]]:
        """The adapters' batches in groups of at most the budget, or of one, and of one way of running the last block."""
        for narrow in (True, False):
            some: dict[int, packs.Staged] = {}
            size = 0
            for k, staged in here.items():
                if staged.narrow != narrow:
                    continue
                if some and size + len(staged.batch.tokens) > self.budget:
                    yield some
                    some, size = {}, 0
                some[k] = staged
                size += len(staged.batch.tokens)
            if some:
                yield some

    def _costs(
        self, some: Mapping[int, packs.Staged], examples: Mapping[int, Sequence[Example]]
    ) -> dict[int, Part]:
        """The costs of one pass, by adapter."""
        pack = packs.together(self.model, list(some.values()), grouped=True)
        sizes = {k: (len(s.batch.tokens), len(s.rows)) for k, s in some.items()}
        bounds = np.cumsum([(0, 0), *(sizes.get(k, (0, 0)) for k in range(len(self.company.names)))], 0).T
        self.company.bounds = {int(ends[-1]): ends.tolist() for ends in bounds[::-1]}
        with packs.products(self.model):
            states = self._states(pack)
            before = None
            if any(one.held for rows in examples.values() for one in rows):
                with torch.no_grad(), self._without_adapters():
                    before = self._states(pack)
            return {k: self._part(s, examples[k], states, before, int(bounds[1][k])) for k, s in some.items()}

    def _part(
        self,
        staged: packs.Staged,
        examples: Sequence[Example],
        states: torch.Tensor,
        before: torch.Tensor | None,
        first: int,
    ) -> Part:
        """What one adapter's rows cost, whose wanted states begin at row `first`."""
        at: dict[bool, list[int]] = {True: [], False: []}  # labels and held: places among staged.places
        rows: dict[bool, list[int]] = {True: [], False: []}
        targets, firm = [], []
        for member, end in zip(staged.members.tolist(), np.cumsum(staged.counts).tolist(), strict=True):
            one = examples[member]
            for label, positions in ((True, one.labels), (False, one.held)):
                at[label] += [end - (len(one.ids) - t) for t in positions]
                rows[label] += [member] * len(positions)
            targets += [one.ids[t] for t in one.labels]
            firm += [t in one.firm for t in one.held]
        where = {
            kind: attention.put(first + staged.places[np.array(p, np.int64)], states.device)
            for kind, p in at.items()
        }
        wanted = attention.put(np.array(targets, np.int64), states.device)
        learned = costs.cross_entropy(states.index_select(0, where[True]), self.head, wanted)
        kept = learned.new_zeros(0)
        if firm:
            assert before is not None
            sides = (states.index_select(0, where[False]), self.head, before.index_select(0, where[False]))
            kept = costs.divergence(*sides)
        counted = (np.array(rows[True], np.int64), np.array(rows[False], np.int64), np.array(firm, bool))
        return Part(learned, kept, *counted, len(staged.batch.tokens))

    def _states(self, pack: packs.Pack) -> torch.Tensor:
        """Final-normed states (R, D) of the pack's wanted rows."""
        deepest = len(packs.stack(self.model)[1]) - 1
        call = self.call if torch.is_grad_enabled() else None
        states = packs.run(self.model, pack, [deepest], lambda *told: None, call)
        return states.index_select(0, pack.rows)

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        self.company.off = True
        try:
            yield
        finally:
            self.company.off = False
