"""What a guest can make the server hold or do: repetition, storms, depth, size. Bounded, and no other guest waits.

XEN9P_REPEAT says how many of each message the repetition sends; 1000000 is the duty, the default takes a second or two.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import REQUESTS, descriptors, heap, rss
from serving import Session, memory_session
from xen9p import codec, server
from xen9p.client import Client
from xen9p.dataplane import Limits
from xen9p.transport.memory import MemoryRingTransport

REPEAT = int(os.environ.get("XEN9P_REPEAT", "150"))
# C's heap is counted to the byte, so one lost allocation in every message shows; RSS moves for other reasons too.
HEAP_SLACK, RSS_SLACK = 9_000, 16_000_000


def test_many_requests_queue_up_to_a_bound(export: Path) -> None:
    limits = Limits(max_queued=4)
    with memory_session(export, order=5, limits=limits) as session:
        for tag in range(200):
            session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"d%d" % tag, 0o755, 0), tag))
            assert session.served.device.stats()["in_flight"] <= limits.max_queued
        got = {codec.decode(session.client.recv_raw())[0] for _ in range(200)}
        assert got == set(range(200))
        assert len(os.listdir(export)) == 200


def test_requests_that_do_not_end_pile_up_to_a_bound_only(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest stays in the ring, where it is the guest's own memory that it fills."""
    held = threading.Event()
    original = server._HANDLERS[codec.Tmkdir]
    monkeypatch.setitem(server._HANDLERS, codec.Tmkdir, lambda device, msg: (held.wait(10), original(device, msg))[1])
    with memory_session(export, order=5, limits=Limits(max_queued=4)) as session:
        for tag in range(50):
            session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"d%d" % tag, 0o755, 0), tag))
        time.sleep(0.2)
        assert session.served.device.stats()["in_flight"] == 4
        held.set()
        assert {codec.decode(session.client.recv_raw())[0] for _ in range(50)} == set(range(50))


