"""Streams: reads and writes in a row are read ahead of and dropped behind, and leave alone what was there before."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopmount import MISSING, mounted
from serving import OPENERS, Session, memory_session
from xen9p import page_cache
from xen9p.dataplane import Limits

MIB = 1 << 20
LIMITS = Limits(stream_bytes=4 * MIB)
SLACK = 24 * MIB
"""What a stream may leave behind: what it read before it was one, with the kernel's own reading ahead."""

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("streams"), mib=900) as point:
        yield point


def make(path: Path, mib: int, *, cached: bool = False) -> Path:
    """A file that is on the disk, and in the page cache or not."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    if not cached:
        forget(path)
    return path


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert here(path) == 0


def here(path: Path) -> int:
    """Bytes of it in the page cache, asked of mincore(2) by a way of the test's own."""
    with path.open("rb") as file:
        return sum(piece.count(1) for piece in page_cache.pages(file.fileno(), path.stat().st_size)) * mmap.PAGESIZE


def read_all(session: Session, name: bytes, size: int, step: int = 256 << 10) -> bytes:
    client = session.client
    fid = client.walk(session.root, name)
    client.lopen(fid)
    try:
        return b"".join(client.read(fid, at, min(step, size - at)) for at in range(0, size, step))
    finally:
        client.clunk(fid)


def test_a_file_that_is_read_in_a_row_does_not_stay(store: Path) -> None:
    big = make(store / "big", 128)
    with memory_session(store, order=9, limits=LIMITS) as session:
        # The largest message that fits is what a kernel asks for.
        step = session.client.msize - 24
        client = session.client
        fid = client.walk(session.root, b"big")
        client.lopen(fid)
        with big.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            at = 0
            while data := client.read(fid, at, step):
                at += len(data)
        assert at == 128 * MIB
        client.clunk(fid)
        stats = session.served.device.stats()
    assert stats["streams"] == 1
    assert stats["dropped_bytes"] > 96 * MIB
    assert here(big) <= SLACK


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_the_bytes_are_right(store: Path, kind: str) -> None:
    make(store / "right", 24)
    with OPENERS[kind](store, limits=LIMITS) as session:  # type: ignore[attr-defined]
        assert (
            read_all(session, b"right", 24 * MIB, 8000 if kind == "memory" else 64000) == (store / "right").read_bytes()
        )
        assert session.served.device.stats()["streams"] == 1


def test_what_somebody_had_there_stays(store: Path) -> None:
    path = make(store / "hot", 96)
    hot = range(40 * MIB, 48 * MIB)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), len(hot), hot.start)
    assert here(path) > 7 * MIB
    with memory_session(store, order=9, limits=LIMITS) as session:
        read_all(session, b"hot", 96 * MIB)
        stats = session.served.device.stats()
    assert stats["spared_bytes"] > 7 * MIB
    with path.open("rb") as file:
        all_pages = b"".join(page_cache.pages(file.fileno(), 96 * MIB))
    assert sum(all_pages[hot.start // mmap.PAGESIZE : hot.stop // mmap.PAGESIZE]) * mmap.PAGESIZE > 7 * MIB
    assert sum(all_pages) * mmap.PAGESIZE <= len(hot) + SLACK


def test_without_streams_all_of_it_stays(store: Path) -> None:
    path = make(store / "off", 32)
    with memory_session(store, order=9, limits=Limits(stream_bytes=0)) as session:
        read_all(session, b"off", 32 * MIB)
        assert session.served.device.stats()["streams"] == 0
    assert here(path) > 30 * MIB  # the machine may want a page back


def test_random_reads_are_no_stream(store: Path) -> None:
    path = make(store / "random", 64)
    dice = random.Random(1)
    with memory_session(store, order=9, limits=LIMITS) as session:
        client = session.client
        fid = client.walk(session.root, b"random")
        client.lopen(fid)
        for _ in range(400):
            client.read(fid, dice.randrange(0, 64 * MIB - 4096), 4096)
        assert session.served.device.stats()["streams"] == 0
    assert here(path) > 0


def test_a_stream_that_goes_elsewhere_gives_back_what_was_read_ahead(store: Path) -> None:
    path = make(store / "seek", 96)
    with memory_session(store, order=9, limits=LIMITS) as session:
        client = session.client
        fid = client.walk(session.root, b"seek")
        client.lopen(fid)
        for at in range(0, 32 * MIB, 256 << 10):
            client.read(fid, at, 256 << 10)
        for at in range(64 * MIB, 65 * MIB, 64 << 10):
            client.read(fid, at, 4096)
        client.clunk(fid)
        for at in range(0, 96, 4):  # every fid may be a stream of its own, and each ends
            one = client.walk(session.root, b"seek")
            client.lopen(one)
            client.read(one, at * MIB, 4096)
            client.clunk(one)
    assert here(path) < 64 * MIB


def test_what_is_written_in_a_row_beyond_the_end_does_not_stay(store: Path) -> None:
    with memory_session(store, order=9, limits=LIMITS) as session:
        client = session.client
        fid = client.walk(session.root)
        client.lcreate(fid, b"written", os.O_WRONLY, 0o644)
        data = os.urandom(256 << 10)
        for at in range(0, 96 * MIB, len(data)):
            assert client.write(fid, at, data) == len(data)
        client.fsync(fid)
        client.clunk(fid)
        stats = session.served.device.stats()
    assert stats["dropped_bytes"] > 48 * MIB
    path = store / "written"
    assert here(path) < 48 * MIB
    assert path.stat().st_size == 96 * MIB
    assert path.read_bytes() == data * (96 * MIB // len(data))


def test_what_is_overwritten_may_be_somebodys(store: Path) -> None:
    path = make(store / "over", 48, cached=True)
    with memory_session(store, order=9, limits=LIMITS) as session:
        client = session.client
        fid = client.walk(session.root, b"over")
        client.lopen(fid, os.O_RDWR)
        data = os.urandom(256 << 10)
        for at in range(0, 48 * MIB, len(data)):
            client.write(fid, at, data)
        client.fsync(fid)
        assert session.served.device.stats()["dropped_bytes"] == 0
    assert here(path) > 45 * MIB


def test_hits_are_counted(store: Path) -> None:
    make(store / "counted", 1)
    with memory_session(store, order=9, limits=Limits()) as session:
        device = session.served.device
        read_all(session, b"counted", MIB, 64 << 10)
        first = device.stats()
        assert first["read_misses"] >= 1
        assert first["hit_bytes"] + first["miss_bytes"] == MIB
        read_all(session, b"counted", MIB, 64 << 10)
        second = device.stats()
    assert second["read_misses"] == first["read_misses"]
    assert second["hit_bytes"] == first["hit_bytes"] + MIB


def test_a_guest_cannot_have_many_streams(store: Path) -> None:
    """More than there may be, on a file that costs nothing; each is read to its end all the same."""
    with (store / "sparse").open("wb") as file:
        file.truncate(6 * MIB)
    with memory_session(store, order=9, limits=Limits(stream_bytes=MIB)) as session:
        client = session.client
        for _ in range(80):
            fid = client.walk(session.root, b"sparse")
            client.lopen(fid)
            for at in range(0, 6 * MIB, 512 << 10):
                client.read(fid, at, 500_000)
        assert 1 <= session.served.device.stats()["streams"] <= 64
