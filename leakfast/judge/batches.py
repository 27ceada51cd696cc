"""Batches from the moment they are meant to the moment all their results are on the disk. Each step is in a journal
before the next one is taken, so a crash anywhere is taken up again: a batch is never sent twice, and no result is
lost. Demands a client that submits, finds, looks and fetches; knows no service."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from leakfast.errors import JudgeError
from leakfast.judge.contract import ERROR, UNREADABLE, Reply, Request
from leakfast.judge.prices import Budget
from leakfast.judge.sdk import Unsure
from leakfast.progress import Progress
from leakfast.storage import journal as lines
from leakfast.storage.interrupts import pause

log = logging.getLogger("leakfast.judge")


@dataclass
class Intent:
    """A batch that was to be sent: its own id, when (seconds since 1970), the keys in it, what it may cost, and
    the service's id of it once known. candidates: ids it may have, where the answer to sending it was lost."""

    id: str
    time: float
    keys: list[str]
    usd: float
    batch_id: str | None = None
    candidates: list[str] = field(default_factory=list)
    broken: bool = False


@dataclass(frozen=True)
class Ended:
    """A batch that ended. where: names of result files; rest: the status of what has no result line; gone: the
    service has it no more."""

    where: tuple[str, ...] = ()
    rest: str | None = None
    why: str | None = None
    gone: bool = False


class Client(Protocol):
    """What the services have in common."""

    max_requests: int
    max_bytes: int

    def submit(self, requests: Sequence[Request], intent: Intent) -> str: ...
    def find(self, intent: Intent) -> list[str]: ...
    def state(self, batch_id: str) -> Ended | None: ...
    def results(self, batch_id: str, ended: Ended) -> Iterator[tuple[str, Reply]]: ...
    def line(self, request: Request) -> str: ...


class Ledger:
    """The journal of one judge's batches."""

    def __init__(self, path: Path):
        self.path = path
        self.open: dict[str, Intent] = {}
        self.known_ids: set[str] = set()
        entries, damaged = lines.read(path)
        if damaged:
            log.warning("%s: %d damaged lines are left out", path, damaged)
        for entry in entries:
            self._apply(entry)

    def note(self, **entry: Any) -> None:
        """Write an event to the disk, then to memory."""
        lines.append(self.path, [entry])
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        event, name = entry["event"], entry["intent"]
        if event == "intent":
            self.open[name] = Intent(name, entry["time"], entry["keys"], entry["usd"])
        elif event in ("submitted", "foreign"):
            self.known_ids.add(entry["batch"])
            if name in self.open:
                self.open[name].batch_id = entry["batch"] if event == "submitted" else None
        elif event == "closed":
            self.open.pop(name, None)


def in_flight(ledger: Ledger) -> set[str]:
    """Keys of requests that are in an open batch."""
    return {key for intent in ledger.open.values() for key in intent.keys}


def carry_out(
    client: Client,
    requests: Sequence[tuple[Request, int]],
    ledger: Ledger,
    budget: Budget,
    keep: Callable[[list[Reply]], None],
    poll_s: float,
    progress: Progress | None = None,
) -> tuple[dict[str, Reply], bool]:
    """Take up open batches, send what is in none (as far as the budget goes), wait, and keep every result.

    requests: with their prompt tokens. keep: puts replies on the disk. Returns (replies by key, whether the
    budget stopped it). Raises JudgeError where the service fails; ids and results so far stay."""
    replies: dict[str, Reply] = {}
    total = len(requests)
    stopped = False
    while True:
        attach(client, ledger, budget)
        open_keys = in_flight(ledger)
        fresh = [one for one in requests if one[0].key not in open_keys and one[0].key not in replies]
        for chunk in _chunks(client, fresh):
            sent = _affordable(chunk, budget)
            if sent:
                _send(client, ledger, sent, budget)
            if len(sent) < len(chunk):
                stopped = True
                break
        again = False
        while waiting := [intent for intent in ledger.open.values() if not intent.broken]:
            looked = [_look(client, ledger, intent, budget, replies, keep) for intent in waiting]
            again |= "foreign" in looked
            if progress is not None:
                progress(len(replies), max(total, len(replies)), "results")
            if all(state == "runs" for state in looked):
                pause(poll_s)
        if not again:
            return replies, stopped


