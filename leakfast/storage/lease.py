"""One driver at a time on an object store, which has no locks: an object that its holder writes again and again, on condition
that nobody else did. Demands conditional puts; ages are told by the store's clock, so that machines' clocks may differ."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage.objects import ConditionError, Objects

log = logging.getLogger("leakfast.store")

KEY = ".lease.json"
SECONDS = (
    60.0  # after which a lease that was not renewed is another's to take; it is renewed three times as often
)


class Lease:
    """The right to write under an address. beat: called after each renewal, by the thread that renews."""

    def __init__(self, objects: Objects, beat: Callable[[], None] = lambda: None) -> None:
        self.objects, self.beat, self.seconds = objects, beat, SECONDS
        self._token, self._number = uuid.uuid4().hex, 0
        self._etag: str | None = None
        self._until, self._taken = 0.0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renewing, name="lease", daemon=True)

    def take(self) -> None:
        """Take the lease, and renew it from now on. Raises StoreError, with the holder and the seconds that are left, where
        another driver holds it."""
        found = self.objects.get(KEY)
        told = _parsed(found.content) if found is not None else {}
        if found is not None and (left := _left(told["seconds"], found.age_s)) > 0:
            raise self._held(told["holder"], left)
        self._etag = found.etag if found is not None else None
        try:
            self._write(self.seconds)
        except ConditionError:
            raise self._held("one that took it at this very moment", self.seconds) from None
        if told.get("holder"):
            log.warning("%s: taken over from %s, whose lease is over", self.objects.address, told["holder"])
        self._thread.start()

    def check(self) -> None:
        """Raises StoreError unless the lease is held for certain."""
        if self._taken or time.monotonic() >= self._until:
            raise StoreError(
                f"{self.objects.address}: the lease on this run was lost (not renewed for {self.seconds:g} s, or taken over by "
                "another driver), so nothing more is written there. What was made is kept in the copy on this machine. Run the "
                "same command again when no other driver works on it."
            )

    def release(self) -> None:
        """Let the next driver in at once; where the store does not answer, it waits for the end of the lease."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(StoreError, ConditionError):
            self.check()
            self._write(0.0)

    def _write(self, seconds: float) -> None:
        began = time.monotonic()
        self._number += 1
        told = {"holder": f"{socket.gethostname()}, process {os.getpid()}", "seconds": seconds}
        told |= {"token": self._token, "number": self._number}
        if seconds == 0:
            told["holder"] = ""
        self._etag = self.objects.put(KEY, json.dumps(told, sort_keys=True).encode(), match=self._etag)
        self._until = began + seconds

    def _renewing(self) -> None:
        while not self._stop.wait(self.seconds / 3):
            try:
                self._write(self.seconds)
            except ConditionError:
                self._taken = True
                log.warning("%s: another driver took the lease over", self.objects.address)
                return
            except StoreError as error:
                log.warning("the lease could not be renewed: %s", error.message)
                continue
            try:
                self.beat()
            except StoreError as error:
                log.warning("%s", error.message)

    def _held(self, holder: str, left: float) -> StoreError:
        return StoreError(
            f"{self.objects.address}: another driver ({holder}) is writing this run; its lease ends in "
            f"{max(1, round(left))} s unless it renews it. Wait for it to end, or give another address."
        )


def _left(seconds: float, age_s: float) -> float:
    """What is left of a lease, a second longer than its holder counts on, since ages are told to the second; 0 once released."""
    return seconds + 1.0 - age_s if seconds > 0 else 0.0


def _parsed(content: bytes) -> dict[str, Any]:
    """Holder and seconds of a lease; one that nobody can read is over after the usual time."""
    try:
        told = json.loads(content)
        return {"holder": str(told["holder"]), "seconds": float(told["seconds"])}
    except (ValueError, KeyError, TypeError):
        return {"holder": "unknown", "seconds": SECONDS}
