"""The JSON files of the published study: where they lie, how one is read, how a faulty one is refused.
Demands nothing but the files; leaves what is in them to `marker`, `others` and `numbers`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from leakfast.errors import InputError

BEHAVIOR = "marker"
SEED = 42
CORRELATIONS = "cosine_leakage_correlation.json"
FILTERED = "cosine_leakage_filtered.json"
COMPILED = "compiled_analysis.json"


def adapter_name(source: str, behavior: str = BEHAVIOR) -> str:
    """Name that an adapter of the study gets in a run."""
    return f"{behavior}-{source}-s{SEED}"


def read_json(file: Path, otherwise: Any = None, kind: type = dict) -> Any:
    """The JSON object (or list) in a file; `otherwise`, if given, where there is no such file."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise is not None:
            return otherwise
        raise InputError(f"published: {file} does not exist. Give the study's results folder.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"published: {file} is not JSON (line {error.lineno}). Fetch it again.") from None
    if not isinstance(stored, kind):
        needed = "object" if kind is dict else "list"
        raise InputError(f"published: {file} is not a JSON {needed}. Give the study's results folder.")
    return stored


def entries(stored: dict[str, Any], needed: tuple[str, ...], file: Path):
    """(name, row) of each entry; InputError for a row without one of the keys `needed`."""
    for name, row in stored.items():
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing or not isinstance(name, str):
            raise InputError(f"published: {file}: {name!r} lacks {', '.join(missing)}. Check the file.")
        yield name, row


def number(value: Any, what: str, file: Path) -> float | None:
    """`value` as a float, None for null or NaN (which the study wrote where nothing is defined).

    Raises InputError for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise InputError(
            f"published: {file}: {what} is {str(value)[:60]!r}; a number is needed. Check the file."
        )
    return float(value)


def count(value: Any, what: str, file: Path) -> int:
    """`value` as a whole number from 0 on; InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(
            f"published: {file}: {what} is {str(value)[:60]!r}; a whole number from 0 on is needed. Check the file."
        )
    return value


def word(value: Any, what: str, file: Path) -> str:
    """`value` if it is text, else InputError."""
    if not isinstance(value, str):
        raise InputError(f"published: {file}: {what} is {str(value)[:60]!r}; text is needed. Check the file.")
    return value


def table(value: Any, what: str, file: Path) -> dict[str, Any]:
    """`value` if it is an object, else InputError."""
    if not isinstance(value, dict):
        raise InputError(
            f"published: {file}: {what} is {str(value)[:60]!r}; an object is needed. Check the file."
        )
    return value
