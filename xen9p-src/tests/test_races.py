"""Messages and files that change while they are used: each outcome is one of the known ones, whatever the timing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostile import raw
from serving import Served, memory_session, serve_memory
from xen9p import codec
from xen9p.client import Client
from xen9p.dataplane import Verdict
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

SECONDS = 1.0
WRAP = 1 << 32
RENAME_EXCHANGE, AT_FDCWD = 2, -100
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def meanwhile(*works: Callable[[], None]) -> Iterator[None]:
    """Does each work over and over in a thread of its own; what fails there fails the test."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def loop(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def together(*works: Callable[[], None]) -> None:
    """Does each work once, all at the same time; what fails in one fails the test when all have ended."""
    failures: list[BaseException] = []

    def once(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=once, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures, failures


def exchange(first: Path, second: Path) -> None:
    """Swaps two names in one step."""
    if _LIBC.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        pytest.fail(os.strerror(ctypes.get_errno()))


def content(client: Client, root: int, *names: bytes) -> bytes | int:
    """What a walk, an open and a read give: data, or the errno of the first that failed."""
    try:
        fid = client.walk(root, *names)
    except OSError as error:
        return error.errno or 0
    try:
        client.lopen(fid)
        return client.read(fid, 0, 100)
    except OSError as error:
        return error.errno or 0
    finally:
        client.clunk(fid)


def test_a_directory_that_turns_into_a_symlink_leads_nowhere(export: Path) -> None:
    (export / "d").mkdir()
    (export / "d" / "outside").write_text("inside")
    (export / "s").symlink_to("..")
    got: dict[bytes | int, int] = {}
    made = 0
    with memory_session(export) as session, meanwhile(lambda: exchange(export / "d", export / "s")):
        client, root, end = session.client, session.root, time.monotonic() + SECONDS
        while time.monotonic() < end:
            result = content(client, root, b"d", b"outside")
            got[result] = got.get(result, 0) + 1
            try:
                with client.walked(root, b"d") as folder:
                    client.mkdir(folder, b"made")
                    client.unlinkat(folder, b"made", codec.AT_REMOVEDIR)
                    made += 1
            except OSError as error:
                got[error.errno or 0] = 1
    assert set(got) <= {b"inside", errno.ENOTDIR, errno.ENOENT, errno.EACCES, errno.ELOOP}
    assert got.get(b"inside"), "the race was never lost: it raced with nothing"
    assert len(got) > 1, "the race was never won"
    assert made
    assert sorted(os.listdir(export.parent)) == ["export", "outside"]


def test_a_directory_that_leaves_the_export_is_no_way_out(export: Path) -> None:
    """A fid in a directory that the host moves out and in again: its `..` is never the directory above the export."""
    (export / "d").mkdir()
    (export / "outside").write_text("inside")
    inside, outside = export / "d", export.parent / "d"
    with memory_session(export) as session:
        client = session.client
        folder = client.walk(session.root, b"d")

        def move() -> None:
            inside.rename(outside)
            outside.rename(inside)

        got = set()
        with meanwhile(move):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                got.add(content(client, folder, b"..", b"outside"))
    assert got <= {b"inside", errno.ESTALE, errno.ENOENT}
    assert got > {b"inside"}


def outcome(message: codec.Message, reply: codec.Message) -> str:
    """The reply's kind, or its errno's name."""
    if isinstance(reply, codec.Rlerror):
        return errno.errorcode[reply.ecode]
    assert reply.type == message.type + 1
    return type(reply).__name__


FID, OTHER = 500, 501
# What may be said to a message on a fid that is changed under it; anything else is a defect.
USES = {
    codec.Tlopen(FID, os.O_RDWR): {"EBADF", "EINVAL", "EISDIR"},
    codec.Tread(FID, 0, 100): {"EBADF", "EISDIR"},
    codec.Twrite(FID, 0, b"v" * 100): {"EBADF", "EISDIR"},
    codec.Tgetattr(FID, codec.GETATTR_BASIC): {"EBADF"},
    codec.Tsetattr(FID, codec.SETATTR_SIZE, 0, 0, 0, 100, 0, 0, 0, 0): {"EBADF", "EISDIR"},
    codec.Tfsync(FID, 1): {"EBADF"},
    codec.Tlock(FID, codec.LOCK_TYPE_RDLCK, 0, 0, 0, 1, b"c"): {"EBADF"},
    codec.Treaddir(FID, 0, 1000): {"EBADF", "ENOTDIR"},
    codec.Tstatfs(FID): {"EBADF"},
}
# Of a file onto a directory, or the other way round.
MOVES = {"EBADF", "ESTALE", "EISDIR", "ENOENT", "ENOTDIR", "ENOTEMPTY", "EEXIST"}
CHANGES = {
    codec.Tclunk(FID): {"EBADF"},
    codec.Twalk(0, FID, (b"f",)): {"EINVAL", "ENOENT"},
    codec.Twalk(0, FID, (b"g",)): {"EINVAL", "ENOENT"},
    codec.Twalk(FID, FID, (b"f",)): {"EBADF", "ENOTDIR", "ENOENT"},
    codec.Twalk(0, FID, (b"d",)): {"EINVAL", "ENOENT"},
    codec.Trename(FID, 0, b"g"): MOVES,
    codec.Trename(FID, 0, b"f"): MOVES,
    codec.Tlcreate(FID, b"new", os.O_RDWR, 0o600, 0): {"EBADF", "ENOTDIR", "EINVAL"},
    # The name may stand for a file of another kind by the time that it is removed.
    codec.Tremove(FID): {"EBADF", "ESTALE", "ENOTEMPTY", "ENOENT", "ENOTDIR", "EISDIR"},
}


def play(client: Client, script: dict[codec.Message, set[str]], tags: int, seed: int) -> set[str]:
    """Sends messages of the script in random order, a few in flight; the outcomes seen."""
    dice, seen, end = random.Random(seed), set(), time.monotonic() + 1.5 * SECONDS
    messages = list(script)
    while time.monotonic() < end:
        batch = {tags + i: dice.choice(messages) for i in range(8)}
        for tag, message in batch.items():
            client.send_raw(codec.encode(message, tag))
        for _ in range(len(batch)):
            tag, reply = codec.decode(client.recv_raw())
            message = batch.pop(tag)
            result = outcome(message, reply)
            assert result in script[message] or result[0] == "R", (message, result)
            if isinstance(reply, codec.Rread):
                # One of the files, whole or empty; bytes of any other file mean a descriptor closed too early.
                assert reply.data in (b"", b"f" * 100, b"g" * 100, b"v" * 100, bytes(100)), reply.data
            seen.add(f"{type(message).__name__} {result}")
    return seen


def test_one_fid_over_two_rings(export: Path) -> None:
    """Using a fid on one ring while the other clunks, moves, replaces and removes it."""
    files = export / "f", export / "g"
    (export / "d").mkdir()
    (export / "d" / "keep").touch()
    secret = export.parent / "outside"

    def refill() -> None:
        for path in files:
            if not path.exists():
                new = export.parent / "new"
                new.write_bytes(path.name.encode() * 100)
                with contextlib.suppress(IsADirectoryError):  # the peer has put its directory there
                    new.rename(path)
                new.unlink(missing_ok=True)
        time.sleep(0.001)

    def recycle() -> None:
        # A descriptor that the server closed too early soon means this file.
        for fd in [os.open(secret, os.O_RDWR) for _ in range(20)]:
            os.close(fd)

    refill()
    seen: list[set[str]] = []
    wanted = {"Tread Rread", "Twrite Rwrite", "Tclunk Rclunk", "Twalk Rwalk", "Trename Rrename"}
    wanted |= {"Tread EBADF", "Tclunk EBADF"}
    until = time.monotonic() + 60
    with serve_memory(export, rings=2) as (rings, served):
        first, _ = Client.connect(MemoryRingTransport(rings[0]))
        other = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        try:
            with meanwhile(refill, recycle):
                # On a busy machine one of the two may be done before the other has begun.
                while not wanted <= set().union(*seen) and time.monotonic() < until:
                    rounds = len(seen)
                    together(
                        lambda seed=2 * rounds + 1: seen.append(play(first, USES, 100, seed)),
                        lambda seed=2 * rounds + 2: seen.append(play(other, CHANGES, 200, seed)),
                    )
            with contextlib.suppress(OSError):
                first.rpc(codec.Tclunk(FID), 1)
        finally:
            first.close()
            other.close()
        assert served.verdict is None
        assert served.device.stats()["fids"] == 1
    assert secret.read_text() == "secret"
    assert sorted(os.listdir(export.parent)) == ["export", "outside"]
    assert wanted <= set().union(*seen)


SLOT = 64


def of_size(make: Callable[[bytes], codec.Message]) -> codec.Message:
    """The message of exactly SLOT bytes, so that the ring is one slot after the other."""
    fill = SLOT - len(codec.encode(make(b""), 0))
    return make(b"n" * fill)


# A message, and a byte of it that the peer changes back and forth.
FLIPS = {
    "size": (of_size(lambda fill: codec.Tmkdir(0, fill, 0o755, 0)), 1, 0x40),
    "size-high": (of_size(lambda fill: codec.Tmkdir(0, fill, 0o755, 0)), 3, 0x7F),
    "type": (of_size(lambda fill: codec.Tmkdir(0, fill, 0o755, 0)), 4, codec.Tunlinkat.type),
    "fid": (of_size(lambda fill: codec.Twalk(0, 0xFFFF, (b"d", fill))), 7, 9),
    "name": (of_size(lambda fill: codec.Twalk(0, 0xFFFF, (b".d", fill))), 20, ord(".")),
    "new-name": (of_size(lambda fill: codec.Tmkdir(0, fill, 0o755, 0)), 13, ord("/")),
    "name-length": (of_size(lambda fill: codec.Tmkdir(0, fill, 0o755, 0)), 12, 0xFF),
    "count": (of_size(lambda fill: codec.Twrite(1, 0, fill)), 21, 0xFF),
}


def flood(ring: MemoryRing, served: Served, message: bytes, end: float) -> None:
    """Sends the message until the time is over or the device has ended. Its tags go round."""
    transport = MemoryRingTransport(ring, timeout=0.05)
    tags = 0
    with contextlib.suppress(TimeoutError):
        while served.verdict is None and time.monotonic() < end:
            for _ in range(32):
                transport.send(message[:5] + (tags % 60000).to_bytes(2, "little") + message[7:])
                tags += 1
            for _ in range(32):
                transport.recv()
    transport.close()


def flipper(ring: MemoryRing, at: int, true: int, lie: int) -> Callable[[], None]:
    """Turns byte number at of every message in the ring to a lie and back; one begins at each multiple of SLOT."""
    slots = ring.half // SLOT - 1
    first = ring.half + ring.index(64) % SLOT + at
    where = slice(first, first + slots * SLOT, SLOT)
    honest, lying = bytes([true]) * slots, bytes([lie]) * slots

    def flip() -> None:
        # Honest most of the time: a lie that is seen ends most devices, and a device that ended races no more.
        for _ in range(10):
            ring.data[where] = lying
            ring.data[where] = honest
            time.sleep(0)

    return flip


@pytest.mark.parametrize("what", FLIPS)
def test_a_message_that_changes_while_it_is_read(export: Path, what: str) -> None:
    """The peer turns one byte of every message in the ring back and forth: the server sees it one way or the other."""
    message, at, lie = FLIPS[what]
    good = codec.encode(message, 0)
    assert len(good) == SLOT
    verdicts, end = set(), time.monotonic() + SECONDS / 2
    (export / "f").touch()
    while time.monotonic() < end:
        with serve_memory(export, order=3) as (rings, served):
            (ring,) = rings
            client = Client(MemoryRingTransport(ring))
            client.version()
            root = client.attach()
            client.lopen(client.walk(root, b"f"), os.O_RDWR)
            client.close()
            with meanwhile(flipper(ring, at, good[at], lie)):
                flood(ring, served, good, end)
                served.device.stop()
                verdicts.add(served.join())
        assert sorted(os.listdir(export.parent)) == ["export", "outside"]
        assert (export.parent / "outside").read_text() == "secret"
        for name in os.listdir(export):
            if name != "f":
                (export / name).rmdir()
    assert verdicts <= {Verdict.STOPPED, Verdict.PROTOCOL}


def pieces(total: int, largest: int, dice: random.Random) -> list[tuple[int, int]]:
    """(offset, length) of pieces that make up a whole, in random order."""
    cut, at = [], 0
    while at < total:
        length = min(dice.randint(1, largest), total - at)
        cut.append((at, length))
        at += length
    dice.shuffle(cut)
    return cut


@pytest.mark.parametrize("start", [0, WRAP - 30_000])
def test_many_writes_in_flight_keep_their_data(export: Path, start: int) -> None:
    """Pieces of one file over two rings, many in flight, other messages between them: each byte lands in its place."""
    dice = random.Random(start)
    data = dice.randbytes(3_000_000)
    todo = pieces(len(data), 30_000, dice)
    with serve_memory(export, rings=2, start_at=start) as (rings, served):
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        fid = first.walk(root)
        first.lcreate(fid, b"f", os.O_RDWR)

        def write(client: Client, mine: list[tuple[int, int]], tags: int) -> None:
            for begin in range(0, len(mine), 40):
                wanted: dict[int, codec.Message] = {}
                for i, (offset, length) in enumerate(mine[begin : begin + 40]):
                    tag = tags + 2 * i
                    wanted[tag] = codec.Rwrite(length)
                    client.send_raw(codec.encode(codec.Twrite(fid, offset, data[offset : offset + length]), tag))
                    if i % 3 == 0:
                        client.send_raw(codec.encode(codec.Tstatfs(root), tag + 1))
                        wanted[tag + 1] = codec.Tstatfs(root)
                while wanted:
                    tag, reply = codec.decode(client.recv_raw())
                    want = wanted.pop(tag)
                    assert reply == want or isinstance(want, codec.Tstatfs)

        try:
            together(lambda: write(first, todo[::2], 0), lambda: write(second, todo[1::2], 1000))
        finally:
            first.close()
            second.close()
        assert served.device.stats()["in_flight"] == 0
        for ring in rings:
            assert ring.index(64) == ring.index(68), "bytes of the ring were not given back"
    assert (export / "f").read_bytes() == data


def test_flushed_writes_give_their_place_back(export: Path) -> None:
    """A Tflush of each write that still waits: the ring is free again, and every piece is there or was never begun."""
    with memory_session(export, order=4) as session:
        client, root = session.client, session.root
        fid = client.walk(root)
        client.lcreate(fid, b"f", os.O_RDWR)
        for round_ in range(30):
            wanted = set()
            for i in range(6):
                client.send_raw(codec.encode(codec.Twrite(fid, i * 5000, bytes([round_ + 1]) * 5000), 2 * i))
                client.send_raw(codec.encode(codec.Tflush(2 * i), 2 * i + 1))
                wanted.add(2 * i + 1)
            while wanted:
                tag, reply = codec.decode(client.recv_raw())
                if tag in wanted:
                    assert isinstance(reply, codec.Rflush)
                    wanted.remove(tag)
                else:
                    assert reply == codec.Rwrite(5000)
        assert client.read(fid, 0, 1) <= b"\x1e"
        assert session.served.device.stats()["in_flight"] == 0
    found = (export / "f").read_bytes()
    for at in range(0, len(found), 5000):
        assert len(set(found[at : at + 5000])) == 1


def test_nothing_of_a_bad_message_is_left_in_the_ring(export: Path) -> None:
    """A write that is refused (bad fid, offset) is taken off the ring like one that works."""
    with serve_memory(export) as (rings, _):
        client = Client(MemoryRingTransport(rings[0]))
        client.version()
        root = client.attach()
        for fid, offset in ((99, 0), (root, 0), (99, 2**64 - 1)):
            for _ in range(20):
                client.send_raw(raw(codec.Twrite.type, 1, fid.to_bytes(4, "little") + offset.to_bytes(8, "little")
                                    + (9000).to_bytes(4, "little") + bytes(9000)))  # fmt: skip
                assert isinstance(codec.decode(client.recv_raw())[1], codec.Rlerror)
        client.close()
        assert rings[0].index(64) == rings[0].index(68)
