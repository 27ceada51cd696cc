"""A model larger than memory: its modules without weights, and a reader that brings one decoder block at a time from the
safetensors files, the next one read ahead by a thread. Demands files whose names are the modules' own, one to one (`trouble`
says why not); leaves the order in which prompts meet blocks to leakfast.forward.streaming."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from leakfast.errors import ModelError

log = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ALIGNED = 64  # bytes: where a tensor begins inside a buffer


def shards_of(folder: Path) -> dict[str, Path]:
    """Tensor name → file of a Hugging Face folder: model.safetensors, else what its index lists. Empty where there is neither.
    Raises ModelError for a file that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if (folder / SINGLE).is_file():
        try:
            with safe_open(str(folder / SINGLE), framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / SINGLE)
        except SafetensorError as error:
            raise ModelError(
                f"model: {folder / SINGLE} cannot be read ({error}). Needed: a whole file. Fetch the model again."
            ) from error
    if not (folder / INDEX).is_file():
        return {}
    named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    if gone := sorted({name for name in named.values() if not (folder / name).is_file()}):
        raise ModelError(
            f"model: {folder} lacks {len(gone)} of its weight files, such as {gone[0]}. Needed: every file that {INDEX} "
            "lists. Fetch the model again."
        )
    return {tensor: folder / name for tensor, name in named.items()}


@dataclass(frozen=True)
class _Place:
    """A parameter of a module, and the tensor of the files that it is."""

    module: Any
    name: str
    tensor: str


