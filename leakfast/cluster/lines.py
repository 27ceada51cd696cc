"""The line between a driver and a worker on this machine: messages on a socket, each after its length, written as
multiprocessing writes them between processes of one program. The driver's end never waits, so that a worker that hangs in the
middle of a message, or reads none, holds up nobody else. Demands connected sockets; leaves what is said to messages.py."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections import deque
from multiprocessing.reduction import ForkingPickler
from typing import Any

_LENGTH = struct.Struct("!Q")


class Line:
    """The driver's end. Raises OSError where the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self._out: deque[memoryview] = deque()
        self._length = True  # what comes next is a length
        self._body = bytearray(_LENGTH.size)
        self._room = memoryview(self._body)

    @property
    def awaits(self) -> int:
        """Events of `selectors` at which there is something to do."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    def send(self, what: Any) -> None:
        """What the other end does not take now goes with `flush`."""
        body = ForkingPickler.dumps(what)
        self._out += (memoryview(_LENGTH.pack(len(body))), memoryview(body))
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._out:
                rest = self._out[0][self.end.send(self._out[0]) :]
                if rest:
                    self._out[0] = rest
                else:
                    self._out.popleft()

    def receive(self) -> Any:
        """The next message that is whole, None where there is none yet. Raises EOFError where the other end is gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                n_bytes = self.end.recv_into(self._room)
                if n_bytes == 0:
                    raise EOFError
                self._room = self._room[n_bytes:]
                if self._room:
                    continue
                body = self._body
                self._length = not self._length
                self._body = bytearray(_LENGTH.size if self._length else _LENGTH.unpack(body)[0])
                self._room = memoryview(self._body)
                if self._length:
                    return ForkingPickler.loads(body)
        return None

    def close(self) -> None:
        self.end.close()


def send(end: socket.socket, what: Any) -> None:
    """The worker's end: on its way, whole, when this returns. Raises OSError where the driver is gone."""
    body = ForkingPickler.dumps(what)
    end.sendall(_LENGTH.pack(len(body)))
    end.sendall(body)


def receive(end: socket.socket) -> Any:
    """The worker's end: the next message, waited for. Raises EOFError, OSError where the driver is gone."""
    return ForkingPickler.loads(_whole(end, _LENGTH.unpack(_whole(end, _LENGTH.size))[0]))


def _whole(end: socket.socket, n_bytes: int) -> bytearray:
    body = bytearray(n_bytes)
    room = memoryview(body)
    while room:
        got = end.recv_into(room)
        if got == 0:
            raise EOFError
        room = room[got:]
    return body