def attach(client: Client, ledger: Ledger, budget: Budget) -> None:
    """Find out what became of batches whose sending was cut short, before anything else is sent. What one that never arrived was
    to cost at most may be spent again."""
    for intent in list(ledger.open.values()):
        if intent.batch_id is not None:
            log.info("judge: batch %s of %d requests taken up again", intent.batch_id, len(intent.keys))
            continue
        intent.candidates = [name for name in client.find(intent) if name not in ledger.known_ids]
        if intent.candidates:
            ledger.note(event="submitted", intent=intent.id, batch=intent.candidates[0])
            log.info("judge: batch %s found again at the service", intent.candidates[0])
        else:
            ledger.note(event="closed", intent=intent.id, why="the service has no such batch")
            budget.settle(intent.usd, 0.0)


def _send(client: Client, ledger: Ledger, sent: Sequence[tuple[Request, int]], budget: Budget) -> None:
    usd = sum(budget.at_most(n) for _, n in sent)
    name = secrets.token_hex(8)
    keys = [request.key for request, _ in sent]
    ledger.note(event="intent", intent=name, time=time.time(), keys=keys, usd=usd)
    try:
        batch_id = client.submit([request for request, _ in sent], ledger.open[name])
    except Unsure:
        raise  # left open: looked for by the next command
    except JudgeError:
        ledger.note(event="closed", intent=name, why="refused")
        raise
    ledger.note(event="submitted", intent=name, batch=batch_id)
    log.info("judge: batch %s of %d requests sent", batch_id, len(sent))


def _look(
    client: Client,
    ledger: Ledger,
    intent: Intent,
    budget: Budget,
    replies: dict[str, Reply],
    keep: Callable[[list[Reply]], None],
) -> str:
    """Fetch the results of a batch that ended: `runs`, `ended`, `broken`, or `foreign` where it was another's,
    found in the place of ours, and ours must be sent again."""
    assert intent.batch_id is not None
    ended = client.state(intent.batch_id)
    if ended is None:
        return "runs"

    def close(why: str) -> None:
        ledger.note(event="closed", intent=intent.id, why=why)
        budget.settle(intent.usd, 0.0)

    wanted = set(intent.keys)
    if ended.gone:
        log.warning("judge: the service no longer has batch %s; its results are lost", intent.batch_id)
        replies.update({key: Reply(key, ERROR, detail="the batch is gone") for key in wanted})
        close("gone")
        return "ended"
    found = dict(client.results(intent.batch_id, ended))
    if found and not wanted & set(found):
        log.info("judge: batch %s is not ours", intent.batch_id)
        ledger.note(event="foreign", intent=intent.id, batch=intent.batch_id)
        if others := [name for name in intent.candidates if name not in ledger.known_ids]:
            ledger.note(event="submitted", intent=intent.id, batch=others[0])
            return "runs"
        close("the service has no such batch")
        return "foreign"
    found = {key: reply for key, reply in found.items() if key in wanted}
    keep(list(found.values()))
    replies.update(found)
    missing = wanted - set(found)
    if missing and ended.rest is None:
        log.warning(
            "judge: %d of %d results of batch %s cannot be read; the same command fetches them again",
            len(missing),
            len(wanted),
            intent.batch_id,
        )
        replies.update({key: Reply(key, UNREADABLE, detail="no readable line") for key in missing})
        intent.broken = True  # in memory alone: the next command looks again
        return "broken"
    replies.update({key: Reply(key, ended.rest or ERROR, detail=ended.why) for key in missing})
    close("collected")
    return "ended"


def _chunks(client: Client, fresh: Sequence[tuple[Request, int]]) -> Iterator[list[tuple[Request, int]]]:
    """Pieces that fit into one batch, by number and bytes."""
    chunk: list[tuple[Request, int]] = []
    size = 0
    for request, n in fresh:
        length = len(client.line(request)) + 1
        if chunk and (len(chunk) == client.max_requests or size + length > client.max_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append((request, n))
        size += length
    if chunk:
        yield chunk


def _affordable(chunk: list[tuple[Request, int]], budget: Budget) -> list[tuple[Request, int]]:
    """The longest beginning that the budget allows, promised."""
    for count, (_, n) in enumerate(chunk):
        if not budget.promise(budget.at_most(n)):
            return chunk[:count]
    return chunk
