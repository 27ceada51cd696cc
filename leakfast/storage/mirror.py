"""A run on an object store: a copy on this machine is worked in, and what the run commits is put into the store, files first
and the manifest last. Demands a lease for writing; leaves the calls to `storage.objects`, what is in a run to `storage.run`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage import layout
from leakfast.storage.disk import atomic_write, file_hash, stamp_of
from leakfast.storage.lease import Lease
from leakfast.storage.manifests import parse_manifest
from leakfast.storage.objects import ConditionError, Found, Objects, address_of
from leakfast.storage.run import Run, watchers

log = logging.getLogger("leakfast.store")

STATE = ".mirror.json"  # in the copy: which manifest of the store it comes from
LOOSE = ".loose.json"  # in the store: files that the manifest does not name, since a listing may be late
LOOSE_S = 5.0  # between two looks at those, where nothing asks for one sooner
_AT_ONCE = 8  # objects fetched side by side


@contextmanager
def working_copy(place: str | Path) -> Iterator[Path]:
    """The folder that a run is made in: `place` itself, or of an address s3://bucket/prefix a copy in the cache, held by a lease
    and mirrored while the block lasts. Raises StoreError where another driver holds it, or the store does not take what was
    made, which is then still in the copy."""
    address = address_of(place)
    if address is None:
        yield Path(place)
        return
    mirror = Mirror(address, copy_of(address))
    with Run(mirror.folder).lock(), contextlib.ExitStack() as leaving:
        mirror.begin()
        leaving.callback(mirror.end)
        leaving.push(mirror.leave)
        yield mirror.folder


def reading_copy(place: str | Path) -> Path:
    """The folder that a run is read in: `place` itself, or of an address a copy in the cache, fetched now. What is made in
    that copy stays on this machine. Raises StoreError where there is no run."""
    address = address_of(place)
    if address is None:
        return Path(place)
    mirror = Mirror(address, copy_of(address, "read"))
    with Run(mirror.folder).lock():
        if not mirror.fetch():
            raise StoreError(
                f"{address}: holds no manifest.json, so it is no run. Give the address of a run, or make one with `leakfast run "
                f"STUDY.toml --out {address}`."
            )
    return mirror.folder


def copy_of(address: str, use: str = "work") -> Path:
    """The folder of an address' copy: in LEAKFAST_CACHE, else in leakfast's folder of the user's cache."""
    given = os.environ.get("LEAKFAST_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leakfast"
    store = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.sha256(f"{store} {address}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", address.rpartition("/")[2])
    return (Path(given) if given else base) / "runs" / f"{name}-{digest}-{use}"


class Mirror:
    """The run at an address, and its copy in a folder."""

    def __init__(self, address: str, folder: Path) -> None:
        self.objects, self.folder, self.run = Objects(address), folder, Run(folder)
        self.lease = Lease(self.objects, self._beat)
        self.etag: str | None = None  # of the manifest in the store
        self.known: dict[str, str] = {}  # path → hash of what that manifest names
        self._loose: dict[str, tuple[int, int, int]] = {}  # path → its stamp when it was put
        self._named: list[str] = []  # loose files that the store knows of
        self._looked, self._pushed = 0.0, ""
        self._busy, self._mirrors = threading.RLock(), False

    # ── from the store ───────────────────────────────────────────────────────────────────────────
    def fetch(self) -> bool:
        """Bring the copy to what the store has; whether it has a run. A copy that was ahead of the store (a put that failed)
        stays ahead; one that another driver left behind takes the store's manifest. A file whose bytes do not match is left
        out: the run notices, and makes it again."""
        found = self.objects.get(layout.MANIFEST)
        if found is None:
            return False
        self.etag, digest = found.etag, hashlib.sha256(found.content).hexdigest()
        self.known = _named_in(found.content)
        local = self.folder / layout.MANIFEST
        ours = local.is_file() and digest in self._state()
        self._fetch_loose(over=not ours)
        if not ours:
            atomic_write(local, found.content)
        wanted = self.run.manifest["shards"]
        absent = [path for path, entry in wanted.items() if not self._is_here(path, entry["sha256"])]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for path, content in zip(absent, pool.map(self.objects.get, absent), strict=True):
                self._keep(path, content, wanted[path]["sha256"])
        self._keep_state(digest)
        log.info("%s: %d files fetched of %d", self.objects.address, len(absent), len(wanted))
        return True

    def _is_here(self, path: str, sha256: str) -> bool:
        file = self.folder / path
        return file.is_file() and file_hash(file) == sha256

    def _keep(self, path: str, found: Found | None, sha256: str) -> None:
        if found is not None and hashlib.sha256(found.content).hexdigest() == sha256:
            atomic_write(self.folder / path, found.content)
            return
        self.known.pop(path, None)
        why = "is not in the store" if found is None else "has other bytes than its manifest says"
        log.warning("%s/%s: %s; it is left out", self.objects.address, path, why)

    def _fetch_loose(self, over: bool) -> None:
        """Files beside the manifest, those that are here too where `over`."""
        listed = self.objects.get(LOOSE)
        names = json.loads(listed.content) if listed is not None else []
        for name in names:
            if not _is_loose(name) or (not over and (self.folder / name).is_file()):
                continue
            found = self.objects.get(name)
            if found is not None and found.whole:
                atomic_write(self.folder / name, found.content)
                self._loose[name] = stamp_of(self.folder / name)
        self._named = sorted(filter(_is_loose, names))

    # ── to the store ─────────────────────────────────────────────────────────────────────────────
    def begin(self) -> None:
        """Take the lease, fetch, and mirror from now on what the run commits."""
        with contextlib.ExitStack() as unless_done:
            self.lease.take()
            unless_done.callback(self.lease.release)
            self.fetch()
            watchers[str(self.folder.resolve())] = self.push
            self._mirrors = True
            unless_done.pop_all()

    def push(self, everything: bool = False) -> None:
        """Put what the run committed since the last time. Raises StoreError where the store does not take it, the lease is lost,
        or another driver wrote the manifest."""
        with self._busy:
            content = (self.folder / layout.MANIFEST).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            changed = digest != self._pushed and digest != self._state()[0]
            if everything or changed or time.monotonic() - self._looked > LOOSE_S:
                self.lease.check()
                for path, sha256 in _named_in(content).items():
                    if self.known.get(path) != sha256:
                        self._put_file(path, sha256)
            if everything or time.monotonic() - self._looked > LOOSE_S:
                self.put_loose()
            if changed or self.etag is None:
                self._put_manifest(content, digest)

    def _beat(self) -> None:
        """Loose files from time to time while nothing is committed; never waits, since the lease would not be renewed."""
        if self._mirrors and self._busy.acquire(blocking=False):
            try:
                self.put_loose()
            finally:
                self._busy.release()

    def put_loose(self) -> None:
        """Put the study, the journal and replies that were paid for, where they changed."""
        with self._busy:
            self._looked = time.monotonic()
            paths = [layout.STUDY, layout.JOURNAL]
            paths += [str(p.relative_to(self.folder)) for p in (self.folder / layout.JUDGE).glob("*.jsonl")]
            there = [path for path in paths if (self.folder / path).is_file()]
            for path in there:
                stamp = stamp_of(self.folder / path)
                if self._loose.get(path) != stamp:
                    self.lease.check()
                    self.objects.put(path, (self.folder / path).read_bytes())
                    self._loose[path] = stamp
            named = sorted({*self._named, *there})
            if named != self._named:
                self.lease.check()
                self.objects.put(LOOSE, json.dumps(named).encode())
                self._named = named

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Everything that the copy holds is in the store when this returns; where the work ended in an error, if the store
        takes it. Raises as `push`."""
        if isinstance(error, StoreError):
            return
        with (
            contextlib.nullcontext() if error is None else contextlib.suppress(StoreError, FileNotFoundError)
        ):
            self.push(everything=True)

    def end(self) -> None:
        """Mirror no more, and let the next driver in."""
        watchers.pop(str(self.folder.resolve()), None)
        self.lease.release()

    def _put_file(self, path: str, sha256: str) -> None:
        file = self.folder / path
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() == sha256:  # else the run will notice, and make it again
            self.objects.put(path, content)
            self.known[path] = sha256

    def _put_manifest(self, content: bytes, digest: str) -> None:
        self.lease.check()
        self._keep_state(self._state()[0], digest)
        try:
            self.etag = self.objects.put(layout.MANIFEST, content, match=self.etag)
        except ConditionError:
            raise StoreError(
                f"{self.objects.address}/{layout.MANIFEST}: another driver wrote it since this one last did, so this one stops. "
                "What was made is kept in the copy on this machine. Run the same command again when no other driver works on it."
            ) from None
        self._keep_state(digest)
        self._pushed = digest

    # ── what the copy knows of the store ─────────────────────────────────────────────────────────
    def _state(self) -> tuple[str, str]:
        """(hash of the manifest that was last seen in the store, hash of one that was about to be put)."""
        try:
            told = json.loads((self.folder / STATE).read_bytes())
            return str(told["seen"]), str(told["putting"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return "", ""

    def _keep_state(self, seen: str, putting: str = "") -> None:
        atomic_write(self.folder / STATE, json.dumps({"seen": seen, "putting": putting}).encode())


def _named_in(manifest: bytes) -> dict[str, str]:
    """Path → hash of the files that a manifest names; of a damaged one nothing."""
    parsed: Mapping[str, Any] = parse_manifest(manifest) or {"shards": {}}
    return {path: entry["sha256"] for path, entry in parsed["shards"].items()}


def _is_loose(name: Any) -> bool:
    """Whether a name is one of a file beside the manifest, and of nothing outside the folder."""
    if not isinstance(name, str):
        return False
    parts = PurePosixPath(name).parts
    judge = len(parts) == 2 and parts[0] == layout.JUDGE and name.endswith(".jsonl") and ".." not in parts
    return judge or name in (layout.STUDY, layout.JOURNAL)
