"""A child process that shuts itself in as a worker does, and then does what a test wants."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from xen9p import sandbox, server, worker
from xen9p.client import Client
from xen9p.dataplane import DataPlane
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.users import Users

CAP_SYS_ADMIN = 21


def has_capability(number: int) -> bool:
    """Whether this process has a capability in its effective set."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(fields["CapEff"], 16) >> number & 1)


needs_admin = pytest.mark.skipif(not has_capability(CAP_SYS_ADMIN), reason="a mount namespace takes CAP_SYS_ADMIN")


def confine(path: Path, readonly: bool = False) -> int:
    """What a worker does before it gets its rings; a descriptor of the export."""
    worker.prepare_process()
    root = sandbox.cage(str(path), readonly)
    sandbox.shut(root, readonly)
    return root


@contextmanager
def confined_session(path: Path, readonly: bool = False, users: Users | None = None) -> Iterator[tuple[Client, int]]:
    """A client of a confined child that serves a ring, which both have in their memory."""
    ring = MemoryRing()

    def serve() -> int:
        worker.prepare_process()
        root = sandbox.cage(str(path), readonly)
        device = DataPlane(root, readonly, users=users)
        sandbox.shut(root, readonly)
        ring.serve_with(device)
        return int(device.run(server.serve))

    with child(serve) as (_, _result):
        client, root = Client.connect(MemoryRingTransport(ring))
        yield client, root
        client.close()
    ring.close()


@contextmanager
def child(work: Callable[[], Any]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Runs work() in a child; (its pid, a function that waits for the result). It ends with the block at the latest.

    The result goes through JSON; an exception in the child is one here.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            try:
                answer: dict[str, Any] = {"result": work()}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)

    def result() -> Any:
        with open(reading, "rb", closefd=False) as pipe:
            answer = json.loads(pipe.read() or b'{"error": "it died"}')
        if "error" in answer:
            pytest.fail(f"in the child: {answer['error']}")
        return answer["result"]

    try:
        yield pid, result
    finally:
        os.close(reading)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