class Everything:
    """Each message once a call, as it works and as it fails; what a call makes it takes away again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.root = 0

    def begin(self) -> None:
        """A new session: Tversion with fids open, Tattach."""
        self.client.version()
        self.root = self.client.attach()

    def refused(self, message: codec.Message) -> None:
        with contextlib.suppress(OSError):
            self.client.rpc(message)
            raise AssertionError(f"{message} worked")

    def calls(self) -> list[Callable[[], None]]:
        return [
            self.sessions,
            self.files,
            self.names,
            self.moves,
            self.directories,
            self.locks,
            self.xattrs,
            self.refusals,
        ]

    def sessions(self) -> None:
        fid = self.client.walk(self.root, b"f")
        self.client.lopen(fid, os.O_RDWR)
        self.begin()
        self.client.clunk(self.client.attach(uname=b"u" * 200))

    def files(self) -> None:
        client, root = self.client, self.root
        fid = client.walk(root)
        client.lcreate(fid, b"made", os.O_RDWR)
        client.write(fid, 0, b"y" * 5000)
        client.read(fid, 0, 100)
        client.getattr(fid)
        client.setattr(fid, mode=0o600, size=10)
        client.statfs(fid)
        client.fsync(fid, datasync=True)
        client.flush(3)
        other = client.walk(root, b"made")
        client.lopen(other, os.O_RDWR | os.O_TRUNC)
        client.remove(other)
        client.clunk(fid)

    def names(self) -> None:
        client, root = self.client, self.root
        client.symlink(root, b"symlink", b"t" * 300)
        with client.walked(root, b"symlink") as fid:
            client.readlink(fid)
        with client.walked(root, b"f") as fid:
            client.link(root, fid, b"link")
        client.mknod(root, b"fifo", stat.S_IFIFO | 0o600)
        for name in (b"symlink", b"link", b"fifo"):
            client.unlinkat(root, name)

    def moves(self) -> None:
        client, root = self.client, self.root
        with client.walked(root, b"f") as fid:
            client.rename(fid, root, b"moved")
            client.renameat(root, b"moved", root, b"f")

    def directories(self) -> None:
        client, root = self.client, self.root
        client.mkdir(root, b"d")
        with client.walked(root, b"d/..") as fid:
            client.lopen(fid)
            while client.readdir(fid, 0, 100) and client.rpc(codec.Treaddir(fid, 2**63 - 1, 100)).data:  # type: ignore[attr-defined]
                pass
        client.unlinkat(root, b"d", codec.AT_REMOVEDIR)

    def locks(self) -> None:
        client = self.client
        with client.walked(self.root, b"f") as fid:
            client.lopen(fid)
            for proc in (1, 2):
                for start in (0, 20, 40):
                    client.lock(fid, codec.LOCK_TYPE_RDLCK, start, 10, proc_id=proc, client_id=b"c" * 200)
            client.lock(fid, codec.LOCK_TYPE_WRLCK, client_id=b"another")
            client.getlock(fid, codec.LOCK_TYPE_WRLCK, client_id=b"c" * 200)
            client.lock(fid, codec.LOCK_TYPE_UNLCK, 5, 10, proc_id=1, client_id=b"c" * 200)

    def xattrs(self) -> None:
        client = self.client
        with client.walked(self.root, b"f") as fid:
            for value, flags in ((b"v" * 1000, 0), (b"", os.XATTR_REPLACE)):
                clone = client.walk(fid)
                client.xattrcreate(clone, b"user.a", len(value), flags)
                client.write(clone, 0, value)
                client.clunk(clone)
                with contextlib.suppress(OSError):
                    found, size = client.xattrwalk(fid, b"user.a")
                    client.read(found, 0, size)
                    client.clunk(found)
            client.clunk(client.xattrwalk(fid)[0])
            for given_up in (client.clunk, client.remove):
                clone = client.walk(fid)
                client.xattrcreate(clone, b"user.a", 30_000)
                with contextlib.suppress(OSError):
                    given_up(clone)

    def refusals(self) -> None:
        root, none = self.root, 0xDEAD
        with self.client.walked(self.root, b"f") as fid:
            for message in (
                codec.Tauth(none, b"user", b"", 0),
                codec.Tattach(none, codec.NOFID, b"", b"other", 0),
                codec.Tattach(root, codec.NOFID, b"", b"", 0),
                codec.Txattrwalk(fid, none, b"user.a"),
                codec.Txattrwalk(fid, root, b"user.a"),
                codec.Txattrcreate(fid, b"user.a", 2**40, 0),
                codec.Txattrcreate(none, b"user.a", 4, 0),
                codec.Twalk(root, none, (b"none",)),
                codec.Twalk(root, fid, (b"f",)),
                codec.Tlcreate(root, b"f" * 300, os.O_RDWR, 0o600, 0),
                codec.Tlink(root, none, b"made"),
                codec.Tlink(root, fid, b"f"),
                codec.Tsymlink(root, b"f", b"t", 0),
                codec.Tmknod(root, b"f", stat.S_IFIFO, 0, 0, 0),
                codec.Tmkdir(root, b"f", 0o755, 0),
                codec.Trename(none, root, b"made"),
                codec.Trename(root, root, b"made"),
                codec.Trenameat(root, b"none", root, b"made"),
                codec.Tunlinkat(root, b"none", 0),
                codec.Tremove(none),
                codec.Tread(fid, 0, 10),
                codec.Twrite(fid, 0, b"y" * 3000),
                codec.Treaddir(fid, 0, 10),
                codec.Tfsync(none, 0),
                codec.Tlock(none, 0, 0, 0, 0, 0, b"c" * 300),
                codec.Tgetlock(none, 0, 0, 0, 0, b"c" * 300),
                codec.Treadlink(fid),
                codec.Tgetattr(none, 0),
                codec.Tsetattr(none, 0, 0, 0, 0, 0, 0, 0, 0, 0),
                codec.Tstatfs(none),
                codec.Tlopen(none, 0),
                codec.Tclunk(none),
                codec.Tlease(9),
                codec.Trevoke(7),
            ):
                self.refused(message)


def growth(work: Callable[[], None]) -> int:
    """Bytes of heap that REPEAT calls leave. What is made once (a thread's buffer) is gone in another round; a leak,
    60 bytes in each call, is in every one."""
    left = 0
    for _ in range(4):
        before = heap()
        for _ in range(REPEAT):
            work()
        left = heap() - before
        if left < HEAP_SLACK:
            break
    return left


@pytest.mark.parametrize("call", range(8))
def test_repetition_keeps_nothing(session: Session, call: int) -> None:
    """Neither memory nor a descriptor nor a fid is left of any message, whether it worked or not."""
    (session.served.path / "f").write_text("x" * 100)
    everything = Everything(session.client)
    everything.begin()
    work = everything.calls()[call]
    for _ in range(50):
        work()
    size, fds = rss(), descriptors()
    assert growth(work) < HEAP_SLACK
    assert rss() - size < RSS_SLACK
    assert descriptors() == fds
    assert session.served.device.stats()["fids"] == 1
    assert os.listdir(session.served.path) == ["f"]


def test_the_repetition_knows_every_message(export: Path) -> None:
    (export / "f").touch()
    with memory_session(export) as session:
        everything = Everything(session.client)
        everything.begin()
        for work in everything.calls():
            work()
        assert sorted(session.served.device.stats_by_type()) == REQUESTS


_STORM = """
import os, sys, time
fd, end, kicks = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    for _ in range(1000):
        os.eventfd_write(fd, 1)
    kicks += 1000
print(kicks)
"""


def test_a_storm_of_events_stops_nobody(export: Path) -> None:
    """Kicks without messages: the other device serves, this one goes on afterwards and then sleeps again."""
    (export / "f").write_bytes(bytes(1000))
    with memory_session(export) as stormed, memory_session(export) as other:
        transport = stormed.client.transport
        assert isinstance(transport, MemoryRingTransport)
        kick = transport._ring.to_back
        before = stormed.served.device.stats()["requests"]
        command = [sys.executable, "-c", _STORM, str(kick), "0.5"]
        with subprocess.Popen(command, pass_fds=[kick], stdout=subprocess.PIPE, text=True) as storm:
            served, slowest = 0, 0.0
            while storm.poll() is None:
                begun = time.monotonic()
                assert len(other.client.read_file(other.root, b"f")) == 1000
                slowest = max(slowest, time.monotonic() - begun)
                served += 1
            assert storm.stdout is not None
            kicks = int(storm.stdout.read())
        assert kicks > 10_000
        assert served > 10
        assert slowest < 2
        assert stormed.served.device.stats()["requests"] == before
        assert len(stormed.client.read_file(stormed.root, b"f")) == 1000
        time.sleep(0.05)
        busy = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - busy < 0.15, "a device without work spins"


def test_depth_beyond_any_path(export: Path) -> None:
    """Fids reach where no path does; what needs a path there says so, and nothing breaks."""
    name, depth = b"deep-dir", 1500
    with memory_session(export) as session:
        client, root = session.client, session.root
        at = client.walk(root)
        for _ in range(depth):
            client.mkdir(at, name)
            client.rpc(codec.Twalk(at, at, (name,)))
        client.clunk(at)
        bottom = client.walk(root, *[name] * depth)
        client.write_file(bottom, b"f", b"down here")
        assert client.read_file(bottom, b"f") == b"down here"
        client.renameat(bottom, b"f", bottom, b"g")
        for attempt in (
            lambda: client.rename(client.walk(bottom, b"g"), bottom, b"h"),
            lambda: client.rename(bottom, root, b"up"),
            lambda: client.walk(bottom, *[b".."] * 16),
            lambda: client.remove(client.walk(bottom, b"g")),
        ):
            with contextlib.suppress(OSError):
                attempt()
        client.write_file(bottom, b"h", b"still")
        assert client.read_file(bottom, b"h") == b"still"
        up = client.walk(root, name, *[b".."] * 5)
        assert client.getattr(up).qid.path == client.getattr(root).qid.path
    subprocess.run(["rm", "-rf", "--", export], check=True)  # shutil.rmtree recurses, once a level


def test_twenty_thousand_entries_in_small_pieces(export: Path, tmp_path: Path) -> None:
    wanted = {b"entry-%05d" % i for i in range(20_000)}
    folder = os.open(export, os.O_RDONLY)
    for name in wanted:
        os.mknod(name, dir_fd=folder)
    os.close(folder)
    small = tmp_path / "small"
    small.mkdir()
    (small / "f").write_text("x")
    seen: list[bytes] = []
    with memory_session(export) as session, memory_session(small) as other:
        fid = session.client.walk(session.root)
        session.client.lopen(fid)
        offset, pieces, before, size = 0, 0, heap(), rss()
        while entries := session.client.readdir(fid, offset, 3000):
            seen += [e.name for e in entries]
            offset = entries[-1].offset
            pieces += 1
            if pieces % 20 == 0:
                assert other.client.read_file(other.root, b"f") == b"x"
        assert heap() - before < 1_000_000
        assert rss() - size < 16_000_000  # the names that this test keeps
    assert pieces > 200
    assert sorted(seen) == sorted(wanted | {b".", b".."})
    subprocess.run(["rm", "-rf", "--", export], check=True)


@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 65536])
def test_a_reply_is_never_larger_than_msize(session: Session, count: int) -> None:
    for i in range(600):
        (session.served.path / f"entry-{i:03}-{'x' * 200}").touch()
    (session.served.path / "f").write_bytes(bytes(2_000_000))
    client = session.client
    folder, file = client.walk(session.root), client.walk(session.root, b"f")
    client.lopen(folder)
    client.lopen(file)
    for message in (codec.Treaddir(folder, 0, count), codec.Tread(file, 0, count)):
        client.send_raw(codec.encode(message, 5))
        raw = client.recv_raw()
        assert len(raw) <= client.msize
        data = codec.decode(raw)[1].data  # type: ignore[attr-defined]
        assert len(data) > min(count, client.msize) * 0.9 or isinstance(message, codec.Treaddir)
