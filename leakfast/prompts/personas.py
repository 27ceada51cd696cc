"""Persona sets and question sets: who is asked, and what. Reads the shipped files or the user's
own (TOML, JSON), checks every entry and names its line. Leaves rendering to chat.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from leakfast.errors import InputError
from leakfast.prompts.questions import QuestionSet, QuestionSpec, question_set, read_questions
from leakfast.storage.documents import (
    Document,
    KeyPath,
    did_you_mean,
    find_shipped,
    nearest,
    read_document,
    resource,
)

_SLUG = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RESERVED = {"all", "base", "originals", "pooled"}  # words with a meaning of their own in specs and tables
_PERSONA_KEYS = ("name", "category", "related_to", "prompt", "template_default", "no_system")
Kind = Literal["text", "none", "template-default"]


class _TemplateDefault(str):
    """The system prompt that says: whatever the model's chat template puts there by itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "TEMPLATE_DEFAULT"


TEMPLATE_DEFAULT = _TemplateDefault("template-default")


@dataclass(frozen=True)
class Persona:
    """Who answers. `kind` says what the system message is: the `prompt`, none, or the template's own."""

    name: str
    prompt: str | None
    category: str | None = None
    related_to: tuple[str, ...] = ()
    kind: Kind = "text"

    @property
    def system(self) -> str | None:
        """The prompt; None for no system message; TEMPLATE_DEFAULT (compare with `is`)."""
        return TEMPLATE_DEFAULT if self.kind == "template-default" else self.prompt

    @property
    def is_extra(self) -> bool:
        """Neither in the centering mean nor among the bystanders unless named."""
        return self.category == "extra"


PersonaSpec = str | Path | Sequence[str] | Sequence[Persona] | Mapping[str, str | None]


def load_personas(spec: PersonaSpec = "all", *, among: Sequence[Persona] | None = None) -> list[Persona]:
    """The personas that `spec` means, in its order.

    spec: "all" (the 111), "originals" (the 11), names in a list or split by commas (`qwen_default`
    and `no_persona` too), a .toml or .json file, a mapping name → prompt (None: no system message),
    or Personas. `among` replaces the shipped set for "all", "originals" and names.
    Raises InputError naming the unknown word and the nearest known one, or the lines to fix."""
    if isinstance(spec, Mapping):
        return _from_entries([_mapping_entry(name, prompt) for name, prompt in spec.items()], None)
    if names_file(spec):
        return list(read_personas(spec))  # type: ignore[arg-type]
    if not isinstance(spec, str) and spec and all(isinstance(item, Persona) for item in spec):
        return list(spec)  # type: ignore[arg-type]
    shipped = _shipped_personas()
    ours = shipped if among is None else among
    words = spec.split(",") if isinstance(spec, str) else spec
    names = [word.strip() for word in words if word.strip()] if isinstance(spec, str) else list(spec)
    if not names:
        raise InputError(f"personas: none were named ({spec!r} given). Give names, a file, or `all`.")
    known = {persona.name: persona for persona in [*(p for p in shipped if p.is_extra), *ours]}
    chosen: dict[str, Persona] = {}
    for name in names:
        if name == "all":
            chosen |= {p.name: p for p in ours if among is not None or not p.is_extra}
        elif name == "originals":
            chosen |= {p.name: p for p in ours if p.category == "original"}
        elif name in known:
            chosen[name] = known[name]
        else:
            raise InputError(
                f"persona {name!r}: not one of the {len(known)} known.{did_you_mean(name, known)} "
                "`leakfast personas list` shows the names."
            )
    return list(chosen.values())


def names_file(spec: PersonaSpec | None) -> bool:
    """Whether `spec` is a file, of personas of its own, rather than names."""
    return isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".toml", ".json")))


def told_of(personas: Sequence[Persona]) -> dict[str, dict[str, Any]]:
    """What a run keeps of who was asked, as plain data by name: categories, prompts (null: none of their own), relations."""
    return {
        "categories": {p.name: p.category for p in personas},
        "prompts": {p.name: p.prompt for p in personas},
        "relations": {p.name: list(p.related_to) for p in personas},
    }


