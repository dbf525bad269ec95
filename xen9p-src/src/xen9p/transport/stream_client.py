"""The client's end of a Unix or TCP connection that carries 9P messages one after the other."""

from __future__ import annotations

import errno
import select
import socket
import time
from contextlib import suppress
from types import TracebackType

from xen9p.codec import HEADER_SIZE
from xen9p.errors import ProtocolError
from xen9p.transport.link import wait_for


class SocketTransport:
    """Whole messages over a connected stream socket, which it owns. A transport.link.Transport.

    Args:
        sock: connected; its timeout (seconds, None for ever) bounds every send and receive.
        max_size: the largest message in bytes that recv() accepts before it calls the peer broken.
    """

    def __init__(self, sock: socket.socket, max_size: int = 64 << 20) -> None:
        self._sock = sock
        self._timeout = sock.gettimeout()
        sock.setblocking(False)  # whether to wait is decided here
        self._max_size = max_size
        self._unsent = bytearray()
        self._head = bytearray()  # of the message that is arriving
        self._body = bytearray()  # all of it, once its size is known
        self._filled = 0

    @classmethod
    def unix(cls, path: str, timeout: float | None = None) -> SocketTransport:
        """Connects to a Unix socket; OSError if nobody listens there."""
        return cls._connect(socket.AF_UNIX, path, timeout)

    @classmethod
    def tcp(cls, host: str, port: int, timeout: float | None = None) -> SocketTransport:
        """Connects to a TCP port; OSError if nobody listens there."""
        sock = socket.create_connection((host, port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock)

    @classmethod
    def _connect(cls, family: int, address: str, timeout: float | None) -> SocketTransport:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def set_timeout(self, seconds: float | None) -> None:
        """Bounds every send and receive from now on; None: they wait for ever."""
        self._timeout = seconds

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, data: bytes, /) -> None:
        """Sends all of it."""
        deadline = self._deadline(None)
        self._unsent += data
        while not self.flush():
            wait_for(self.fileno(), select.POLLOUT, deadline)

    def post(self, data: bytes, /) -> bool:
        """Takes a message unless an earlier one has not gone out."""
        if not self.flush():
            return False
        self._unsent += data
        self.flush()
        return True

    def flush(self) -> bool:
        """Sends what the socket takes now; True if nothing is left."""
        try:
            while self._unsent:
                sent = self._sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            return False
        except BrokenPipeError:  # not to be taken for the end of who reads our output
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection") from None
        return True

    def recv(self, timeout: float | None = None) -> bytes:
        """One whole message, header included. EOFError if the peer hung up between two messages."""
        deadline = self._deadline(timeout)
        while (message := self.poll()) is None:
            wanted = select.POLLIN if self.flush() else select.POLLIN | select.POLLOUT
            wait_for(self.fileno(), wanted, deadline)
        return message

    def poll(self) -> bytes | None:
        """One whole message if it is here; errors as recv()."""
        try:
            while len(self._head) < 4:
                some = self._sock.recv(4 - len(self._head))
                self._ended_if(not some, within=bool(self._head))
                self._head += some
                if len(self._head) == 4:
                    self._begin(int.from_bytes(self._head, "little"))
            view = memoryview(self._body)
            while self._filled < len(view):
                count = self._sock.recv_into(view[self._filled :])
                self._ended_if(count == 0, within=True)
                self._filled += count
        except BlockingIOError:
            return None
        message = bytes(view)
        self._head, self._body = bytearray(), bytearray()
        return message

    def _begin(self, size: int) -> None:
        if not HEADER_SIZE <= size <= self._max_size:
            self._head.clear()
            raise ProtocolError(f"message size {size} is not within {HEADER_SIZE}..{self._max_size}")
        self._body = bytearray(size)
        self._body[:4] = self._head
        self._filled = 4

    def _ended_if(self, ended: bool, *, within: bool) -> None:
        if ended and within:
            self._head, self._body = bytearray(), bytearray()
            raise ProtocolError("the server closed the connection within a message")
        if ended:
            raise EOFError("the server closed the connection")

    def _deadline(self, timeout: float | None) -> float | None:
        seconds = self._timeout if timeout is None else timeout
        return None if seconds is None else time.monotonic() + seconds

    def shutdown(self) -> None:
        """Ends the conversation both ways; a recv() that waits in another thread returns."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket; twice is allowed."""
        self._sock.close()

    def __enter__(self) -> SocketTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
