"""Replies that were paid for, each noted on the disk (leakfast.storage.journal) before anything else happens. Demands the path of
one judge's; leaves asking to the judges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from leakfast.judge.contract import Reply
from leakfast.storage import journal as lines


class Cache:
    """Replies of one judge that were paid for, by key. A damaged line is a reply that is not there."""

    def __init__(self, path: Path):
        self.path = path
        entries, self.damaged = lines.read(path)
        self.replies: dict[str, Reply] = {}
        self.spent_usd = 0.0
        for entry in entries:
            self.spent_usd += entry.pop("usd", 0.0)
            self.replies[entry["key"]] = Reply(**entry)

    def keep(self, replies: Iterable[tuple[Reply, float]]) -> None:
        """Note (reply, what it cost in USD) on the disk before anything else happens; only those paid for."""
        paid = [(reply, usd) for reply, usd in replies if reply.is_paid]
        lines.append(self.path, [{**asdict(reply), "usd": usd} for reply, usd in paid])
        for reply, usd in paid:
            self.replies[reply.key] = reply
            self.spent_usd += usd
