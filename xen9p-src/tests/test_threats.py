"""Rows of the threat table that need no Xen: what a hostile peer sends, and what is left of the server."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import FILE, NEW, REPLIES, REQUESTS, ROOT, SAMPLES, lengths, raw
from serving import Session, memory_session, serve_memory, socket_session
from xen9p import codec, server
from xen9p.client import Client
from xen9p.dataplane import Verdict
from xen9p.transport.memory import MemoryRingTransport

PER_EXAMPLE = [HealthCheck.function_scoped_fixture]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes and giving files away needs root")


def refused(err: int) -> object:
    return pytest.raises(OSError, match=os.strerror(err))


def sample_id(message: codec.Message) -> str:
    return codec.message_name(message.type)


def ready(client: Client, path: Path) -> None:
    """Makes the fids that the samples speak of, and checks that they have their numbers."""
    (path / "f").write_text("content")
    client.version()
    assert client.attach() == ROOT
    assert client.walk(ROOT, b"f") == FILE
    client.lopen(FILE, os.O_RDWR)


@settings(max_examples=120, deadline=None, suppress_health_check=PER_EXAMPLE)
@given(
    messages=st.lists(
        st.tuples(st.one_of(st.sampled_from(REQUESTS), st.integers(0, 255)), st.binary(max_size=80)),
        max_size=15,
    )
)
def test_random_bodies_do_no_harm(export: Path, messages: list[tuple[int, bytes]]) -> None:
    """Whatever comes, the export's surroundings stay as they are and the device ends in order."""
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        for tag, (kind, body) in enumerate(messages):
            client.send_raw(raw(kind, tag, body))
        served.device.stop()
        assert served.join() in (Verdict.STOPPED, Verdict.PROTOCOL)
        client.close()
    assert sorted(os.listdir(export.parent)) == ["export", "outside"]


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_cut_message_ends_the_device(export: Path, kind: int) -> None:
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        client.send_raw(raw(kind, 1, b"\0"))
        assert served.join() == Verdict.PROTOCOL
        client.close()


def test_there_is_a_sample_of_every_request() -> None:
    assert sorted(message.type for message in SAMPLES) == REQUESTS


@pytest.mark.parametrize("message", [m for m in SAMPLES if lengths(m)], ids=sample_id)
def test_a_raised_length_ends_the_device(export: Path, message: codec.Message) -> None:
    """Each string, list and data with a length that its message does not hold, the rest being right."""
    for at, size in lengths(message):
        good = codec.encode(message, 5)
        real = int.from_bytes(good[at : at + size], "little")
        for lie in {real + 1, real + 4, 255, (1 << size * 8 - 1) - 1, (1 << size * 8) - 1}:
            with serve_memory(export) as (rings, served):
                client = Client(MemoryRingTransport(rings[0]))
                ready(client, export)
                client.send_raw(good[:at] + lie.to_bytes(size, "little") + good[at + size :])
                assert served.join() == Verdict.PROTOCOL, (at, lie)
                client.close()
            assert sorted(os.listdir(export)) == ["f"], (at, lie)
            assert (export / "f").read_text() == "content", (at, lie)


@pytest.mark.parametrize("more", [1, 41, 65536, 2**31, 2**32 - 5])
def test_a_write_of_more_than_its_message_holds(export: Path, more: int) -> None:
    with serve_memory(export) as (rings, served):
        client = Client(MemoryRingTransport(rings[0]))
        ready(client, export)
        body = FILE.to_bytes(4, "little") + bytes(8) + (4 + more).to_bytes(4, "little") + b"data"
        client.send_raw(raw(codec.Twrite.type, 5, body))
        assert served.join() == Verdict.PROTOCOL
        client.close()
    assert (export / "f").read_text() == "content"


@pytest.mark.parametrize("kind", [*REPLIES, 1, 99, 127])
def test_replies_sent_to_the_server_end_the_device(export: Path, kind: int) -> None:
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        client.send_raw(raw(kind, 1, b""))
        assert served.join() == Verdict.PROTOCOL
        client.close()


def test_unknown_types_get_an_errno(export: Path) -> None:
    with socket_session(export) as session:
        for kind in (0, 2, 98, 126, 128, 255):
            session.client.send_raw(raw(kind, 5, b"anything"))
            assert codec.decode(session.client.recv_raw())[1] == codec.Rlerror(95)


