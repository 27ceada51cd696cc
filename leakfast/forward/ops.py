"""Picks the implementation of each op, once for an op and a device, and logs which and why. Demands torch
tensors; the kernels and their reference live in kernels/, the C++ in csrc/. A path asked for by name runs
or raises."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from leakfast.forward import autotune as tuning

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger(__name__)

# op → implementations, best first
IMPLEMENTATIONS = {
    "segment_means": ("reference",),
    "centroid_sums": ("triton", "reference"),
    "choice_logprobs": ("triton", "native", "tiled", "reference"),
    "divergences": ("triton", "native", "reference"),
    "fp8_rows": ("triton", "reference"),
}
_FLOAT_NAMES = ("float32", "bfloat16")


def segment_means(states: torch.Tensor, offsets: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Mean of each segment of rows: states (N, D), offsets (P+1,) int64 → (P, D) float32.

    Accumulated in float32 in a fixed order; equal to
    `torch.stack([states[a:b].float().mean(0) for a, b in pairwise(offsets)])`.
    impl: "auto" or a name of IMPLEMENTATIONS; a name that cannot run raises ValueError."""
    from leakfast.kernels import reference

    _choose("segment_means", impl, states.device.type)
    return reference.segment_means_reference(states, offsets)


def centroid_sums(
    states: torch.Tensor,
    leaf_rows: torch.Tensor,
    offsets: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sums of squares of each persona's last-token states, read in place from packed states.

    states (T, D), any float dtype; leaf_rows (N,) int64, persona after persona; offsets (P+1,) int64 from
    0 to N. Returns (P, D) float32 twice: `rows.sum(0)` and `rows.square().sum(0)` with
    `rows = states[leaf_rows[a:b]].float()`, in float32 and a fixed order; no rows sum to 0.
    out: two contiguous (P, D) float32 that are added to in place and returned.
    leaf_rows and offsets may lie on the CPU, where they are checked; on a GPU the kernel trusts them.
    Raises ValueError on what does not fit, or an impl that cannot run here."""
    chosen = _choose("centroid_sums", impl, states.device.type)
    if chosen == "reference":
        from leakfast.kernels import reference

        return reference.last_token_centroids_reference(states, leaf_rows, offsets, out)
    import torch

    from leakfast.kernels.last_token_centroids import last_token_centroids

    if not offsets.is_cuda and (
        len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(leaf_rows) or (offsets.diff() < 0).any()
    ):
        raise ValueError("offsets must run from 0 to N and not decrease")
    if not leaf_rows.is_cuda and len(leaf_rows) and not 0 <= leaf_rows.min() <= leaf_rows.max() < len(states):
        raise ValueError(f"leaf_rows must lie in 0…{len(states) - 1}")
    given = states, leaf_rows.to(states.device), offsets.to(states.device)
    with torch.cuda.device(states.device):  # Triton launches on the current device
        return last_token_centroids(*given, out, _tuned_centroids(given))


def choice_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (nats) of chosen next tokens, without an (N, V) tensor of logits.

    hidden (N, D), final-normed; head (V, D); token_ids (N, C) int64. Returns logprobs (N, C) and the
    log-sum-exp over V (N,), float32: `x = hidden.float() @ head.float().T`,
    `torch.log_softmax(x, -1).gather(1, token_ids)`, `x.logsumexp(-1)`. Never rounded below float32.
    A NaN in a row of hidden reaches that row alone. On the CPU the C++ op uses torch.get_num_threads()
    threads; its bits depend on neither their number nor N. impl: "auto" or a name of IMPLEMENTATIONS.
    Raises ValueError on shapes, ids outside 0…V-1 (on a GPU ids are not read back: such an id gives NaN),
    or an impl that cannot run here."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or head.numel() == 0:
        raise ValueError("hidden must be (N, D) and head (V, D), with V and D of at least 1")
    if token_ids.ndim != 2 or len(token_ids) != len(hidden) or token_ids.is_floating_point():
        raise ValueError("token_ids must be (N, C) integers")
    if hidden.device != head.device:
        raise ValueError(f"hidden lies on {hidden.device}, head on {head.device}; move one")
    token_ids = token_ids.long()
    if not token_ids.is_cuda and token_ids.numel():
        low, high = token_ids.aminmax()
        if low < 0 or high >= len(head):
            raise ValueError(f"token ids must lie in 0…{len(head) - 1}")
    dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in (hidden, head))
    chosen = _choose("choice_logprobs", impl, hidden.device.type, dtypes)
    hidden, head, token_ids = hidden.detach(), head.detach(), token_ids.to(hidden.device)
    if chosen == "native":
        return _choice_logprobs_native(hidden, head, token_ids)
    if chosen == "triton":
        import torch

        from leakfast.kernels.choice_logprobs import choice_logprobs as triton_choice_logprobs

        with torch.cuda.device(hidden.device):  # Triton launches on the current device
            config = _tuned_choices(hidden, head, token_ids)
            return triton_choice_logprobs(hidden, head, token_ids, config)
    if chosen == "tiled":
        from leakfast.kernels.choice_tiled import choice_logprobs_tiled

        return choice_logprobs_tiled(hidden, head, token_ids)
    from leakfast.kernels import reference

    return reference.choice_logprobs_reference(hidden, head, token_ids)


def divergences(
    states_p: torch.Tensor,
    states_q: torch.Tensor,
    head: torch.Tensor,
    impl: str = "auto",
    of: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(p‖q), KL(q‖p) and Jensen–Shannon divergence between next-token distributions, in nats, row by row,
    without an (N, V) tensor of logits.

    states_p, states_q (N, D), final-normed; head (V, D). of: (N,) int64 on the host, the row of states_p (G, D) that each row
    of states_q is compared with; the C++ op makes the logits of a row that neighbours share once.
    p = softmax(states_p.float() @ head.float().T), q likewise, m = (p + q)/2: `(p * (p / q).log()).sum(-1)`, the same with
    letters changed, and `(p * (p / m).log() + q * (q / m).log()).sum(-1) / 2`, three (N,) float32. JS lies in 0…log 2; all
    three are 0 or more and exactly 0 for equal states, the reference's but for rounding. A NaN in a row of states reaches its
    pairs alone. On the CPU the C++ op uses torch.get_num_threads() threads and takes at most 16 MB (more where V is above
    229,000); its bits depend on neither their number nor N nor what a pair stands beside. impl: "auto" or a
    name of IMPLEMENTATIONS. Raises ValueError on shapes that do not fit, or an impl that cannot run here."""
    given = states_p, states_q, head
    if any(x.ndim != 2 for x in given) or head.numel() == 0 or states_p.shape[1] != head.shape[1]:
        raise ValueError("states must be (N, D) and head (V, D), with V and D of at least 1")
    n_pairs = len(states_p) if of is None else len(of)
    if len(states_q) != n_pairs or states_q.shape[1] != states_p.shape[1]:
        raise ValueError(
            f"states_p are {tuple(states_p.shape)}, states_q {tuple(states_q.shape)}; {n_pairs} pairs are needed"
        )
    if of is not None and n_pairs and not (of.min() >= 0 and of.max() < len(states_p)):
        raise ValueError(f"of names rows {of.min()} to {of.max()} of {len(states_p)} states")
    if len({x.device for x in given}) > 1:
        raise ValueError(
            f"states and head lie on {', '.join(str(x.device) for x in given)}; move them to one"
        )
    dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in given)
    chosen = _choose("divergences", impl, head.device.type, dtypes)
    given = tuple(x.detach() for x in given)
    if chosen == "native":
        import torch

        from leakfast import _native

        found = _native.divergences(*map(_array_of, given), torch.get_num_threads(), of=of)
        return tuple(torch.from_numpy(found).unbind())
    if of is not None:
        import torch

        given = (given[0].index_select(0, torch.from_numpy(of).to(states_p.device)), *given[1:])
    if chosen == "triton":
        import torch

        from leakfast.kernels.divergences import divergences as triton_divergences

        with torch.cuda.device(head.device):  # Triton launches on the current device
            return triton_divergences(*given, _tuned_divergences(given))
    from leakfast.kernels import reference

    return reference.divergences_reference(*given)


