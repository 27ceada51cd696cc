"""Weights in other formats to a Hugging Face folder: GGUF files, dequantized once and kept.
Demands the packages gguf and accelerate (extra `gguf`); leaves loading the folder to models.py.

The tokenizer is built from the file's vocabulary and merges as transformers does it, and split as the file says
in `tokenizer.ggml.pre`, which transformers 5.19 does not read: SmolLM2's rule of single digits is lost there, and
a line break or several spaces before a digit become other tokens than the model was trained with."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import ModelError, WrongModelError, optional
from leakfast.storage.disk import explained, file_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("leakfast.models")

ABOUT = "leakfast_model.json"  # beside the weights: where they come from
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre → how text is cut before the merges: a pattern, "digits" (every digit alone, then GPT-2's
# pattern), or "gpt2" (that pattern alone). Names and rules: llama.cpp's list of pre-tokenizers.
_PRE = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "jina-v2-code"), "gpt2"),
    **dict.fromkeys("smollm starcoder refact command-r codeshell exaone minerva".split(), "digits"),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen"),
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"),
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    ),
}


def models_dir() -> Path:
    """Where fetched and converted models are kept: $LEAKFAST_MODELS, by default ~/.cache/leakfast/models."""
    given = os.environ.get("LEAKFAST_MODELS")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leakfast" / "models"


def gguf_of(path: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one of a folder without config.json; None for anything
    else. Raises WrongModelError for a folder that holds several."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise WrongModelError(
            f"model: {path} holds {len(found)} GGUF files. Needed: one. Use --model {found[0]} to choose."
        )
    return found[0] if found else None


def about(folder: str | Path) -> dict[str, Any]:
    """What ABOUT says of a folder's weights; empty where there is none."""
    path = Path(folder) / ABOUT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def from_gguf(file: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made under models_dir() the first time and found there after.

    The folder is named by the file's SHA-256, so another file of the same name is another model."""
    digest = file_hash(file)
    folder = models_dir() / f"{file.stem}-{digest[:16]}"
    if not (folder / ABOUT).is_file():
        log.info("models: %s is dequantized into %s, once", file, folder)
        convert(file, folder, {"name": file.stem, "sha256": digest})
    return folder


def convert(file: Path, folder: Path, said: dict[str, Any]) -> Path:
    """Dequantize `file` into `folder` (config.json, model.safetensors in bfloat16, tokenizer, chat template,
    ABOUT with `said`), whole or not at all.

    Equal to transformers' own reading (`from_pretrained(gguf_file=…)`) rounded once to bfloat16; a tied head is
    not written twice. Raises ModelError for a file that is damaged, of an architecture transformers cannot read
    from GGUF, or with a tokenizer whose cuts are not known here."""
    _check_installed(file)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with explained(folder):
        temporary.mkdir(parents=True)
    try:
        pre, kind, types = _described(file)
        own = file.parent / "tokenizer.json"
        with quiet_bars(True):
            _write_tokenizer(file, temporary, pre, kind, own if own.is_file() else None)
            _write_weights(file, temporary)
        origin = f"dequantized from {'/'.join(types)} ({file.name})"
        text = json.dumps({**said, "origin": origin, "pre_tokenizer": pre}, indent=1, ensure_ascii=False)
        with explained(folder):
            (temporary / ABOUT).write_text(text + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


class quiet_bars:
    """No bars of transformers' own while local weights load (a download keeps them); then as before."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.were_on = self.quiet and logging.is_progress_bar_enabled()
        if self.were_on:
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        if self.were_on:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_installed(file: Path) -> None:
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise ModelError(
            f"model: {file.name} is a GGUF file, and {' and '.join(absent)} is not installed. Needed: the package "
            "that reads it. Type: pip install 'leakfast[gguf]'"
        )


def _described(file: Path) -> tuple[str, str, list[str]]:
    """(pre-tokenizer, kind of tokenizer, the types its matrices are stored in, most first) of a GGUF file."""
    from collections import Counter

    with optional(
        "gguf", f"model: {file.name} is a GGUF file, and reading it needs", "pip install 'leakfast[gguf]'"
    ):
        from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {
            k: reader.fields[k].contents()
            for k in reader.fields
            if k.startswith("tokenizer.ggml.")
            and k not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
        }
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(
            f"model: {file} cannot be read as GGUF ({error}). Needed: a whole file. Copy or fetch it again."
        ) from error
    stored = Counter(t.tensor_type.name for t in reader.tensors if len(t.shape) > 1)
    return (
        str(fields.get("tokenizer.ggml.pre", "")),
        str(fields.get("tokenizer.ggml.model", "")),
        [name for name, _ in stored.most_common()],
    )


def pre_tokenizer(pre: str) -> Any:
    """tokenizers' pre-tokenizer of a name in `tokenizer.ggml.pre`; KeyError for one that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    rule = _PRE[pre]
    if rule == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = rule == "digits"
    first = pre_tokenizers.Digits(True) if digits else pre_tokenizers.Split(Regex(rule), "isolated")
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits)]
    )


def _write_tokenizer(file: Path, folder: Path, pre: str, kind: str, own: Path | None) -> None:
    from transformers import AutoTokenizer

    if kind == "gpt2" and pre not in _PRE and own is None:
        raise ModelError(
            f"model: {file.name} cuts text by the rule {pre or '(none named)'!r} before tokenizing, which is not known "
            f"here, so its token ids could be wrong. Needed: one of {', '.join(sorted(_PRE))}. Put the model's own "
            "tokenizer.json beside the file, or use the original weights."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model: the tokenizer of {file.name} cannot be read ({error}). Needed: a GGUF file of an architecture "
            "that transformers reads. Use the original weights."
        ) from error
    inner: Tokenizer = tokenizer.backend_tokenizer
    if kind == "gpt2" and own is None:
        inner.pre_tokenizer = pre_tokenizer(pre)
    with explained(folder):
        tokenizer.save_pretrained(folder)
        if own is not None:
            shutil.copyfile(own, folder / "tokenizer.json")


def _write_weights(file: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    try:
        net = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model: the weights of {file.name} cannot be read ({error}). Needed: a GGUF file of an architecture "
            "that transformers reads. Use the original weights."
        ) from error
    config = net.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"dtype": "bfloat16", "architectures": [type(net).__name__]}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    state, seen = {}, set()
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() in seen:  # a tied head
            continue
        seen.add(tensor.data_ptr())
        state[name] = tensor.to(torch.bfloat16).contiguous()
    with explained(folder):
        save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8"
        )
        net.generation_config.save_pretrained(folder)
