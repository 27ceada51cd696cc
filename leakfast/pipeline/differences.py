"""What two runs were told differently, what they were made with, and which numbers moved. Demands two run directories, of which
nothing is changed; leaves the statistics to stats."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.errors import InputError
from leakfast.models.adapters import card_in
from leakfast.stats.against import Side, compare, pairs_of
from leakfast.stats.collect import inputs_hash
from leakfast.stats.moved import moved
from leakfast.stats.tables import Stats, read, stats
from leakfast.storage import layout
from leakfast.storage.documents import parse_toml
from leakfast.storage.manifests import events
from leakfast.storage.reading import ReadOnlyRun
from leakfast.study.config import parse_study

log = logging.getLogger("leakfast.diff")
_ABSENT = "–"
_NAMED = 3  # personas that are told by name
_MEASURED = (
    layout.COMPLETIONS,
    layout.CHOICES,
    layout.PROBABILITY,
)  # trees whose shards tell how they were made


@dataclass(frozen=True)
class Differences:
    """settings: (dotted path, a, b) of the two studies; made_with: the same of versions, model, prompts and adapters; numbers:
    `against.compare`; rates: `moved.moved`, the farthest first; only: what one of the two measured alone, adapters and, of
    adapters that both have, personas; notes: what could not be set against each other."""

    settings: list[tuple[str, Any, Any]]
    made_with: list[tuple[str, Any, Any]]
    numbers: pl.DataFrame
    rates: pl.DataFrame
    only: tuple[list[str], list[str]]
    notes: list[str]

    @property
    def identical(self) -> bool:
        """Nothing differs, not even what the two were made with."""
        tables = (self.numbers, self.rates)
        same = all((table["difference"].fill_null(0.0) == 0).all() for table in tables)
        # a rate that one of the two has alone
        known = all((table["value"].is_null() == table["other"].is_null()).all() for table in tables)
        return same and known and not self.settings and not self.made_with and not any(self.only)


def differences(this: str | Path, other: str | Path, *, bootstraps: int = 2000, seed: int = 0) -> Differences:
    """The first run set against the second. bootstraps, seed: of the intervals of ρ's differences. Raises InputError for a path
    that is no run and for a run without anything to count."""
    runs = [ReadOnlyRun(path) for path in (this, other)]
    for run in runs:
        run.open()
    notes: list[str] = []
    one, two = (Side(run, _tables(run)) for run in runs)
    measured = [
        {f"{b}/{a}" for b, a in side.stats.rates.select("behavior", "adapter").unique().rows()}
        for side in (one, two)
    ]
    for pair in pairs_of(one, two, base=True):
        asked = [set(part["persona"]) for part in (pair.mine, pair.theirs)]
        named = (pair.told["adapter"], pair.told["other_adapter"])
        for k, name in enumerate(named):
            if alone := sorted(asked[k] - asked[1 - k]):
                some = ", ".join(alone[:_NAMED]) + f" and {len(alone) - _NAMED} more" * (len(alone) > _NAMED)
                measured[k].add(f"{pair.told['behavior']}/{name} as {some}")
    return Differences(
        _settings(runs, notes),
        _apart(*map(_made_with, runs)),
        compare(one, two, bootstraps=bootstraps, seed=seed),
        moved(one, two),
        (sorted(measured[0] - measured[1]), sorted(measured[1] - measured[0])),
        notes,
    )


def _tables(run: ReadOnlyRun) -> Stats:
    """The run's tables where they rest on what it holds, made by whichever version; else computed, and not kept."""
    stage = run.manifest["stages"].get("stats", {})
    if stage.get("inputs") == inputs_hash(run):
        try:
            return read(run)
        except (InputError, ValueError):
            pass  # of a version with other columns
    log.info("%s: tables are absent or older than what they rest on; computing them", run.path)
    return stats(run, write=False)


def _settings(runs: list[ReadOnlyRun], notes: list[str]) -> list[tuple[str, Any, Any]]:
    """Every setting with another value, defaults included; one that both files spell alike is the same (a file beside them)."""
    texts = []
    for run in runs:
        path = run.path / layout.STUDY
        texts.append(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None)
    if None in texts:
        if texts != [None, None]:
            notes.append(f"settings: {runs[texts.index(None)].path} was made without a study")
        return []
    raw = [
        _flat(parse_toml(text or "", run.path / layout.STUDY).data)
        for text, run in zip(texts, runs, strict=True)
    ]
    try:
        checked = [
            parse_study(text or "", run.path / layout.STUDY).model_dump(mode="json")
            for text, run in zip(texts, runs, strict=True)
        ]
    except InputError as error:
        notes.append(
            f"settings: as the files spell them, without defaults: {' '.join(error.message.split())}"
        )
        return _apart(*raw)
    alone = _alone(*(study["behaviors"] for study in checked))
    whole = [_flat(study) for study in checked]
    spelled = {path for path, value in raw[0].items() if path in raw[1] and raw[1][path] == value}
    return [*alone, *(row for row in _apart(*whole) if row[0] not in spelled)]


def _alone(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """A row for every behavior that one of two studies has, taken out of it."""
    rows = []
    for name in sorted(one.keys() ^ other.keys()):
        sides = [_ABSENT if study.pop(name, None) is None else "asked" for study in (one, other)]
        rows.append((f"behaviors.{name}", *sides))
    return rows


def _flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{before}{key}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{path}.")
        else:
            found[path] = value
    return found


def _apart(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    paths = dict.fromkeys([*one, *other])
    rows = [(path, one.get(path, _ABSENT), other.get(path, _ABSENT)) for path in paths]
    return [row for row in rows if row[1] != row[2]]


def _made_with(run: ReadOnlyRun) -> dict[str, Any]:
    """Versions, the model, the personas' rendered prompts, what each behavior was asked, the adapters' hashes: what of them the
    run tells."""
    told: dict[str, Any] = {}
    outputs = run.manifest["stages"].get("stats", {}).get("outputs", {})
    told |= {f"tables: {name}": outputs[name] for name in ("leakfast", "commit") if outputs.get(name)}
    journal = run.path / layout.JOURNAL
    for entry in events(journal, "engine"):  # the last one holds
        told["engine"] = f"{entry.get('backend')} {entry.get('version')}"
    for entry in events(journal, "model"):
        told |= {"model": entry.get("name"), "model: dtype": entry.get("dtype")}
    prompts: dict[str, str] = {}
    asked: dict[str, set[str]] = {}
    for relpath, entry in run.manifest["shards"].items():
        parts = relpath.split("/")
        if parts[0] not in _MEASURED:
            continue
        prompts |= entry.get("personas", {})
        told |= {"model: fingerprint": entry["base"]} if entry.get("base") else {}
        for what in ("questions", "items"):
            if digest := entry.get(f"{what}_sha256"):
                asked.setdefault(f"{what} of {entry.get('behavior', parts[1])}", set()).add(digest[:16])
    told |= {name: ", ".join(sorted(digests)) for name, digests in sorted(asked.items())}
    told |= {f"prompt of {name}": digest for name, digest in sorted(prompts.items())}
    for folder in sorted((run.path / layout.ADAPTERS).glob("*")):
        card = card_in(run.path, folder.name)
        if card is not None:
            told[f"adapter {folder.name}"] = card.adapter_hash[:16]
            told[f"training rows of {folder.name}"] = card.data_hash[:16]
    return told
