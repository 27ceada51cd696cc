"""What training rows follow from, so that `data build`, `train`, `sweep` and `run` of one study share them. Leaves making
them to the behaviors' builders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas
from leakfast.storage.disk import file_hash, hash_of
from leakfast.train import chats
from leakfast.train.groups import DEFAULT_ASSISTANT, own_assistant
from leakfast.train.recipe import rows_settings_of

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig


def inputs_of(
    loaded: Any, dtype: str, personas: Sequence[Persona], source: str, seed: int, asked: Any, cfg: DataConfig
) -> str:
    """SHA-256 (hex) of everything the rows follow from. asked: from `data.material`."""
    people = [(p.name, p.kind, p.prompt) for p in personas]
    questions = getattr(asked, "questions", None)
    parts = [loaded.fingerprint, dtype, people, source, seed, questions or asked.hash, rows_settings_of(cfg)]
    if questions:
        parts += chat.reading_of_prompts(loaded.tokenizer, f"data {questions}", personas, questions)
    parts += [file_hash(path) for path in (cfg.rows, cfg.benign_rows) if path is not None]
    if cfg.benign_rows is not None and chats.SOURCE.encode() in Path(cfg.benign_rows).read_bytes():
        parts.append("{source} in benign rows")  # earlier versions taught it as it stands
    own, (shipped,) = own_assistant(personas), load_personas([DEFAULT_ASSISTANT])
    if cfg.default_assistant and own is not None and own.prompt != shipped.prompt:
        parts.append("the study's own assistant")  # earlier versions took the shipped one
    return hash_of(*parts)
