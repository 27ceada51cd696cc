"""Where a run can be exported to, by name, and one call for all. Demands the optional packages of the place that is named
(looked for before anything is sent); leaves what is sent to `inspect_log`, `wandb_run` and `hub`."""

from __future__ import annotations

import importlib
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from leakfast.errors import InputError, optional
from leakfast.progress import Progress
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    from leakfast.stats.tables import Stats
    from leakfast.storage.run import Run


class _Kind(NamedTuple):
    module: str
    needs: str  # package that is imported
    extra: str  # of leakfast, "" where the package comes along anyway
    where: str  # what `where` means


KINDS = {
    "inspect": _Kind("leakfast.sinks.inspect_log", "inspect_ai", "inspect", "FOLDER"),
    "wandb": _Kind("leakfast.sinks.wandb_run", "wandb", "wandb", "PROJECT"),
    "hub": _Kind("leakfast.sinks.hub", "huggingface_hub", "", "OWNER/NAME"),
}
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PROJECT = re.compile(r"[^/\\#?%:\s][^/\\#?%:]*(/[^/\\#?%:]+)?")


@dataclass(frozen=True)
class Target:
    """kind: of KINDS. where: folder of logs, project (ENTITY/PROJECT), or repository; public: seen by everyone."""

    kind: str
    where: str
    public: bool = False


@dataclass
class Sent:
    """What an export did: the place in words, what was sent, what was there already with the same hash, and what the run
    has that the place does not get, with the reason. dropped: the same of what the study no longer names, in a line; None
    where the run has nothing of it."""

    to: str
    where: str
    sent: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    dropped: str | None = None


def target(word: str, run: str | Path, *, public: bool = False) -> Target:
    """`KIND` or `KIND:WHERE` as a Target; run: gives its name to what is not named. Raises InputError for a kind that
    there is not, and where a name is needed or none that the place allows."""
    kind, _, where = word.partition(":")
    name = Path(run).resolve().name
    if kind not in KINDS:
        raise InputError(
            f"export: {word} given, but there is no such place.{did_you_mean(kind, KINDS)} Use one of: "
            f"{', '.join(f'{name}:{one.where}' for name, one in KINDS.items())}."
        )
    if kind == "inspect":
        where = where or str(Path(os.environ.get("INSPECT_LOG_DIR") or "logs") / name)
    if kind == "wandb":
        where = where or os.environ.get("WANDB_PROJECT") or "leakfast"
        if not _PROJECT.fullmatch(where):
            raise InputError(
                f"export: the project {where!r} given; Weights & Biases takes none with : # ? % or \\. Type: "
                "--to wandb --project PROJECT (or ENTITY/PROJECT)."
            )
    if kind == "hub" and not _REPO.fullmatch(where):
        raise InputError(
            f"export: hub needs a repository, {where or 'none'} given. Type: --to hub --repo OWNER/NAME, where OWNER is "
            "your name or organization on the Hub."
        )
    return Target(kind, where, public)


def check(asked: Target) -> None:
    """The place's package is here, and can be imported. Raises InputError with how to install it."""
    with _package(asked):
        importlib.import_module(KINDS[asked.kind].needs)


def _package(asked: Target) -> AbstractContextManager[None]:
    """The block in which the place's package is imported, and parts of it wherever they are used."""
    kind = KINDS[asked.kind]
    install = f"pip install '{f'leakfast[{kind.extra}]' if kind.extra else kind.needs}'"
    return optional(kind.needs, f"export: {asked.kind} needs the package", install)


def export(
    run: str | Path | Run, asked: Target, stats: Stats | None = None, progress: Progress | None = None
) -> Sent:
    """Send a run to a place; what is there with the same hash is not sent again, so the same call goes on from where an
    earlier one stopped. stats: the run's tables, read (or made, where they are out of date) without it. Raises InputError
    for a run that holds nothing, a missing package or no right to write there, SinkError where the place refuses."""
    from leakfast.sinks.material import Material
    from leakfast.stats import dropped

    check(asked)
    material = Material.of(run, stats)
    with _package(asked):
        module = importlib.import_module(KINDS[asked.kind].module)
        sent: Sent = module.send(material, asked, progress or (lambda done, total, what="": None))
    sent.dropped = dropped.unsent(material.run)
    return sent
