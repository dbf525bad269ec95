"""Byte-range locks, which the host's kernel keeps: between owners, devices, processes and the host's own programs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostile import descriptors
from serving import Session, memory_session, serve_memory, socket_session
from test_races import together
from test_serve import serving
from xen9p import codec
from xen9p.client import Client
from xen9p.transport.memory import MemoryRingTransport
from xen9p.transport.stream_client import SocketTransport

READ, WRITE, UNLOCK = codec.LOCK_TYPE_RDLCK, codec.LOCK_TYPE_WRLCK, codec.LOCK_TYPE_UNLCK
OK, BLOCKED = codec.LOCK_SUCCESS, codec.LOCK_BLOCKED
LAST = 2**63 - 1
OFD_GETLK, OFD_SETLK = 36, 37  # Linux
FREE = (UNLOCK, 0, 0)


def refused(err: int) -> object:
    return pytest.raises(OSError, match=os.strerror(err))


@dataclass
class Owner:
    """A process of a guest, with an open fid of a file."""

    client: Client
    fid: int
    proc: int = 1
    name: bytes = b"guest"

    def lock(self, kind: int, start: int = 0, length: int = 0, flags: int = 0) -> int:
        message = codec.Tlock(self.fid, kind, flags, start, length, self.proc, self.name)
        reply = self.client.rpc(message)
        assert isinstance(reply, codec.Rlock)
        return reply.status

    def ask(self, kind: int, start: int = 0, length: int = 0) -> codec.Rgetlock:
        return self.client.getlock(self.fid, kind, start, length, proc_id=self.proc, client_id=self.name)

    def sees(self, kind: int, start: int = 0, length: int = 0) -> tuple[int, int, int]:
        """What is in the way: (kind, start, length)."""
        reply = self.ask(kind, start, length)
        return FREE if reply.kind == UNLOCK else (reply.kind, reply.start, reply.length)


def opened(session: Session, proc: int = 1, flags: int = os.O_RDWR, name: bytes = b"guest") -> Owner:
    fid = session.client.walk(session.root, b"f")
    session.client.lopen(fid, flags)
    return Owner(session.client, fid, proc, name)


@pytest.fixture
def two(export: Path) -> Iterator[tuple[Session, Session]]:
    """Two devices on one export, as two guests have them."""
    (export / "f").touch()
    with memory_session(export) as first, socket_session(export) as second:
        yield first, second


def test_between_guests(two: tuple[Session, Session]) -> None:
    a, b = opened(two[0]), opened(two[1])
    assert a.lock(WRITE, 100, 50) == OK
    for flags in (0, codec.LOCK_FLAGS_BLOCK, codec.LOCK_FLAGS_BLOCK | codec.LOCK_FLAGS_RECLAIM):
        assert b.lock(WRITE, 149, 1, flags) == BLOCKED
        assert b.lock(READ, 0, 0, flags) == BLOCKED
    assert b.lock(WRITE, 150, 10) == OK
    assert b.lock(WRITE, 0, 100) == OK
    assert a.lock(UNLOCK, 100, 50) == OK
    assert b.lock(WRITE, 100, 50) == OK
    assert a.sees(WRITE) == (WRITE, 0, 160)


def test_shared_upgrade_downgrade(two: tuple[Session, Session]) -> None:
    a, b = opened(two[0]), opened(two[1])
    assert (a.lock(READ), b.lock(READ)) == (OK, OK)
    assert a.lock(WRITE) == BLOCKED, "the other reads"
    assert b.sees(WRITE) == (READ, 0, 0), "a failed upgrade leaves what was"
    assert b.sees(READ) == FREE
    assert b.lock(UNLOCK) == OK
    assert a.lock(WRITE) == OK
    assert b.lock(READ) == BLOCKED
    assert a.lock(READ) == OK
    assert b.lock(READ) == OK
    assert a.lock(UNLOCK) == OK
    assert a.lock(UNLOCK) == OK, "nothing to release is no error"
    assert b.lock(WRITE) == OK


def test_owners_are_processes(two: tuple[Session, Session]) -> None:
    """One owner has one set of locks, whatever fid it comes by; another process or guest name is another owner."""
    first, again, child, other = (
        opened(two[0]),
        opened(two[0], flags=os.O_RDONLY),
        opened(two[0], proc=2),
        opened(two[0], name=b"another"),
    )
    child.fid = first.fid  # inherited
    assert first.lock(WRITE, 0, 10) == OK
    assert again.lock(READ, 0, 5) == OK, "its own lock is not in its way"
    assert child.lock(READ, 7, 1) == BLOCKED
    assert other.lock(READ, 7, 1) == BLOCKED
    reply = child.ask(READ, 0)
    assert (reply.kind, reply.start, reply.length, reply.proc_id, reply.client_id) == (WRITE, 5, 5, 1, b"guest")
    assert child.lock(UNLOCK) == OK
    assert other.lock(WRITE, 5, 1) == BLOCKED, "a child that closes its copy releases nothing of its parent's"
    assert again.lock(UNLOCK) == OK
    assert other.lock(WRITE) == OK


def test_a_clunk_releases(two: tuple[Session, Session]) -> None:
    a, again, b = opened(two[0]), opened(two[0]), opened(two[1])
    assert a.lock(WRITE, 0, 10) == OK
    assert again.lock(WRITE, 20, 10) == OK
    two[0].client.clunk(a.fid)
    assert b.lock(READ, 20, 1) == BLOCKED
    two[0].client.clunk(again.fid)
    assert b.lock(WRITE) == OK
    two[1].client.version()
    assert opened(two[0]).lock(WRITE) == OK, "a new session holds nothing of the old one"


def test_the_file_may_be_gone(two: tuple[Session, Session]) -> None:
    a, b = opened(two[0]), opened(two[1])
    os.rename(two[0].served.path / "f", two[0].served.path / "g")
    os.unlink(two[0].served.path / "g")
    (two[0].served.path / "f").touch()
    assert a.lock(WRITE) == OK
    assert b.lock(READ) == BLOCKED
    assert opened(two[1], proc=2).lock(WRITE) == OK, "the new file of that name is another"


def test_the_end_of_a_device_releases(export: Path) -> None:
    (export / "f").touch()
    with memory_session(export) as staying:
        mine = opened(staying)
        with memory_session(export) as leaving:
            assert opened(leaving).lock(WRITE) == OK
            assert mine.lock(WRITE) == BLOCKED
        assert mine.lock(WRITE) == OK


def test_two_processes_and_the_death_of_one(export: Path, tmp_path: Path) -> None:
    (export / "f").touch()
    path = str(tmp_path / "socket")
    with memory_session(export) as here, serving(export, "--unix", path) as (process, _):
        client, root = Client.connect(SocketTransport.unix(path, timeout=10))
        mine, theirs = opened(here), opened(Session(client, root, here.served))
        assert theirs.lock(WRITE, 10, 10) == OK
        assert mine.lock(READ) == BLOCKED
        assert mine.sees(READ) == (WRITE, 10, 10)
        assert mine.ask(WRITE).client_id == b"", "who it is in the other guest is not told"
        assert mine.lock(WRITE, 0, 10) == OK
        assert theirs.lock(WRITE, 9, 1) == BLOCKED
        assert theirs.lock(WRITE, 20, 5) == OK
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert mine.lock(WRITE) == OK
        client.close()


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
    print("locked", flush=True)
    sys.stdin.readline()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        print(error.errno, flush=True)
    sys.stdin.readline()
"""


