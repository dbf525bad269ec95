"""Measure what a worker's confinement costs per request: two servers on rings in memory, one shut in, in turns.

Needs root and the built data plane: sudo .venv/bin/python tools/sandbox_cost.py. Prints medians in microseconds.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xen9p-src" / "src"))

from xen9p import codec, sandbox, server, worker
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

ROUNDS, REQUESTS = 151, 200


def start(folder: Path, confined: bool) -> tuple[int, Client, int]:
    """A server in a child: (its pid, a client of it, the fid of an open file)."""
    ring = MemoryRing()
    pid = os.fork()
    if pid == 0:
        try:
            worker.prepare_process()
            root = sandbox.cage(str(folder), False) if confined else os.open(folder, os.O_RDONLY)
            device = DataPlane(root, False, Limits(spin_us=200))  # measured anew, it would differ
            if confined:
                sandbox.shut(root, False)
            ring.serve_with(device)
            device.run(server.serve)
        finally:
            os._exit(1)
    client, root = Client.connect(MemoryRingTransport(ring))
    fid = client.walk(root, b"f")
    client.lopen(fid, os.O_RDWR)
    return pid, client, fid


def measure(request: Callable[[], object]) -> float:
    """Microseconds of one request."""
    began = time.perf_counter()
    for _ in range(REQUESTS):
        request()
    return (time.perf_counter() - began) / REQUESTS * 1e6


def main() -> int:
    """Measure in turns, and print."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "f").write_bytes(bytes(65536))
        servers = {name: start(Path(folder), confined) for name, confined in (("free", False), ("confined", True))}
        kinds: dict[str, Callable[[Client, int], object]] = {
            "Tgetattr": lambda client, fid: client.rpc(codec.Tgetattr(fid, codec.GETATTR_BASIC)),
            "Tread 4096": lambda client, fid: client.rpc(codec.Tread(fid, 0, 4096)),
            "Tlopen, Twalk, Tclunk": lambda client, _: client.clunk(_opened(client)),
        }
        for kind, request in kinds.items():
            took: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, (_, client, fid) in servers.items():
                    took[name].append(measure(partial(request, client, fid)))
            free, confined = (statistics.median(took[name]) for name in ("free", "confined"))
            print(f"{kind}: {free:.2f} us free, {confined:.2f} us confined, {confined - free:+.2f} us")
        for pid, _, _ in servers.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return 0


def _opened(client: Client) -> int:
    fid = client.walk(0, b"f")
    client.lopen(fid, os.O_RDONLY)
    return fid


if __name__ == "__main__":
    sys.exit(main())
