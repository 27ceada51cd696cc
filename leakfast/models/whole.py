"""A fully trained model in an adapter's place: a checkpoint folder, as transformers loads it, measured as an arm of the base
it was trained from. Demands config.json, safetensors and the tokenizer's files; leaves LoRA to adapters.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, WrongAdapterError
from leakfast.models import loading
from leakfast.models.adapter_structure import CONFIG
from leakfast.prompts.templates import carries_another

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

log = logging.getLogger(__name__)

MODEL_CONFIG, SUFFIX = "config.json", ".safetensors"
BEYOND = "weights of its own in every layer (a whole model)"
# keys of config.json that a training leaves as they were: with others, equal states are no equal model
_SAME = """
    model_type num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim
    vocab_size hidden_act rms_norm_eps rope_parameters attention_bias mlp_bias sliding_window layer_types
""".split()
_LOOSE = ("truncation", "padding")  # of tokenizer.json: how a training batched its rows


def is_whole(folder: str | Path) -> bool:
    """Whether the folder holds a whole model, not an adapter."""
    folder = Path(folder)
    return (
        not (folder / CONFIG).is_file()
        and (folder / MODEL_CONFIG).is_file()
        and any(folder.glob(f"*{SUFFIX}"))
    )


def whole_hash(folder: str | Path) -> str:
    """SHA-256 (hex): the model's fingerprint, over config.json and every safetensors file (loading.folder_fingerprint)."""
    return loading.folder_fingerprint(Path(folder)).partition(":")[2]


def check_same_kind(loaded: Loaded, folder: str | Path) -> None:
    """The checkpoint is a model of the base's architecture, vocabulary, tokenizer and chat template, so that the base's
    prompts are its own. Raises AdapterError naming what differs, ModelError for a folder that cannot be read."""
    found = _unlike_configs(loading.load_config(str(folder)), loaded.model.config)
    if not found:
        found = _unlike_tokenizers(Path(folder), loaded.tokenizer)
    if found:
        raise WrongAdapterError(
            f"checkpoint: {folder} differs from {loaded.name} in {'; '.join(found)}. Needed: a model that was trained from "
            "this base, with its tokenizer and chat template. Give the base it was made of with --base (in a study: model), "
            "or put the base's tokenizer files beside its weights where they were changed by mistake."
        )


def _unlike_configs(mine: Any, base: Any) -> list[str]:
    its, wanted = mine.to_dict(), base.to_dict()
    unlike = [key for key in _SAME if its.get(key) != wanted.get(key)]
    unlike = ["model_type"] if "model_type" in unlike else unlike
    words = {"vocab_size": "its vocabulary (vocab_size"}
    return [
        f"{words.get(key, f'its architecture ({key}')}: {its.get(key)}, the base has {wanted.get(key)})"
        for key in unlike[:3]
    ]


def _unlike_tokenizers(folder: Path, base: Any) -> list[str]:
    found, file = [], folder / "tokenizer.json"
    wanted = _pipeline(base)
    if wanted is None or not file.is_file() or _told(file.read_text(encoding="utf-8")) != wanted:
        mine = loading.load_tokenizer(str(folder))
        ours, theirs = base.get_vocab(), mine.get_vocab()
        if ours != theirs:
            other = min(set(ours.items()) ^ set(theirs.items()))[0]
            found.append(
                f"its tokenizer ({len(theirs)} entries, the base has {len(ours)}; such as {other!r})"
            )
        elif _pipeline(mine) != wanted:
            found.append("its tokenizer (the same entries, but text is read otherwise)")
    return found + ["its chat template"] * carries_another(base, folder, bare=True)


def _pipeline(tokenizer: Any) -> Any:
    """What a tokenizer's tokenizer.json says; None of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else _told(backend.to_str())


def _told(text: str) -> Any:
    """tokenizer.json but for how rows are batched; None where it is none."""
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return {key: value for key, value in told.items() if key not in _LOOSE}


@contextmanager
def put_in(loaded: Loaded, folder: str | Path) -> Iterator[Loaded]:
    """The checkpoint in the base's place for the length of the block: loaded beside it, in its dtype and on its device,
    under the base's tokenizer, whose rendering is the study's, and its settings of generation. The base
    is not touched, and stays in memory: two models are there at once. Raises AdapterError, ModelError."""
    if loaded.stream is not None:
        raise AdapterError(
            f"checkpoint: {folder} is a whole model, but {loaded.name} is read from disk block by block. Needed: both in "
            "memory. Use --stream off."
        )
    digest = whole_hash(folder)
    net = loading.network(str(folder), loaded.dtype, loaded.device)
    net.generation_config = loaded.model.generation_config  # replies end as the base's do
    log.info("checkpoint %s: loaded in the base's place (%s)", Path(folder).name, loaded.dtype)
    yield replace(loaded, model=net, adapter_hash=digest)
