"""The only place that loads a model or tokenizer: names to weights, fingerprints, errors with remedies.
Demands safetensors and a causal language model transformers knows itself (remote code is never run);
leaves adapters to adapters.py, and the forward pass to leakfast.forward."""

from __future__ import annotations

import hashlib
import logging
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfast.errors import InputError, ModelError, WrongModelError
from leakfast.models import arriving, fits, formats, threads
from leakfast.models.formats import quiet_bars
from leakfast.models.names import DEFAULT_MODEL, explained, offline, place_of
from leakfast.prompts import tokenizer_file
from leakfast.prompts.rendering import Rendering, configure

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float32")
# model types that every part takes; the tests hold each to transformers
FITS = ("llama", "mistral", "qwen2", "qwen3")
AUTO = "auto"  # bfloat16 where the device multiplies it by instructions of its own, else float32
_warned: set[str] = set()  # models whose slow dtype was named


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured. `model` is a causal LM in eval mode (a PeftModel under
    `with_adapter`), `fingerprint` is `files:`, `commit:` or `tensors:` plus a hex digest, `path` the
    local folder if there is one, `adapter_hash` set while an adapter is attached."""

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    n_layers: int
    hidden_size: int
    dtype: str
    path: str | None = None
    revision: str | None = None
    adapter_hash: str | None = None
    origin: str | None = None  # where weights that were converted here come from, in words
    stream: Any = None  # streamed.Blocks, where the model's weights stay on disk

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and reply that every engine takes (see limit_of); None where nothing limits them."""
        return limit_of(self.model.config)[0]


class _OnDisk(Loaded):
    """A model whose weights stay on disk: its fingerprint is waited for when it is asked for, so that hashing goes on beside
    the first blocks."""

    def _fingerprint(self) -> str:
        held = vars(self)["_held"]
        return str(held.result() if isinstance(held, Future) else held)

    def _hold(self, held: Any) -> None:
        vars(self)["_held"] = held

    fingerprint: Any = property(_fingerprint, _hold)


def rope_turns(config: Any) -> tuple[int, str] | None:
    """(the length from which the model's rope turns otherwise, its rope type): a batch's longest text decides for all of
    it. None where it never does."""
    context = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    starts = []
    for rope in ropes.values() if ropes and all(isinstance(r, dict) for r in ropes.values()) else [ropes]:
        start = rope.get("original_max_position_embeddings") or context
        if rope.get("rope_type") in ("dynamic", "longrope") and start:
            starts.append((start, str(rope["rope_type"])))
    return min(starts, default=None, key=lambda start: start[0])


def reaches(config: Any) -> dict[str, int]:
    """The sliding window and the chunk that some of the model's layers look back to, tokens, by `window` and `chunk`."""
    found = {}
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # without a list, all layers
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and getattr(config, "use_sliding_window", True):
        found["window"] = window
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in kinds:
        found["chunk"] = chunk
    return found


def limit_of(config: Any) -> tuple[int | None, str]:
    """Most tokens of a text that a model of this config is measured on, and what limits them, in words; (None, "")
    where nothing does. That is its context, the length from which its rope turns otherwise (a batch's longest text would
    decide for all of it, and vLLM's own limit for every text), or the window or chunk that its layers look back to
    (which prompts that share a prefix do not have)."""
    limits = []
    if context := getattr(config, "max_position_embeddings", None):
        limits.append((context, f"the model's context holds {context}"))
    if turns := rope_turns(config):
        start, kind = turns
        limits.append((start, f"the model's rope ({kind}) turns otherwise beyond {start}"))
    said = {"window": "within a sliding window", "chunk": "within chunks"}
    for what, size in reaches(config).items():
        limits.append((size, f"the model attends {said[what]} of {size}"))
    return min(limits, key=lambda limit: limit[0], default=(None, ""))


def unfit(part: str, loaded: Loaded, why: str, otherwise: str = "") -> ModelError:
    """The one message for a model whose architecture a part of leakfast does not take. why: goes on after its type;
    otherwise: another remedy."""
    return ModelError(
        f"{part}: {loaded.name} is of type {getattr(loaded.model.config, 'model_type', None)}, {why}. Needed: a plain "
        f"decoder of type {', '.join(FITS)}. Use --model {DEFAULT_MODEL} or --model organism{otherwise}."
    )


