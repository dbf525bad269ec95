"""Every message on a real directory, over each transport."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving import Served, Session, memory_session, serve_memory, socket_session
from xen9p import codec, server
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.transport.memory import MemoryRingTransport

FILE_SIZES = (0, 1, 4095, 4096, 32767, 32768, 65536, 200_000)


def refused(err: int) -> object:
    return pytest.raises(OSError, match=os.strerror(err))


def make(session: Session, name: bytes, data: bytes = b"") -> int:
    """A new open file."""
    fid = session.client.walk(session.root)
    session.client.lcreate(fid, name, os.O_RDWR)
    if data:
        assert session.client.write(fid, 0, data) == len(data)
    return fid


@pytest.mark.parametrize("size", FILE_SIZES)
def test_bytes_are_the_same_on_both_sides(session: Session, size: int) -> None:
    data = os.urandom(size)
    session.client.write_file(session.root, b"f", data)
    assert (session.served.path / "f").read_bytes() == data
    assert session.client.read_file(session.root, b"f") == data


def test_version_is_negotiated(session: Session) -> None:
    ask = session.client.rpc
    assert ask(codec.Tversion(65536, b"9P2000.L.extra"), codec.NOTAG).version == b"9P2000.L"  # type: ignore[attr-defined]
    assert ask(codec.Tversion(65536, b"9P2000.u"), codec.NOTAG).version == b"unknown"  # type: ignore[attr-defined]
    with refused(errno.EPROTO):
        ask(codec.Tattach(0, codec.NOFID, b"", b"", 0))
    with refused(errno.EINVAL):
        ask(codec.Tversion(4095, b"9P2000.L"), codec.NOTAG)


def test_a_new_version_forgets_the_fids(session: Session) -> None:
    make(session, b"f")
    assert session.served.device.stats()["fids"] == 2
    session.client.version()
    assert session.served.device.stats()["fids"] == 0
    with refused(errno.EBADF):
        session.client.walk(session.root)


def test_another_export_is_refused(session: Session) -> None:
    with refused(errno.ENOENT):
        session.client.attach(aname=b"other-guest-root")


def test_walk_stops_where_the_path_ends(session: Session) -> None:
    (session.served.path / "a" / "b").mkdir(parents=True)
    fid, newfid = session.root, session.client.new_fid()
    reply = session.client.rpc(codec.Twalk(fid, newfid, (b"a", b"b", b"c")))
    assert len(reply.wqids) == 2  # type: ignore[attr-defined]
    with refused(errno.EBADF):
        session.client.rpc(codec.Tclunk(newfid))
    with refused(errno.ENOENT):
        session.client.rpc(codec.Twalk(fid, newfid, (b"c",)))


def test_dotdot_stays_beneath_the_export(session: Session) -> None:
    (session.served.path / "a" / "b").mkdir(parents=True)
    root = session.client.getattr(session.root).qid
    for names in ([b".."], [b"..", b".."], [b"a", b".."], [b"a", b"b", b"..", b"..", b"..", b".."]):
        fid = session.client.walk(session.root, *names)
        assert session.client.getattr(fid).qid == root
        session.client.clunk(fid)


@pytest.mark.parametrize("name", [b"", b"a/b", b"/", b"../outside", b"a\0b", b"x" * 256, b"x" * 65000])
def test_bad_names_are_refused_everywhere(export: Path, name: bytes) -> None:
    with memory_session(export, order=9) as session:
        client, root = session.client, session.root
        make(session, b"f")
        for attempt in (
            lambda: client.walk(root, name),
            lambda: client.mkdir(root, name),
            lambda: client.symlink(root, name, b"t"),
            lambda: client.mknod(root, name, stat.S_IFIFO | 0o600),
            lambda: client.renameat(root, b"f", root, name),
            lambda: client.renameat(root, name, root, b"g"),
            lambda: client.unlinkat(root, name),
            lambda: client.lcreate(client.walk(root), name, os.O_RDWR),
        ):
            with pytest.raises(OSError, match=r"Invalid argument|File name too long"):
                attempt()
        assert os.listdir(export) == ["f"]
        assert (export.parent / "outside").read_text() == "secret"


def test_symlinks_are_never_followed(session: Session) -> None:
    (session.served.path / "up").symlink_to("../outside")
    (session.served.path / "dir").symlink_to("..")
    fid = session.client.walk(session.root, b"up")
    assert session.client.readlink(fid) == b"../outside"
    with refused(errno.ELOOP):
        session.client.lopen(fid)
    with pytest.raises(OSError, match=r"No such file|Not a directory"):
        session.client.walk(session.root, b"dir", b"outside")
    with refused(errno.EOPNOTSUPP):
        session.client.setattr(fid, mode=0o777)
    with pytest.raises(OSError, match=r"."):
        session.client.lcreate(session.client.walk(session.root), b"up", os.O_RDWR | os.O_TRUNC)
    assert (session.served.path.parent / "outside").read_text() == "secret"


def test_special_files_are_made_but_never_opened(session: Session) -> None:
    session.client.mknod(session.root, b"fifo", stat.S_IFIFO | 0o644)
    path = session.served.path / "fifo"
    assert stat.S_ISFIFO(path.stat().st_mode)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        fid = session.client.walk(session.root, b"fifo")
        with refused(errno.EPERM):
            session.client.lopen(fid, flags)
    with refused(errno.EPERM):
        session.client.lcreate(session.client.walk(session.root), b"fifo", os.O_WRONLY)
    session.client.renameat(session.root, b"fifo", session.root, b"moved")
    assert [e.name for e in session.client.listdir(session.root)] == [b"moved"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mknod of a device and chown need root")
def test_device_nodes_and_owners(session: Session) -> None:
    session.client.mknod(session.root, b"null", stat.S_IFCHR | 0o666, major=1, minor=3)
    fid = session.client.walk(session.root, b"null")
    assert session.client.getattr(fid).rdev == os.makedev(1, 3)
    with refused(errno.EPERM):
        session.client.lopen(fid)
    user = session.client.attach(n_uname=1234)
    session.client.lcreate(user, b"owned", os.O_RDWR, 0o600, gid=77)
    session.client.mkdir(session.client.attach(n_uname=99), b"dir", 0o2775, gid=88)
    session.client.symlink(session.client.attach(n_uname=98), b"link", b"t", gid=87)
    got = {p.name: (p.lstat().st_uid, p.lstat().st_gid) for p in session.served.path.iterdir()}
    assert got == {"null": (0, 0), "owned": (1234, 77), "dir": (99, 88), "link": (98, 87)}
    assert stat.S_IMODE((session.served.path / "dir").stat().st_mode) == 0o2775
    fid = session.client.walk(session.root, b"owned")
    session.client.setattr(fid, uid=5, gid=6, mode=0o4755)
    after = (session.served.path / "owned").stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (5, 6, 0o4755)


def test_attributes(session: Session) -> None:
    fid = make(session, b"f", b"hello")
    session.client.setattr(fid, mode=0o640, size=3, atime_ns=1_000_000_001, mtime_ns=2_000_000_002)
    there, here = (session.served.path / "f").stat(), session.client.getattr(fid)
    assert (here.mode, here.size, here.nlink) == (there.st_mode, 3, 1)
    assert (here.uid, here.gid, here.blksize) == (there.st_uid, there.st_gid, there.st_blksize)
    assert (here.mtime_sec, here.mtime_nsec) == (2, 2)
    assert there.st_mtime_ns == 2_000_000_002
    assert there.st_atime_ns == 1_000_000_001
    with refused(errno.EFBIG):
        session.client.rpc(codec.Tsetattr(fid, 8, 0, 0, 0, 2**63, 0, 0, 0, 0))
    with refused(errno.EINVAL):
        session.client.rpc(codec.Tsetattr(fid, 0x120, 0, 0, 0, 0, 0, 0, 0, 10**9))


def test_an_unlinked_open_file_goes_on_working(session: Session) -> None:
    fid = make(session, b"f", b"before")
    session.client.unlinkat(session.root, b"f")
    assert session.client.write(fid, 6, b" after") == 6
    assert session.client.read(fid, 0, 100) == b"before after"
    assert session.client.getattr(fid).nlink == 0
    session.client.setattr(fid, size=2)
    assert session.client.read(fid, 0, 100) == b"be"


def test_rename_remove_link(session: Session) -> None:
    client, root, path = session.client, session.root, session.served.path
    client.mkdir(root, b"d")
    fid = make(session, b"f", b"x")
    d = client.walk(root, b"d")
    client.link(d, fid, b"hard")
    assert (path / "d" / "hard").stat().st_nlink == 2
    client.rename(fid, d, b"g")
    assert sorted(os.listdir(path / "d")) == ["g", "hard"]
    with refused(errno.ENOTEMPTY):
        client.unlinkat(root, b"d", codec.AT_REMOVEDIR)
    client.remove(client.walk(d, b"hard"))
    client.remove(client.walk(d, b"g"))
    with refused(errno.ESTALE):
        client.rename(fid, root, b"again")
    client.unlinkat(root, b"d", codec.AT_REMOVEDIR)
    assert os.listdir(path) == []
    with refused(errno.EBUSY):
        client.remove(client.walk(root))


def test_readdir_goes_on_where_it_stopped(session: Session) -> None:
    names = {f"file-{i:04}".encode() for i in range(500)}
    for name in names:
        (session.served.path / name.decode()).touch()
    fid = session.client.walk(session.root)
    session.client.lopen(fid)
    seen, offset = [], 0
    while entries := session.client.readdir(fid, offset, 1000):
        seen += [e.name for e in entries]
        offset = entries[-1].offset
    assert sorted(seen) == sorted(names | {b".", b".."})
    first = session.client.readdir(fid, 0, 1000)
    assert [e.name for e in first] == seen[: len(first)]
    with refused(errno.EINVAL):
        session.client.readdir(fid, 0, 10)
    up = next(e for e in session.client.readdir(fid, 0) if e.name == b"..")
    assert up.qid.path == session.client.getattr(session.root).qid.path


def test_types_of_fids_are_checked(session: Session) -> None:
    file = make(session, b"f", b"x")
    directory = session.client.walk(session.root)
    session.client.lopen(directory)
    with refused(errno.ENOTDIR):
        session.client.readdir(file)
    with refused(errno.EISDIR):
        session.client.read(directory, 0, 10)
    with refused(errno.EISDIR):
        session.client.write(directory, 0, b"x")
    with refused(errno.ENOTDIR):
        session.client.mkdir(file, b"d")
    with refused(errno.ENOTDIR):
        session.client.walk(file, b"x")
    with refused(errno.EBADF):
        session.client.read(session.client.walk(session.root, b"f"), 0, 1)
    with refused(errno.EINVAL):
        session.client.lopen(file)


def test_offsets_and_counts_at_the_edge(session: Session) -> None:
    fid = make(session, b"f", b"abc")
    assert session.client.rpc(codec.Tread(fid, 0, 0xFFFFFFFF)).data == b"abc"  # type: ignore[attr-defined]
    assert session.client.read(fid, 2**62, 10) == b""
    with refused(errno.EINVAL):
        session.client.read(fid, 2**64 - 1, 10)
    with refused(errno.EFBIG):
        session.client.write(fid, 2**63 - 1, b"x" * 10)


def test_what_is_not_there_yet_says_so(session: Session) -> None:
    with pytest.raises(OSError, match="No such file"):
        session.client.auth()


def test_readonly_refuses_every_change(export: Path) -> None:
    (export / "f").write_text("x")
    with socket_session(export, readonly=True) as session:
        client, root = session.client, session.root
        f = client.walk(root, b"f")
        for attempt in (
            lambda: client.mkdir(root, b"d"),
            lambda: client.symlink(root, b"l", b"t"),
            lambda: client.link(root, f, b"h"),
            lambda: client.mknod(root, b"n", stat.S_IFIFO),
            lambda: client.unlinkat(root, b"f"),
            lambda: client.renameat(root, b"f", root, b"g"),
            lambda: client.rename(f, root, b"g"),
            lambda: client.setattr(f, size=0),
            lambda: client.lcreate(client.walk(root), b"n", os.O_RDWR),
            lambda: client.lopen(client.walk(root, b"f"), os.O_RDWR),
            lambda: client.lopen(client.walk(root, b"f"), os.O_RDONLY | os.O_TRUNC),
            lambda: client.remove(client.walk(root, b"f")),
        ):
            with refused(errno.EROFS):
                attempt()
        assert client.read_file(root, b"f") == b"x"
        assert os.listdir(export) == ["f"]


def test_fids_are_bounded(export: Path) -> None:
    with memory_session(export, limits=Limits(max_fids=10)) as session:
        for _ in range(9):
            session.client.walk(session.root)
        with refused(errno.EMFILE):
            session.client.walk(session.root)


def test_descriptors_do_not_leak(session: Session) -> None:
    client, root = session.client, session.root
    client.write_file(root, b"f", b"data")
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        client.read_file(root, b"f")
        client.listdir(root)
        with refused(errno.ENOENT):
            client.walk(root, b"nothing")
        client.clunk(client.walk(root, b".."))
        client.unlinkat(root, b"f")
        client.write_file(root, b"f", b"data")
    assert len(os.listdir("/proc/self/fd")) == count


def send_all(session: Session, messages: list[tuple[int, codec.Message]]) -> dict[int, codec.Message]:
    """Sends everything before it reads anything; replies by tag."""
    for tag, message in messages:
        session.client.send_raw(codec.encode(message, tag))
    return dict(codec.decode(session.client.recv_raw()) for _ in messages)


def test_replies_find_their_requests(session: Session) -> None:
    fid = make(session, b"f", bytes(range(256)) * 16)
    wanted = [(tag, codec.Tread(fid, tag, 8)) for tag in range(60)]
    replies = send_all(session, wanted)
    for tag, _ in wanted:
        assert replies[tag].data == bytes((tag + i) % 256 for i in range(8))  # type: ignore[attr-defined]


@contextmanager
def slow_mkdir() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Tmkdir waits in its handler: (set when one has begun, to be set when it may go on)."""
    begun, go_on = threading.Event(), threading.Event()
    original = server._HANDLERS[codec.Tmkdir]

    def wait(device: DataPlane, message: codec.Message) -> codec.Message:
        begun.set()
        go_on.wait(10)
        return original(device, message)

    server._HANDLERS[codec.Tmkdir] = wait
    try:
        yield begun, go_on
    finally:
        go_on.set()
        server._HANDLERS[codec.Tmkdir] = original