def fp8_rows(x: torch.Tensor, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x (T, K), any float dtype, in float8_e4m3fn and their scales (T, 1) float32, x ≈ out.float() · scale: a scale is
    the row's largest magnitude / 448, the division IEEE's. Every implementation gives the same bits. impl: "auto" or a name
    of IMPLEMENTATIONS. Raises ValueError for what is not a matrix of floats, or an impl that cannot run here."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError("x must be (T, K) of a float dtype")
    chosen = _choose("fp8_rows", impl, x.device.type, (str(x.dtype).removeprefix("torch."),))
    if chosen == "reference":
        from leakfast.kernels import reference

        return reference.fp8_rows_reference(x)
    import torch

    from leakfast.kernels.fp8_rows import fp8_rows as triton_fp8_rows

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return triton_fp8_rows(x if x.stride(1) == 1 else x.contiguous())


def chosen_paths(device: str | None = None) -> dict[str, str]:
    """Op → implementation that "auto" takes on a device type ("cpu", "cuda"; None: CUDA where there is one)."""
    return {op: chosen for op, (chosen, _) in explained_paths(device).items()}


def explained_paths(
    device: str | None = None, dtypes: tuple[str, ...] = ("float32",)
) -> dict[str, tuple[str, str]]:
    """Op → (implementation, why) of chosen_paths, for tensors of these dtypes ("bfloat16", …)."""
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {op: _decide(op, "auto", device, dtypes) for op in IMPLEMENTATIONS}


def _tuned_centroids(given: tuple[torch.Tensor, ...]) -> Any:
    """The kernel's config under LEAKFAST_AUTOTUNE; None: the shipped table's."""
    if not tuning.asked():
        return None
    from leakfast.kernels import last_token_centroids as kernel

    states, rows, offsets = given
    runs = {str(c): partial(kernel.last_token_centroids, *given, config=c) for c in kernel.CONFIGS.values()}
    shape = 1 << len(rows).bit_length(), len(offsets) - 1, states.shape[1], states.dtype
    name = tuning.best("centroid_sums", shape, states.device, runs, kernel.FAILURES)
    return runs[name].keywords["config"]


def _tuned_choices(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> Any:
    """As above, for choice_logprobs."""
    if not tuning.asked() or len(hidden) == 0:
        return None
    from leakfast.kernels import choice_logprobs as kernel

    shape, configs = kernel.candidates(hidden, head)
    runs = {str(c): partial(kernel.choice_logprobs, hidden, head, token_ids, c) for c in configs}
    name = tuning.best("choice_logprobs", (*shape, token_ids.shape[1]), hidden.device, runs, kernel.FAILURES)
    return runs[name].args[3]


def _tuned_divergences(given: tuple[torch.Tensor, ...]) -> Any:
    """As above, for divergences."""
    if not tuning.asked() or len(given[0]) == 0:
        return None
    from leakfast.kernels import divergences as kernel

    shape, configs = kernel.candidates(*given)
    runs = {str(c): partial(kernel.divergences, *given, c) for c in configs}
    name = tuning.best("divergences", shape, given[2].device, runs, kernel.FAILURES)
    return runs[name].args[3]


def _choice_logprobs_native(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    from leakfast import _native

    arrays = _array_of(hidden), _array_of(head)
    logprobs, lse = _native.choice_logprobs(*arrays, token_ids.contiguous().numpy(), torch.get_num_threads())
    return torch.from_numpy(logprobs), torch.from_numpy(lse)


def _array_of(x: torch.Tensor) -> Any:
    """A matrix as the C++ takes it: rows of float32, or of bfloat16 seen as uint16, without a copy if it can be."""
    import torch

    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _choose(op: str, impl: str, device: str, dtypes: tuple[str, ...] = ("float32",)) -> str:
    return _decide(op, impl, device, dtypes)[0]


@cache
def _decide(op: str, impl: str, device: str, dtypes: tuple[str, ...] = ("float32",)) -> tuple[str, str]:
    known = IMPLEMENTATIONS[op]
    if impl not in ("auto", *known):
        raise ValueError(f"{op}: implementation {impl!r} asked, there is {', '.join(('auto', *known))}")
    passed_over = []
    for name in known if impl == "auto" else (impl,):
        runs, why = _can_run(name, device, dtypes, named=impl != "auto")
        if runs:
            reason = "; ".join([why, *passed_over] if impl == "auto" else ["asked for by name", why])
            log.info("ops: %s runs as %s on %s (%s)", op, name, device, reason)
            return name, reason
        passed_over.append(f"{name} not: {why}")
    raise ValueError(f"{op}: implementation {impl!r} asked, but it cannot run: {why}. Use impl='auto'.")


def _can_run(name: str, device: str, dtypes: tuple[str, ...], named: bool) -> tuple[bool, str]:
    """Whether an implementation runs on a device with these dtypes, and why or why not."""
    if name == "triton":
        if device != "cuda":
            return False, f"it needs a CUDA device, the tensors are on {device}"
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        if not set(dtypes) <= {"float16", *_FLOAT_NAMES}:
            return False, f"it takes float16, bfloat16 and float32, not {' and '.join(dtypes)}"
        return True, "a GPU kernel"
    if name == "native":
        if device != "cpu":
            return False, f"it runs on the CPU, the tensors are on {device}"
        if not set(dtypes) <= set(_FLOAT_NAMES):
            return False, f"it takes float32 and bfloat16, not {' and '.join(dtypes)}"
        try:
            native = importlib.import_module("leakfast._native")
        except ImportError as error:
            return False, f"leakfast._native cannot be used: {error}"
        best = native.choice_paths(set(dtypes) == {"bfloat16"})[0]
        if best == "portable" and not named:
            return False, "torch's own matrix product is faster than portable C++"
        return True, f"C++ for {best}"
    return True, "plain torch"