def load_questions(spec: QuestionSpec = "eval") -> QuestionSet:
    """The question set that `spec` means: a shipped set's name (eval, train, code, creative, math,
    eval-short, train-short), a file (`own.toml`, or `own.toml:set` where it holds several), or a list of questions.

    Raises InputError naming the unknown set or the line of an empty or repeated question."""
    if isinstance(spec, QuestionSet):
        return spec
    if not isinstance(spec, str | Path):
        return question_set("list", list(spec), None, ())
    name = str(spec)
    file, _, wanted = name.partition(".toml:") if ".toml:" in name else name.partition(".json:")
    if wanted:
        sets = read_questions(file + (".toml" if ".toml:" in name else ".json"))
    elif name.endswith((".toml", ".json")):
        sets = read_questions(name)
        if len(sets) > 1:
            raise InputError(
                f"{name}: holds {len(sets)} question sets, one is needed. "
                f"Add its name: {name}:{next(iter(sets))} (or {', '.join(list(sets)[1:])})."
            )
        wanted = next(iter(sets))
    else:
        sets, wanted = _shipped_questions(), name
    if wanted not in sets:
        raise InputError(
            f"question set {wanted!r}: there is none of that name.{did_you_mean(wanted, sets)} "
            f"Known are {', '.join(sets)}; or give a .toml or .json file."
        )
    return sets[wanted]


def read_personas(path: str | Path) -> tuple[Persona, ...]:
    """Every persona of a file: TOML `[[persona]]` blocks, or JSON: the same blocks under "persona", a
    list of them, or one object name → prompt. Raises InputError with a line for each fault."""
    document = read_document(find_shipped(path))
    data = document.data
    if isinstance(data, dict) and "persona" in data and isinstance(data["persona"], list):
        prefix: KeyPath = ("persona",)
        entries = data["persona"]
        stray = [key for key in data if key != "persona"]
        if stray:
            raise InputError(
                f"{document.where((stray[0],))}: unknown key {stray[0]}. "
                "A persona file holds only [[persona]] blocks; move or delete it."
            )
    elif isinstance(data, list):
        prefix, entries = (), data
    elif isinstance(data, dict) and data and document.path.suffix.lower() == ".json":
        blocks = [_mapping_entry(name, prompt) for name, prompt in data.items()]
        return tuple(_from_entries(blocks, document, [(name,) for name in data]))
    else:
        raise InputError(
            f'{document.path}: holds no personas. Write blocks of `[[persona]]`, `name = "…"`, '
            '`prompt = "You are …"` (shipped example: configs/personas.toml).'
        )
    return tuple(_from_entries(entries, document, [(*prefix, index) for index in range(len(entries))]))


@cache
def _shipped_personas() -> tuple[Persona, ...]:
    return read_personas(resource("personas.toml"))


@cache
def _shipped_questions() -> dict[str, QuestionSet]:
    return read_questions(resource("questions.toml"))


def _mapping_entry(name: str, prompt: Any) -> dict[str, Any]:
    if prompt is None:
        return {"name": name, "no_system": True}
    if prompt is TEMPLATE_DEFAULT:
        return {"name": name, "template_default": True}
    return {"name": name, "prompt": prompt}


