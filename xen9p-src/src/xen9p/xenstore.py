"""XenStore, typed: the only module that uses pyxs.

Of pyxs it takes what is sound, the packets and the connection, and not its router thread, whose death would
hang every caller for ever. So there is no thread here: a request waits for its reply until a deadline, watch
events that come in between are kept, and ``fileno()`` goes into the caller's selector.

After an error of the connection (XenStoreError) the next call connects anew and sets every watch again.
Paths and values are str here, bytes in pyxs.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import stat
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, TypeVar

from pyxs import connection as _connection
from pyxs._internal import Op as _Op
from pyxs._internal import Packet as _Packet
from pyxs.exceptions import PyXSError

from xen9p.errors import XenStoreError

SOCKET: Final = "/run/xenstored/socket"
TIMEOUT: Final = 10.0  # seconds for one request; xenstored answers in milliseconds unless it is gone
_MAX_PAYLOAD: Final = 4096
_TRANSACTION_TRIES: Final = 20
_PATH: Final = re.compile(r"@(introduceDomain|releaseDomain)|/?[A-Za-z0-9_@:-]+(/[A-Za-z0-9_@:-]+)*|/")
_PERMISSION: Final = re.compile(r"[nrwb][0-9]{1,5}")

T = TypeVar("T")


class XenStoreErrnoError(XenStoreError):
    """XenStore answered with an errno."""


class _Transport:
    """The socket under pyxs's packets: with deadlines, and closed in any case."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def recv(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            some = self._sock.recv(size - len(data))
            if not some:
                raise ConnectionResetError(errno.ECONNRESET, "xenstored hung up")
            data += some
        return bytes(data)

    def close(self) -> None:
        self._sock.close()


