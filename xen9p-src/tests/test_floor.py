"""The benchmark's floor on a ring in memory: it answers what v9fs and fio ask, and nothing behind it is read."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from floor.serve import Floor, build
from xen9p import codec, dataplane
from xen9p.client import Client
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

SIZE = 3 * 1024 * 1024 + 5
SOURCE = Path(dataplane.__file__).parent


def fails(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=re.escape(os.strerror(number)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SOURCE, tmp_path_factory.mktemp("floor") / "floor.so")


@pytest.fixture(params=[0, (1 << 32) - 9000])
def client(library: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    ring = MemoryRing(6)
    ring.start_at(request.param)
    floor = Floor(library, SIZE, 3, spin_us=200)
    floor.add_memory_ring(ring.page, ring.data, ring.order, ring.to_back, ring.to_front)
    thread = threading.Thread(target=floor.run, daemon=True)
    thread.start()
    try:
        connected, root = Client.connect(MemoryRingTransport(ring))
        assert root == 0
        yield connected
        assert floor.requests > 2
        connected.close()
    finally:
        floor.stop()
        thread.join(10)
        assert not thread.is_alive()
        floor.close()
        ring.close()


def test_every_byte_can_be_read_in_any_size(client: Client) -> None:
    fid = client.walk(0, b"read-2")
    client.lopen(fid)
    assert client.getattr(fid).size == SIZE
    assert len(client.read_file(0, b"read-2")) == SIZE
    for count in (1, 4096, 65536, 1 << 20):
        reply = client.rpc(codec.Tread(fid, SIZE - 10 - min(count, 8192), count))
        assert reply.data == b"\x5a" * min(count, min(count, 8192) + 10)  # type: ignore[attr-defined]
    assert client.rpc(codec.Tread(fid, SIZE, 4096)).data == b""  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [b"read-3", b"read-", b"read-x", b"reader-1", b"other"])
def test_other_names_do_not_exist(client: Client, name: bytes) -> None:
    with fails(errno.ENOENT):
        client.walk(0, name)


def test_what_it_cannot_do_is_an_errno_and_not_the_end(client: Client) -> None:
    fid = client.walk(0, b"read-0")
    with fails(errno.EBADF):
        client.rpc(codec.Tread(99, 0, 4096))
    with fails(errno.EOPNOTSUPP):
        client.rpc(codec.Twrite(fid, 0, b"x"))
    client.clunk(fid)
    with fails(errno.EBADF):
        client.clunk(fid)


def test_it_ends_when_its_peer_goes(library: Path) -> None:
    ring = MemoryRing()
    floor = Floor(library, SIZE, 1, spin_us=0)
    floor.add_memory_ring(ring.page, ring.data, ring.order, ring.to_back, ring.to_front)
    thread = threading.Thread(target=floor.run, daemon=True)
    thread.start()
    time.sleep(0.1)  # it waits for events by now
    ring.page[128:132] = bytes(4)
    ring.wake_backend()
    thread.join(10)
    assert not thread.is_alive()
    floor.close()
    ring.close()
