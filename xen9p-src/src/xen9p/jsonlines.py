"""JSON objects, one a line, over a stream socket that never blocks the loop."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from xen9p.loop import Loop

Object = dict[str, Any]

MAX_LINE: Final = 256 * 1024
MAX_UNSENT: Final = 4 * 1024 * 1024


def listen(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner can connect to; what lay there is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


class BadLineError(ValueError):
    """A line that is no JSON object, or too long."""


class LineBuffer:
    """Takes bytes as they come and gives the objects that are whole."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._data = bytearray()
        self._max_line = max_line

    def feed(self, data: bytes) -> list[Object]:
        """The objects that data completes; BadLineError ends the conversation."""
        self._data += data
        *lines, rest = self._data.split(b"\n")
        self._data = bytearray(rest)
        if len(rest) > self._max_line:
            raise BadLineError(f"a line of over {self._max_line} bytes")
        return [parse(bytes(line)) for line in lines if line.strip()]


def parse(line: bytes) -> Object:
    """One object from one line, or BadLineError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadLineError(f"a JSON object is wanted, not {type(value).__name__}")
    return value


def dump(value: Object) -> bytes:
    """One line for one object."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class Channel:
    """A conversation in the loop. It owns the socket.

    Args:
        received: called with each object.
        closed: called once with the reason when the other side hangs up, errs or does not read;
            not called after close().
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        received: Callable[[Object], None],
        closed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._received = received
        self._closed_callback = closed
        self._lines = LineBuffer()
        self._unsent = bytearray()
        self.open = True
        sock.setblocking(False)
        loop.add(sock, self._ready)

    def send(self, value: Object) -> None:
        """Sends now or as soon as the other side reads; nothing happens on a closed channel."""
        if not self.open:
            return
        self._unsent += dump(value)
        self._flush()

    def close(self) -> None:
        """Closes without telling closed(); what is unsent is lost."""
        if self.open:
            self.open = False
            self._loop.remove(self._sock)
            self._sock.close()

    def _end(self, reason: str) -> None:
        if self.open:
            self.close()
            self._closed_callback(reason)

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            # The loop will read what is left and then find the end; do not lose a last word.
            self._unsent.clear()
            if error.errno is None:
                self._end("broken")
            return
        if len(self._unsent) > MAX_UNSENT:
            self._end("does not read")
            return
        self._loop.modify(self._sock, self._ready, write=bool(self._unsent))

    def _ready(self) -> None:
        if self._unsent:
            self._flush()
        if not self.open:
            return
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error.strerror or "broken")
            return
        if not data:
            self._end("hung up")
            return
        try:
            objects = self._lines.feed(data)
        except BadLineError as error:
            self._end(str(error))
            return
        for value in objects:
            if not self.open:
                return
            self._received(value)