def test_a_tag_in_use_ends_the_device(export: Path) -> None:
    hold = threading.Event()
    original = server._HANDLERS[codec.Tmkdir]
    server._HANDLERS[codec.Tmkdir] = lambda device, msg: (hold.wait(10), original(device, msg))[1]
    try:
        with serve_memory(export) as (rings, served):
            client, root = Client.connect(MemoryRingTransport(rings[0]))
            for name in (b"a", b"b"):
                client.send_raw(codec.encode(codec.Tmkdir(root, name, 0o755, 0), 7))
            for _ in range(100):
                if served.device.reason:
                    break
                hold.wait(0.05)
            hold.set()
            assert served.join() == Verdict.PROTOCOL
            assert "tag 7" in served.device.reason
            client.close()
    finally:
        hold.set()
        server._HANDLERS[codec.Tmkdir] = original


@pytest.mark.parametrize("name", [b"", b"a/b", b"/", b"../outside", b"a\0b", b"x" * 256, b".", b".."])
def test_bad_new_names_are_refused(export: Path, name: bytes) -> None:
    """What makes or moves a name, dots included: they name what is there already."""
    with memory_session(export) as session:
        client, root = session.client, session.root
        (export / "f").touch()
        (export / "d").mkdir()
        file, directory = client.walk(root, b"f"), client.walk(root, b"d")
        for attempt in (
            lambda: client.link(root, file, name),
            lambda: client.link(directory, file, name),
            lambda: client.rename(file, root, name),
            lambda: client.rename(directory, root, name),
            lambda: client.rename(file, directory, name),
            lambda: client.renameat(root, b"f", directory, name),
            lambda: client.renameat(directory, name, root, b"moved"),
            lambda: client.mkdir(directory, name),
            lambda: client.symlink(directory, name, b"target"),
            lambda: client.mknod(directory, name, stat.S_IFIFO | 0o600),
            lambda: client.lcreate(client.walk(directory), name, os.O_RDWR),
            lambda: client.unlinkat(directory, name),
            lambda: client.unlinkat(directory, name, codec.AT_REMOVEDIR),
        ):
            with pytest.raises(OSError, match=r"Invalid argument|File name too long|File exists"):
                attempt()
        assert sorted(os.listdir(export)) == ["d", "f"]
        assert not os.listdir(export / "d")
        assert sorted(os.listdir(export.parent)) == ["export", "outside"]


@pytest.mark.parametrize("kind", [stat.S_IFSOCK, pytest.param(stat.S_IFBLK, marks=AS_ROOT)], ids=["socket", "block"])
def test_sockets_and_block_devices_are_never_opened(session: Session, kind: int) -> None:
    # Were it opened, the answer would be ENXIO: nobody listens, and there is no device of that number.
    session.client.mknod(session.root, b"node", kind | 0o666, major=0xABC, minor=0xDEF)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_DIRECTORY):
        with refused(errno.EPERM):
            session.client.lopen(session.client.walk(session.root, b"node"), flags)
        with refused(errno.EPERM):
            session.client.lcreate(session.client.walk(session.root), b"node", flags)
    session.client.renameat(session.root, b"node", session.root, b"moved")
    assert [e.name for e in session.client.listdir(session.root)] == [b"moved"]


def test_a_fid_survives_a_refused_xattrcreate(session: Session) -> None:
    session.client.write_file(session.root, b"f", b"content")
    fid = session.client.walk(session.root, b"f")
    for name, size, err in (
        (b"user.a", 2**32, errno.E2BIG),
        (b"user.a", 2**64 - 1, errno.E2BIG),
        (b"btrfs.compression", 1, errno.EOPNOTSUPP),
        (b"user." + b"n" * 251, 1, errno.ERANGE),
    ):
        with refused(err):
            session.client.xattrcreate(fid, name, size)
    session.client.lopen(fid)
    assert session.client.read(fid, 0, 100) == b"content"
    with refused(errno.ENODATA):
        session.client.rpc(codec.Txattrwalk(fid, NEW, b"user.a"))
    with refused(errno.EBADF):
        session.client.rpc(codec.Tclunk(NEW))


@AS_ROOT
@pytest.mark.parametrize("uname", [b"", b"root", b"../../outside", bytes(40), b"\xff" * 3000], ids=range(5))
def test_a_forged_user_gets_the_same_tree(session: Session, uname: bytes) -> None:
    """The ring says which export it is; n_uname names the owner of new files only, and nobody (~0) is root."""
    tree = session.client.getattr(session.root).qid.path
    for uid, owner in ((0, 0), (1234, 1234), (codec.NONUNAME, 0), (2**31, 2**31), (2**32 - 2, 2**32 - 2)):
        fid = session.client.attach(uname=uname, n_uname=uid)
        assert session.client.getattr(fid).qid.path == tree
        session.client.lcreate(fid, b"f", os.O_RDWR)
        assert (session.served.path / "f").stat().st_uid == owner
        session.client.unlinkat(session.root, b"f")
        session.client.clunk(fid)
