"""A decoder block whose residual sums and norms are one kernel each, and rotary embedding in place: the parts of fused.py that
are no module of their own. Demands blocks of the common shape (input_layernorm, self_attn, post_attention_layernorm, mlp) and
transformers' apply_rotary_pos_emb; whether a model's are such is tried, not read off its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

ROTATE = "apply_rotary_pos_emb"
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Chain:
    """The blocks of a decoder, and of the block that has just run its output already normed for the next."""

    def __init__(self, blocks: Sequence[Any], is_norm: Callable[[Any], bool]) -> None:
        self.blocks = [block for block in blocks if _common(block, is_norm)]
        following = {id(one): other for one, other in zip(blocks, blocks[1:], strict=False)}
        self._norms = {
            id(block): following[id(block)].input_layernorm
            for block in self.blocks
            if id(block) in following and _common(following[id(block)], is_norm)
        }
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The norm of a block's input, where the block before has made it; held no longer."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] is hidden else None

    def out(self, block: Any, hidden: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """The block's output, hidden + made."""
        norm = self._norms.get(id(block))
        if norm is None or not _beside(norm, hidden):
            return hidden + made
        self._ready = added(hidden, made, norm)
        return self._ready[0]


def _common(block: Any, is_norm: Callable[[Any], bool]) -> bool:
    """Whether a block has the parts, its norms left alone by others."""
    if not all(hasattr(block, name) for name in _PARTS):
        return False
    norms = block.input_layernorm, block.post_attention_layernorm
    return all(is_norm(n) and "forward" not in vars(n) and not n._forward_hooks for n in norms)


def _beside(norm: Any, hidden: torch.Tensor) -> bool:
    """Not so where a block's weights are on another device or still on the disk."""
    return bool(norm.weight.device == hidden.device and norm.weight.dtype == hidden.dtype)


def added(x: torch.Tensor, y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, the norm of it), (…, D) each, by the kernel."""
    from leakfast.kernels.add_norm import add_norm

    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
        return add_norm(x, y, norm.weight, norm.variance_epsilon)


def forward(block: Any, chain: Chain, hidden: torch.Tensor, *given: Any, **words: Any) -> Any:
    """A block of the common shape on hidden (B, L, D); what it cannot run so runs as the block's class has it."""
    norm = block.post_attention_layernorm
    if given or hidden.requires_grad or not _beside(norm, hidden):
        return type(block).forward(block, hidden, *given, **words)
    ready = chain.of(hidden)
    words = {
        "attention_mask": None,
        **words,
        "hidden_states": block.input_layernorm(hidden) if ready is None else ready,
    }
    attended, _ = block.self_attn(**words)
    hidden, ready = added(hidden, attended, norm)
    return chain.out(block, hidden, block.mlp(ready))


def places(modules: Iterator[Any]) -> dict[str, Any]:
    """The Python modules whose attention calls a rotation of their own by its usual name: name → that function."""
    names = {type(m).__module__ for m in modules if type(m).__name__.endswith("Attention")}
    return {name: vars(sys.modules[name])[ROTATE] for name in names if ROTATE in vars(sys.modules[name])}


def rotated(
    own: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *given: Any,
    **words: Any,
) -> Any:
    """`own` by the kernel, in place, for one sequence: q (1, H, T, d), k (1, K, T, d), cos and sin (1, T, d)."""
    if given or words or not _turns(q, k, cos, sin):
        return own(q, k, cos, sin, *given, **words)
    from leakfast.kernels.rope import rope

    with torch.cuda.device_of(q):  # as in `added`
        rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
    return q, k


def _turns(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes these: one sequence, heads as wide as the angles, side by side, one dtype, no gradient."""
    fits = not q.requires_grad and q.ndim == k.ndim == 4 and len(q) == len(k) == len(cos) == len(sin) == 1
    fits = fits and cos.ndim == sin.ndim == 3 and q.dtype == k.dtype == cos.dtype == sin.dtype
    return fits and all((x.shape[-1], *x.stride()[1::2]) == (cos.shape[-1], cos.shape[-1], 1) for x in (q, k))


def trial_of_rotation(model: Any, dtype: torch.dtype, device: Any) -> Callable[[], torch.Tensor]:
    """What turns the same random queries and keys by the model's own angles at every call, through the function that its
    attention calls. Raises ValueError where there is none, or where the kernel does not take what it is given."""
    found = places(model.modules())
    if len(found) != 1:
        raise ValueError(f"{len(found)} rotations are called {ROTATE}")
    config, (name,) = model.config, found
    heads, keys = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    draw, tokens = torch.Generator().manual_seed(0), 5
    q, k = (torch.randn(1, tokens, n, d, generator=draw).to(device, dtype) for n in (heads, keys))
    cos, sin = model.rotary_emb(q, torch.arange(tokens, device=device)[None])
    if not _turns(q.transpose(1, 2), k.transpose(1, 2), cos, sin):
        raise ValueError(f"its angles are {tuple(cos.shape)}, {cos.dtype}, its heads {d} wide, {dtype}")

    def run() -> torch.Tensor:
        turned = vars(sys.modules[name])[ROTATE](
            q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin
        )
        return torch.cat([x.transpose(1, 2).flatten() for x in turned])

    return run


def trial_of_block(model: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What runs the first two blocks on x (1, L, D), their attention stood in for by something that needs no layout; both
    outputs, one after the other. Raises ValueError where a block returns more than a tensor."""
    blocks = list(model.layers)[:2]

    def attend(hidden_states: torch.Tensor, **words: Any) -> tuple[torch.Tensor, None]:
        return 0.7 * hidden_states.flip(-1), None

    def run() -> torch.Tensor:
        hidden, outs = x, []
        own: list[Mapping[str, Any]] = [dict(vars(block.self_attn)) for block in blocks]
        try:
            for block in blocks:
                block.self_attn.forward = attend
            for block in blocks:
                hidden = block(hidden)
                if not isinstance(hidden, torch.Tensor):
                    raise ValueError("a block returns more than its states")
                outs.append(hidden)
        finally:
            for block, was in zip(blocks, own, strict=True):
                vars(block.self_attn).pop("forward", None)
                if "forward" in was:
                    block.self_attn.forward = was["forward"]
        return torch.cat([out.flatten() for out in outs])

    return run


def installed(chain: Chain) -> list[tuple[Any, Callable[..., Any]]]:
    """(block, its forward by the chain) of every block that can run so."""
    return [(block, partial(forward, block, chain)) for block in chain.blocks]