class Blocks:
    """The weights of a model on disk, a block of them in memory.

    Read through safetensors' memory map, so that pages are the page cache's; a block is copied from there into one of two
    buffers (pinned where the model is on a GPU), cast as loading does. A block's forward brings its own weights, so that any
    forward of the model gives what it gives loaded, slowly: block-major order is forward.streaming's.
    until: the last block that is read ahead; tried: the deepest that forward.streaming has tried block by block."""

    def __init__(self, net: Any, files: Mapping[str, Path], dtype: Any, device: Any) -> None:
        self.files, self.dtype, self.device = files, dtype, device
        self.until = self.tried = -1
        self._open: dict[Path, Any] = {}
        self._laid: dict[int, list[range]] = {}
        self._here: int | None = None
        self._ahead: tuple[int, int, Future[list[Any]]] | None = None
        self._slot = 0
        self._slots: list[Any] = [None, None]
        self._copied: list[Any] = [None, None]  # events of copies out of pinned buffers
        self._on_device: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._added: dict[int, list[tuple[Any, Callable[[], Any]]]] = {}
        self._head: Any = None
        self.blocks, rest = _places(net, stack_of(net))
        self._embedding, self._output = net.get_input_embeddings(), net.get_output_embeddings()
        self._empty = _emptied(net, dtype, device)
        self.read_blocks: list[int] = []  # every block read so far, in order
        for place in rest:
            if place.name != "weight" or place.module not in (self._embedding, self._output):
                small = self._tensor(place.tensor).to(device, dtype, copy=True)
                place.module._parameters[place.name].data = small
        self._table = next(p.tensor for p in rest if p.module is self._embedding and p.name == "weight")
        own = [p.tensor for p in rest if p.module is self._output and p.name == "weight"]
        self._head_name = own[0] if own else self._table
        self._embedding.forward = self._embedded
        if self._output is not None:
            self._output.forward = partial(self._logits, type(self._output).forward)
        for n, block in enumerate(stack_of(net)[1]):
            block.forward = partial(self._run, n, block.forward)

    @property
    def block_bytes(self) -> int:
        """Of the largest block, in the model's dtype."""
        return max(self._bytes(n) for n in range(len(self.blocks)))

    def bring(self, n: int) -> None:
        """Block n has its weights, and the block after it is being read, if it is not beyond `until`."""
        if self._here == n:
            return
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == n:
            slot, views = ahead[1], ahead[2].result()
        else:
            if ahead is not None:
                ahead[2].result()  # its buffer is being written
            slot = 1 - self._slot
            views = self._read(n, slot)
        self.leave()
        self._put(n, views, slot)
        self._slot, self._here = slot, n
        self.read_blocks.append(n)
        if n + 1 <= min(self.until, len(self.blocks) - 1):
            self._ahead = (n + 1, 1 - slot, self._pool.submit(self._read, n + 1, 1 - slot))

    def leave(self) -> None:
        """No block has weights any longer."""
        if self._here is not None:
            for place in self.blocks[self._here]:
                parameter = place.module._parameters[place.name]
                parameter.data = self._empty.expand(parameter.shape)
        self._here = None

    def head(self) -> Any:
        """Weight (V, D) of the output head in the model's dtype and on its device, read when it is first asked for: the map
        of the file itself on a CPU where that is in the model's dtype."""
        if self._head is None:
            self._head = self._tensor(self._head_name).to(self.device, self.dtype)
        return self._head

    def embedding_rows(self, ids: Any) -> Any:
        """Rows (N, D) of the input embedding for token ids (N,) int64 on the CPU, which alone are read; in the model's dtype and
        on its device."""
        return self._tensor(self._table)[ids].to(self.device, self.dtype)

    @contextmanager
    def adding(self, updates: Mapping[Any, Callable[[], Any]]) -> Iterator[None]:
        """Linear layers of the blocks with an update added to their weights whenever a block is brought, inside the block."""
        owner = {id(place.module): n for n, places in enumerate(self.blocks) for place in places}
        try:
            self.leave()
            for module, update in updates.items():
                self._added.setdefault(owner[id(module)], []).append((module, update))
            yield
        finally:
            self._added.clear()
            self.leave()

    def _run(self, n: int, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self.bring(n)
        return forward(*given, **named)

    def _embedded(self, ids: Any) -> Any:
        """The module's own forward over the rows of the table that the tokens ask for, which alone are read."""
        import torch

        module = self._embedding
        rows, where = torch.unique(ids.cpu(), return_inverse=True)
        parameter, padding = module._parameters["weight"], module.padding_idx
        shape = parameter.shape
        try:
            module.padding_idx = None  # matters for gradients alone
            parameter.data = self.embedding_rows(rows)
            return type(module).forward(module, where.to(ids.device))
        finally:
            module.padding_idx = padding
            parameter.data = self._empty.expand(shape)

    def _logits(self, forward: Callable[..., Any], states: Any) -> Any:
        parameter = self._output._parameters["weight"]
        shape = parameter.shape
        try:
            parameter.data = self.head()
            return forward(self._output, states)
        finally:
            parameter.data = self._empty.expand(shape)

    def _tensor(self, name: str) -> Any:
        """A tensor of the files, as a view of their map."""
        from safetensors import safe_open

        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt", device="cpu")
        return self._open[path].get_tensor(name)

    def _bytes(self, n: int) -> int:
        return max((where.stop for where in self._ranges(n)), default=0)

    def _ranges(self, n: int) -> list[range]:
        """Where each parameter of block n lies in a buffer, bytes."""
        if n not in self._laid:
            found, end = [], 0
            for place in self.blocks[n]:
                size = place.module._parameters[place.name].numel() * self.dtype.itemsize
                start = -(-end // _ALIGNED) * _ALIGNED + self._phase(place)
                found.append(range(start, start + size))
                end = found[-1].stop
            self._laid[n] = found
        return self._laid[n]

    def _phase(self, place: _Place) -> int:
        """How far from a boundary the weight of a loaded model lies: on a CPU that is a view of the file's map where the
        dtype is the file's, and a BLAS may sum in another order there."""
        mapped = self._tensor(place.tensor)
        return mapped.data_ptr() % _ALIGNED if self.device.type == "cpu" and mapped.dtype == self.dtype else 0

    def _read(self, n: int, slot: int) -> list[Any]:
        """Block n copied from the map into a buffer: its parameters' views. Runs in the reader's thread too."""
        import torch

        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        pinned = self.device.type == "cuda"
        buffer: Any = self._slots[slot]
        if buffer is None:
            buffer = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._slots[slot] = buffer
        views = self._views(buffer, n)
        for place, view in zip(self.blocks[n], views, strict=True):
            view.copy_(self._tensor(place.tensor))
        return views

    def _views(self, buffer: Any, n: int) -> list[Any]:
        views = []
        for place, where in zip(self.blocks[n], self._ranges(n), strict=True):
            shape = place.module._parameters[place.name].shape
            views.append(buffer[where.start : where.stop].view(self.dtype).view(shape))
        return views

    def _put(self, n: int, views: list[Any], slot: int) -> None:
        import torch

        if self.device.type == "cuda":  # on the current stream, after what still runs on the block before
            if self._on_device is None:
                self._on_device = torch.empty(self.block_bytes, dtype=torch.uint8, device=self.device)
            there = self._views(self._on_device, n)
            for to, view in zip(there, views, strict=True):
                to.copy_(view, non_blocking=True)
            copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._copied[slot] = copied
            views = there
        for place, view in zip(self.blocks[n], views, strict=True):
            place.module._parameters[place.name].data = view
        with torch.no_grad():
            for module, update in self._added.get(n, ()):
                module.weight.add_(update().to(self.device))


def stack_of(net: Any) -> tuple[str, Any]:
    """The name in the model and the blocks of a causal LM's decoder: its list of as many modules as the config has layers.
    ("", ()) where there is none."""
    import torch

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == net.config.num_hidden_layers:
            return name, module
    return "", ()


def skeleton(config: Any, dtype: Any) -> Any:
    """The causal LM of a config in eval mode, its parameters on torch's meta device, its buffers (rotary frequencies, which
    no file holds) made as ever."""
    import transformers

    lm: Any = transformers.AutoModelForCausalLM
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with _weightless():
        net: Any = lm.from_config(config, dtype=dtype, trust_remote_code=False, **eager)
    return net.eval().requires_grad_(False)


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters that modules register become meta tensors; no page of theirs is ever written."""
    import torch

    own = torch.nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        own(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # else it is tied to one that is there
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = own  # type: ignore[method-assign]


def trouble(net: Any, files: Mapping[str, Path]) -> str | None:
    """Why a model cannot be read block by block, in words after "because"; None where it can."""
    if not files:
        return f"it has no {SINGLE} and no {INDEX}"
    if getattr(net.config, "quantization_config", None):
        return "its weights are quantized"
    if getattr(net, "_keep_in_fp32_modules", None) or getattr(net, "_keep_in_fp32_modules_strict", None):
        return "some of its modules stay in float32"
    name, _ = stack_of(net)
    embedding, output = net.get_input_embeddings(), net.get_output_embeddings()
    if not name or embedding is None or output is None or not hasattr(embedding, "padding_idx"):
        return "it has no list of blocks between an embedding and an output head"
    parameters = dict(net.named_parameters())  # tied ones once
    again = net.state_dict().keys() - parameters.keys()
    if again & {n for n, _ in net.named_buffers()}:
        return "its files hold buffers beside the weights"
    if any(net.get_parameter(n) is not embedding.weight for n in again):
        return "it ties other weights than its head's"
    if len({p.dtype for p in parameters.values()}) > 1:
        return "its weights are of several dtypes"
    if odd := sorted(parameters.keys() ^ files.keys()):
        which = "the files lack" if odd[0] in parameters else "the modules have no place for"
        return f"{which} {len(odd)} names, such as {odd[0]} (transformers converts them on loading)"
    return _misfit(parameters, files)


def _misfit(parameters: Mapping[str, Any], files: Mapping[str, Path]) -> str | None:
    from safetensors import safe_open

    for path in sorted(set(files.values())):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                if name in parameters and shape != tuple(parameters[name].shape):
                    return f"{name} is {shape} in the file and {tuple(parameters[name].shape)} by the config"
    return None


def _places(net: Any, stack: tuple[str, Any]) -> tuple[list[list[_Place]], list[_Place]]:
    """(places of each block, places of everything else), tied parameters once."""
    name, blocks = stack
    per_block: list[list[_Place]] = [[] for _ in blocks]
    rest = []
    for full, _ in net.named_parameters():
        where, _, last = full.rpartition(".")
        place = _Place(net.get_submodule(where), last, full)
        if full.startswith(f"{name}."):
            per_block[int(full[len(name) + 1 :].partition(".")[0])].append(place)
        else:
            rest.append(place)
    return per_block, rest


def _emptied(net: Any, dtype: Any, device: Any) -> Any:
    """Gives every parameter a shape, a dtype and a device, and one element of memory for all of them, which is returned."""
    import torch

    one = torch.zeros(1, dtype=dtype, device=device)
    made: dict[int, Any] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(one.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return one
