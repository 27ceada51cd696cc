"""What each setting means, from the docstring of its table in study/config.py: the one place that says it, for docs/study.md
and for the options of the command line. Leaves the words to the docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel


def keys_of(table: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Key → JSON schema, without the keys that are tables themselves."""
    return {
        key: schema
        for key, schema in table.model_json_schema()["properties"].items()
        if not any(
            "$ref" in one
            for one in (
                schema,
                *(schema.get(n, ()) for n in ("additionalProperties", "items")),
                *schema.get("anyOf", ()),
            )
        )
    }


def meanings(table: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """The first words of a table's docstring, and key → meaning.

    A key begins a line or a sentence; several with one meaning are split by commas. ValueError for a key that the
    docstring does not explain."""
    keys = list(keys_of(table))
    one = "|".join(keys)
    begins = re.compile(rf"(?:^|(?<=[.)])[ \n])((?:{one})(?:, (?:{one}))*): ", re.MULTILINE)
    summary, *found = begins.split(inspect.cleandoc(table.__doc__ or ""))
    said = {
        key: " ".join(words.split())
        for names, words in zip(found[::2], found[1::2], strict=True)
        for key in names.split(", ")
    }
    if lacking := [key for key in keys if key not in said]:
        raise ValueError(f"{table.__name__}: the docstring does not explain {', '.join(lacking)}")
    return " ".join(summary.split()), said
