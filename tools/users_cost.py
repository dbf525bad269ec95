"""Measure what the host's checks cost per request: two workers on rings in memory, one of which checks, in turns.

Needs root and the built data plane: sudo .venv/bin/python tools/users_cost.py. Prints medians in microseconds.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xen9p-src" / "src"))

from xen9p import codec, sandbox, server, worker
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.users import Users

ROUNDS, REQUESTS = 151, 100
ALICE, BOB = 1000, 1001
NAMES = count()


class Server:
    """A worker in a child, and a client of it with two users and a file that one has open."""

    def __init__(self, folder: Path, checks: bool) -> None:
        ring = MemoryRing()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                worker.prepare_process()
                root = sandbox.cage(str(folder), False)
                users = Users(checks=checks, groups=((BOB, (BOB, 100)),))
                device = DataPlane(root, False, Limits(spin_us=200), users=users)  # measured anew, it would differ
                sandbox.shut(root, False)
                ring.serve_with(device)
                device.run(server.serve)
            finally:
                os._exit(1)
        self.client, _ = Client.connect(MemoryRingTransport(ring))
        self.alice, self.bob = (self.client.attach(n_uname=uid) for uid in (ALICE, BOB))
        self.fid = self.client.walk(self.alice, b"f")
        self.client.lopen(self.fid, os.O_RDWR)

    def end(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def open(self, root: int) -> None:
        """Look a file up, open and close it."""
        fid = self.client.walk(root, b"f")
        self.client.lopen(fid, os.O_RDONLY)
        self.client.clunk(fid)

    def create(self, root: int, gid: int) -> None:
        """Make a file, close and remove it."""
        name = f"{next(NAMES)}".encode()
        fid = self.client.walk(root)
        self.client.lcreate(fid, name, os.O_WRONLY, 0o600, gid)
        self.client.clunk(fid)
        self.client.unlinkat(root, name)


def measure(request: Callable[[], object]) -> float:
    """Microseconds of one request."""
    began = time.perf_counter()
    for _ in range(REQUESTS):
        request()
    return (time.perf_counter() - began) / REQUESTS * 1e6


def in_turn(work: Callable[[int], None], *roots: int) -> None:
    """The same by each user."""
    for root in roots:
        work(root)


def main() -> int:
    """Measure in turns, and print."""
    kinds: dict[str, Callable[[Server], object]] = {
        "Tgetattr": lambda s: s.client.rpc(codec.Tgetattr(s.fid, codec.GETATTR_BASIC)),
        "Tread 4096": lambda s: s.client.rpc(codec.Tread(s.fid, 0, 4096)),
        "Twrite 4096": lambda s: s.client.rpc(codec.Twrite(s.fid, 0, bytes(4096))),
        "Twalk, Tlopen, Tclunk": lambda s: s.open(s.alice),
        "the same by two users in turn, both": lambda s: in_turn(s.open, s.alice, s.bob),
        "Twalk, Tlcreate, Tclunk, Tunlinkat": lambda s: s.create(s.alice, ALICE),
        "the same with a group of another number": lambda s: s.create(s.alice, 555),
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        (Path(folder) / "f").write_bytes(bytes(65536))
        (Path(folder) / "f").chmod(0o666)
        servers = {name: Server(Path(folder), checks) for name, checks in (("guest", False), ("host", True))}
        for kind, request in kinds.items():
            took: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, one in servers.items():
                    took[name].append(measure(partial(request, one)))
            guest, host = (statistics.median(took[name]) for name in ("guest", "host"))
            print(f"{kind}: {guest:.2f} us the guest checks, {host:.2f} us the host does, {host - guest:+.2f} us")
        for one in servers.values():
            one.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
