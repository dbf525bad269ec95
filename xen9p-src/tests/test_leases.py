"""Leases: what a client may keep, who has to give it up, and that nobody ever sees what is old.

XEN9P_COHERENT says for how many seconds the long test runs; 3600 is an hour.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import socket
import stat
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from confined import child, needs_admin
from hostile import descriptors
from serving import Served
from test_limits import HEAP_SLACK, growth
from xen9p import codec, lease_table, sandbox, server, worker
from xen9p.async_client import AsyncClient
from xen9p.client import Client, Pending
from xen9p.dataplane import DataPlane, Leases
from xen9p.errors import Xen9pError
from xen9p.leases import Leases as Session
from xen9p.transport.link import Transport
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.transport.stream_client import SocketTransport

SECONDS = float(os.environ.get("XEN9P_COHERENT", "2"))
TERM = 0.6
LEAST = 1000  # reads of the long test, also on a machine that is busy
HANG = 20.0  # seconds after which something will not end any more


class Guest:
    """A device of its own on a shared table, with a client that does by hand what leases.py does."""

    def __init__(self, path: Path, table: Leases, term: float = TERM, peer: int = 0) -> None:
        self.ring = MemoryRing(5)
        self.served = Served(path)
        self.served.device.set_leases(table, term, peer)
        self.ring.serve_with(self.served.device)
        self.served.start()
        self.client, self.root = Client.connect(MemoryRingTransport(self.ring))

    def lease(self, how: int = codec.LEASE_OPEN) -> codec.Rlease:
        return self.client.rpc(codec.Tlease(how))  # type: ignore[return-value]

    def poll(self, batch: int = 0) -> Pending[codec.Rrevoke]:
        return self.client.submit(codec.Trevoke(batch), codec.Rrevoke)

    def key(self, *names: bytes) -> int:
        fid = self.client.walk(self.root, *names)
        try:
            return self.client.getattr(fid).gen
        finally:
            self.client.clunk(fid)

    def leased(self, name: bytes) -> bool:
        """Whether what a getattr says now may be kept."""
        fid = self.client.walk(self.root, name)
        self.client.transport.send(codec.encode(codec.Tgetattr(fid, codec.GETATTR_BASIC), 4000))
        kept = codec.strip_lease(self.client.transport.recv(HANG))[1]
        self.client.clunk(fid)
        return kept

    def close(self) -> None:
        self.client.close()
        self.served.close()
        self.ring.close()


@contextmanager
def two(export: Path, term: float = TERM) -> Iterator[tuple[Guest, Guest, Leases]]:
    table = lease_table.new_table()
    a, b = Guest(export, table, term), Guest(export, table, term)
    try:
        yield a, b, table
    finally:
        a.close()
        b.close()
        table.close()


def test_a_change_waits_until_it_is_given_up_and_nothing_else_does(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    (export / "g").write_bytes(b"other")
    with two(export, 30) as (a, b, table):
        assert a.lease().buckets == 65536
        poll, key = a.poll(), a.key(b"f")
        fid = b.client.walk(b.root, b"f")
        b.client.lopen(fid, os.O_WRONLY)
        writing = b.client.submit(codec.Twrite(fid, 0, b"new"), codec.Rwrite)
        told = poll.result(HANG)
        assert codec.decode_buckets(told.buckets) == (key % 65536,)
        assert b.client.read_file(b.root, b"g") == b"other", "the ring of the writer goes on"
        b.client.write_file(b.root, b"g", b"b")
        assert (export / "f").read_bytes() == b"old"
        assert not a.leased(b"f"), "while somebody waits to change it nobody may keep it"
        assert a.leased(b"g")
        a.poll(told.batch)
        assert writing.result(HANG).count == 3
        assert (export / "f").read_bytes() == b"new"
        assert a.leased(b"f")
        assert b.served.device.lease_stats()["waits"] == 1
        assert a.served.device.lease_stats()["revocations"] == 1
        assert table.stats() == {"sessions": 1, "opened": 1, "revoked": 1, "voided": 0}


def _open(client: Client, root: int, flags: int) -> int:
    fid = client.walk(root, b"f")
    client.lopen(fid, flags)
    return fid


def _xattr(client: Client, root: int) -> None:
    fid = client.walk(root, b"f")
    client.xattrcreate(fid, b"user.a", 1)
    client.write(fid, 0, b"v")
    client.clunk(fid)


CHANGES: dict[str, tuple[Callable[[Client, int], object], list[tuple[bytes, ...]], list[bytes]]] = {
    # what B does, files whose leases A loses, names in the root whose leases A loses
    "write": (lambda c, r: c.write(_open(c, r, os.O_WRONLY), 0, b"x"), [(b"f",)], []),
    "append": (lambda c, r: c.write(_open(c, r, os.O_WRONLY | os.O_APPEND), 0, b"x"), [(b"f",)], []),
    "open to truncate": (lambda c, r: _open(c, r, os.O_WRONLY | os.O_TRUNC), [(b"f",)], []),
    "mode": (lambda c, r: c.setattr(c.walk(r, b"f"), mode=0o600), [(b"f",)], []),
    "size": (lambda c, r: c.setattr(c.walk(r, b"f"), size=1), [(b"f",)], []),
    "create": (lambda c, r: c.lcreate(c.walk(r), b"new", os.O_RDWR), [()], [b"new"]),
    "mkdir": (lambda c, r: c.mkdir(r, b"new"), [()], [b"new"]),
    "symlink": (lambda c, r: c.symlink(r, b"new", b"f"), [()], [b"new"]),
    "mknod": (lambda c, r: c.mknod(r, b"new", stat.S_IFREG | 0o600), [()], [b"new"]),
    "link": (lambda c, r: c.link(r, c.walk(r, b"f"), b"new"), [(), (b"f",)], [b"new"]),
    "unlink": (lambda c, r: c.unlinkat(r, b"f"), [(), (b"f",)], [b"f"]),
    "remove": (lambda c, r: c.remove(c.walk(r, b"f")), [(), (b"f",)], [b"f"]),
    "rmdir": (lambda c, r: c.unlinkat(r, b"d", codec.AT_REMOVEDIR), [(), (b"d",)], [b"d"]),
    "rename over": (lambda c, r: c.renameat(r, b"f", r, b"g"), [(), (b"f",), (b"g",)], [b"f", b"g"]),
    "rename away": (lambda c, r: c.rename(c.walk(r, b"f"), c.walk(r, b"d"), b"f"), [(), (b"f",), (b"d",)], [b"f"]),
    "xattr": (_xattr, [(b"f",)], []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_takes_what_it_changes_and_no_more(export: Path, change: str) -> None:
    for name in ("f", "g", "same"):
        (export / name).write_bytes(b"content")
    (export / "d").mkdir()
    do, files, names = CHANGES[change]
    with two(export, 30) as (a, b, _):
        a.lease()
        keys = {n: a.key(*n) for n in ((), (b"f",), (b"g",), (b"d",), (b"same",))}
        root = keys[()]
        for name in (b"f", b"g", b"d", b"same", b"new"):
            try:
                a.client.clunk(a.client.walk(a.root, name))
            except FileNotFoundError:
                assert name == b"new"
        wanted = {keys[n] % 65536 for n in files} | {zlib.crc32(n, root & 0xFFFFFFFF) % 65536 for n in names}
        told: set[int] = set()

        def give_up() -> None:
            batch = 0
            while not told >= wanted:
                reply = a.poll(batch).result(HANG)
                assert not reply.everything
                told.update(codec.decode_buckets(reply.buckets))
                batch = reply.batch
            a.poll(batch)

        thread = Thread(target=give_up)
        thread.start()
        do(b.client, b.root)
        thread.join(HANG)
        assert told == wanted


def test_who_never_gives_up_holds_up_others_for_a_term_and_once(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export) as (a, b, table):
        a.lease()
        a.poll()
        assert a.leased(b"f")
        fid = _open(b.client, b.root, os.O_WRONLY)
        began = time.monotonic()
        writing = b.client.submit(codec.Twrite(fid, 0, b"new"), codec.Rwrite)
        renewed = 0
        while not table.stats()["voided"]:
            assert time.monotonic() - began < HANG
            try:
                a.lease(codec.LEASE_RENEW)
                renewed += 1
            except OSError:
                break
            time.sleep(TERM / 5)
        assert renewed, "it says that it lives, and that does not help it"
        assert writing.result(HANG).count == 3
        assert table.stats()["sessions"] == 0
        waits = b.served.device.lease_stats()["waits"]
        b.client.write(fid, 0, b"two")
        assert b.served.device.lease_stats()["waits"] == waits
        assert not a.leased(b"f")
        with pytest.raises(BlockingIOError):
            a.lease()
        assert a.served.device.lease_stats()["voided"] == 1


def test_a_new_device_does_not_help_who_has_not_given_up(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export) as (_, b, table):
        a = Guest(export, table, peer=7)
        a.lease()
        a.key(b"f")
        b.client.write_file(b.root, b"f", b"new")
        assert table.stats()["voided"] == 1
        a.close()
        again, somebody = Guest(export, table, peer=7), Guest(export, table, peer=8)
        with pytest.raises(BlockingIOError):
            again.lease()
        somebody.lease()
        again.close()
        somebody.close()


def test_who_gives_up_late_each_time_gets_no_leases_any_more(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export) as (a, b, _):
        a.lease()
        fid = _open(b.client, b.root, os.O_WRONLY)
        batch = 0
        times = 0
        try:
            while times < 10:
                poll = a.poll(batch)
                a.key(b"f")
                a.lease(codec.LEASE_RENEW)
                b.client.submit(codec.Twrite(fid, 0, b"%d" % times), codec.Rwrite)
                batch = poll.result(HANG).batch
                time.sleep(TERM * 0.6)
                times += 1
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        assert 1 < times < 10
        with pytest.raises(BlockingIOError):
            a.lease()


def test_a_session_that_is_ended_is_waited_for_no_longer(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export, 60) as (a, b, table):
        for end in (lambda: a.lease(codec.LEASE_CLOSE), a.client.version):
            a.lease()
            root = a.client.attach() if end is a.client.version else a.root
            a.root = root
            a.key(b"f")
            fid = _open(b.client, b.root, os.O_WRONLY)
            writing = b.client.submit(codec.Twrite(fid, 0, b"new"), codec.Rwrite)
            end()
            assert writing.result(HANG).count == 3
            assert table.stats()["sessions"] == 0
            a.root = a.client.attach()
        with pytest.raises(OSError, match="Stale"):
            a.lease(codec.LEASE_RENEW)


def _a_write_that_waits(a: Guest, b: Guest) -> Transport:
    """Of tag 100, by b, to a file that a has a lease of."""
    a.lease()
    a.key(b"f")
    fid = _open(b.client, b.root, os.O_WRONLY)
    b.client.transport.send(codec.encode(codec.Twrite(fid, 0, b"new"), 100))
    until = time.monotonic() + HANG
    while not b.served.device.lease_stats()["waits"]:
        assert time.monotonic() < until
    return b.client.transport


def test_what_waits_can_be_flushed(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export, 60) as (a, b, _):
        transport = _a_write_that_waits(a, b)
        transport.send(codec.encode(codec.Tflush(100), 101))
        assert codec.decode(transport.recv(HANG)) == (101, codec.Rflush())
        assert (export / "f").read_bytes() == b"old"
        a.client.transport.send(codec.encode(codec.Trevoke(0), 100))
        a.client.transport.recv(HANG)  # what the write had taken already
        assert a.leased(b"f"), "nobody is changing it any more"
    with two(export, 60) as (a, b, _):
        a.lease()
        a.client.transport.send(codec.encode(codec.Trevoke(0), 100))
        a.client.transport.send(codec.encode(codec.Tflush(100), 101))
        assert codec.decode(a.client.transport.recv(HANG))[1] == codec.Rlerror(125)  # ECANCELED
        assert codec.decode(a.client.transport.recv(HANG)) == (101, codec.Rflush())


def test_a_new_session_answers_what_waits(export: Path) -> None:
    """A Tversion ends what waits for others, and that is said."""
    (export / "f").write_bytes(b"old")
    with two(export, 60) as (a, b, _):
        transport = _a_write_that_waits(a, b)
        transport.send(codec.encode(codec.Tversion(8192, b"9P2000.L"), codec.NOTAG))
        assert codec.decode(transport.recv(HANG)) == (100, codec.Rlerror(125))  # ECANCELED
        assert codec.decode(transport.recv(HANG)) == (codec.NOTAG, codec.Rversion(8192, b"9P2000.L"))
        assert (export / "f").read_bytes() == b"old"


def test_repetition_keeps_nothing(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export, 30) as (a, b, table):

        def work() -> None:
            a.lease()
            poll = a.poll()
            a.key(b"f")
            b.client.submit(codec.Tsetattr(file, codec.SETATTR_MODE, 0o600, 0, 0, 0, 0, 0, 0, 0), codec.Rsetattr)
            a.lease(codec.LEASE_CLOSE)
            with suppress(OSError):
                poll.result(HANG)
            b.key(b"f")

        file = b.client.walk(b.root, b"f")
        for _ in range(50):
            work()
        before = descriptors()
        assert growth(work) < HEAP_SLACK
        assert descriptors() <= before
        assert table.stats()["sessions"] == 0


def test_nonsense(export: Path) -> None:
    with two(export) as (a, b, _):
        for message in (codec.Tlease(codec.LEASE_RENEW), codec.Tlease(9), codec.Trevoke(0)):
            with pytest.raises(OSError, match=r"Invalid|Stale"):
                b.client.rpc(message)
        a.lease()
        with pytest.raises(OSError, match="Invalid"):
            a.client.rpc(codec.Trevoke(7))
        a.poll()
        with pytest.raises(OSError, match="busy"):
            a.client.rpc(codec.Trevoke(0))
    ring, served = MemoryRing(5), Served(export)
    ring.serve_with(served.device)
    served.start()
    client, _ = Client.connect(MemoryRingTransport(ring))
    with pytest.raises(OSError, match="not supported"):
        client.rpc(codec.Tlease(codec.LEASE_OPEN))
    client.close()
    served.close()
    ring.close()


def test_a_restore_has_everybody_give_up_everything(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two(export, 30) as (a, _, table):
        a.lease()
        assert a.leased(b"f")
        table.freeze()
        assert table.owed() == 1
        assert not a.leased(b"f")
        told = a.poll().result(HANG)
        assert told.everything
        a.poll(told.batch)
        a.key(b"f")  # what comes after it has been answered
        assert table.owed() == 0
        table.thaw()
        assert a.leased(b"f")


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"x" * 100)
    with pytest.raises(Xen9pError, match="lease table"):
        lease_table.open_table(tmp_path / "t")


# Workers of their own, as on a host.


@contextmanager
def worker_process(export: Path, table: Leases, term: float = TERM) -> Iterator[tuple[int, socket.socket]]:
    """(pid, the client's end) of a process that serves a socket."""
    ours, theirs = socket.socketpair()

    def serve() -> int:
        ours.close()
        device = DataPlane(os.open(export, os.O_RDONLY | os.O_DIRECTORY), readonly=False)
        device.set_leases(table, term)
        device.add_stream(theirs)
        return int(device.run(server.serve))

    with child(serve) as (pid, _):
        theirs.close()
        yield pid, ours


def test_a_worker_of_two_processes_that_is_killed_while_it_changes_something(export: Path) -> None:
    (export / "f").write_bytes(b"old")
    table = lease_table.new_table()
    a = Guest(export, table, 30)
    a.lease()
    assert a.leased(b"f")
    with worker_process(export, table) as (pid, sock):
        client, root = Client.connect(SocketTransport(sock))
        fid = _open(client, root, os.O_WRONLY)
        writing = client.submit(codec.Twrite(fid, 0, b"new"), codec.Rwrite)
        told = a.poll().result(HANG)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((OSError, EOFError, Xen9pError)):
            writing.result(HANG)
        client.close()
        poll = a.poll(told.batch)
        assert not a.leased(b"f"), "who was killed cannot say that it is done"
        assert pid in table.pids()
        assert table.recover(pid) > 0
        last = poll.result(HANG)
        assert last.everything
        a.poll(last.batch)
        assert a.leased(b"f")
        assert pid not in table.pids()
    a.close()
    table.close()


def test_a_supervisor_cleans_up_after_workers_that_died_without_it(export: Path, tmp_path: Path) -> None:
    path = lease_table.path_of(tmp_path, export)
    table = lease_table.open_table(path)
    assert path.stat().st_mode & 0o777 == 0o600
    table.freeze()
    device = DataPlane(os.open(export, os.O_RDONLY | os.O_DIRECTORY), readonly=False)
    device.set_leases(table, TERM)
    other = lease_table.open_table(path)
    assert other.pids() == {os.getpid()}
    lease_table.clean(tmp_path, {os.getpid()})
    assert other.pids() == {os.getpid()}
    lease_table.clean(tmp_path, set())
    assert other.pids() == set()
    lease_table.revoke(tmp_path, export)
    device.close()
    other.close()
    table.close()


@needs_admin
def test_a_confined_worker_waits_and_is_told_like_any_other(export: Path) -> None:
    """The table is mapped before the walls close, and futexes work behind them."""
    (export / "f").write_bytes(b"old")
    os.chmod(export / "f", 0o666)
    table, ring = lease_table.new_table(), MemoryRing(5)
    a = Guest(export, table, 30)
    a.lease()
    assert a.leased(b"f")

    def serve() -> int:
        worker.prepare_process()
        root = sandbox.cage(str(export), readonly=False)
        device = DataPlane(root, readonly=False)
        device.set_leases(table, 30)
        sandbox.shut(root, readonly=False)
        ring.serve_with(device)
        return int(device.run(server.serve))

    with child(serve):
        client, root = Client.connect(MemoryRingTransport(ring))
        assert client.rpc(codec.Tlease(codec.LEASE_OPEN)) == codec.Rlease(30000, 65536)
        fid = _open(client, root, os.O_WRONLY)
        writing = client.submit(codec.Twrite(fid, 0, b"new"), codec.Rwrite)
        told = a.poll().result(HANG)
        a.poll(told.batch)
        assert writing.result(HANG).count == 3
        client.getattr(fid)
        waiting = client.submit(codec.Trevoke(0), codec.Rrevoke)
        changing = a.client.submit(
            codec.Tsetattr(a.client.walk(a.root, b"f"), codec.SETATTR_MODE, 0o600, 0, 0, 0, 0, 0, 0, 0), codec.Rsetattr
        )
        batch = waiting.result(HANG).batch
        client.submit(codec.Trevoke(batch), codec.Rrevoke)
        changing.result(HANG)
        client.close()
    a.close()
    ring.close()
    table.close()


class Keeper:
    """A client that keeps whole files under leases, and nothing else: the smallest coherent cache."""

    def __init__(self, client: AsyncClient, root: int) -> None:
        self.client, self.root = client, root
        self.leases = Session(client, self.revoked)
        self.kept: dict[bytes, tuple[int, bytes]] = {}  # by name: its bucket, the data
        self.keys: dict[bytes, int] = {}
        self.fids: dict[bytes, int] = {}
        self.hits = 0

    async def revoked(self, buckets: Collection[int] | None) -> None:
        self.kept = {} if buckets is None else {n: k for n, k in self.kept.items() if k[0] not in buckets}

    async def fid(self, name: bytes) -> int:
        if name not in self.fids:
            fid = await self.client.walk(self.root, name)
            self.keys[name] = (await self.client.getattr(fid)).gen
            await self.client.lopen(fid, os.O_RDWR)
            self.fids[name] = fid
        return self.fids[name]

    async def read(self, name: bytes) -> int:
        if name in self.kept and self.leases.remaining():
            self.hits += 1
            return int(self.kept[name][1])
        fid, mark = await self.fid(name), self.leases.mark()
        data = await self.client.read(fid, 0, 100)
        bucket = self.leases.file(self.keys[name])
        if self.leases.holds(mark, bucket):
            self.kept[name] = bucket, data
        return int(data)

    async def write(self, name: bytes, value: int) -> None:
        fid = await self.fid(name)
        self.leases.touch(self.leases.file(self.keys[name]))
        self.kept.pop(name, None)
        await self.client.write(fid, 0, b"%012d" % value)
        self.leases.touch(self.leases.file(self.keys[name]))
        self.kept.pop(name, None)


async def use(keepers: list[Keeper], names: list[bytes], seconds: float, seed: int) -> int:
    """Each writes a file of its own and reads all of them. What was read or written once is the least that a read that
    starts later may see. Returns how many reads there were.
    """
    least = dict.fromkeys(names, 0)
    reads = 0
    until = time.monotonic() + seconds

    async def one(keeper: Keeper, mine: bytes, rng: random.Random) -> None:
        nonlocal reads
        value = 0
        while time.monotonic() < until or reads < LEAST:
            if rng.random() < 0.1:
                value += 1
                await keeper.write(mine, value)
                least[mine] = max(least[mine], value)
                continue
            name = rng.choice(names)
            at_least = least[name]
            got = await keeper.read(name)
            assert got >= at_least, f"{name!r}: {got} after {at_least}"
            least[name] = max(least[name], got)
            reads += 1
            if rng.random() < 0.2:
                await asyncio.sleep(0)

    await asyncio.gather(
        *(one(k, n, random.Random(seed + i)) for i, (k, n) in enumerate(zip(keepers, names, strict=True)))
    )
    return reads


def test_nothing_old_is_ever_read_through_workers_of_two_processes(export: Path) -> None:
    names = [b"a", b"b", b"c"]
    for name in names:
        (export / os.fsdecode(name)).write_bytes(b"%012d" % 0)
    table = lease_table.new_table()

    async def run(sockets: list[socket.socket]) -> None:
        keepers = []
        for sock in sockets:
            client, root = await AsyncClient.connect(SocketTransport(sock))
            keepers.append(Keeper(client, root))
            await keepers[-1].leases.open()
        reads = await use(keepers, names, SECONDS, seed=random.randrange(1 << 30))
        assert sum(k.hits for k in keepers) > reads / 4, "it is a cache"
        for keeper in keepers:
            await keeper.leases.close()
            keeper.client.close()

    with ExitStack() as stack:
        sockets = [stack.enter_context(worker_process(export, table, 3.0))[1] for _ in names]
        asyncio.run(run(sockets))
    assert table.stats()["voided"] == 0
    assert table.stats()["revoked"] > 10
    table.close()


def test_a_client_without_leases_is_told_so_in_one_line(export: Path) -> None:
    ours, theirs = socket.socketpair()
    served = Served(export)
    served.device.add_stream(theirs)
    served.start()

    async def run() -> None:
        client, root = await AsyncClient.connect(SocketTransport(ours))
        with pytest.raises(Xen9pError, match="the server gives no leases"):
            await Keeper(client, root).leases.open()
        client.close()

    asyncio.run(run())
    served.close()
    theirs.close()
