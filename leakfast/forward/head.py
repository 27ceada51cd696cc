"""Log-probabilities of chosen tokens from final-normed states, as the model's own output head has them: scaled, capped or
with a bias where it does that. Demands a causal language model; leaves states to passes.py and the kernel to ops.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from leakfast.errors import ModelError
from leakfast.forward.ops import choice_logprobs
from leakfast.forward.passes import decoder
from leakfast.models.loading import FITS, unfit

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

_TRIAL_TOKENS = 12
_LOGITS = 1 << 24  # float32 logits held at once where the kernel does not apply
_PART = "choices"


@dataclass(frozen=True)
class Head:
    """logits = cap·tanh(x/cap) of x = scale · (states · weightᵀ + bias); weight (V, D). No cap, no bias: None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def scaled(self, states: torch.Tensor) -> torch.Tensor:
        """States whose product with the weight is the logits, where there is no cap and no bias."""
        return states if self.scale == 1 else states * self.scale

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(R, D) states → (R, V) float32."""
        found = torch.nn.functional.linear(states, self.weight, self.bias).float() * self.scale
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap

    def logprobs(self, states: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """log P of tokens asked (R, C) int64 after states (R, D): (R, C) float32, nats. By the kernel, without logits,
        unless the head caps or has a bias: then of as many rows at once as fit in 64 MiB."""
        if self.cap is None and self.bias is None:
            return choice_logprobs(self.scaled(states), self.weight, asked)[0]
        step = max(1, _LOGITS // len(self.weight))
        parts = []
        for first in range(0, len(states), step):
            logits = self.logits(states[first : first + step])
            chosen = logits.gather(1, asked[first : first + step])
            parts.append(chosen - logits.logsumexp(1, keepdim=True))
        return torch.cat(parts) if parts else states.new_empty(asked.shape, dtype=torch.float32)


_read: WeakKeyDictionary[Any, tuple[float, float | None]] = WeakKeyDictionary()


def head_of(loaded: Loaded) -> Head:
    """The output head under the adapter that is on: of a head of the adapter's own, of rows that it trained, or the
    base's. Raises ModelError for a head with LoRA matrices, and for a model whose logits are made in no way known here."""
    net = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    output = net.get_output_embeddings()
    if output is None:
        raise unfit(_PART, loaded, "without an output head")
    if hasattr(output, "lora_A"):
        raise ModelError(
            f"{_PART}: the adapter on {loaded.name} has LoRA matrices on the output head, which is scored as a whole. "
            "Needed: an adapter of the decoder's blocks alone. Train one with: leakfast train"
        )
    scale, cap = _how(loaded, net)
    bias = getattr(output, "bias", None)
    if hasattr(output, "token_adapter"):
        weight = output.token_adapter.get_merged_weights(output.token_adapter.active_adapters)
    elif hasattr(output, "modules_to_save"):
        (name,) = output.active_adapters
        weight, bias = output.modules_to_save[name].weight, output.modules_to_save[name].bias
    else:
        weight = output.weight if loaded.stream is None else loaded.stream.head()
    return Head(weight, bias, scale, cap)


def _how(loaded: Loaded, net: Any) -> tuple[float, float | None]:
    """Scale and cap of a model's logits: by its config, held once to its own logits on a few tokens."""
    config = net.config
    if config.model_type in FITS:
        return 1.0, None
    if net not in _read:
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        _hold(loaded, net, float(scale), cap)
        _read[net] = float(scale), cap
    return _read[net]


@torch.inference_mode()
def _hold(loaded: Loaded, net: Any, scale: float, cap: float | None) -> None:
    """ModelError where logits made so are not the model's own."""
    device = next(net.parameters()).device
    ids = torch.arange(_TRIAL_TOKENS, device=device)[None] % net.config.vocab_size
    output = net.get_output_embeddings()
    weight = getattr(output, "weight", None) if loaded.stream is None else loaded.stream.head()
    own = net(input_ids=ids, use_cache=False).logits[0].float()
    states = decoder(loaded)(input_ids=ids, use_cache=False)[0][0]
    if weight is not None and weight.shape[-1] == states.shape[-1]:
        ours = Head(weight, getattr(output, "bias", None), scale, cap).logits(states)
        bound = 1e-4 if weight.dtype == torch.float32 else 4 * torch.finfo(weight.dtype).eps
        if ours.shape == own.shape and bool((ours - own).abs().max() <= bound * own.abs().max()):
            return
    raise unfit(_PART, loaded, "whose logits are made otherwise than by its head, a scale and a cap")


def check(loaded: Loaded, plain: bool = False) -> None:
    """Raises ModelError, as `head_of` and passes.decoder, before anything is begun. plain: nor for a head that caps its
    logits or adds a bias, which distributions as a whole are not compared through."""
    decoder(loaded)
    head = head_of(loaded)
    if plain and (head.cap is not None or head.bias is not None):
        raise unfit("engine", loaded, "whose head caps its logits or has a bias")