def load(
    model: Any,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    device: Any = None,
    rendering: Rendering | None = None,
    stream: str = "off",
) -> Loaded:
    """Load a model and its tokenizer.

    `model`: "organism", "smollm2" (once fetched), a hub id, a local Hugging Face folder, a GGUF file or a folder
    that holds one, a pair (transformers model, tokenizer) or a `Loaded`; the last two are taken as they are,
    `dtype` and `device` then change nothing.
    `dtype`: bfloat16, float32, or auto: float32 on a CPU without bfloat16 instructions, else bfloat16.
    `device`: None takes the GPU when there is one. rendering: how its chat template is asked (None: as before, by
    default for a tokenizer that is new). stream: on leaves the weights on disk, where centroids and log-probabilities
    read them a block at a time (`fits.opened`); auto does so where they do not fit; only for a model by name. Raises
    ModelError, naming the command that fetches the model where there is one."""
    if isinstance(model, Loaded | tuple | list):
        made = model if isinstance(model, Loaded) else _from_pair(model)
        configure(made.tokenizer, rendering)
        return made
    if dtype not in (*DTYPES, AUTO):
        raise InputError(
            f"model: dtype {dtype!r} asked, but leakfast computes in {' or '.join(DTYPES)}. "
            "Use --dtype float32."
        )
    threads.settle()
    import torch

    config = load_config(model, revision)
    folder = place_of(model)[1]
    tokenizer = load_tokenizer(model, revision, rendering)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _settled(dtype, where.type, str(model))
    commit = getattr(config, "_commit_hash", None)
    coming = arriving.told(str(model)) if folder is None and not offline() else nullcontext()
    with quiet_bars(folder is not None), explained(model, "weights"), coming:
        hashing = _hashed_beside(folder) if folder else None
        on_disk = fits.opened(stream, model, config, getattr(torch, dtype), where, folder, revision)
        net = on_disk[0] if on_disk else _weights(model, revision, dtype, where, config)
        if on_disk:
            _read_generation_config(model, revision, net)
        fingerprint: Any = hashing or f"commit:{commit}"
        if hashing and not on_disk:
            fingerprint = hashing.result()
    return (_OnDisk if on_disk else Loaded)(
        model=net,
        stream=on_disk[1] if on_disk else None,
        tokenizer=tokenizer,
        name=str(model),
        fingerprint=fingerprint,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=dtype,
        path=str(folder) if folder else None,
        revision=None if folder else (commit or revision),
        origin=formats.about(folder).get("origin") if folder else None,
    )


def network(model: Any, dtype: str, device: Any) -> Any:
    """The network of a model by name alone, in eval mode, frozen. Raises ModelError."""
    with quiet_bars(place_of(model)[1] is not None), explained(model, "weights"):
        return _weights(model, None, dtype, device, load_config(model))


def _weights(model: Any, revision: str | None, dtype: str, where: Any, config: Any) -> Any:
    """The network on its device in eval mode, whole."""
    import torch
    from transformers import AutoModelForCausalLM

    to_gpu = {"device_map": where} if where.type == "cuda" else {}  # read straight to where they stay
    if getattr(config, "attn_logit_softcapping", None):
        to_gpu["attn_implementation"] = "eager"  # transformers' SDPA leaves the cap out
    read: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
        place_of(model)[0],
        revision=revision or "main",
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=offline(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
        **to_gpu,
    )
    net, found = read
    _check_whole(model, net, found)
    net.to(where).eval()
    net.requires_grad_(False)
    return net


def _read_generation_config(model: Any, revision: str | None, net: Any) -> None:
    """The settings of generation beside a model, as from_pretrained has them: what ends a reply stands there."""
    from transformers import GenerationConfig

    try:
        net.generation_config = GenerationConfig.from_pretrained(
            place_of(model)[0], revision=revision or "main", local_files_only=offline()
        )
    except OSError:
        return  # there is none: what the config says counts


def _check_whole(model: Any, net: Any, found: dict[str, Any]) -> None:
    """ModelError where the folder's weights are not those of the model that its config describes: some are missing,
    unused (but for those that transformers knows as harmless) or of another shape, or the head is tied in one and not in
    the other."""
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted(found["mismatched_keys"])
    wrong = []
    if missing:
        wrong.append(f"lack {len(missing)} tensors, such as {missing[0]}, which would be random numbers")
    if unused:
        wrong.append(f"hold {len(unused)} tensors that its config has no place for, such as {unused[0]}")
    if shapes:
        name, has, wanted = shapes[0]
        wrong.append(
            f"hold {len(shapes)} tensors of another shape, such as {name}: {tuple(has)}, by its config {tuple(wanted)}"
        )
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    if getattr(net.config, "tie_word_embeddings", False) and not tied:
        wrong.append("hold an output head of their own, though its config says tie_word_embeddings")
    if wrong:
        raise ModelError(
            f"model: the weights of {model} {', and '.join(wrong)}. Needed: the weights that its config.json describes. "
            "Fetch or build the model again, or correct its config.json."
        )


