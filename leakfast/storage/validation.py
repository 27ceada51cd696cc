"""What pydantic finds wrong in a file or a flag, in words: where it stands, what was given, what to write instead.
Demands pydantic's own findings; checks nothing itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel

from leakfast.storage.likeness import nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

    from leakfast.storage.documents import Document, KeyPath

_SHOULD_BE = "Input should be "


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> str:
    """One message for all findings in a document that should be a `model`: a line for each value, with its line in the file
    and what to write instead."""
    found: dict[KeyPath, list[Any]] = {}
    for finding in error.errors(include_url=False):
        found.setdefault(_real_path(finding["loc"], document.data, model), []).append(finding)
    # where a value may be of several kinds and goes into one of them, only what is wrong inside is told
    ends = [loc for loc in found if not any(other[: len(loc)] == loc for other in found if other != loc)]
    return "\n       ".join(
        f"{document.where(_present(loc, document.data))}: {_told(loc, found[loc], model)}" for loc in ends
    )


def reason(findings: Iterable[Any]) -> str:
    """What is wrong with one value; what each of the kinds that it may be of asks for is one sentence."""
    said = list(dict.fromkeys(finding["msg"].removeprefix("Value error, ") for finding in findings))
    if all(words.startswith(_SHOULD_BE) for words in said):
        said = [_SHOULD_BE + " or ".join(words.removeprefix(_SHOULD_BE) for words in said)]
    words = "; or: ".join(said)
    return words[:1].lower() + words[1:]


def _told(loc: KeyPath, findings: list[Any], model: type[BaseModel]) -> str:
    """The findings of one value: what is wrong and what to do."""
    name, first = ".".join(map(str, loc)), findings[0]
    if first["type"] == "extra_forbidden":
        known = list(_fields(_at(loc[:-1], model)))
        close = nearest(loc[-1], known)
        return f"unknown key {name}. " + (
            f"Did you mean {close}?" if close else f"Known here: {', '.join(known)}."
        )
    if first["type"] == "missing":
        field = _fields(_at(loc[:-1], model))[str(loc[-1])].annotation
        if _model_of(field) is None:
            return f"{name} is missing. Add a line `{loc[-1]} = …`."
        keys = ".".join(part for part in loc if isinstance(part, str))
        header = (
            f"[[{keys}]]" if get_origin(field) is list else f"[{keys}{'' if _is_model(field) else '.NAME'}]"
        )
        return f"{name} is missing. Add a table `{header}`."
    given = first.get("input")
    shown = ":" if isinstance(given, dict | list) else f" is {given!r}:"
    needed = "a table is needed" if first["type"] == "model_type" else reason(findings)
    return f"{name}{shown} {needed}. Correct that line."


def _real_path(loc: KeyPath, data: Any, model: type[BaseModel]) -> KeyPath:
    """pydantic's location without the names that it gives to the kinds a value may be of: those are neither in `data` nor
    keys of the table there."""
    out: KeyPath = ()
    for part in loc:
        if _present((part,), data):
            data = data[part]
        elif part not in _fields(_at(out, model)):
            continue
        out = (*out, part)
    return out


def _present(loc: KeyPath, data: Any) -> KeyPath:
    """The part of `loc` that stands in the file."""
    for place, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        if not inside and not (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            return loc[:place]
        data = data[part]
    return loc


def _at(loc: KeyPath, model: type[BaseModel]) -> type[BaseModel] | None:
    """The model of the table under `loc`; None where no table is meant to be."""
    at: type[BaseModel] | None = model
    for part in loc:
        if part in _fields(at):
            at = _model_of(_fields(at)[str(part)].annotation)
        # else a name of its own, or a place in a list: each of these is of the model that the whole is of
    return at


def _fields(model: type[BaseModel] | None) -> dict[str, Any]:
    return model.model_fields if model else {}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a table, of those in a list, or of those under names of their own."""
    if _is_model(annotation):
        found: type[BaseModel] = annotation
        return found
    return next((one for one in map(_model_of, get_args(annotation)) if one), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