def test_programs_of_the_host(two: tuple[Session, Session]) -> None:
    """Another process, for any close in this one would release its own POSIX locks."""
    a, path = opened(two[0]), str(two[0].served.path / "f")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert a.lock(READ) == BLOCKED
        reply = a.ask(READ)
        assert (reply.kind, reply.start, reply.length) == (WRITE, 5, 10)
        assert reply.proc_id != holder.pid, "numbers of the host's processes are not told"
        assert a.lock(WRITE, 15, 1) == OK
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert int(holder.stdout.readline()) == errno.EAGAIN
        holder.stdin.write("\n")
    assert a.lock(WRITE) == OK


def test_ranges_at_the_edge(two: tuple[Session, Session]) -> None:
    a, b = opened(two[0]), opened(two[1])
    for start, length, want in (
        (LAST, 1, (LAST, 0)),
        (LAST, 0, (LAST, 0)),
        (0, 2**63, (0, 0)),
        (5, LAST, None),
        (5, LAST - 4, (5, 0)),
        (5, LAST - 5, (5, LAST - 5)),
        (2**62, 2**62, (2**62, 0)),
    ):
        if want is None:
            continue
        assert a.lock(WRITE, start, length) == OK
        assert b.sees(READ) == (WRITE, *want)
        assert a.lock(UNLOCK, start, length) == OK
        assert b.sees(WRITE) == FREE
    for start, length in ((2**63, 0), (2**64 - 1, 1), (LAST, 2), (5, LAST), (1, 2**63), (0, 2**64 - 1), (0, 2**63 + 1)):
        for message in (
            codec.Tlock(a.fid, WRITE, 0, start, length, 1, b"c"),
            codec.Tlock(a.fid, UNLOCK, 0, start, length, 1, b"c"),
            codec.Tgetlock(a.fid, WRITE, start, length, 1, b"c"),
        ):
            with refused(errno.EINVAL):
                a.client.rpc(message)
    for bad in (
        codec.Tlock(a.fid, 3, 0, 0, 0, 1, b"c"),
        codec.Tlock(a.fid, WRITE, 4, 0, 0, 1, b"c"),
        codec.Tlock(a.fid, WRITE, 0, 0, 0, 1, b"c" * 256),
        codec.Tlock(a.fid, WRITE, 0, 0, 0, 1, b"a\0b"),
        codec.Tgetlock(a.fid, 200, 0, 0, 1, b"c"),
    ):
        with refused(errno.EINVAL):
            a.client.rpc(bad)
    assert b.sees(WRITE) == FREE


