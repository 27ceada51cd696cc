"""The rows of an optimizer step in padded batches through transformers' own forward, for models that packed.py does not
take. Demands a model with peft's LoRA layers, or one whose own weights are trained; leaves sums over passes to loop.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from leakfast.forward import passes
from leakfast.steering.running import edited
from leakfast.train.collate import Batch, collate
from leakfast.train.parts import Part
from leakfast.train.steer import Steer, edits_of, label_of

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.train.collate import Example


class Padded:
    """Steps of `net`, peft's model or a plain one that is no part of `loaded`; micro-batches of `batch_size` rows. recompute:
    activations of a block are made again in the backward pass. steer: what is done to the model meanwhile, and to the base
    where replies are held to it."""

    def __init__(
        self, loaded: Loaded, net: Any, batch_size: int, *, recompute: bool, steer: Steer | None = None
    ) -> None:
        self.loaded, self.net, self.batch_size, self.recompute = loaded, net, batch_size, recompute
        self.edits, self.label = edits_of([steer], loaded.device), label_of([steer])

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model as a padded training step runs it; on leaving, without gradient checkpointing."""
        model = _plain(self.net)
        try:
            if self.recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with ExitStack() as stack:
                if self.edits:
                    stack.enter_context(edited(model.get_decoder(), self.edits, self.label))
                if (
                    self.edits and self.loaded.model is not model
                ):  # a copy in training: the base runs where held
                    base = passes.decoder(self.loaded)
                    stack.enter_context(edited(base, self.edits, self.label, must_run=False))
                yield
        finally:
            if self.recompute:
                model.gradient_checkpointing_disable()

    def parts(self, examples: Sequence[Example], step: int) -> Iterator[Part]:
        """What the rows of a step cost, pass by pass."""
        for first in range(0, len(examples), self.batch_size):
            batch = collate(examples[first : first + self.batch_size], self.loaded.device)
            learned, kept = losses(self.loaded, self.net, batch)
            rows = (first + batch.rows.cpu().numpy(), first + batch.held_rows.cpu().numpy())
            yield Part(learned, kept, *rows, batch.firm.cpu().numpy().astype(np.bool_), batch.ids.numel())


def losses(loaded: Loaded, net: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(learned (N,), kept (H,)) in nats, fp32: the cross-entropy of each of the batch's labels, and
    KL(unadapted ‖ adapted) at each of its held positions.

    Equal to F.cross_entropy(net(ids).logits[rows, columns], targets, reduction="none") and
    F.kl_div(adapted.log_softmax(-1), unadapted.log_softmax(-1), log_target=True, reduction="none").sum(-1), but the
    head sees these N + H rows only: no (B, T, V) tensor is made. The unadapted model's carry no gradient."""
    n = len(batch.targets)
    rows = torch.cat([batch.rows, batch.held_rows])
    columns = torch.cat([batch.columns, batch.held_columns])
    logits = _logits(loaded, net, batch.ids, rows, columns)
    learned = F.cross_entropy(logits[:n], batch.targets, reduction="none")
    if not len(batch.held_rows):
        return learned, learned.new_zeros(0)
    with (
        torch.no_grad(),
        _unadapted(net),
    ):  # of a whole model in training the base is another, which stays as it is
        at = (batch.ids, batch.held_rows, batch.held_columns)
        before = _logits(loaded, loaded.model, *at).log_softmax(-1)
    return learned, F.kl_div(logits[n:].log_softmax(-1), before, log_target=True, reduction="none").sum(-1)


@contextmanager
def _unadapted(net: Any) -> Iterator[None]:
    """Without adapters; afterwards those are trained that were: peft asks for gradients of all that it turns on again."""
    if not hasattr(net, "disable_adapter"):
        yield
        return
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    with net.disable_adapter():
        yield
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _logits(
    loaded: Loaded, net: Any, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """fp32 logits (N, V) of the model as it stands, at (rows, columns) of `ids`."""
    model = _plain(net)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    mixed = (
        torch.autocast(loaded.device.type, torch.bfloat16) if loaded.dtype == "bfloat16" else nullcontext()
    )
    with mixed:
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return head(hidden[rows, columns]).float()


def _plain(net: Any) -> Any:
    """transformers' model, under peft's layers or by itself."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net
