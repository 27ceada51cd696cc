"""Bytes a token that a block of the engine moves between its matrix products, and kernels, counted on meta tensors: as
transformers has the block, as the engine ran it before its own kernels, and with them. Times nothing, needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from _common import card, ending_with_json, make_model, parser, surroundings
from torch.utils._python_dispatch import TorchDispatchMode

from leakfast import models
from leakfast.forward import forest, fused
from leakfast.kernels import reference
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas, load_questions

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.linear", "aten._scaled_mm")
_TRANSFORMERS = dict(fused.PLAIN)
_BEFORE = fused.PLAIN | {"norm": "torch"}  # what a GPU ran before there were kernels of this kind
_KERNELS = {"gated": 1, "rope": 2, "add_norm": 0}  # op → how many of its first inputs it writes over


def bytes_of(x: torch.Tensor) -> int:
    """Of the elements that lie apart in memory: an expanded tensor is read once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


class Counting(TorchDispatchMode):
    """Bytes read and written and kernels run, of everything but matrix products and views; one call of an op that is its
    own kernel counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels, self.by_op = 0, 0, {}

    def add(self, name: str, moved: int) -> None:
        self.bytes += moved
        self.kernels += 1
        self.by_op[name] = self.by_op.get(name, 0) + moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, torch.Tensor)]
        if func.is_view or not made or name.startswith((*_PRODUCTS, "aten.empty", "aten._unsafe_view")):
            return out
        read = {id(x): bytes_of(x) for x in flat((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        self.add(name, sum(read.values()) + sum(map(bytes_of, made)))
        return out

    @contextmanager
    def kernels_of_ours(self) -> Iterator[None]:
        """Stand-ins for the Triton kernels, which take no meta tensors: outputs of the right shapes, inputs and outputs
        counted."""

        def standing_in(name: str, over: int) -> Callable:
            def call(*given):
                tensors = [x for x in given if isinstance(x, torch.Tensor)]
                with torch.utils._python_dispatch._disable_current_modes():
                    made = [] if over else [torch.empty_like(tensors[0]) for _ in range(2)]
                self.add(name, sum(map(bytes_of, [*tensors, *tensors[:over], *made])))
                return tuple(made) if made else tensors[0]

            return call

        with ExitStack() as stack:
            for name, over in _KERNELS.items():
                call = standing_in(name, over)
                stack.enter_context(mock.patch(f"leakfast.kernels.{name}.{name}", call))
            yield


def flat(x):
    """Every value in nested tuples, lists and dicts."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, tuple | list):
        for one in x:
            yield from flat(one)
    else:
        yield x


def keys_a_token(budget: int) -> float:
    """Keys that are gathered for a packed token: 111 personas × 20 questions through the organism's tokenizer."""
    tokenizer = models.load_tokenizer("organism")
    prompts = chat.render_grid(tokenizer, load_personas(), load_questions("eval").questions)
    batches = list(forest.plan(prompts, budget))
    return sum(len(b.k_rows) for b in batches) / sum(len(b.tokens) for b in batches)


def attention(count: Counting, per_token: float) -> Callable:
    """Stands in for variable-length attention over a forest: gathered keys and values are read, written and read again,
    queries read, the output written; two gathers and one attention."""

    def attend(module, query, key, value, mask, **more):
        tokens = query.shape[2]
        gathered = [
            int(per_token * tokens) * x.shape[1] * x.shape[3] * x.element_size() for x in (key, value)
        ]
        for moved in gathered:
            count.add("gather of keys and values", 2 * moved)
        count.add("attention", sum(gathered) + 2 * bytes_of(query))
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.empty_like(query.transpose(1, 2)), None

    return attend


def counted(net, plan: dict[str, str], tokens: int, per_token: float) -> Counting:
    """One block in the middle of a decoder, on `tokens` packed tokens."""
    from transformers import AttentionInterface

    count = Counting()
    AttentionInterface.register("traffic", attention(count, per_token))
    model, config = net.model, net.config
    config._attn_implementation = "traffic"
    hidden = torch.empty(1, tokens, config.hidden_size, dtype=net.dtype, device="meta")
    d = config.hidden_size // config.num_attention_heads
    angles = tuple(torch.empty(1, tokens, d, dtype=net.dtype, device="meta") for _ in range(2))
    with torch.inference_mode(), count.kernels_of_ours(), fused.applied(model, plan):
        hidden = model.layers[0](hidden, position_embeddings=angles)
        with count:
            before = count.bytes, count.kernels, dict(count.by_op)
            model.layers[1](hidden, position_embeddings=angles)
    count.bytes -= before[0]
    count.kernels -= before[1]
    count.by_op = {k: v - before[2].get(k, 0) for k, v in count.by_op.items() if v > before[2].get(k, 0)}
    return count


def counted_rows(width: int, kernel: bool) -> float:
    """Bytes an element of rounding rows to FP8."""
    x = torch.empty(1024, width, dtype=torch.bfloat16, device="meta")
    if kernel:  # both readings, the second at worst from memory; one byte out, four a row
        return (2 * bytes_of(x) + x.numel() + 4 * len(x)) / x.numel()
    with Counting() as count:
        reference.fp8_rows_reference(x)
    return count.bytes / x.numel()


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--tokens", type=int, default=16_384, help="packed tokens of a batch")
    options = made.parse_args()
    with ending_with_json("traffic", "cpu"):
        run(options)


def run(options) -> None:
    shape = options.shape or "qwen2.5-7b"
    net = make_model(shape, "bfloat16", "meta")
    per_token = keys_a_token(options.tokens)
    ways = {"transformers": _TRANSFORMERS, "before": _BEFORE, "ours": fused.UNMEASURED}
    found = {name: counted(net, plan, options.tokens, per_token) for name, plan in ways.items()}
    rows = {
        name: {
            "kernels": c.kernels,
            "kb_a_token": c.bytes / options.tokens / 1e3,
            "by_op_kb": {
                k: v / options.tokens / 1e3 for k, v in sorted(c.by_op.items(), key=lambda i: -i[1])
            },
        }
        for name, c in found.items()
    }
    width = net.config.intermediate_size
    fp8 = {"before": counted_rows(width, False), "ours": counted_rows(width, True)}
    lines = [(n, f"{r['kernels']} kernels, {r['kb_a_token']:.1f} KB a token") for n, r in rows.items()]
    share = found["ours"].bytes / found["before"].bytes
    lines += [("ours over before", f"{share:.3f}")]
    lines += [("rows to FP8", f"{fp8['before']:.1f} bytes an element before, {fp8['ours']:.1f} ours")]
    record = {"bench": "traffic", "shape": shape, "keys_a_token": per_token, "rows": rows, "of_before": share}
    card(
        f"bytes between a block's products, {shape}, {options.tokens} tokens",
        lines,
        record | {"fp8_bytes_an_element": fp8, **surroundings("cpu")},
    )


if __name__ == "__main__":
    main()
