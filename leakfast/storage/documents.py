"""Files a person wrote: TOML and JSON read with the line number of every key, and the files that
are shipped with the package. Demands nothing but the standard library; leaves meaning to callers."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakfast.errors import InputError
from leakfast.storage.likeness import did_you_mean as did_you_mean
from leakfast.storage.likeness import nearest as nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]

_PACKAGE = Path(__file__).resolve().parent.parent
MAX_BYTES = 64 << 20  # of a file that a person wrote
MAX_DEPTH = 64  # of tables and lists in each other

_TOKEN = re.compile(
    r"""
      (?P<string>\"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5}
          | "(?:\\.|[^"\\\n])*" | '[^'\n]*')
    | (?P<comment>\#[^\n]*)
    | (?P<newline>\n)
    | (?P<mark>[\[\]{}=:,.])
    | (?P<bare>[^\s\[\]{}=:,."'\#]+)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Document:
    """A parsed TOML or JSON file: `data` as plain Python, and the line on which each key stands."""

    path: Path
    text: str
    data: Any
    _lines: dict[KeyPath, int] = field(repr=False)

    def line(self, key: KeyPath) -> int | None:
        """1-based line of `key` (names and list indices), or of its nearest ancestor with one."""
        for end in range(len(key), 0, -1):
            if key[:end] in self._lines:
                return self._lines[key[:end]]
        return None

    def where(self, key: KeyPath = ()) -> str:
        """`file, line N` of `key`: the first part of an error message."""
        line = self.line(key)
        return f"{self.path}, line {line}" if line else str(self.path)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The parsed TOML file. Raises InputError naming the line if it is missing or is not TOML."""
    data: dict[str, Any] = read_document(path).data
    return data


def read_document(path: str | Path) -> Document:
    """Parse `path` as JSON if it ends in .json, else as TOML; InputError names file and line."""
    path = Path(path)
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        try:
            data = parse_json(text, object_pairs_hook=_refuse_twins)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {error.lineno}: not JSON: {error.msg}. Correct that line and try again."
            ) from None
        except _Twins as error:
            raise InputError(f"{path}: {error}. Keep one of the two.") from None
        except ValueError as error:
            raise InputError(
                f"{path}: not JSON that can be read: {error}. Correct it and try again."
            ) from None
        return Document(path, text, data, _json_lines(text))
    return parse_toml(text, path)


def parse_json(text: str | bytes, **how: Any) -> Any:
    """`json.loads` that ends in a ValueError for whatever cannot be read: also what is nested more than MAX_DEPTH deep, and
    text that holds half a character (a lone \\ud800), which no file can be written with."""
    try:
        data = json.loads(text, **how)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    _check_depth(data)
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds half a character ({error.object[error.start]!a})") from None
    return data


def _check_depth(data: Any) -> None:
    """Raises ValueError for tables and lists that lie more than MAX_DEPTH deep in each other."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level]
        level = [one for some in inner if isinstance(some, list) for one in some]
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def parse_toml(text: str, path: str | Path) -> Document:
    """A Document from TOML text; `path` is only used in messages."""
    text = text.replace("\r\n", "\n")
    try:
        data = tomllib.loads(text)
        _check_depth(data)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = int(found.group(1)) if found and found.group(1) else text.count("\n") + 1
        reason = re.sub(r"\s*\(at .*\)", "", str(error))
        raise InputError(
            f"{path}, line {line}: not TOML: {reason}. Correct that line and try again."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        reason = (
            f"it is nested more than {MAX_DEPTH} deep" if isinstance(error, RecursionError) else str(error)
        )
        raise InputError(f"{path}: not TOML that can be read: {reason}. Correct it and try again.") from None
    return Document(Path(path), text, data, _toml_lines(text))


def resource(*parts: str) -> Path:
    """Path of a file or folder shipped under configs/, in a checkout and in an installed package.

    Raises InputError naming the files there are if it is not shipped."""
    root = _resource_root()
    found = root.joinpath(*parts)
    if not found.exists():
        wanted = "/".join(parts)
        shipped = sorted(str(p.relative_to(root)) for p in root.rglob("*.toml"))
        raise InputError(
            f"{wanted}: not a file here and not shipped with leakfast. "
            f"Shipped are {', '.join(shipped) or 'none'}. Give one of these names or a path."
        )
    return found


def find_shipped(name: str | Path) -> Path:
    """`name` if it is a file, else the shipped file of that name (with or without `configs/`)."""
    path = Path(name)
    try:
        if path.exists() or path.is_absolute():
            return path
    except OSError:  # a name that no file can have
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if parts and ".." not in parts:
        shipped = _resource_root().joinpath(*parts)
        if shipped.is_file():
            return shipped
    return path


def _resource_root() -> Path:
    installed = _PACKAGE / "_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _like(path: Path) -> str:
    """Which file beside `path`, or shipped, was meant; endings, which all share, tell nothing."""
    folder, root = path.parent if path.parent.is_dir() else Path(), _resource_root()
    known = {p.stem: folder / p.name for p in folder.iterdir() if p.suffix in (".toml", ".json", ".jsonl")}
    if not path.is_absolute() and ".." not in path.parts:
        inside = root / Path(*path.parts[path.parts[:1] == ("configs",) : -1])
        known = {p.stem: p.relative_to(root) for p in inside.glob("*.toml")} | known
    close = nearest(path.stem, known)
    return f"Did you mean {known[close]}?" if close else "Check the path, or give a shipped name."


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but a file is needed. Give a .toml or .json file in it.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(
                f"{path}: {size >> 20} MB, but {MAX_BYTES >> 20} MB are the most that is read. Give the file that was meant."
            )
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. {_like(path)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from None
    except ValueError:  # NUL
        raise InputError(f"{str(path)!a}: no file has such a name. Correct it.") from None


class _Twins(ValueError):
    """A name that stands twice in one object."""


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise _Twins(f"the name {twin!r} stands twice in one object")
    return seen


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, text, line) of every token that is not a comment."""
    out, line, at = [], 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        if match.lastgroup != "comment":
            out.append((match.lastgroup or "", match.group(), line))
    return out


def _unquote(token: str) -> str:
    if token[:1] == '"':
        try:
            return str(json.loads(token))
        except json.JSONDecodeError:
            return token[1:-1]
    return token[1:-1] if token[:1] == "'" else token


def _toml_lines(text: str) -> dict[KeyPath, int]:
    """Line of every key, array-of-tables entry and array element of valid TOML text."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    tokens = _tokens(text)
    table: KeyPath = ()
    i = 0

    def name(i: int) -> tuple[list[str], int]:
        """The dotted key that starts at token i, and the token after it."""
        parts: list[str] = []
        while tokens[i][0] in ("bare", "string") or tokens[i][1] == ".":
            if tokens[i][1] != ".":
                parts.append(_unquote(tokens[i][1]))
            i += 1
        return parts, i

    def inside(names: list[str]) -> KeyPath:
        """`names` with the index of the newest entry after each array of tables on the way."""
        key: KeyPath = ()
        for part in names:
            key = (*key, part)
            if key in counts:
                key = (*key, counts[key])
        return key

    while i < len(tokens):
        kind, value, line = tokens[i]
        if kind == "newline":
            i += 1
        elif value == "[":
            double = i + 1 < len(tokens) and tokens[i + 1][1] == "["
            parts, i = name(i + (2 if double else 1))
            if double:
                key = (*inside(parts[:-1]), parts[-1])
                counts[key] = counts.get(key, -1) + 1
            table = inside(parts)
            _note(lines, table, line)
            i += 2 if double else 1
        elif kind in ("bare", "string"):
            parts, i = name(i)
            key = (*table, *parts)
            _note(lines, key, line)
            i = _values(tokens, i + 1, key, lines)
        else:
            i += 1
    return lines


def _note(lines: dict[KeyPath, int], key: KeyPath, line: int) -> None:
    """Give `key`, and tables that only its dots make, their line."""
    for end in range(1, len(key) + 1):
        lines.setdefault(key[:end], line)


def _json_lines(text: str) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {}
    _values([token for token in _tokens(text) if token[0] != "newline"], 0, (), lines)
    return lines


def _values(tokens: list[tuple[str, str, int]], i: int, key: KeyPath, lines: dict[KeyPath, int]) -> int:
    """Walk the value that starts at token i, note its inner lines, return the token after it."""

    def skip(i: int) -> int:
        while i < len(tokens) and tokens[i][0] == "newline":
            i += 1
        return i

    if i >= len(tokens):
        return i
    opening = tokens[i][1]
    if opening not in ("[", "{"):
        while i < len(tokens) and tokens[i][0] != "newline" and tokens[i][1] not in (",", "]", "}"):
            i += 1
        return i
    closing = "]" if opening == "[" else "}"
    i, index = skip(i + 1), 0
    while i < len(tokens) and tokens[i][1] != closing:
        if opening == "[":
            inner: KeyPath = (*key, index)
            lines.setdefault(inner, tokens[i][2])
        else:
            inner, line = key, tokens[i][2]
            while tokens[i][1] not in ("=", ":"):
                if tokens[i][1] != ".":
                    inner = (*inner, _unquote(tokens[i][1]))
                i += 1
            lines.setdefault(inner, line)
            i = skip(i + 1)
        i = skip(_values(tokens, i, inner, lines))
        if i < len(tokens) and tokens[i][1] == ",":
            i = skip(i + 1)
        index += 1
    return i + 1
