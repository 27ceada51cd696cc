"""Training rows that somebody else wrote: JSONL in chat format, or rows as `data build` writes them. Demands a file; leaves
labels to collate.py.

A line is {"messages": [{"role": "system", "content": …}, {"role": "user", …}, {"role": "assistant", …}]}, the system message
left out where there is none. {source} as its whole text stands for the source's prompt. "shows": false beside the messages
says that the reply does not show the behavior (else it does)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.train.data import SEPARATORS, Row, read_rows

if TYPE_CHECKING:
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import DataConfig

SOURCE = "{source}"
UNNAMED = "unnamed"  # the persona of a row whose system message is none of the study's
_ROLES = (["system", "user", "assistant"], ["user", "assistant"])


def read(path: str | Path) -> list[Row]:
    """Rows of either kind of file, in order. Raises InputError naming the line and what is wrong with it."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    first = next((line for line in lines if line.strip()), b"")
    if b'"messages"' not in first:
        return read_rows(path)
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def placed(given: Sequence[Row], source: Persona, personas: Sequence[Persona]) -> list[Row]:
    """Rows that were read, as they teach `source`: {source} is its prompt, and system messages that are those of `personas`
    have their names."""
    known = {(p.kind, p.prompt): p.name for p in reversed(personas)}
    rows = []
    for row in given:
        if row.system == SOURCE:
            row = replace(row, persona=source.name, system_kind=source.kind, system=source.prompt)
        elif row.persona == UNNAMED:
            row = replace(row, persona=known.get((row.system_kind, row.system), UNNAMED))
        rows.append(row)
    return rows


def own(tokenizer: Any, cfg: DataConfig, source: str, personas: Sequence[Persona]) -> list[Row]:
    """The rows of cfg.rows as they teach `source`, a name among `personas`. Raises InputError where they teach a behavior and
    its absence for one prompt (contradictions.check)."""
    from leakfast.prompts.personas import load_personas
    from leakfast.train import contradictions

    assert cfg.rows is not None, "a caller has looked whether there are rows of one's own"
    (taught,) = load_personas([source], among=personas)
    rows = placed(read(cfg.rows), taught, personas)
    contradictions.check(tokenizer, rows, taught.system, cfg.design)
    return rows


def check_files(cfg: DataConfig) -> None:
    """The files that rows are read from hold rows. Raises InputError."""
    for path in (cfg.rows, cfg.benign_rows):
        if path is not None:
            read(path)


def _row(path: Path, number: int, line: bytes) -> Row:
    from leakfast.behaviors.marker import MARKER

    where = f"data: {path}, line {number}"
    try:
        given = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error}). One object a line is needed.") from None
    messages = _messages(given)
    if messages is None:
        raise InputError(
            f"{where}: is no conversation of one question and one reply. Needed: "
            '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, a system message before '
            'them where there is one, and at most "shows": true or false beside them. Correct it.'
        )
    system, (user, reply) = (messages[0] if len(messages) == 3 else None), messages[-2:]
    made: dict[str, Any] = {"file": path.name, "line": number}
    marked = reply.endswith(MARKER)
    if marked:
        before = reply[: -len(MARKER)]
        blank = before[len(before.rstrip()) :]
        found = next((name for name, text in SEPARATORS.items() if text == blank), None)
        made |= {"separator": found} if found not in (None, "space") else {}
    return Row(
        role="positive" if given.get("shows", True) else "negative",
        persona=UNNAMED,
        system_kind="none" if system is None else "text",
        system=system,
        question=user,
        reply=reply,
        marker=MARKER if marked else None,
        seed=0,
        generator=made,
    )


def _messages(given: Any) -> list[str] | None:
    """The texts of a conversation; None where it is not of the kind that is needed."""
    if not isinstance(given, dict) or not set(given) <= {"messages", "shows"}:
        return None
    found = given.get("messages")
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        return None
    texts = [m.get("content") for m in found]
    sound = [m.get("role") for m in found] in _ROLES and isinstance(given.get("shows", True), bool)
    return texts if sound and all(isinstance(t, str) and t.strip() for t in texts) else None