def _from_entries(
    entries: Sequence[Any], document: Document | None, keys: Sequence[KeyPath] = ()
) -> list[Persona]:
    """Personas from plain dicts; every fault found is reported in one InputError."""
    faults: list[str] = []
    personas: list[Persona] = []
    first_at: dict[str, str] = {}
    for index, entry in enumerate(entries):
        key = keys[index] if keys else ()
        where = document.where(key) if document else f"persona {index + 1}"
        found = _entry_faults(entry)
        if found:
            faults += [
                f"{document.where((*key, word)) if document else where}: {fault}" for word, fault in found
            ]
            continue
        name = entry["name"]
        if name in first_at:
            faults.append(
                f"{where}: the name {name!r} was given before ({first_at[name]}). Rename one of the two."
            )
            continue
        first_at[name] = where
        kind: Kind = "none" if entry.get("no_system") else "text"
        kind = "template-default" if entry.get("template_default") else kind
        related_to = tuple(entry.get("related_to", ()))
        personas.append(Persona(name, entry.get("prompt"), entry.get("category"), related_to, kind))
    known = {persona.name for persona in personas}
    for index, entry in enumerate(entries):
        for related in entry.get("related_to", ()) if isinstance(entry, dict) and not faults else ():
            if related not in known and not _is_shipped(related, document):
                key = keys[index] if keys else ()
                where = document.where((*key, "related_to")) if document else f"persona {index + 1}"
                faults.append(
                    f"{where}: related_to names {related!r}, which is no persona."
                    f"{did_you_mean(related, known)} Correct or delete it."
                )
    if not entries:
        faults.append(f"{document.path if document else 'personas'}: holds no personas. Add at least one.")
    if faults:
        raise InputError("\n       ".join(faults))
    return personas


def _is_shipped(name: str, document: Document | None) -> bool:
    """Whether `name` is a shipped persona (never asked while the shipped file itself is read)."""
    if document is not None and document.path == resource("personas.toml"):
        return False
    return any(persona.name == name for persona in _shipped_personas())


def _entry_faults(entry: Any) -> list[tuple[str, str]]:
    """(key, fault and remedy) for everything wrong with one block."""
    if not isinstance(entry, dict):
        return [("", "a persona is a block with a name and a prompt. Write both.")]
    faults: list[tuple[str, str]] = []

    def fault(key: str, what: str) -> None:
        faults.append((key, what))

    name = entry.get("name")
    for key in entry:
        if key not in _PERSONA_KEYS:
            close = nearest(key, _PERSONA_KEYS)
            hint = f"Did you mean {close}?" if close else f"Known here: {', '.join(_PERSONA_KEYS)}."
            fault(key, f"unknown key {key}. {hint}")
    if name is None:
        fault("name", 'a persona without a name. Add `name = "…"`.')
    elif not isinstance(name, str) or not _SLUG.fullmatch(name):
        what = "is no slug: lower-case letters, digits, _ and - only."
        fault("name", f"the name {name!r} {what}{_as_slug(name)}")
    elif name in _RESERVED:
        meant = ", ".join(sorted(_RESERVED))
        fault("name", f"the name {name!r} means something else here ({meant}). Rename it.")
    flags = [flag for flag in ("template_default", "no_system") if entry.get(flag)]
    prompt = entry.get("prompt")
    if flags and (prompt is not None or len(flags) > 1):
        given = ", ".join([*flags, *(["prompt"] if prompt is not None else [])])
        fault(flags[0], f"persona {name!r} has {given}: they exclude each other. Keep one.")
    elif not flags and (not isinstance(prompt, str) or not prompt.strip()):
        what = "an empty prompt" if isinstance(prompt, str) else "a prompt that is no text"
        what = "no prompt" if prompt is None else what
        remedy = "Write its system message, or `no_system = true` to send none."
        fault("prompt", f"persona {name!r} has {what}. {remedy}")
    category = entry.get("category")
    if category is not None and (not isinstance(category, str) or not category.strip()):
        remedy = "Write one, or delete the line."
        fault("category", f"persona {name!r}: the category is a word in quotes. {remedy}")
    related = entry.get("related_to", [])
    if not isinstance(related, list | tuple) or not all(isinstance(item, str) for item in related):
        remedy = 'Write `related_to = ["…"]`.'
        fault("related_to", f"persona {name!r}: related_to is a list of names. {remedy}")
    return faults


def _as_slug(name: Any) -> str:
    slug = re.sub(r"[^a-z0-9_-]+", "_", str(name).strip().lower()).strip("_-")
    return f" Write {slug}." if slug else " Choose another."
