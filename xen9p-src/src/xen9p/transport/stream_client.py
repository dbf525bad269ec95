"""The client's end of a Unix or TCP connection that carries 9P messages one after the other."""

from __future__ import annotations

import socket
from types import TracebackType

from xen9p.codec import HEADER_SIZE
from xen9p.errors import ProtocolError


class SocketTransport:
    """Whole messages over a connected stream socket, which it owns.

    Args:
        sock: connected; its timeout (seconds, None for ever) bounds every send and receive.
        max_size: the largest message in bytes that recv() accepts before it calls the peer broken.
    """

    def __init__(self, sock: socket.socket, max_size: int = 64 << 20) -> None:
        self._sock = sock
        self._max_size = max_size

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

    def send(self, data: bytes) -> None:
        """Sends all of it."""
        self._sock.sendall(data)

    def recv(self) -> bytes:
        """One whole message, header included. EOFError if the peer hung up between two messages."""
        head = self._exactly(4, at_start=True)
        size = int.from_bytes(head, "little")
        if not HEADER_SIZE <= size <= self._max_size:
            raise ProtocolError(f"message size {size} is not within {HEADER_SIZE}..{self._max_size}")
        return head + self._exactly(size - 4, at_start=False)

    def _exactly(self, size: int, *, at_start: bool) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._sock.recv_into(view)
            if count == 0:
                if at_start and len(view) == size:
                    raise EOFError("the server closed the connection")
                raise ProtocolError("the server closed the connection within a message")
            view = view[count:]
        return bytes(data)

    def close(self) -> None:
        """Closes the socket; twice is allowed."""
        self._sock.close()

    def __enter__(self) -> SocketTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
