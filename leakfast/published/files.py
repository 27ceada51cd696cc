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
            raise wrong(file, f"{name!r} lacks {', '.join(missing)}")
        yield name, row


def wrong(file: Path, what: str, remedy: str = "Check the file.") -> InputError:
    """The error of a file that holds something else."""
    return InputError(f"published: {file}: {what}. {remedy}")


def _needed(fits: bool, needed: str, value: Any, what: str, file: Path) -> Any:
    if not fits:
        raise wrong(file, f"{what} is {str(value)[:60]!r}; {needed} is needed")
    return value


def number(value: Any, what: str, file: Path) -> float | None:
    """`value` as a float, None for null or NaN (which the study wrote where nothing is defined).

    Raises InputError for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
    return float(_needed(fits, "a number", value, what, file))


def count(value: Any, what: str, file: Path) -> int:
    """`value` as a whole number from 0 on; InputError for anything else."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return _needed(fits, "a whole number from 0 on", value, what, file)


def word(value: Any, what: str, file: Path) -> str:
    """`value` if it is text, else InputError."""
    return _needed(isinstance(value, str), "text", value, what, file)


def table(value: Any, what: str, file: Path) -> dict[str, Any]:
    """`value` if it is an object, else InputError."""
    return _needed(isinstance(value, dict), "an object", value, what, file)
