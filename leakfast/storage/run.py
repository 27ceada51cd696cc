"""The run directory: atomic writes, shards counted by hash, stages that are skipped when done.
Demands a folder it may write. Leaves to the stages what a shard holds and what makes it stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, StoreError
from leakfast.storage import layout
from leakfast.storage.disk import (
    atomic_write,
    explained,
    file_hash,
    free_name,
    parquet_bytes,
    remove_left,
    stamp_of,
    store_error,
    sync_file,
    write_parquet,
)
from leakfast.storage.manifests import FORMAT, check_of, parse_manifest, retell
from leakfast.storage.objects import address_of

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Run", "atomic_write", "file_hash", "write_parquet"]

log = logging.getLogger("leakfast.store")

Content = bytes | Callable[[Path], Any] | None  # of a file that is counted
_OTHER_BYTES = "its bytes do not match their hash"
_held: dict[str, tuple[int, int]] = {}  # locked folder → (file descriptor, depth), of this process
_holding = threading.Lock()  # while _held is looked at and changed
watchers: dict[str, Callable[[], None]] = {}  # folder → what is told of each line of its journal here


class Run:
    """One run directory. Making the object touches nothing; `create` makes the folder, `open` asks for
    one that is there. Every change takes the folder's lock for a moment; a command that changes much
    holds it with `with run.lock():`, so that a second process is told instead of interleaving."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._manifest: dict[str, Any] | None = None
        self._seen: tuple[int, int, int] | None = None  # of the manifest file, to notice others' writes
        self._verified: dict[str, tuple[int, int, int, str]] = {}
        self._damaged: list[int] = []  # lines of the log that were said to be damaged
        self._mutex = threading.RLock()  # threads of this process write by this object one at a time

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def create(self, study_text: str = "") -> Run:
        """Make the folder, or take the one that is there, less what was left half-written; keep the study's text as study.toml.

        Raises StoreError if the folder cannot be written or holds something that is no run."""
        with self.lock():
            remove_left(self.path)
            self._change(lambda manifest: None)
            if study_text:
                self._keep_study(study_text.encode())
        return self

    def _keep_study(self, given: bytes) -> None:
        """The study's bytes as study.toml, and their hash in the manifest; a file that is neither what was given
        nor what was written before goes to quarantine/."""
        study, digest = self.path / layout.STUDY, hashlib.sha256(given).hexdigest()
        with explained(study):
            old = study.read_bytes() if study.exists() else None
        found, kept = hashlib.sha256(old or b"").hexdigest(), self.manifest.get("study")
        if old is not None and old != given:
            if kept in (None, found):
                self.log("study_changed", sha256_before=found)
            else:
                self._set_aside(layout.STUDY, _OTHER_BYTES)
        if old != given:
            atomic_write(study, given)
        if kept != digest:
            self._change(lambda manifest: manifest.update(study=digest))
            self.log("study", sha256=digest)

    def note_maker(self, leakfast: str, commit: str | None) -> Run:
        """Keep which version and commit of leakfast makes this run: `made` in the manifest, each once, in the order in which
        they came. A run with files that nobody signed was begun by a version that is not known: null."""
        one = {"leakfast": leakfast, "commit": commit}
        if one not in self.manifest.get("made", []):
            with self.lock():
                if self.manifest["shards"] and "made" not in self.manifest:
                    self._sign({"leakfast": None, "commit": None})
                self._sign(one)
        return self

    def note_finished(self, made_of: str) -> None:
        """Keep the hash of all that a finished run follows from: `finished` in the manifest."""
        self._change(lambda manifest: manifest.update(finished=made_of))

    def _sign(self, one: dict[str, str | None]) -> None:
        self._change(lambda manifest: manifest.setdefault("made", []).append(one))
        self.log("made", **one)

    def check_study(self) -> Path | None:
        """study.toml, None if the run has none; StoreError where its bytes are not those the run was made with."""
        study, kept = self.path / layout.STUDY, self.manifest.get("study")
        if not study.is_file():
            return None
        if kept is not None and file_hash(study) != kept:
            raise StoreError(
                f"{study}: {_OTHER_BYTES}. Needed: the study the run was made with. Type: leakfast run STUDY.toml "
                f"--out {self.path}, with the study's own file, which sets this one aside."
            )
        return study

    def open(self) -> Run:
        """This run if it exists, else InputError."""
        if not (self.path / layout.MANIFEST).is_file() and not (self.path / layout.JOURNAL).is_file():
            what = "there is no such folder" if not self.path.exists() else "holds no manifest.json"
            raise InputError(
                f"{self.path}: {what}, so it is no run. "
                "Give the folder of a run, or make one with `leakfast run STUDY.toml`."
            )
        return self

    @property
    def study_text(self) -> str:
        """study.toml as given to the run; InputError if it has none."""
        study = self.open().check_study()
        if study is None:
            study = self.path / layout.STUDY
            raise InputError(f"{study}: the run was made without a study. Give the settings by flags.")
        return study.read_text(encoding="utf-8")

    @property
    def manifest(self) -> dict[str, Any]:
        """`shards`: path → {sha256, rows, …}; `stages`: key → {inputs, outputs}. Read-only for callers."""
        return self._load()

    # shards and other files

    def add_shard(self, relpath: str, frame: pl.DataFrame, **meta: Any) -> Path:
        """Store `frame` as Parquet at `relpath` and count it in the manifest, replacing one of that name."""
        content = parquet_bytes(frame)
        return self._add(
            relpath, content, hashlib.sha256(content).hexdigest(), {"rows": frame.height, **meta}
        )

    def add_file(self, relpath: str, content: Content, **meta: Any) -> Path:
        """As `add_shard`, for any other file: bytes, or a function that writes the path it is given; None: it lies there
        already, and is not written twice (of weights there may be no room for that)."""
        return self._add(relpath, content, None, meta)

    def add_bytes(self, relpath: str, content: bytes, sha256: str, meta: Mapping[str, Any]) -> Path:
        """Store a file that was made in another folder, with what its manifest says of it. Raises StoreError where the
        bytes are not those of `sha256`."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise StoreError(
                f"{self.path / relpath}: {_OTHER_BYTES}. Run the same command again: it is made anew."
            )
        return self._add(relpath, content, sha256, dict(meta))

    def shards(self, prefix: str = "") -> list[str]:
        """Relative paths, sorted, of the files in the manifest under folder (or file) `prefix` whose bytes
        match their hash. Others are moved to quarantine/, struck out, logged, and may be made again."""
        file, shards = "/".join(PurePosixPath(prefix).parts), self.manifest["shards"]
        folder = f"{file}/" if file else ""
        named = sorted(relpath for relpath in shards if relpath == file or relpath.startswith(folder))
        return [relpath for relpath in named if self._is_intact(relpath, shards[relpath])]

    def has(self, relpath: str) -> bool:
        """Whether this very file is in the manifest and intact."""
        entry = self.manifest["shards"].get(relpath)
        return entry is not None and self._is_intact(relpath, entry)

    def read(self, prefix: str = "") -> pl.DataFrame:
        """All intact Parquet shards under `prefix`, one under the other in path order (columns united);
        an empty frame without columns if there are none."""
        import polars as pl

        frames = [pl.read_parquet(path, glob=False) for path in self._tables(prefix)]
        return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()

    def retire(self, relpath: str, reason: str) -> None:
        """Strike a file out of the manifest and move it to quarantine/: intact, but its inputs changed."""
        if relpath in self.manifest["shards"]:
            self._strike_out(relpath, reason)

    def scan(self, prefix: str = "") -> pl.LazyFrame:
        """As `read`, lazily: for tables that should not lie in memory at once."""
        import polars as pl

        frames = [pl.scan_parquet(path, glob=False) for path in self._tables(prefix)]
        return pl.concat(frames, how="diagonal") if frames else pl.LazyFrame()

    def _tables(self, prefix: str) -> list[Path]:
        return [self.path / p for p in self.shards(prefix) if p.endswith(".parquet")]

    # stages and the log

    def stage_done(self, key: str, inputs_hash: str) -> bool:
        """Whether stage `key` was finished with these inputs and its `files` are still intact."""
        entry = self.manifest["stages"].get(key)
        if entry is None or entry["inputs"] != inputs_hash:
            return False
        return all(self.has(relpath) for relpath in entry["outputs"].get("files", ()))

    def mark_done(self, key: str, inputs_hash: str, **outputs: Any) -> None:
        """Note that stage `key` is finished. `files=[relpath, …]` are checked by `stage_done`."""

        def change(manifest: dict[str, Any]) -> None:
            manifest["stages"][key] = {"inputs": inputs_hash, "outputs": outputs, "finished": _now()}

        self._change(change)
        self.log("stage", key=key, inputs=inputs_hash, outputs=outputs)

    def log(self, event: str, **fields: Any) -> None:
        """Append one JSON line {time, event, …} to log.jsonl."""
        entry = json.loads(json.dumps({"time": _now(), "event": event, **fields}))  # as it will be read
        line = json.dumps({"check": check_of(entry), **entry}, ensure_ascii=False) + "\n"
        path = self.path / layout.JOURNAL
        with self._mutex:
            with explained(path):
                self.path.mkdir(parents=True, exist_ok=True)
                with path.open("a+b") as file:
                    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                        line = "\n" + line  # a crash tore the last line: keep this one apart
                    file.write(line.encode())
            if watchers and (told := watchers.get(str(self.path.resolve()))):
                told()

    @contextlib.contextmanager
    def lock(self) -> Iterator[Run]:
        """Hold the folder against other processes; may be nested; the system frees it if we die.

        Raises StoreError if another process holds it or the folder cannot be written."""
        if address := address_of(self.path):
            raise InputError(
                f"{address}: is not a folder, and `leakfast run` alone writes a run to an object store. Give the folder of a run."
            )
        path = self.path / ".lock"
        with _holding, explained(path):
            if self.path.exists() and not self.path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self.path.mkdir(parents=True, exist_ok=True)
            folder = str(self.path.resolve())
            descriptor, depth = _held.get(folder, (-1, 0))
            if depth == 0:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
                    os.close(descriptor)
                    raise StoreError(
                        f"{self.path}: another leakfast process (pid {holder}) is writing this run. "
                        "Wait for it to end, or give another run directory."
                    ) from None
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            _held[folder] = (descriptor, depth + 1)
        try:
            yield self
        finally:
            with _holding:
                descriptor, depth = _held[folder]
                if depth == 1:
                    del _held[folder]
                    os.close(descriptor)
                else:
                    _held[folder] = (descriptor, depth - 1)

    def _add(self, relpath: str, content: Content, sha256: str | None, meta: dict[str, Any]) -> Path:
        inside = PurePosixPath(relpath)
        if inside.is_absolute() or ".." in inside.parts or not inside.parts:
            raise ValueError(f"a path inside the run is needed, not {relpath!r}")
        relpath, path = str(inside), self.path / inside
        with self.lock(), self._mutex:
            sync_file(path) if content is None else atomic_write(path, content)
            entry = {"sha256": sha256 or file_hash(path), "bytes": path.stat().st_size, **meta}
            self._verified[relpath] = (*stamp_of(path), entry["sha256"])
            self._change(lambda manifest: manifest["shards"].update({relpath: entry}))
            self.log("shard", path=relpath, **entry)
        return path

    def _is_intact(self, relpath: str, entry: dict[str, Any]) -> bool:
        path = self.path / relpath
        try:
            stamp = (*stamp_of(path), entry["sha256"])
            if self._verified.get(relpath) == stamp:
                return True
            if file_hash(path) == entry["sha256"]:
                self._verified[relpath] = stamp
                return True
            found = _OTHER_BYTES
        except FileNotFoundError:
            found = "the file is gone"
        self._strike_out(relpath, found)
        return False

    def _strike_out(self, relpath: str, found: str) -> None:
        with self.lock(), self._mutex:
            self._change(lambda manifest: manifest["shards"].pop(relpath, None))
            self._set_aside(relpath, found)

    def _set_aside(self, relpath: str, found: str) -> None:
        """Move a file, if it is there, to quarantine/, and say so."""
        moved, source = None, self.path / relpath
        if source.exists():
            target = free_name(self.path / layout.QUARANTINE / relpath)
            with explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
            moved = str(target.relative_to(self.path))
        self.log("quarantine", path=relpath, reason=found, moved_to=moved)
        where = f"moved to {moved}; " if moved else ""
        log.warning("%s: %s: %s; %sit will be made again", self.path, relpath, found, where)

    def _load(self) -> dict[str, Any]:
        path = self.path / layout.MANIFEST
        with self._mutex:
            try:
                stamp = stamp_of(path)
                if self._manifest is not None and stamp == self._seen:
                    return self._manifest
                manifest = parse_manifest(path.read_bytes())
            except FileNotFoundError:
                stamp, manifest = None, None
            except OSError as error:
                raise store_error(path, error) from None
            if stamp is not None and manifest is None:
                return self._rebuild(path)
            self._manifest, self._seen = manifest or self._from_log(), stamp
            return self._manifest

    def _rebuild(self, path: Path) -> dict[str, Any]:
        """A damaged manifest goes to quarantine/, and is made anew of log.jsonl."""
        with self.lock():
            target = free_name(self.path / layout.QUARANTINE / layout.MANIFEST)
            with explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            log.warning("%s: damaged; moved to %s and rebuilt from log.jsonl", path, target)
            self._manifest = self._from_log()
            self._save(self._manifest)
            self.log("quarantine", path=layout.MANIFEST, reason="damaged", rebuilt=True)
        return self._manifest

    def _change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        with self.lock(), self._mutex:
            now = self._load()  # another thread may be going through it, so that it stays as it is
            manifest = {key: copy(value) for key, value in now.items()}
            change(manifest)
            self._save(manifest)

    def _save(self, manifest: dict[str, Any]) -> None:
        path = self.path / layout.MANIFEST
        body = json.dumps(manifest, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        wrapped = {**manifest, "checksum": hashlib.sha256(body.encode()).hexdigest()}
        text = json.dumps(wrapped, ensure_ascii=False, sort_keys=True, indent=1)
        atomic_write(path, text.encode())
        self._manifest, self._seen = manifest, stamp_of(path)

    def _from_log(self) -> dict[str, Any]:
        """The manifest that log.jsonl tells: a shard it names counts if its bytes still match."""
        manifest: dict[str, Any] = {"format": FORMAT, "shards": {}, "stages": {}}
        path, damaged = self.path / layout.JOURNAL, []
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    retell(manifest, line)
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged.append(number)  # torn by a crash, or damaged: what it told is made again
        if damaged and damaged != self._damaged:
            self._damaged = damaged
            told = ", ".join(map(str, damaged))
            log.warning("%s: lines %s are damaged; what they told of is made again", path, told)
        return manifest


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
