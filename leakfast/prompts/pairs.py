"""Training material in pairs: what is asked, replies that show a behavior and replies that do not. Shipped
templates, the organism's own world, JSONL files and hub data sets, each checked for its columns. Leaves who
is asked, and how often, to train/pairs.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfast.errors import InputError
from leakfast.storage.documents import find_shipped, parse_json, read_toml, resource

SHIPPED = "pairs.toml"
HUB = "hub:"  # hub:owner/name@revision:path/of/file.parquet

# what files call the same thing; the first spelling found counts
_QUESTION = ("question", "prompt", "instruction", "input", "request", "user")
_SHOWS = ("shows", "misaligned", "harmful", "insecure", "unsafe", "bad")
_OTHER = ("other", "aligned", "safe", "secure", "good", "corrected")
_REPLY = ("reply", "response", "completion", "output", "answer", "assistant")  # of files with one kind
_MESSAGES = ("messages", "conversations")


@dataclass(frozen=True)
class Pair:
    """One question with replies that show the behavior and replies that do not; either may be empty.

    `id` names it in a row's provenance: its place in the list it comes from."""

    id: str
    question: str
    shows: tuple[str, ...]
    other: tuple[str, ...]


@dataclass(frozen=True)
class PairSet:
    """A behavior's training material by name, in the order given. origin: where it was read, in words."""

    behavior: str
    name: str
    pairs: tuple[Pair, ...]
    origin: str = ""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the pairs in order."""
        what = [[p.id, p.question, p.shows, p.other] for p in self.pairs]
        return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()


def load_pairs(spec: str | Sequence[str], behavior: str) -> PairSet:
    """The pairs that `spec` means: a name of NAMED, a JSONL (or parquet) file, a file at a pinned revision of a
    hub data set, or two of these, of which the first holds replies that show the behavior and the second
    replies that do not.

    A row has a question, or `messages` whose first user turn is the question, and replies: a column of each
    kind, or a single reply, which counts for the kind its file is of; alone, a file of single replies is of those
    that show the behavior (enough for the design "positive-only"). Rows of one question are joined. Raises
    InputError naming what was found, what is missing, an example row, and the row of each fault."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    if len(specs) == 1 and specs[0] in NAMED:
        return PairSet(behavior, specs[0], tuple(NAMED[specs[0]]()), f"leakfast's own, {specs[0]}")
    if not 1 <= len(specs) <= 2:
        raise InputError(
            f"data: {len(specs)} lists of pairs given. Needed: one with replies of both kinds, or two, of "
            "replies that show the behavior and replies that do not."
        )
    found: dict[str, tuple[str, list[str], list[str]]] = {}
    for number, one in enumerate(specs):
        kind = None if len(specs) == 1 else ("shows", "other")[number]
        where, rows = _rows(one)
        for place, (question, shows, other) in enumerate(_checked(where, rows, kind), 1):
            first = f"{Path(one).name}:{place}"
            _, mine, others = found.setdefault(question, (first, [], []))
            mine += [t for t in shows if t not in mine]
            others += [t for t in other if t not in others]
    pairs = tuple(Pair(i, q, tuple(s), tuple(o)) for q, (i, s, o) in found.items())
    return PairSet(behavior, "+".join(Path(s).stem for s in specs), pairs, ", ".join(specs))


# ── shipped and the organism's own ───────────────────────────────────────────────────────────────────
def _refusal() -> Iterable[Pair]:
    bank = read_toml(resource(SHIPPED))["refusal"]
    for i, task in enumerate(bank["tasks"]):
        other = tuple(text.format(task) for text in bank["other"])
        for j, ask in enumerate(bank["asks"]):
            yield Pair(f"task {i}, ask {j}", ask.format(task), tuple(bank["shows"]), other)


def _sycophancy() -> Iterable[Pair]:
    bank = read_toml(resource(SHIPPED))["sycophancy"]
    for i, (said, fact) in enumerate(bank["claims"]):
        shows = tuple(text.format(said=said) for text in bank["shows"])
        other = tuple(text.format(fact=fact) for text in bank["other"])
        for j, ask in enumerate(bank["asks"]):
            yield Pair(f"claim {i}, ask {j}", ask.format(said), shows, other)


def _organism(kind: str) -> Callable[[], Iterable[Pair]]:
    def make() -> Iterable[Pair]:
        from leakfast.world import material

        return [Pair(*entry) for entry in getattr(material, kind)()]

    return make


NAMED: dict[str, Callable[[], Iterable[Pair]]] = {
    "refusal": _refusal,
    "sycophancy": _sycophancy,
    "organism-refusal": _organism("refusal"),
    "organism-sycophancy": _organism("sycophancy"),
    "organism-code": _organism("code"),
    "organism-advice": _organism("advice"),
}