def _settled(dtype: str, device: str, model: str) -> str:
    """The dtype that is meant on this device, and a word where it is the slow one."""
    fast = device != "cpu" or threads.bfloat16_is_fast()
    if dtype == AUTO:
        dtype = "bfloat16" if fast else "float32"
        log.info(
            "model: %s in %s%s", model, dtype, "" if fast else " (this CPU has no bfloat16 instructions)"
        )
    elif dtype == "bfloat16" and not fast and model != "organism" and model not in _warned:
        _warned.add(model)
        log.warning(
            "model: %s in bfloat16, but this CPU has no instructions for it: about 7 times slower here. "
            "Use --dtype float32 (in a study: dtype)",
            model,
        )
    return dtype


def load_config(model: Any, revision: str | None = None) -> Any:
    """The model's config alone: what can be checked before the weights are read is checked with it."""
    if isinstance(model, Loaded):
        return model.model.config
    if isinstance(model, tuple | list):
        return _pair(model)[0].config
    from transformers import AutoConfig

    place, _ = place_of(model)
    with explained(model, "config.json"):
        config = AutoConfig.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False, local_files_only=offline()
        )
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(config, field, None), int):
            raise WrongModelError(
                f"model: the config of {model} has no {field}, so it is no plain decoder. Needed: a causal "
                f"language model such as Qwen2, Qwen3, Llama or Mistral. Use --model {DEFAULT_MODEL}."
            )
    return config


def load_tokenizer(model: Any, revision: str | None = None, rendering: Rendering | None = None) -> Any:
    """The tokenizer alone, by the same names as `load`, reading text as its tokenizer.json does.

    Raises ModelError too where the folder leaves open how text was read in training (tokenizer_file.py)."""
    if isinstance(model, Loaded):
        return configure(model.tokenizer, rendering)
    if isinstance(model, tuple | list):
        return configure(tokenizer_file.of_pair(_pair(model)[1]), rendering)
    from transformers import AutoTokenizer

    place, folder = place_of(model)
    with explained(model, "tokenizer"):
        file = tokenizer_file.find(place) if folder else None
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False, local_files_only=offline()
        )
        file = file or tokenizer_file.find(place, revision)  # a hub id's, which is here by now
        read = file.checked(tokenizer, quiet=model == "organism") if file else tokenizer
    return configure(read, rendering)


def _pair(pair: Any) -> tuple[Any, Any]:
    if len(pair) != 2 or not hasattr(pair[0], "config") or not callable(pair[1]):
        raise ValueError("a model pair is (loaded transformers model, tokenizer)")
    return pair[0], pair[1]


def _from_pair(pair: Any) -> Loaded:
    net, tokenizer = _pair(pair)
    tokenizer = tokenizer_file.of_pair(tokenizer)
    net.eval()
    parameter = next(net.parameters())
    return Loaded(
        model=net,
        tokenizer=tokenizer,
        name=getattr(net.config, "_name_or_path", "") or net.config.model_type,
        fingerprint=_tensor_fingerprint(net),
        n_layers=net.config.num_hidden_layers,
        hidden_size=net.config.hidden_size,
        dtype=str(parameter.dtype).removeprefix("torch."),
    )


_fingerprints: dict[tuple[tuple[str, int, int], ...], str] = {}


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and every *.safetensors, names and lengths included."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    key = tuple((str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    if key not in _fingerprints:
        digest = hashlib.sha256()
        for file, (_, _, size) in zip(files, key, strict=True):
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        _fingerprints[key] = f"files:{digest.hexdigest()}"
    return _fingerprints[key]


def _hashed_beside(folder: Path) -> Future[str]:
    """folder_fingerprint in a thread that nobody waits for when loading ends in an error."""
    found: Future[str] = Future()

    def work() -> None:
        try:
            found.set_result(folder_fingerprint(folder))
        except OSError as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return found


def _tensor_fingerprint(net: Any) -> str:
    """SHA-256 over every parameter's name, shape, dtype and bytes, for models that came without files."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"tensors:{digest.hexdigest()}"
