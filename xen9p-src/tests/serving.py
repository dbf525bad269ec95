"""Serving a directory to a client in this process, over each transport that needs no Xen."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from xen9p import lease_table, server
from xen9p.auth import Authenticator
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits, Verdict
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.transport.stream_client import SocketTransport
from xen9p.users import Users


class Served:
    """A device that serves a directory in a thread, until stopped."""

    def __init__(
        self,
        path: Path,
        readonly: bool = False,
        limits: Limits | None = None,
        authenticator: Authenticator | None = None,
        users: Users | None = None,
    ) -> None:
        self.path = path
        self.device = DataPlane(os.open(path, os.O_RDONLY | os.O_DIRECTORY), readonly, limits, authenticator, users)
        self.verdict: Verdict | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.verdict = self.device.run(server.serve)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float = 10.0) -> Verdict:
        """Waits for the device to end by itself."""
        self._thread.join(timeout)
        assert self.verdict is not None, "the device still serves"
        return self.verdict

    def close(self) -> None:
        if self._thread.is_alive():
            self.device.stop()
        self.join()
        self.device.close()


@dataclass
class Session:
    """A client with the root attached, and what serves it."""

    client: Client
    root: int
    served: Served


@contextmanager
def serve_memory(
    path: Path,
    *,
    rings: int = 1,
    order: int = 5,
    readonly: bool = False,
    limits: Limits | None = None,
    users: Users | None = None,
    start_at: int = 0,
    authenticator: Authenticator | None = None,
) -> Iterator[tuple[list[MemoryRing], Served]]:
    """Serves path over rings in memory whose indices start at start_at."""
    made = [MemoryRing(order) for _ in range(rings)]
    served = Served(path, readonly, limits, authenticator, users)
    for ring in made:
        ring.start_at(start_at)
        ring.serve_with(served.device)
    served.start()
    try:
        yield made, served
    finally:
        served.close()
        for ring in made:
            ring.close()


@contextmanager
def memory_session(path: Path, **options: object) -> Iterator[Session]:
    with serve_memory(path, **options) as (rings, served):  # type: ignore[arg-type]
        client, root = Client.connect(MemoryRingTransport(rings[0]))
        try:
            yield Session(client, root, served)
        finally:
            client.close()


@contextmanager
def socket_session(path: Path, readonly: bool = False, limits: Limits | None = None) -> Iterator[Session]:
    ours, theirs = socket.socketpair()
    served = Served(path, readonly, limits)
    served.device.add_stream(theirs)
    served.start()
    client, root = Client.connect(SocketTransport(ours))
    try:
        yield Session(client, root, served)
    finally:
        client.close()
        served.close()
        theirs.close()


OPENERS: dict[str, Callable[..., object]] = {"memory": memory_session, "socket": socket_session}


@contextmanager
def serve_unix(path: Path, where: Path) -> Iterator[Path]:
    """Serves path on a Unix socket to any number of clients, each with a device of its own; they may have leases."""
    table = lease_table.new_table()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(where))
    listener.listen()
    devices: list[tuple[Served, socket.socket]] = []

    def accept() -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                stream, _ = listener.accept()
                served = Served(path)
                served.device.set_leases(table, 3.0)
                served.device.add_stream(stream)
                served.start()
                devices.append((served, stream))

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield where
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        for served, stream in devices:
            served.close()
            stream.close()
        table.close()
