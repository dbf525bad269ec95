"""Room in the ring for requests: writes that take long, or wait for a thread, leave it to others, up to a bound."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import loopmount
from serving import Session, memory_session
from xen9p import codec
from xen9p.dataplane import Limits
from xen9p.errors import Xen9pError
from xen9p.transport.memory import OUT_CONS, OUT_PROD, MemoryRing, MemoryRingTransport

PART = 8000  # bytes of each write
WRITES = 24  # three rings of order 5 full


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Whoever opens the file for writing waits until the end of the block."""
    path.touch()
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(fd)
        signal.signal(signal.SIGIO, before)


@contextmanager
def frozen(point: Path) -> Iterator[None]:
    """No write to the filesystem goes on until the end of the block."""
    subprocess.run(["fsfreeze", "--freeze", point], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", point], check=True)


def ring_of(session: Session) -> MemoryRing:
    transport = session.client.transport
    assert isinstance(transport, MemoryRingTransport)
    return transport._ring


def until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def opened(session: Session) -> int:
    """A new file "f"."""
    fid = session.client.walk(session.root)
    session.client.lcreate(fid, b"f", os.O_RDWR)
    return fid


def running(session: Session) -> int:
    stats = session.served.device.stats()
    return stats["in_flight"] - stats["queued"]


def stands_still(session: Session) -> bool:
    """Whether the reader waits for requests to end before it takes another."""
    return session.served.device.stats()["throttled"] > 0


def busy_thread(session: Session, name: bytes) -> None:
    """Has a thread of the pool wait for a lease, so that the reader leaves writes to the pool."""
    fid = session.client.walk(session.root, name)
    session.client.send_raw(codec.encode(codec.Tlopen(fid, os.O_WRONLY), 1000))
    until("the open is under way", lambda: running(session) == 1)


def content(count: int = WRITES) -> bytes:
    return b"".join(bytes([n]) * PART for n in range(1, count + 1))


def writes(fid: int, count: int = WRITES) -> Iterator[bytes]:
    for n in range(count):
        yield codec.encode(codec.Twrite(fid, n * PART, bytes([n + 1]) * PART), n)


def room(session: Session) -> int:
    ring = ring_of(session)
    return ring.half - (ring.index(OUT_PROD) - ring.index(OUT_CONS)) % (1 << 32)


def answers(session: Session, count: int) -> set[int]:
    return {codec.decode(session.client.recv_raw())[0] for _ in range(count)}


def test_writes_that_wait_for_a_thread_make_room(export: Path) -> None:
    """All threads are busy: three rings full of writes fit, because the server takes their data out."""
    with memory_session(export, order=5, limits=Limits(pool_threads=1)) as session:
        fid = opened(session)
        with leased(export / "held"):
            busy_thread(session, b"held")
            for message in writes(fid):
                session.client.send_raw(message)
            until("the reader has all of them", lambda: session.served.device.stats()["in_flight"] == WRITES + 1)
            assert room(session) >= ring_of(session).half // 2
            assert running(session) == 1
        assert answers(session, WRITES + 1) == {1000, *range(WRITES)}
    assert (export / "f").read_bytes() == content()


@pytest.mark.skipif(bool(loopmount.MISSING), reason=loopmount.MISSING)
def test_writes_that_stand_still_make_room(tmp_path: Path) -> None:
    """The threads are in writes that the filesystem does not let go on."""
    (tmp_path / "export").mkdir()
    with loopmount.mounted(tmp_path) as point:
        limits = Limits(pool_threads=3)
        with memory_session(point, order=5, limits=limits) as session:
            fid = opened(session)
            with leased(point / "held"):
                busy_thread(session, b"held")
                session.client.write(fid, 0, b"x")  # the reader has learned that writes here are the pool's
                with frozen(point):
                    for message in writes(fid):
                        session.client.send_raw(message)
                    until("all are taken", lambda: session.served.device.stats()["in_flight"] == WRITES + 1)
                    until("all threads stand still", lambda: running(session) == 3)
                    until("there is room", lambda: room(session) >= ring_of(session).half // 2)
            assert answers(session, WRITES + 1) == {1000, *range(WRITES)}
        assert (point / "f").read_bytes() == content()


def test_what_is_taken_out_is_bounded(export: Path) -> None:
    """At the limit of bytes in flight requests stay in the ring again, and it fills."""
    most = 100_000
    with memory_session(export, order=5, limits=Limits(pool_threads=1, max_bytes=most)) as session:
        fid = opened(session)
        with leased(export / "held"):
            busy_thread(session, b"held")
            put = 0
            for message in writes(fid, 100):
                # When the reader stands still, what does not fit now does not fit later.
                until("room, or a limit", lambda: room(session) > PART + 100 or stands_still(session))
                if not session.client.transport.post(message):
                    break
                put += 1
            stats = session.served.device.stats()
            assert stats["bytes"] <= most
            # What is in flight, one more that the reader stands still with, and a ring full.
            assert most // (PART + 50) < put <= most // PART + 1 + ring_of(session).half // PART
        assert answers(session, put + 1) == {1000, *range(put)}
    assert (export / "f").read_bytes() == content(put)


def test_what_is_put_into_one_write_can_be_kept_small(export: Path) -> None:
    """By the iounit of what is opened for writing: clients keep to it. Also while the device serves."""
    (export / "f").touch()
    with memory_session(export, order=7, limits=Limits(max_write=20_000)) as session:
        client, device = session.client, session.served.device
        full = client.msize - 24 & ~4095

        def units() -> list[int]:
            found = []
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                with client.walked(session.root, b"f") as fid:
                    found.append(client.lopen(fid, flags))
            with client.walked(session.root, b"") as fid:
                found.append(client.lcreate(fid, b"made", os.O_RDWR))
            (export / "made").unlink()
            return found

        assert units() == [full, 16384, 16384, 16384]
        device.set_limits(Limits())
        assert units() == [full] * 4
        device.set_limits(Limits(max_write=1 << 20))
        assert units() == [full] * 4
    with pytest.raises(Xen9pError, match=r"max_write is 100 \(it is 0, or 4096 or more"):
        Limits(max_write=100)
