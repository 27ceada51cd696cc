"""What attaching an adapter does to a model, decided from its config and its file's header before anything runs.
Demands a peft LoRA folder and a loaded model, of which peft makes an empty copy; leaves attaching to adapters.py."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, WrongAdapterError

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file

# keys of a LoRA config that only name the adapter, steer its training, or say where plain matrices lie and their scale
_PLAIN = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_rslora
    """.split()
)
# keys that add something else, which peft's own layers compute beside the base's
_LIVE = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA layers",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained rows of an embedding",
    "ensure_weight_tying": "ensure_weight_tying",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: matrices alone are set
_KEPT = 32  # empty models' answers
_known: dict[tuple[Any, ...], _Expected] = {}


@dataclass(frozen=True)
class Structure:
    """What an adapter does to its base. ranks: each layer with LoRA matrices, by its name in the base, and their rank;
    beyond: in words, what there is besides LoRA matrices of linear layers in the blocks (empty: plain LoRA, which is
    W + scale·B·A); writes: the base's own parameters that peft overwrites when it loads the file; head_lora: some of the
    matrices are the output head's."""

    ranks: Mapping[str, int]
    beyond: tuple[str, ...]
    writes: tuple[str, ...]
    head_lora: bool

    @property
    def plain(self) -> bool:
        return not self.beyond


@dataclass(frozen=True)
class _Expected:
    """What peft makes of a config: shapes of the tensors it saves by name, the base's embeddings that it may save
    beside them (name in the file → (parameter of the base, shape)), all modules, layers that are not plain, in words,
    and whether the head has matrices."""

    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, tuple[str, tuple[int, ...]]]
    modules: frozenset[str]
    other: tuple[str, ...]
    head_lora: bool


def structure_of(loaded: Loaded, folder: str | Path) -> Structure:
    """The structure of an adapter of this model. Raises AdapterError where config and file do not name the same
    modules, do not fit the model, or hold what is not measured."""
    config = config_of(folder)
    _refuse(folder, config)
    expected = _expected(loaded, folder, config)
    shapes = _header(folder)
    _check_same(loaded, folder, config, expected, shapes)
    beyond = [word for key, word in _LIVE.items() if config.get(key)] + list(expected.other)
    writes = tuple(expected.stored[key][0] for key in shapes if key in expected.stored)
    if writes and _differs(loaded, folder, expected):
        beyond.append(f"weights of its own for {', '.join(writes)}")
    ranks = {
        key.removeprefix(PREFIX).partition(".lora_")[0]: shape[0]
        for key, shape in shapes.items()
        if ".lora_A." in key or key.endswith(".lora_embedding_A")
    }
    return Structure(ranks, tuple(beyond), writes, expected.head_lora)