def test_what_can_be_locked(two: tuple[Session, Session]) -> None:
    """flock(2) asks for no mode, so any open file will do; on a read-only export nobody is locked out."""
    session, path = two[0], two[0].served.path
    client = session.client
    reader, writer = opened(session, flags=os.O_RDONLY), opened(two[1], flags=os.O_WRONLY)
    assert reader.lock(WRITE, 0, 1) == OK
    assert writer.lock(READ, 1, 1) == OK
    for message in (codec.Tlock(99, WRITE, 0, 0, 0, 1, b""), codec.Tgetlock(99, WRITE, 0, 0, 1, b"")):
        with refused(errno.EBADF):
            client.rpc(message)
    closed = Owner(client, client.walk(session.root, b"f"))
    with refused(errno.EBADF):
        closed.lock(READ)
    with refused(errno.EBADF):
        closed.ask(READ)
    folder = Owner(client, client.walk(session.root))
    client.lopen(folder.fid)
    with refused(errno.EISDIR):
        folder.lock(READ)
    with memory_session(path, readonly=True) as readonly:
        guest = opened(readonly, flags=os.O_RDONLY)
        with refused(errno.EBADF):
            guest.lock(WRITE, 10, 1)
        assert guest.lock(READ, 10, 1) == OK
        assert reader.lock(WRITE, 10, 1) == BLOCKED


def test_ranges_and_owners_are_bounded(two: tuple[Session, Session]) -> None:
    a, b = opened(two[0]), opened(two[1])
    before = descriptors()
    taken = 0
    with refused(errno.ENOLCK):
        while taken < 5000:
            assert a.lock(WRITE, 2 * taken, 1) == OK
            taken += 1
    assert taken == 4096
    assert b.lock(WRITE, 2 * taken, 1) == OK, "the other guest has its own share"
    assert a.lock(READ, 0, 1) == OK, "what takes no more room works"
    with refused(errno.ENOLCK):
        a.lock(READ, 2 * taken - 1, 1)
    assert a.lock(UNLOCK, 0, 4096) == OK
    assert a.lock(WRITE, 1, 1) == OK
    assert a.lock(UNLOCK) == OK
    assert b.lock(UNLOCK) == OK
    assert descriptors() == before
    owners = 0
    with refused(errno.ENOLCK):
        while owners < 2000:
            assert Owner(a.client, a.fid, owners).lock(READ) == OK
            owners += 1
    assert owners == 1024
    assert b.lock(WRITE) == BLOCKED
    a.client.clunk(a.fid)
    assert b.lock(WRITE) == OK
    assert b.lock(UNLOCK) == OK
    assert descriptors() == before - 2


