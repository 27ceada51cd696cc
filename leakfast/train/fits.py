"""Whether a model and rows are fit for the training loop, looked at before the first step: lengths that the model is
measured on, and logits that are the head's product with the last states. Demands encoded rows; leaves layers to lora.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leakfast.errors import InputError
from leakfast.models.loading import FITS, limit_of, unfit

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.train.collate import Example


def check(loaded: Loaded, examples: Sequence[Example]) -> None:
    """InputError for rows that are too long for the model, ModelError where the logits that the loss takes, the head's
    product with the last states, are not the model's own (it scales or caps them)."""
    limit, why = limit_of(loaded.model.config)
    long = [one for one in examples if limit and len(one.ids) > limit]
    if long:
        raise InputError(
            f"train: the {long[0].label} has {len(long[0].ids)} tokens, but {why}. Needed: rows that {loaded.name} is "
            f"measured on. Leave out the {len(long)} rows of more, or shorten them."
        )
    if getattr(loaded.model.config, "model_type", None) not in FITS:
        _check_head(loaded, examples[0].ids[:16])


@torch.no_grad()
def _check_head(loaded: Loaded, ids: Sequence[int]) -> None:
    if getattr(loaded.model.config, "is_encoder_decoder", False):
        raise unfit("train", loaded, "an encoder-decoder")
    decoder, head = loaded.model.get_decoder(), loaded.model.get_output_embeddings()
    if decoder is None or head is None:
        raise unfit("train", loaded, "without a decoder and an output head")
    given = torch.tensor([list(ids)], device=loaded.device)
    own = loaded.model(input_ids=given, use_cache=False).logits.float()
    ours = head(decoder(input_ids=given, use_cache=False).last_hidden_state).float()
    if not (ours - own).abs().max() <= 1e-2 * own.abs().max():
        raise unfit("train", loaded, "whose logits are more than its head's product with the last states")
