"""Question sets: what is asked, read from a file or made of another set with words behind each question. Demands
nothing heavy; leaves names of shipped sets to personas.py."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leakfast.errors import InputError
from leakfast.prompts.conversation import Question, around, described
from leakfast.storage.documents import Document, KeyPath, did_you_mean, find_shipped, read_document

_NAME = re.compile(r"\w[\w .+-]{0,99}")
_SET_KEYS = ("description", "questions", "of", "suffix", "first", "turns", "prefill")


@dataclass(frozen=True)
class QuestionSet:
    """Questions asked as user turns, in order; a question is known by its index."""

    name: str
    questions: tuple[str, ...]
    description: str = ""

    def __len__(self) -> int:
        return len(self.questions)


QuestionSpec = str | Path | Sequence[str] | QuestionSet


def read_questions(path: str | Path) -> dict[str, QuestionSet]:
    """Every question set of a file: TOML or JSON `sets.<name>.questions` (or `of` and `suffix`: another set's
    questions with words behind each), one top-level `questions` list (the set is then named after the file),
    or a bare JSON list. A set may have `turns` before each of its questions and a `prefill` of the reply (see
    conversation.around). InputError names the lines."""
    document = read_document(find_shipped(path))
    data, name = document.data, document.path.stem
    if isinstance(data, list):
        return {name: question_set(name, data, document, ())}
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        made = question_set(name, data["questions"], document, ("questions",), data.get("description"))
        return {name: _surrounded(made, data, f"{document.path}")}
    sets = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(sets, dict) or not sets:
        raise InputError(
            f'{document.path}: holds no questions. Write `questions = ["…", …]`, '
            "or `[sets.NAME]` tables with such a list (shipped example: configs/questions.toml)."
        )
    out: dict[str, QuestionSet] = {}
    faults: list[str] = []
    for name, block in sets.items():
        key: KeyPath = ("sets", name)
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{document.where(key)}: the set's name {name!r} becomes a folder. Needed: letters, digits, spaces, dots, dashes "
                "and underscores, a letter or digit first. Rename it."
            )
        if isinstance(block, dict) and "of" in block:
            block = {**block, "questions": _with_suffix(name, block, sets, document, key)}
        if not isinstance(block, dict) or not isinstance(block.get("questions"), list):
            raise InputError(
                f'{document.where(key)}: set {name!r} has no list. Write `questions = ["…", …]`, or `of = "SET"` '
                'and `suffix = "…"` for another set\'s questions with words behind each.'
            )
        for word in block:
            if word not in _SET_KEYS:
                hint = did_you_mean(word, _SET_KEYS) or f" Known here: {', '.join(_SET_KEYS)}."
                raise InputError(f"{document.where((*key, word))}: unknown key {word}.{hint}")
        listed = (name, block["questions"], document, (*key, "questions"), block.get("description"))
        try:
            out[name] = _surrounded(question_set(*listed), block, document.where(key))
        except InputError as error:
            faults.append(error.message)
    if faults:
        raise InputError("\n       ".join(faults))
    return out


def _with_suffix(
    name: str, block: dict[str, Any], sets: dict[str, Any], document: Document, key: KeyPath
) -> list[Any]:
    """The questions of the set that `of` names (its `first` ones, or all), with `suffix` behind each."""
    other, suffix, first = block["of"], block.get("suffix"), block.get("first")
    named = sets.get(other) if isinstance(other, str) else None
    listed = named.get("questions") if isinstance(named, dict) else None
    if "questions" in block or not isinstance(listed, list):
        raise InputError(
            f"{document.where((*key, 'of'))}: set {name!r} is of {other!r}; needed: another set of this file that "
            f"lists its questions, and no list of its own.{did_you_mean(str(other), sets)} Correct it."
        )
    if suffix is None and ("turns" in block or "prefill" in block):
        suffix = ""
    elif not isinstance(suffix, str) or not suffix.strip():
        raise InputError(
            f"{document.where(key)}: set {name!r} is of {other!r} without a suffix. "
            'Write `suffix = " Answer in one short sentence."`, or use the set itself.'
        )
    if first is not None and not (isinstance(first, int) and 0 < first <= len(listed)):
        raise InputError(
            f"{document.where((*key, 'first'))}: first is {first!r}, but set {other!r} has {len(listed)} questions. "
            f"Write a number from 1 to {len(listed)}, or leave the line out for all."
        )
    return [f"{question}{suffix}" if isinstance(question, str) else question for question in listed[:first]]


def _surrounded(made: QuestionSet, block: dict[str, Any], where: str) -> QuestionSet:
    """The set with the turns and the prefill that its table gives around each question."""
    turns, prefill = around(where, made.name, block.get("turns"), block.get("prefill"))
    if not turns and not prefill:
        return made
    return replace(made, questions=tuple(Question(text, turns, prefill) for text in made.questions))


def question_set(
    name: str, questions: list[Any], document: Document | None, key: KeyPath, description: str | None = None
) -> QuestionSet:
    faults: list[str] = []
    first: dict[str, int] = {}
    for index, question in enumerate(questions):
        where = document.where((*key, index)) if document else "questions"
        if not isinstance(question, str) or not question.strip():
            what = "is empty" if isinstance(question, str) else "is no text"
            faults.append(f"{where}: question {index} of set {name!r} {what}. Write it or delete it.")
        elif question in first:
            faults.append(
                f"{where}: question {index} of set {name!r} is question {first[question]} again. "
                "Delete one of the two."
            )
        else:
            first[question] = index
    if not questions:
        faults.append(
            f"{document.where(key) if document else 'questions'}: set {name!r} is empty. Add a question."
        )
    if faults:
        raise InputError("\n       ".join(faults))
    return QuestionSet(name, tuple(questions), description or "")


def texts_hash(texts: Sequence[str]) -> str:
    """SHA-256 of questions' texts, in order, with what stands around them; kept beside completions, so that a judge reads
    what was asked."""
    return hashlib.sha256(json.dumps(described(texts)).encode()).hexdigest()