class _DeviceTransport:
    """The kernel's device under pyxs's packets: a guest's way to XenStore."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def recv(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += os.read(self._fd, size - len(data))
        return bytes(data)

    def close(self) -> None:
        os.close(self._fd)


class XenStore:
    """A connection to xenstored that opens when it is first used.

    Args:
        path: xenstored's Unix socket; in a guest the kernel's device, /dev/xen/xenbus.
        timeout: seconds that a single request may take.
    """

    def __init__(self, path: str = SOCKET, timeout: float = TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout
        self._connection: Any = None
        self._request = 0
        self._transaction = 0
        self._watches: set[tuple[str, str]] = set()
        # A dict as an ordered set: a watch that fires a thousand times is one event.
        self._events: dict[tuple[str, str], None] = {}

    # Connection.

    @property
    def connected(self) -> bool:
        """Whether the socket is open; it may be broken without anybody having noticed."""
        return self._connection is not None

    def connect(self) -> None:
        """Connects and sets all watches; each fires once. Does nothing when connected."""
        if self._connection is not None:
            return
        connection = _connection.UnixSocketConnection(self._path)
        connection.transport = self._open()
        self._connection = connection
        self._transaction = 0
        for path, token in sorted(self._watches):
            self._ack(_Op.WATCH, path, token)

    def _open(self) -> _Transport | _DeviceTransport:
        try:
            if stat.S_ISCHR(os.stat(self._path).st_mode):
                return _DeviceTransport(os.open(self._path, os.O_RDWR | os.O_CLOEXEC))
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(self._timeout)
                sock.connect(self._path)
            except OSError:
                sock.close()
                raise
            return _Transport(sock)
        except OSError as error:
            raise XenStoreError(
                f"XenStore does not answer at {self._path}",
                "is this dom0, and does xenstored run? see: systemctl status xenstored",
            ) from error

    def close(self) -> None:
        """Closes the socket; watches and kept events stay for the next connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def fileno(self) -> int:
        """The descriptor that is readable when events may have come; connects if need be."""
        self.connect()
        return int(self._connection.fileno())

    # Nodes.

    def read(self, path: str) -> str | None:
        """A node's value, None if there is none. Bytes that are not ASCII become backslash escapes."""
        try:
            payload = self._call(_Op.READ, path)
        except XenStoreErrnoError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return payload.decode("ascii", "backslashreplace")

    def write(self, path: str, value: str) -> None:
        """Makes or changes a node, and makes the nodes above it."""
        self._check_path(path)
        self._ack_raw(_Op.WRITE, path.encode() + b"\0" + value.encode())

    def mkdir(self, path: str) -> None:
        """Makes an empty node unless there is one."""
        self._ack(_Op.MKDIR, path)

    def remove(self, path: str) -> None:
        """Removes a node with all beneath it; nothing happens if it is not there."""
        try:
            self._ack(_Op.RM, path)
        except XenStoreErrnoError as error:
            if error.errno != errno.ENOENT:
                raise

    def children(self, path: str) -> list[str]:
        """The names of a node's children, [] if it is not there."""
        try:
            payload = self._call(_Op.DIRECTORY, path)
        except XenStoreErrnoError as error:
            if error.errno == errno.ENOENT:
                return []
            raise
        return [name.decode("ascii", "backslashreplace") for name in payload.split(b"\0") if name]

    def permissions(self, path: str) -> list[str]:
        """A node's permissions as in xenstore-chmod: owner first, e.g. ["n3", "r0"]."""
        return [p.decode() for p in self._call(_Op.GET_PERMS, path).split(b"\0") if p]

    def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        """Sets a node's permissions: owner and default first ("n3"), then others ("r0")."""
        for permission in permissions:
            if not _PERMISSION.fullmatch(permission):
                raise XenStoreError(f"bad XenStore permission {permission!r}")
        self._ack(_Op.SET_PERMS, path, *permissions)

    def transaction(self, body: Callable[[XenStore], T]) -> T:
        """Runs body as one transaction, again when others wrote in between; body must bear that."""
        if self._transaction:
            raise XenStoreError("a XenStore transaction within a transaction")
        for attempt in range(_TRANSACTION_TRIES):
            self._transaction = int(self._call(_Op.TRANSACTION_START, "").rstrip(b"\0"))
            try:
                result = body(self)
            except BaseException:
                self._end(commit=False)
                raise
            if self._end(commit=True):
                return result
            time.sleep(0.001 * attempt)
        raise XenStoreError(f"XenStore refused a transaction {_TRANSACTION_TRIES} times", "is it overloaded?")

    def _end(self, *, commit: bool) -> bool:
        if not self.connected:
            return False
        try:
            self._ack(_Op.TRANSACTION_END, "T" if commit else "F")
        except XenStoreErrnoError as error:
            if not commit or error.errno == errno.EAGAIN:
                return False
            raise
        finally:
            self._transaction = 0
        return True

    # Watches.

    def watch(self, path: str, token: str) -> None:
        """Reports changes of a node and of all beneath it as (changed path, token); fires once now."""
        self._check_path(path)
        if (path, token) not in self._watches:
            self._watches.add((path, token))
            # A connection that is made now sets this watch too.
            if self.connected:
                self._ack(_Op.WATCH, path, token)
            else:
                self.connect()

    def unwatch(self, path: str, token: str) -> None:
        """Ends a watch; forgets its kept events."""
        self._watches.discard((path, token))
        self._events = {event: None for event in self._events if event[1] != token}
        if self.connected:
            try:
                self._ack(_Op.UNWATCH, path, token)
            except XenStoreErrnoError as error:
                if error.errno != errno.ENOENT:
                    raise

    def events(self, most: int = 256) -> list[tuple[str, str]]:
        """The events that are here, without waiting; reads at most so many packets of the socket."""
        self.connect()
        for _ in range(most):
            if not select.select([self._connection], [], [], 0)[0]:
                break
            packet = self._receive(time.monotonic() + self._timeout)
            if not self._keep_event(packet):
                self._broken("an answer that nobody asked for")
        events = list(self._events)
        self._events.clear()
        return events

    @property
    def pending(self) -> bool:
        """Whether events came while requests were waiting for their replies."""
        return bool(self._events)

    # Packets.

    def _check_path(self, path: str) -> None:
        if len(path) > 3072 or not _PATH.fullmatch(path):
            raise XenStoreError(f"bad XenStore path {path!r:.100}")

    def _ack(self, op: int, *strings: str) -> None:
        self._finish_ack(self._call(op, *strings))

    def _ack_raw(self, op: int, payload: bytes) -> None:
        self._finish_ack(self._exchange(op, payload))

    def _finish_ack(self, payload: bytes) -> None:
        if payload.rstrip(b"\0") != b"OK":
            self._broken(f"{payload!r:.40} in place of OK")

    def _call(self, op: int, *strings: str) -> bytes:
        if op in (_Op.READ, _Op.DIRECTORY, _Op.MKDIR, _Op.RM, _Op.GET_PERMS, _Op.SET_PERMS):
            self._check_path(strings[0])
        return self._exchange(op, b"".join(s.encode() + b"\0" for s in strings))

    def _exchange(self, op: int, payload: bytes) -> bytes:
        if len(payload) > _MAX_PAYLOAD:
            raise XenStoreError(f"{len(payload)} bytes are too many for XenStore, which takes {_MAX_PAYLOAD}")
        self.connect()
        self._request = (self._request + 1) & 0x7FFFFFFF
        deadline = time.monotonic() + self._timeout
        try:
            self._connection.send(_Packet(op, payload, self._request, self._transaction))
        except (PyXSError, OSError) as error:
            self._broken(str(error), error)
        while True:
            packet = self._receive(deadline)
            if self._keep_event(packet):
                continue
            if packet.rq_id != self._request:
                self._broken("an answer to another request")
            if packet.op == _Op.ERROR:
                raise _errno_error(packet.payload, payload)
            if packet.op != op:
                self._broken("an answer of another kind")
            return bytes(packet.payload)

    def _keep_event(self, packet: Any) -> bool:
        if packet.op != _Op.WATCH_EVENT:
            return False
        parts = packet.payload.split(b"\0")
        if len(parts) >= 2:
            path, token = (p.decode("ascii", "backslashreplace") for p in parts[:2])
            self._events[path, token] = None
        return True

    def _receive(self, deadline: float) -> Any:
        try:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._connection], [], [], left)[0]:
                self._broken(f"no answer within {self._timeout:g} s")
            return self._connection.recv()
        except (PyXSError, OSError, ValueError, AttributeError) as error:
            self._broken(str(error) or type(error).__name__, error)

    def _broken(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        self.close()
        self._transaction = 0
        raise XenStoreError(f"the connection to XenStore broke: {reason}") from cause


def _errno_error(payload: bytes, request: bytes) -> XenStoreErrnoError:
    name = payload.rstrip(b"\0").decode("ascii", "replace")
    number = getattr(errno, name, errno.EIO)
    path = request.split(b"\0")[0].decode("ascii", "replace")
    return XenStoreErrnoError(f"XenStore: {path}: {os.strerror(number)}", errno=number)
