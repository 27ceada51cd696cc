"""A run's files against the hashes that are kept of them: bytes, journal lines, study, centroids, adapters. Demands a run that
is only read; knows nothing of what the files say."""

from __future__ import annotations

from leakfast.errors import LeakfastError
from leakfast.geometry import Centroids
from leakfast.models.adapters import CONFIG, adapter_hash, read_card
from leakfast.models.whole import is_whole
from leakfast.pipeline.checks.contract import Check
from leakfast.storage import layout
from leakfast.storage.manifests import parse_manifest, retell
from leakfast.storage.reading import ReadOnlyRun


def bytes_of(run: ReadOnlyRun) -> Check:
    """Every file of the manifest against its hash, and the manifest against its own."""
    check = Check("bytes", "files of the manifest")
    path = run.path / layout.MANIFEST
    if not path.is_file():
        check.wrong.append(f"{layout.MANIFEST}: is gone; what {layout.JOURNAL} tells was looked at instead")
    elif parse_manifest(path.read_bytes()) is None:
        check.wrong.append(
            f"{layout.MANIFEST}: its bytes do not match its checksum; what {layout.JOURNAL} tells was looked at instead"
        )
    told = len(run.manifest["shards"])
    run.shards()
    check.checked = told
    check.wrong += [f"{relpath}: {why}" for relpath, why in sorted(run.set_aside.items())]
    known = run.manifest["shards"]
    there = (p.relative_to(run.path).as_posix() for p in run.path.rglob("part-*.parquet"))
    loose = [name for name in there if name not in known and not name.startswith(layout.QUARANTINE)]
    if loose:
        check.notes.append(
            f"{len(loose)} shards are not in the manifest and count for nothing: {_some(loose)}"
        )
    aside = sum(path.is_file() for path in (run.path / layout.QUARANTINE).rglob("*"))
    if aside:
        check.notes.append(f"{layout.QUARANTINE}/ holds {aside} files that were set aside before")
    return check


def journal(run: ReadOnlyRun) -> Check:
    """Every line of log.jsonl against its check, and the files that the manifest counts against the last line about each."""
    check = Check("journal", "lines")
    path = run.path / layout.JOURNAL
    if not path.is_file():
        check.wrong.append(f"{layout.JOURNAL}: is gone")
        return check
    told: dict[str, dict] = {"shards": {}, "stages": {}}
    torn, unchecked = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        check.checked += 1
        unchecked += line.startswith(b'{"time": ')
        try:
            retell(told, line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.rstrip().endswith(b"}"):
                check.wrong.append(f"{layout.JOURNAL}, line {number}: its bytes do not match their check")
            else:
                torn.append(str(number))
    if torn:
        check.notes.append(
            f"lines {_some(torn)} end in mid-word, as a kill leaves them; they count for nothing"
        )
    if unchecked:
        check.notes.append(f"{unchecked} lines of an earlier version carry no check")
    for relpath, entry in run.manifest["shards"].items():
        last = told["shards"].get(relpath)
        if last is not None and last["sha256"] != entry["sha256"]:
            check.wrong.append(f"{relpath}: {layout.JOURNAL} tells of other bytes than {layout.MANIFEST}")
    return check


def study(run: ReadOnlyRun, why: str) -> Check:
    """study.toml against the hash that the manifest keeps of it. why: it cannot be read as it lies there."""
    check = Check("study", "files")
    try:
        check.checked = 0 if run.check_study() is None else 1
    except LeakfastError as error:
        check.wrong.append(error.message)
    if why:
        check.notes.append(f"rows are not set against it: {why}")
    elif check.checked and run.manifest.get("study") is None:
        check.notes.append(f"the manifest keeps no hash of {layout.STUDY}")
    return check


def adapters(run: ReadOnlyRun) -> Check:
    """Adapters against the hash on their card, shards against the adapter they were measured of, and the files of centroids
    against the hash they carry."""
    check = Check("adapters and centroids", "folders and files")
    digests: dict[str, str] = {}
    for folder in sorted(path for path in (run.path / layout.ADAPTERS).glob("*") if path.is_dir()):
        check.checked += 1
        name = folder.name
        try:
            card = read_card(folder)
            if card is None:
                check.notes.append(f"{layout.adapter(name)}: has no card")
                continue
            digests[name] = card.adapter_hash
            if not ((folder / CONFIG).is_file() or is_whole(folder)):
                check.notes.append(f"{layout.adapter(name)}: the card alone; its weights lie elsewhere")
            elif adapter_hash(folder) != card.adapter_hash:
                check.wrong.append(f"{layout.adapter(name)}: is not the adapter that its card describes")
        except (LeakfastError, OSError) as error:
            said = error.message if isinstance(error, LeakfastError) else str(error)
            check.wrong.append(f"{layout.adapter(name)}: {said}")
    for relpath, entry in run.manifest["shards"].items():
        name = layout.measured_of(relpath)
        if "adapter" in entry and name in digests and entry["adapter"] != digests[name]:
            check.wrong.append(f"{relpath}: was measured of another adapter than {layout.adapter(name)}")
    for path in sorted((run.path / layout.CENTROIDS).glob("*.safetensors")):
        check.checked += 1
        try:
            Centroids.load(path)
        except LeakfastError as error:
            check.wrong.append(error.message)
    return check


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