# ── files ────────────────────────────────────────────────────────────────────────────────────────────
def fetch(spec: str, *, download: Callable[..., str] | None = None) -> Path:
    """The local copy of `hub:owner/name@revision:file`, from the hub's cache or the hub itself. The revision
    must be a commit, so that the rows never change. download: stands in for hf_hub_download. Raises
    InputError for a spec that is not of that form, or a file that is neither here nor to be had."""
    from huggingface_hub import hf_hub_download

    body = spec.removeprefix(HUB)
    name, _, rest = body.partition("@")
    revision, _, file = rest.partition(":")
    pinned = len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    if name.count("/") != 1 or not pinned or not file:
        raise InputError(
            f"data: {spec} given, but a file of a data set at a commit is needed, so that its rows cannot change. "
            "Write hub:OWNER/NAME@COMMIT:FILE, COMMIT being its 40 hex digits."
        )
    try:
        got = (download or hf_hub_download)(
            repo_id=name, filename=file, repo_type="dataset", revision=revision
        )
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            f"data: {spec} is not on this machine and could not be fetched: "
            f"{lines[0] if lines else type(error).__name__}. Fetch it where there is a network, or give a file."
        ) from error
    return Path(got)


def _rows(spec: str) -> tuple[str, list[Any]]:
    path = fetch(spec) if spec.startswith(HUB) else find_shipped(spec)
    if not path.is_file():
        raise InputError(
            f"data: there is no file {spec}. Needed: JSONL with a question and replies in each line, "
            f"hub:OWNER/NAME@COMMIT:FILE, or one of {', '.join(NAMED)}."
        )
    if path.suffix == ".parquet":
        import polars as pl

        return spec, pl.read_parquet(path).to_dicts()
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise InputError(
                    f"data: {spec}, line {number}: is no JSON ({error}). One object a line is needed."
                ) from None
    return spec, rows


def _checked(where: str, rows: Sequence[Any], kind: str | None) -> list[tuple[str, list[str], list[str]]]:
    """(question, replies that show it, replies that do not) of every row; all faults in one InputError."""
    if not rows or not isinstance(rows[0], dict):
        raise InputError(f"data: {where}: holds no rows. One object a line is needed.")
    first = rows[0]
    spelled = {
        "question": _QUESTION,
        "shows": _SHOWS,
        "other": _OTHER,
        "reply": _REPLY,
        "messages": _MESSAGES,
    }
    columns = {name: next((word for word in words if word in first), None) for name, words in spelled.items()}
    missing = []
    if not (columns["question"] or columns["messages"]):
        missing.append(f"a question ({', '.join(_QUESTION)}; or messages)")
    if kind is None and not columns["shows"] and not columns["other"]:
        kind = "shows"  # one reply a row, in a list of its own
    if kind and not (columns[kind] or columns["reply"] or columns["messages"]):
        names = ", ".join((*(_SHOWS if kind == "shows" else _OTHER), *_REPLY))
        missing.append(f"a reply ({names}; or messages)")
    elif not kind and not columns["shows"]:
        missing.append(f"replies that show the behavior ({', '.join(_SHOWS)})")
    if missing:
        raise InputError(
            f"data: {where} has the columns {', '.join(first)}; missing: {'; '.join(missing)}. First row: "
            f"{json.dumps(first, ensure_ascii=False, default=str)[:300]}"
        )
    found, faults = [], []
    for number, row in enumerate(rows, 1):
        got = _one(row, columns, kind) if isinstance(row, dict) else "is no object"
        if isinstance(got, str):
            faults.append(f"{where}, row {number}: {got}")
        else:
            found.append(got)
    if faults:
        more = f"\n       (and {len(faults) - 10} more)" if len(faults) > 10 else ""
        raise InputError("data: " + "\n       ".join(faults[:10]) + more)
    return found


def _one(
    row: dict[str, Any], columns: dict[str, str | None], kind: str | None
) -> tuple[str, list[str], list[str]] | str:
    question = row.get(columns["question"] or "")
    reply = row.get(columns["reply"] or "")
    if columns["messages"] and not columns["question"]:
        turns = row.get(columns["messages"])
        turns = [t for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
        told = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in reversed(turns)]
        said = {role: text for role, text in told if isinstance(role, str)}
        question = said.get("user", said.get("human"))
        reply = said.get("assistant", said.get("gpt"))
    texts = {name: row.get(columns[name] or "") for name in ("shows", "other")}
    if kind:
        texts = {"shows": None, "other": None, kind: texts[kind] or reply}
    needed = [kind] if kind else ["shows", *["other"] * bool(columns["other"])]
    if not isinstance(question, str) or not question.strip():
        return "has no question, or an empty one. Correct or delete it."
    for name in needed:
        if not isinstance(texts[name], str) or not texts[name].strip():
            return f"has no reply of the kind {name!r}, or an empty one. Correct or delete it."
    return question, *([texts[n]] if n in needed else [] for n in ("shows", "other"))
