"""The manifest of a run and the lines of its journal, read with their checks: what was changed since it was written does not
count. Demands nothing; leaves files and locks to the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage.documents import parse_json

FORMAT = 1  # of a manifest


def retell(manifest: dict[str, Any], line: bytes) -> None:
    """Put what a line of the log tells into the manifest. Raises ValueError for a line whose bytes changed since it
    was written, and what a line without its fields raises. Lines of earlier versions begin with their time."""
    entry = parse_json(line)
    checked = line.startswith(b'{"check": ')
    if (checked and entry.pop("check") != check_of(entry)) or not (checked or line.startswith(b'{"time": ')):
        raise ValueError("its bytes do not match their check")
    event, when = entry.pop("event"), entry.pop("time")
    if event == "shard":
        relpath = entry.pop("path")
        if not _is_file(relpath, entry):
            raise ValueError("no file of the run")
        manifest["shards"][relpath] = entry
    elif event == "stage":
        told = {"inputs": entry["inputs"], "outputs": entry["outputs"], "finished": when}
        if not _is_stage(entry["key"], told):
            raise ValueError("no stage")
        manifest["stages"][entry["key"]] = told
    elif event == "study":
        manifest["study"] = entry["sha256"]
    elif event == "made":
        manifest.setdefault("made", []).append({name: entry[name] for name in ("leakfast", "commit")})


def events(path: Path, name: str) -> list[dict[str, Any]]:
    """The lines about an event, in order, of the journal at `path`; those whose bytes do not match their check are left out."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        if name.encode() not in line:
            continue
        try:
            retell({"shards": {}, "stages": {}}, line)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        entry = json.loads(line)
        if entry["event"] == name:
            found.append(entry)
    return found


def check_of(entry: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over a log line's fields."""
    body = json.dumps(entry, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def parse_manifest(content: bytes) -> dict[str, Any] | None:
    """The manifest, or None if its bytes were damaged. A newer format is an error."""
    try:
        manifest: dict[str, Any] = parse_json(content)
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    body = json.dumps(manifest, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(body.encode()).hexdigest() != checksum:
        return None
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"manifest.json: format {manifest.get('format')}, but this leakfast reads {FORMAT}. "
            "Use the version that made the run, or another run directory."
        )
    shards, stages = manifest.get("shards"), manifest.get("stages")
    if not isinstance(shards, dict) or not isinstance(stages, dict):
        return None
    whole = all(_is_file(*one) for one in shards.items()) and all(_is_stage(*one) for one in stages.items())
    return manifest if whole else None


def _is_file(relpath: Any, entry: Any) -> bool:
    """Whether these are the path of a file inside the run, and what is told of it."""
    if (
        not isinstance(relpath, str)
        or not isinstance(entry, dict)
        or not isinstance(entry.get("sha256"), str)
    ):
        return False
    path = PurePosixPath(relpath)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in relpath


def _is_stage(key: Any, told: Any) -> bool:
    if not isinstance(key, str) or not isinstance(told, dict) or not isinstance(told.get("inputs"), str):
        return False
    outputs = told.get("outputs")
    files = outputs.get("files", []) if isinstance(outputs, dict) else None
    return isinstance(files, list | tuple) and all(isinstance(one, str) for one in files)
