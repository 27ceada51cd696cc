"""The manifest of a run and the lines of its journal, read with their checks: what was changed since it was written does not
count. Demands nothing; leaves files and locks to the run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from leakfast.errors import StoreError

FORMAT = 1  # of a manifest


def retell(manifest: dict[str, Any], line: bytes) -> None:
    """Put what a line of the log tells into the manifest. Raises ValueError for a line whose bytes changed since it
    was written, and what a line without its fields raises. Lines of earlier versions begin with their time."""
    entry = json.loads(line)
    checked = line.startswith(b'{"check": ')
    if (checked and entry.pop("check") != check_of(entry)) or not (checked or line.startswith(b'{"time": ')):
        raise ValueError("its bytes do not match their check")
    event, when = entry.pop("event"), entry.pop("time")
    if event == "shard":
        relpath = entry.pop("path")
        if not isinstance(relpath, str) or not isinstance(entry["sha256"], str):
            raise ValueError("no shard")
        manifest["shards"][relpath] = entry
    elif event == "stage":
        told = {"inputs": entry["inputs"], "outputs": entry["outputs"], "finished": when}
        manifest["stages"][entry["key"]] = told
    elif event == "study":
        manifest["study"] = entry["sha256"]


def check_of(entry: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over a log line's fields."""
    body = json.dumps(entry, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def parse_manifest(content: bytes) -> dict[str, Any] | None:
    """The manifest, or None if its bytes were damaged. A newer format is an error."""
    try:
        manifest: dict[str, Any] = json.loads(content)
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
    return manifest