def test_a_slow_request_holds_up_nobody(export: Path) -> None:
    with slow_mkdir() as (begun, go_on), memory_session(export) as session:
        fid = make(session, b"f", b"x")
        session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"d", 0o755, 0), 900))
        assert begun.wait(10)
        assert session.client.read(fid, 0, 1) == b"x"
        session.client.send_raw(codec.encode(codec.Tflush(900), 901))
        assert session.client.read(fid, 0, 1) == b"x"
        go_on.set()
        tags = [codec.decode(session.client.recv_raw())[0] for _ in range(2)]
        assert tags == [900, 901], "a flushed request that runs is answered before its Rflush"


def test_a_flushed_request_that_waits_is_never_run(export: Path) -> None:
    with slow_mkdir() as (begun, go_on), memory_session(export, limits=Limits(python_threads=1)) as session:
        session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"first", 0o755, 0), 900))
        assert begun.wait(10)
        session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"second", 0o755, 0), 901))
        session.client.flush(901)
        go_on.set()
        assert codec.decode(session.client.recv_raw())[0] == 900
        session.client.statfs(session.root)
        assert os.listdir(export) == ["first"]


def test_many_clients_on_one_directory(export: Path) -> None:
    def work(number: int) -> None:
        with memory_session(export, rings=2) as session:
            for i in range(30):
                name = f"{number}-{i}".encode()
                session.client.write_file(session.root, name, name * 100)
                assert session.client.read_file(session.root, name) == name * 100

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(export)) == 120


def test_two_rings_share_their_fids(export: Path) -> None:
    (export / "f").write_text("both")
    with serve_memory(export, rings=2) as (rings, _):
        first, root = Client.connect(MemoryRingTransport(rings[1]))
        other = Client(MemoryRingTransport(rings[0]), msize=first.msize)
        fid = first.walk(root, b"f")
        other.lopen(fid)
        assert other.read(fid, 0, 10) == b"both"
        first.close()
        other.close()


def test_the_peer_hangs_up(export: Path) -> None:
    ours, theirs = socket.socketpair()
    served = Served(export)
    served.device.add_stream(theirs)
    served.start()
    ours.close()
    assert served.join().name == "HANGUP"
    served.close()
    theirs.close()