class Local:
    """The same on a file of the host, with an open file description for each owner."""

    def __init__(self, path: Path, owners: int) -> None:
        self.files = [os.open(path, os.O_RDWR) for _ in range(owners)]

    @staticmethod
    def flock(kind: int, start: int, length: int) -> bytes:
        return struct.pack("hhqqi4x", (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)[kind], 0, start, length, 0)

    def lock(self, owner: int, kind: int, start: int, length: int) -> int:
        try:
            fcntl.fcntl(self.files[owner], OFD_SETLK, self.flock(kind, start, length))
        except BlockingIOError:
            return BLOCKED
        return OK

    def sees(self, owner: int, kind: int, start: int, length: int) -> tuple[int, int, int]:
        raw = fcntl.fcntl(self.files[owner], OFD_GETLK, self.flock(kind, start, length))
        found, _, start, length, _ = struct.unpack("hhqqi4x", raw)
        return FREE if found == fcntl.F_UNLCK else (READ if found == fcntl.F_RDLCK else WRITE, start, length)

    def close(self) -> None:
        for file in self.files:
            os.close(file)


@pytest.mark.parametrize("seed", range(4))
def test_random_locks_are_those_of_the_kernel(two: tuple[Session, Session], seed: int) -> None:
    """Two owners in one guest and one in another against three on a local file: every outcome, every border."""
    dice = random.Random(seed)
    size = 24
    (two[0].served.path / "twin").touch()
    local = Local(two[0].served.path / "twin", 3)
    owners = [opened(two[0]), opened(two[0], proc=2), opened(two[1])]
    for _ in range(200):
        who = dice.randrange(3) if seed % 2 else 0
        kind = dice.choice((READ, READ, WRITE, UNLOCK, UNLOCK))
        start = dice.randrange(size)
        length = dice.choice((0, 1, 1, 2, 5, 9))
        assert owners[who].lock(kind, start, length) == local.lock(who, kind, start, length)
        probe, at = dice.randrange(3), dice.randrange(size + 10)
        for kind in (READ, WRITE):
            mine, theirs = owners[probe].sees(kind, at, 1), local.sees(probe, kind, at, 1)
            if FREE in (mine, theirs):
                assert mine == theirs
            assert mine[0] == theirs[0]
        if owners[0].sees(WRITE) == FREE:  # what there is, is its: then the others see where each range begins and ends
            assert owners[1].sees(WRITE, at) == local.sees(1, WRITE, at, 0)
    for i, owner in enumerate(owners):
        assert owner.lock(UNLOCK) == OK
        local.lock(i, UNLOCK, 0, 0)
    assert [owner.sees(WRITE) for owner in owners] == [FREE] * 3
    local.close()


def test_exclusion_holds_under_load(export: Path) -> None:
    """Two guests, two rings each, count in one file under a lock; nothing is lost."""
    (export / "f").write_bytes(bytes(8))

    def count(client: Client, root: int, proc: int) -> None:
        fid = client.walk(root, b"f")
        client.lopen(fid, os.O_RDWR)
        owner = Owner(client, fid, proc)
        for _ in range(60):
            while owner.lock(WRITE, 0, 0, codec.LOCK_FLAGS_BLOCK) == BLOCKED:
                time.sleep(0.0002)
            value = int.from_bytes(client.read(fid, 0, 8), "little") + 1
            client.write(fid, 0, value.to_bytes(8, "little"))
            owner.lock(UNLOCK)
        client.clunk(fid)

    with contextlib.ExitStack() as stack:
        works = []
        for _ in range(2):
            rings, _served = stack.enter_context(serve_memory(export, rings=2))
            first, root = Client.connect(MemoryRingTransport(rings[0]))
            second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
            second._fids._next, second._next_tag = 1000, 30_000  # both are the device's and not a ring's
            stack.callback(first.close)
            stack.callback(second.close)
            works += [lambda c=first, r=root: count(c, r, 1), lambda c=second, r=root: count(c, r, 2)]
        together(*works)
    assert int.from_bytes((export / "f").read_bytes(), "little") == 240


def test_locks_and_clunks_at_once(export: Path) -> None:
    """A Tlock on one ring while the other clunks its fid: no lock is left."""
    (export / "f").touch()
    with serve_memory(export, rings=2) as (rings, _), memory_session(export) as other:
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        second._next_tag = 30_000  # tags are the device's and not a ring's
        mine = opened(other)
        granted = 0
        for _ in range(300):
            fid = first.walk(root, b"f")
            first.lopen(fid, os.O_RDWR)
            answers: list[int] = []

            def lock(fid: int = fid, answers: list[int] = answers) -> None:
                with contextlib.suppress(OSError):
                    answers.append(Owner(first, fid).lock(WRITE))

            together(lock, lambda fid=fid: second.rpc(codec.Tclunk(fid)))
            granted += answers == [OK]
            assert mine.sees(WRITE) == FREE
        assert granted
        first.close()
        second.close()
