"""The client builds the messages that it should, and believes no reply that does not fit its request."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from xen9p import codec
from xen9p.client import Client, split
from xen9p.codec import Dirent, Message, Qid
from xen9p.errors import ProtocolError
from xen9p.transport.stream_client import SocketTransport

QID = Qid(codec.QT_FILE, 0, 42)


class Script:
    """A server that knows its lines: it checks each request against the script and says the reply."""

    def __init__(self, *lines: tuple[Message, Message]) -> None:
        self.lines = list(lines)
        self.replies: list[bytes] = []
        self.closed = False

    def send(self, data: bytes) -> None:
        tag, msg = codec.decode(data)
        expected, reply = self.lines.pop(0)
        assert msg == expected
        self.replies.append(codec.encode(reply, tag))

    def post(self, data: bytes) -> bool:
        self.send(data)
        return True

    def recv(self, timeout: float | None = None) -> bytes:
        return self.replies.pop(0)

    def poll(self) -> bytes | None:
        return self.replies.pop(0) if self.replies else None

    def flush(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True


def test_connect_agrees_on_version_and_size() -> None:
    script = Script(
        (codec.Tversion(8192, b"9P2000.L"), codec.Rversion(4096, b"9P2000.L")),
        (codec.Tattach(0, codec.NOFID, b"", b"home", 0), codec.Rattach(QID)),
    )
    with Client.connect(script, b"home", 8192)[0] as client:
        assert client.msize == 4096
    assert script.closed
    assert not script.lines


AGREED = (codec.Tversion(8192, b"9P2000.L"), codec.Rversion(4096, b"9P2000.L"))
NO_TREE = (codec.Tattach(0, codec.NOFID, b"", b"home", 0), codec.Rlerror(errno.ENOENT))
OTHER = (AGREED[0], codec.Rversion(4096, b"unknown"))


@pytest.mark.parametrize("lines", [(OTHER,), (AGREED, NO_TREE)])
def test_a_connect_that_fails_leaves_nothing_open(lines: tuple[tuple[Message, Message], ...]) -> None:
    script = Script(*lines)
    with pytest.raises((OSError, ProtocolError)):
        Client.connect(script, b"home", 8192)
    assert script.closed


@pytest.mark.parametrize("reply", [codec.Rversion(8192, b"unknown"), codec.Rversion(8193, b"9P2000.L")])
def test_a_version_that_does_not_fit(reply: Message) -> None:
    with pytest.raises(ProtocolError):
        Client(Script((codec.Tversion(8192, b"9P2000.L"), reply)), 8192).version()


def test_errno_becomes_oserror_and_the_fid_is_free_again() -> None:
    walk = codec.Twalk(7, 0, (b"a",))
    client = Client(Script((walk, codec.Rlerror(errno.EACCES)), (walk, codec.Rwalk((QID,)))))
    with pytest.raises(PermissionError, match="Twalk"):
        client.walk(7, b"a")
    assert client.walk(7, b"a") == 0


def test_a_partial_walk_is_enoent() -> None:
    client = Client(Script((codec.Twalk(7, 0, (b"a", b"b")), codec.Rwalk((QID,)))))
    with pytest.raises(FileNotFoundError) as caught:
        client.walk(7, b"a", b"b")
    assert caught.value.filename == "b"


def test_long_walks_are_split_and_cleaned_up() -> None:
    names = tuple(b"%d" % i for i in range(20))
    first = (codec.Twalk(7, 0, names[:16]), codec.Rwalk((QID,) * 16))
    client = Client(Script(first, (codec.Twalk(0, 0, names[16:]), codec.Rwalk((QID,) * 4))))
    assert client.walk(7, *names) == 0
    script = Script(
        first,
        (codec.Twalk(0, 0, names[16:]), codec.Rwalk((QID,))),
        (codec.Tclunk(0), codec.Rclunk()),
    )
    with pytest.raises(FileNotFoundError):
        Client(script).walk(7, *names)
    assert not script.lines


def test_reads_and_writes_stay_within_msize() -> None:
    client = Client(
        Script(
            (codec.Tread(1, 5, 89), codec.Rread(b"x" * 89)),
            (codec.Twrite(1, 0, b"y" * 77), codec.Rwrite(77)),
            (codec.Twrite(1, 77, b"y" * 3), codec.Rwrite(3)),
            (codec.Treaddir(1, 0, 89), codec.Rreaddir(b"")),
        ),
        msize=100,
    )
    assert client.read(1, 5, 1000) == b"x" * 89
    client.write_all(1, 0, b"y" * 80)
    assert client.readdir(1) == []


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (codec.Tread(1, 0, 10), codec.Rread(b"x" * 11)),
        (codec.Tread(1, 0, 10), codec.Rwrite(3)),
        (codec.Tread(1, 0, 10), codec.Tread(1, 0, 10)),
    ],
)
def test_replies_that_lie(request_: Message, reply: Message) -> None:
    with pytest.raises(ProtocolError):
        Client(Script((request_, reply))).read(1, 0, 10)


def test_a_reply_to_another_request_is_refused() -> None:
    class Confused(Script):
        def recv(self, timeout: float | None = None) -> bytes:
            return codec.encode(codec.decode(super().recv())[1], 999)

    with pytest.raises(ProtocolError, match="tag"):
        Client(Confused((codec.Tclunk(1), codec.Rclunk()))).clunk(1)


def test_setattr_sends_only_what_is_given() -> None:
    times = codec.SETATTR_MTIME | codec.SETATTR_MTIME_SET
    client = Client(
        Script(
            (
                codec.Tsetattr(3, codec.SETATTR_SIZE | times, 0, 0, 0, 9, 0, 0, 1, 500),
                codec.Rsetattr(),
            )
        )
    )
    client.setattr(3, size=9, mtime_ns=10**9 + 500)


def test_write_file_creates_what_is_missing() -> None:
    script = Script(
        (codec.Twalk(9, 0, (b"dir",)), codec.Rwalk((QID,))),
        (codec.Twalk(0, 1, (b"new",)), codec.Rlerror(errno.ENOENT)),
        (codec.Twalk(0, 1, ()), codec.Rwalk(())),
        (codec.Tlcreate(1, b"new", os.O_WRONLY, 0o600, 0), codec.Rlcreate(QID, 0)),
        (codec.Twrite(1, 0, b"hello"), codec.Rwrite(5)),
        (codec.Tclunk(1), codec.Rclunk()),
        (codec.Tclunk(0), codec.Rclunk()),
    )
    Client(script).write_file(9, "dir//new", b"hello", 0o600)
    assert not script.lines


def test_listdir_reads_to_the_end() -> None:
    dot, one, two = (Dirent(QID, i + 1, 8, name) for i, name in enumerate((b".", b"one", b"two")))
    fit = 1000 - codec.READ_OVERHEAD
    client = Client(
        Script(
            (codec.Twalk(9, 0, ()), codec.Rwalk(())),
            (codec.Tlopen(0, os.O_RDONLY | os.O_DIRECTORY), codec.Rlopen(QID, 0)),
            (codec.Treaddir(0, 0, fit), codec.Rreaddir(codec.encode_dirents([dot, one]))),
            (codec.Treaddir(0, 2, fit), codec.Rreaddir(codec.encode_dirents([two]))),
            (codec.Treaddir(0, 3, fit), codec.Rreaddir(b"")),
            (codec.Tclunk(0), codec.Rclunk()),
        ),
        msize=1000,
    )
    assert client.listdir(9, "/") == [one, two]


def test_split() -> None:
    assert split("/a//./b/") == [b"a", b"b"]
    assert split(b"..") == [b".."]


def test_socket_transport_frames_messages() -> None:
    ours, theirs = socket.socketpair()
    with theirs, SocketTransport(ours) as transport:
        wire = codec.encode(codec.Rread(b"x" * 100), 1)
        transport.send(wire)
        assert theirs.recv(1000) == wire
        theirs.sendall(wire + wire[:50])
        assert transport.recv() == wire
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match="within a message"):
            transport.recv()
        with pytest.raises(EOFError):
            transport.recv()


@pytest.mark.parametrize("size", [0, 6, 65 << 20])
def test_socket_transport_refuses_sizes(size: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs, SocketTransport(ours) as transport:
        theirs.sendall(size.to_bytes(4, "little") + bytes(10))
        with pytest.raises(ProtocolError, match="message size"):
            transport.recv()
