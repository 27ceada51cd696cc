"""The reference of the study file, made from leakfast/study/config.py: `python -m leakfast.cli.study_reference`
prints it, `--check docs/study.md` compares, `--write docs/study.md` makes the file. Demands that the docstring
of every table there explains its keys (`key: meaning`); leaves the words to it."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

from pydantic import BaseModel

from leakfast import behaviors
from leakfast.cli import pages
from leakfast.study import config

HEAD = """\
# The study file

Every key that `leakfast run STUDY` and `--study` of other commands read. Made from `leakfast/study/config.py` by `python -m
leakfast.cli.study_reference --write docs/study.md`. A study is TOML; `configs/demo.toml` is a short one. `name`, `sources`
and one table `[behaviors.NAME]` are required, all else has a default. A default of – means that the key is left out, which
the meanings call None. An unknown key is an error that names its line and the key meant.

Personas, question sets, items, pairs and prices are named by a shipped name or by a file: one beside the study file is
found wherever the command is run. NAME is a behavior of the list at the end, or one with a variant: `marker+few`.
"""
TAIL = """\
## Defaults of the behaviors

Where a study says nothing, these go before the defaults above.
"""
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("The file's own keys", config.Study),
    ("`[vllm]`", config.VllmConfig),
    ("`[centroids]`", config.CentroidConfig),
    ("`[trajectory]`", config.TrajectoryConfig),
    ("`[behaviors.NAME.data]`", config.DataConfig),
    ("`[behaviors.NAME.train]`", config.TrainConfig),
    ("`[behaviors.NAME.eval]`", config.EvalConfig),
    ("`[behaviors.NAME.judge]`", config.JudgeConfig),
]
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for title, model in SECTIONS:
        summary, said = meanings(model)
        lines = [f"## {title}", "", summary, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, schema in _keys(model).items():
            value = schema.get("default")
            default = "–" if value is None else f"`{json.dumps(value)}`"
            needed = model.model_fields[key].is_required()
            lines.append(_row(f"`{key}`", kind(schema), "required" if needed else default, said[key]))
        parts.append("\n".join(lines) + "\n")
    lines = ["| behavior | what it is | data | train | eval |", "|---|---|---|---|---|"]
    for name in behaviors.names():
        behavior = behaviors.get(name)
        told = [behavior.settings.get(table, {}).items() for table in ("data", "train", "eval")]
        own = ["<br>".join(f"`{key} = {json.dumps(value)}`" for key, value in one) for one in told]
        control = " (a control, never trained)" if behavior.control else ""
        lines.append(_row(f"`{name}`", behavior.description + control, *own))
    return "\n".join([*parts, TAIL, *lines]) + "\n"


def meanings(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """The first words of a table's docstring, and key → meaning.

    A key begins a line or a sentence; several with one meaning are split by commas. ValueError for a key that the
    docstring does not explain."""
    keys = list(_keys(model))
    one = "|".join(keys)
    begins = re.compile(rf"(?:^|(?<=[.)])[ \n])((?:{one})(?:, (?:{one}))*): ", re.MULTILINE)
    summary, *found = begins.split(inspect.cleandoc(model.__doc__ or ""))
    said = {
        key: " ".join(words.split())
        for names, words in zip(found[::2], found[1::2], strict=True)
        for key in names.split(", ")
    }
    if lacking := [key for key in keys if key not in said]:
        raise ValueError(f"{model.__name__}: the docstring does not explain {', '.join(lacking)}")
    return " ".join(summary.split()), said


def kind(schema: dict[str, Any]) -> str:
    """A key's type and bounds in words, from its JSON schema; that it may be left out shows in the default."""
    if "anyOf" in schema:
        return " or ".join(kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if words := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{json.dumps(word)}`" for word in words)
    if schema["type"] == "object":
        return f"table of {kind(schema['additionalProperties'])}"
    if schema["type"] == "array":
        return f"list of {kind(schema['items'])}{', not empty' if schema.get('minItems') else ''}"
    bounds = [f" {sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return schema["type"] + ",".join(bounds).replace(str(2**63), "2^63")


def _keys(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Key → JSON schema, without the keys that are tables: those have sections of their own."""
    found = model.model_json_schema()["properties"].items()
    return {
        k: schema
        for k, schema in found
        if "$ref" not in schema and "$ref" not in schema.get("additionalProperties", ())
    }


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Print, check or write the page; 1 when the check fails."""
    return pages.main(argv, reference, "leakfast.cli.study_reference")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
