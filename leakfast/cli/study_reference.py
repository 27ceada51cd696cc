"""The reference of the study file, made from leakfast/study/config.py: `python -m leakfast.cli.study_reference`
prints it, `--check docs/study.md` compares, `--write docs/study.md` makes the file. Demands that the docstring
of every table there explains its keys (`key: meaning`); leaves the words to it."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel

from leakfast import behaviors
from leakfast.cli import pages
from leakfast.study import config
from leakfast.study.meanings import keys_of, meanings

HEAD = """\
# The study file

Every key that `leakfast run STUDY` and `--study` of other commands read. Made from `leakfast/study/config.py` by `python -m
leakfast.cli.study_reference --write docs/study.md`. A study is TOML; `configs/demo.toml` is a short one. `name`, `sources`
and one table `[behaviors.NAME]` are required, all else has a default. A default of – means that the key is left out, which
the meanings call None. An unknown key is an error that names its line and the key meant.

Personas, question sets, items, pairs and prices are named by a shipped name or by a file: one beside the study file is
found wherever the command is run. NAME is a behavior of the list at the end, or one with a variant: `marker+few`.

A study may be edited and run again: what it names and is not there yet is made. Sources, seeds and behaviors that it names no
longer stay in the run, stand in none of its tables, and are there again once they are named again; a line tells of them.
"""
TAIL = """\
## Defaults of the behaviors

Where a study says nothing, these go before the defaults above.
"""
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("The file's own keys", config.Study),
    ("`[vllm]`", config.VllmConfig),
    ("`[centroids]`", config.CentroidConfig),
    ("`[predictors]`", config.PredictorConfig),
    ("`[trajectory]`", config.TrajectoryConfig),
    ("`[[steering]]`", config.SteeringConfig),
    ("`[behaviors.NAME]`", config.BehaviorConfig),
    ("`[behaviors.NAME.data]`", config.DataConfig),
    ("`[behaviors.NAME.train]`", config.TrainConfig),
    ("`[behaviors.NAME.train.steering]`", config.TrainSteeringConfig),
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
        for key, schema in keys_of(model).items():
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


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Print, check or write the page; 1 when the check fails."""
    return pages.main(argv, reference, "leakfast.cli.study_reference")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