def file_in(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not Path(folder).is_dir():
        raise WrongAdapterError(
            f"adapter: there is no folder {folder}. Needed: a peft adapter folder with {CONFIG} and {WEIGHTS}. "
            "Check the path, or make one with: leakfast train"
        )
    if not path.is_file():
        raise WrongAdapterError(
            f"adapter: {folder} holds no {name}. Needed: a peft adapter folder with {CONFIG} and {WEIGHTS}. "
            "Check the path, or make one with: leakfast train"
        )
    return path


def config_of(folder: str | Path) -> dict[str, Any]:
    """The adapter's config, of LoRA without trained biases. Raises AdapterError."""
    path = file_in(folder, CONFIG)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"adapter: {path} is not JSON ({error}). Copy or train the adapter again."
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("bias", "none") != "none":
        raise WrongAdapterError(
            f"adapter: {folder} is of type {kind} with bias {config.get('bias') if kind else None!r}. "
            'Needed: LoRA with bias "none", which can be taken off again. Train one with: leakfast train'
        )
    return config


def _refuse(folder: str | Path, config: Mapping[str, Any]) -> None:
    """AdapterError for what is measured by no backend."""
    from peft import LoraConfig

    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise WrongAdapterError(
            f"adapter: {folder} has init_lora_weights {start!r}, which changes the base's weights too (PiSSA, OLoRA, "
            "CorDA, LoftQ and LoRA-GA do): B·A alone on the base is not the model that was trained. Needed: a plain LoRA "
            "adapter. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=<the adapter as it was "
            "before training>), or train one with: leakfast train"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise WrongAdapterError(
            f"adapter: {folder} is made for task {config['task_type']}. Needed: an adapter of a causal language model "
            f"(task_type CAUSAL_LM in its {CONFIG}). Train one with: leakfast train"
        )
    fields = LoraConfig.__dataclass_fields__
    odd = [key for key in config if key in fields and key not in _PLAIN | _LIVE.keys() and config[key]]
    unknown = [key for key in config if key not in fields and config[key] not in (None, False, [], {}, "")]
    if odd or unknown:
        what = f"{' and '.join(odd)}, which leakfast does not measure"
        if not odd:
            what = f"{' and '.join(unknown)}, which this peft does not know and would leave out"
        raise WrongAdapterError(
            f"adapter: {folder} has {what}. Needed: LoRA of linear layers, DoRA, modules_to_save or trained token rows. "
            f"Train one with: leakfast train{'' if odd else ', or install a newer peft'}"
        )


def _expected(loaded: Loaded, folder: str | Path, config: Mapping[str, Any]) -> _Expected:
    """What peft makes of the config on an empty model of this kind; known again for the like."""
    net = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    names = {"base_model_name_or_path", "revision", "peft_version"}
    said = {key: config[key] for key in config.keys() - names}
    key = (type(net), net.config.to_json_string(), json.dumps(said, sort_keys=True))
    if key not in _known:
        if len(_known) >= _KEPT:
            _known.pop(next(iter(_known)))
        _known[key] = _made(net, folder)
    return _known[key]


def _made(net: Any, folder: str | Path) -> _Expected:
    import torch
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.save_and_load import get_peft_model_state_dict
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        empty = type(net)(copy.deepcopy(net.config))
    names = {id(module): name for name, module in empty.named_modules()}
    ends = (empty.get_input_embeddings(), empty.get_output_embeddings())
    own = {names[id(m)]: {n: tuple(p.shape) for n, p in m.named_parameters()} for m in ends if m is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says them again when it attaches
            wrapped = PeftModel(empty, LoraConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
            saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WrongAdapterError(
            f"adapter: peft cannot make the layers of {folder} in a {type(net).__name__}: {reason} Needed: an adapter of "
            f"this model. Give --model the one it was trained on, correct its {CONFIG}, or train it again."
        ) from error
    stored, other = {}, []
    for name, shapes in own.items():
        module = empty.get_submodule(name)
        lora = isinstance(module, LoraLayer)
        if lora or id(module) in names:  # else peft keeps the base's own beside it and loads none
            inside = "base_layer." if lora else ""
            stored.update({f"{PREFIX}{name}.{inside}{n}": (f"{name}.{n}", s) for n, s in shapes.items()})
    for name, module in empty.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            if name in own or type(base) not in (torch.nn.Linear, Conv1D):
                other.append(f"LoRA of {name if name in own else type(base).__name__}")
    modules, lora_head = frozenset(names.values()), isinstance(empty.get_output_embeddings(), LoraLayer)
    return _Expected({k: tuple(t.shape) for k, t in saved.items()}, stored, modules, tuple(other), lora_head)


def _header(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the adapter's file."""
    from safetensors import SafetensorError, safe_open

    path = file_in(folder, WEIGHTS)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"adapter: {path} cannot be read ({error}). Copy or train the adapter again."
        ) from error


def _check_same(
    loaded: Loaded,
    folder: str | Path,
    config: Mapping[str, Any],
    expected: _Expected,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """The file holds exactly the tensors that peft makes of the config, in their shapes."""
    targets = config.get("target_modules") or []
    targets = [] if isinstance(targets, str) else targets
    absent = {t for t in targets if not any(n == t or n.endswith(f".{t}") for n in expected.modules)}
    missing = sorted(expected.shapes.keys() - shapes.keys())
    extra = sorted(shapes.keys() - expected.shapes.keys() - expected.stored.keys())
    absent |= {m for key in extra if (m := _module(key)) not in expected.modules}
    wanted = {**expected.shapes, **{key: shape for key, (_, shape) in expected.stored.items()}}
    misfits = [_misfit(k, s, wanted[k]) for k, s in shapes.items() if k in wanted and s != wanted[k]]
    found = []
    if absent:
        found.append(f"no module {', '.join(sorted(absent)[:3])}")
    if missing:
        found.append(
            f"the file lacks {len(missing)} of the {len(expected.shapes)} tensors that its config asks for, such as "
            f"{missing[0]}"
        )
    if extra:
        found.append(
            f"the file holds {len(extra)} tensors that its config does not name, such as {extra[0]} (peft would leave "
            "them out, vLLM would not)"
        )
    found += misfits[:3]
    if found:
        raise WrongAdapterError(
            f"adapter: {folder} does not fit {loaded.name}: {'; '.join(found)}. Needed: an adapter of this model whose "
            f"{WEIGHTS} and {CONFIG} name the same modules. Give --model the one it was trained on "
            f"({config.get('base_model_name_or_path') or f'{CONFIG} does not say which'}), or copy or train it again."
        )


def _module(key: str) -> str:
    """The module that a tensor of the file names."""
    name = key.removeprefix(PREFIX).partition(".lora_")[0]
    return name.removesuffix(".weight").removesuffix(".bias").removesuffix(".base_layer")


def _misfit(key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    name, _, side = key.removesuffix(".weight").removeprefix(PREFIX).rpartition(".lora_")
    if side in ("A", "B") and len(shape) == len(wanted) == 2:
        rank, width = (0, 1) if side == "A" else (1, 0)
        if shape[width] != wanted[width]:
            return f"{name} is {wanted[width]} wide, its lora_{side} {shape[width]}"
        return f"{name} has rank {shape[rank]}, {CONFIG} says {wanted[rank]}"
    said = f"{key.removeprefix(PREFIX)} is {shape} in the file and {wanted} here"
    embedding = len(shape) == 2 and any(word in key for word in ("embed", "lm_head"))
    return said + (", as after adding tokens before training" if embedding else "")


def _differs(loaded: Loaded, folder: str | Path, expected: _Expected) -> bool:
    """Whether a stored embedding is another one than the base's, in the base's dtype, bit for bit."""
    import torch
    from safetensors import safe_open

    with safe_open(str(file_in(folder, WEIGHTS)), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key not in expected.stored:
                continue
            mine = loaded.model.get_parameter(expected.stored[key][0]).detach()
            its = file.get_tensor(key).to(mine.device, mine.dtype)
            if not torch.equal(its.view(torch.uint8), mine.contiguous().view(torch.uint8)):
                return True
    return False


@contextmanager
def unchanged(model: Any, writes: tuple[str, ...] = (), what: str = "the adapter") -> Iterator[None]:
    """The model's weights after the block are those before it, bit for bit. writes: names of parameters that the block
    overwrites, which are put back from copies. Raises AdapterError where others have changed; an error inside goes
    first."""
    import torch

    before = _sums(model)
    copies = {name: model.get_parameter(name).detach().clone() for name in writes}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, copied in copies.items():
                model.get_parameter(name).copy_(copied)
    after = _sums(model)
    touched = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if touched:
        raise AdapterError(
            f"adapter: {what} changed {len(touched)} weights of the base for good, such as {min(touched)}, so nothing "
            "after it would be right. Needed: an adapter that can be taken off again. Run the others without it."
        )


def _sums(model: Any) -> dict[str, bytes]:
    """Name → sums over pieces of a tensor's bits, read once: a change anywhere shows."""
    import torch

    found: dict[str, bytes] = {}
    seen: dict[tuple[int, int], str] = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        flat = flat.clone() if flat.storage_offset() else flat
        place = (tensor.data_ptr(), tensor.numel())
        if place in seen:
            found[name] = f"as {seen[place]}".encode()
            continue
        seen[place] = name
        size = next(n for n in (8, 4, 2, 1) if flat.numel() * flat.element_size() % n == 0)
        bits = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])
        piece = next(n for n in (4096, 512, 64, 8, 1) if bits.numel() % n == 0)
        found[name] = bits.view(-1, piece).sum(0, dtype=torch.int64).cpu().numpy().tobytes()
    return found
