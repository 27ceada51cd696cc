"""Training rows that a run holds: `data build`, `train` and `run` of one study share them. Demands a run and what the
rows follow from; leaves making them to the behaviors' builders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leakfast.prompts import chat
from leakfast.storage import layout
from leakfast.train.data import Row, read_rows, write_rows
from leakfast.train.identity import rows_settings_of

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import DataConfig


def file_of(name: str) -> str:
    """Where a run keeps the rows of the adapter `name`, relative to it."""
    return layout.rows(name)


def inputs_of(
    loaded: Any, dtype: str, personas: Sequence[Persona], source: str, seed: int, asked: Any, cfg: DataConfig
) -> str:
    """SHA-256 (hex) of everything the rows follow from. asked: from `data.material`."""
    people = [(p.name, p.kind, p.prompt) for p in personas]
    questions = getattr(asked, "questions", None)
    parts = [loaded.fingerprint, dtype, people, source, seed, questions or asked.hash, rows_settings_of(cfg)]
    if questions:
        parts += chat.reading_of_prompts(loaded.tokenizer, f"data {questions}", personas, questions)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def find(run: Run, name: str, inputs: str) -> list[Row] | None:
    """The rows that the run holds of these inputs, None where there are none."""
    if not (run.path / layout.MANIFEST).is_file() or not run.stage_done(f"data {name}", inputs):
        return None
    return read_rows(run.path / file_of(name))


def keep(run: Run, name: str, inputs: str, rows: Sequence[Row]) -> None:
    """Store the rows in the run under these inputs, in place of others of that name."""
    with run.lock():
        run.create()
        run.add_file(file_of(name), lambda path: write_rows(path, rows))
        run.mark_done(f"data {name}", inputs, files=[file_of(name)])
