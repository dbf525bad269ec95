"""The frontend's end of a ring as a transport: what rings in memory and rings shared with Xen have in common."""

from __future__ import annotations

import errno
import os
from typing import Any

from xen9p._dataplane import ffi, lib
from xen9p.errors import ProtocolError

BROKEN = "a ring index or message size of the backend is out of range"


class RingFront:
    """Whole messages over the frontend's half of a ring (C's x9_front), which it owns.

    Args:
        front: an x9_front.
        half: bytes a direction.
        timeout: seconds that send() and recv() wait; None for ever.

    Raises:
        ProtocolError: the backend's indices or sizes are out of range.
        TimeoutError: nothing came, or no room was made, in time.
    """

    def __init__(self, front: Any, half: int, timeout: float | None) -> None:
        self._front = front
        self._timeout_ms = _milliseconds(timeout)
        self._buffer = ffi.new("uint8_t[]", half)

    def send(self, data: bytes, /) -> None:
        """Puts one message into the ring; waits for room."""
        self._check(lib.x9_front_send(self._front, data, len(data), self._timeout_ms))

    def recv(self, timeout: float | None = None) -> bytes:
        """Takes one message off the ring; waits for it."""
        wait = self._timeout_ms if timeout is None else _milliseconds(timeout)
        size = lib.x9_front_recv(self._front, self._buffer, len(self._buffer), wait)
        self._check(-size if size < 0 else 0)
        return bytes(ffi.buffer(self._buffer, size))

    def post(self, data: bytes, /) -> bool:
        """Puts one message into the ring if there is room."""
        err = lib.x9_front_send(self._front, data, len(data), 0)
        if err == errno.ETIMEDOUT:
            return False
        self._check(err)
        return True

    def poll(self) -> bytes | None:
        """Takes one message off the ring if it is there."""
        size = lib.x9_front_recv(self._front, self._buffer, len(self._buffer), 0)
        if size == -errno.ETIMEDOUT:
            return None
        self._check(-size if size < 0 else 0)
        return bytes(ffi.buffer(self._buffer, size))

    def flush(self) -> bool:
        """True: what post() took is in the ring."""
        return True

    def fileno(self) -> int:
        """Readable when the backend has sent an event."""
        return int(lib.x9_front_fd(self._front))

    @staticmethod
    def _check(err: int) -> None:
        if err == errno.EPROTO:
            raise ProtocolError(BROKEN)
        if err:
            raise OSError(err, os.strerror(err))

    def close(self) -> None:
        """Gives up the ring; twice is allowed."""
        front, self._front = self._front, None
        if front is not None:
            lib.x9_front_free(front)


def _milliseconds(seconds: float | None) -> int:
    return -1 if seconds is None else int(seconds * 1000)
