"""Log lines with fields for the systemd journal: `journalctl GUEST=g1`.

Speaks the journal's own datagrams (systemd's JOURNAL_NATIVE_PROTOCOL), so that nothing has to be installed. Without a
journal, lines go to standard error.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

SOCKET: Final = "/run/systemd/journal/socket"
_PRIORITY: Final = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

Fields = dict[str, str]


def fields(guest: str, domid: int, devid: int | None = None, tag: str = "", export: str = "") -> Fields:
    """The fields of a line about a guest, or about one of its devices."""
    found = {"GUEST": guest, "DOMID": str(domid)}
    if devid is not None:
        found |= {"DEVICE": f"{domid}/{devid}", "TAG": tag, "EXPORT": export}
    return found


def encode(values: Mapping[str, str]) -> bytes:
    """One datagram: NAME=value lines; a value of more than one line goes with its length before it."""
    out = bytearray()
    for name, value in values.items():
        data = value.encode(errors="surrogateescape")
        if b"\n" in data:
            out += name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            out += name.encode() + b"=" + data + b"\n"
    return bytes(out)


class Handler(logging.Handler):
    """Sends each record as one line with its fields.

    Args:
        name: SYSLOG_IDENTIFIER.
        journal: whether there is one to send to; else, and when it does not take a line, that goes to standard error.
        path: the journal's socket.
    """

    def __init__(self, name: str, *, journal: bool, path: str = SOCKET) -> None:
        super().__init__()
        self._name = name
        self._about: Fields = {}
        self._path = path
        self._socket = _connect(path) if journal else None

    def speak_for(self, about: Fields) -> None:
        """From now on every line is about one device: what a worker says after its fork."""
        self._about = dict(about)

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if self._about:
            words = (f"{key.lower()}={self._about[key]}" for key in ("GUEST", "DEVICE", "TAG") if key in self._about)
            text = f"{' '.join(words)} {text}"
        if self._socket is None or not self._send(record, text):
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)

    def _send(self, record: logging.LogRecord, text: str) -> bool:
        assert self._socket is not None
        more: Any = getattr(record, "fields", {})
        message = encode(
            {
                "MESSAGE": f"{record.levelname.lower()}: {text}",
                "PRIORITY": str(_PRIORITY.get(record.levelno, 5)),
                "SYSLOG_IDENTIFIER": self._name,
                **self._about,
                **more,
            }
        )
        try:
            self._socket.send(message, socket.MSG_DONTWAIT)
        except OSError as error:
            # Busy, or being restarted: standard error leads there too.
            if error.errno in (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE):
                self._again()
            return False
        return True

    def _again(self) -> None:
        """The journal was restarted: its socket is a new one."""
        assert self._socket is not None
        try:
            self._socket.connect(self._path)
        except OSError:
            return  # not there yet, or out of sight of a confined worker

    def reconnect(self) -> None:
        """Forgets a socket whose descriptor is closed, and opens another."""
        if self._socket is not None:
            self._socket.detach()
            self._socket = _connect(self._path)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        super().close()


def _connect(path: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return None
    return sock


def set_up(name: str) -> None:
    """Logs to the journal if systemd has connected standard error to it, and else to standard error."""
    logging.basicConfig(level=logging.INFO, handlers=[Handler(name, journal="JOURNAL_STREAM" in os.environ)])


def after_fork() -> None:
    """In a child that has closed every descriptor: connects to the journal anew."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Handler):
            handler.reconnect()


def speak_for(about: Fields) -> None:
    """Lets every line of this process be about one device."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Handler):
            handler.speak_for(about)
