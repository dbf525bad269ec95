"""Many requests under way: replies in any order, cancelled requests, full rings, lost connections; both clients."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from serving import Served, Session, memory_session, serve_memory
from xen9p import codec
from xen9p.async_client import AsyncClient
from xen9p.client import Client
from xen9p.codec import Message
from xen9p.dataplane import Verdict
from xen9p.errors import ProtocolError
from xen9p.transport.link import Transport
from xen9p.transport.memory import RING_ORDER, MemoryRingTransport
from xen9p.transport.stream_client import SocketTransport

Answer = Callable[[int, Message], list[tuple[int, Message]]]
QID = codec.Qid(0, 0, 1)


@contextmanager
def answering(answer: Answer) -> Iterator[SocketTransport]:
    """A transport to a peer that answers each request with what answer() returns."""
    ours, theirs = socket.socketpair()
    peer = SocketTransport(theirs)

    def serve() -> None:
        try:
            while True:
                for tag, reply in answer(*codec.decode(peer.recv())):
                    peer.send(codec.encode(reply, tag))
        except (OSError, EOFError, ProtocolError):
            peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    transport = SocketTransport(ours, 1 << 20)
    transport.set_timeout(10)
    try:
        yield transport
    finally:
        transport.close()
        thread.join(5)  # it has seen the end; whoever waits on a descriptor that is closed under it waits on
        peer.close()


def backwards(count: int) -> Answer:
    """Waits for so many reads and answers them in reverse, each with its offset."""
    kept: list[tuple[int, Message]] = []

    def answer(tag: int, msg: Message) -> list[tuple[int, Message]]:
        assert isinstance(msg, codec.Tread)
        kept.append((tag, codec.Rread(b"%d" % msg.offset)))
        return kept[::-1] if len(kept) == count else []

    return answer


def test_replies_come_in_any_order() -> None:
    with answering(backwards(50)) as transport:
        client = Client(transport)
        under_way = [client.submit(codec.Tread(1, n, 10), codec.Rread) for n in range(50)]
        assert len({pending.tag for pending in under_way}) == 50
        assert [pending.result().data for pending in under_way] == [b"%d" % n for n in range(50)]


def test_replies_come_in_any_order_for_asyncio() -> None:
    async def main(transport: Transport) -> list[bytes]:
        async with AsyncClient(transport) as client:
            return list(await asyncio.gather(*(client.read(1, n, 10) for n in range(50))))

    with answering(backwards(50)) as transport:
        assert asyncio.run(main(transport)) == [b"%d" % n for n in range(50)]


@pytest.mark.parametrize("size", [0, 1, 32757, 32758, 1_000_000])
def test_streams_carry_every_byte(session: Session, export: Path, size: int) -> None:
    data = os.urandom(size)
    client = session.client
    client.write_file(session.root, b"f", data)
    assert (export / "f").read_bytes() == data
    with client.walked(session.root, b"f") as fid:
        client.lopen(fid, os.O_RDWR)
        assert b"".join(client.read_all(fid)) == data
        pieces = (data[i : i + 999] for i in range(0, size, 999))
        assert client.write_stream(fid, 5, pieces) == size
    assert (export / "f").read_bytes() == data[:5] + data if size > 5 else True


def test_a_reader_that_stops_early_leaves_a_session_that_works(session: Session, export: Path) -> None:
    (export / "f").write_bytes(bytes(2_000_000))
    with session.client.walked(session.root, b"f") as fid:
        session.client.lopen(fid)
        pieces = session.client.read_all(fid)
        for _ in range(4):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert session.client.read_file(session.root, b"f") == bytes(2_000_000)


def test_a_short_read_is_no_end_of_file() -> None:
    content = bytes(range(256)) * 40

    def stingy(tag: int, msg: Message) -> list[tuple[int, Message]]:
        assert isinstance(msg, codec.Tread)
        return [(tag, codec.Rread(content[msg.offset : msg.offset + min(msg.count, 700)]))]

    with answering(stingy) as transport:
        assert b"".join(Client(transport, 8192).read_all(1)) == content


def test_full_rings_stop_nobody(export: Path) -> None:
    """Reads whose replies do not fit, and writes behind them: whoever only sent would wait for ever."""
    (export / "f").write_bytes(bytes(100_000))
    with memory_session(export, order=2) as session:
        client = session.client
        with client.walked(session.root, b"f") as fid:
            client.lopen(fid, os.O_RDWR)
            under_way: list[tuple[int, object]] = []
            for n in range(60):
                under_way.append((4000, client.submit(codec.Tread(fid, n * 100, 4000), codec.Rread)))
                part = bytes([n]) * 4000
                client.submit(codec.Twrite(fid, n * 4000, part), codec.Rwrite)
            for size, pending in under_way:
                assert len(pending.result().data) == size  # type: ignore[attr-defined]
        written = (export / "f").read_bytes()
        assert all(written[n * 4000 : (n + 1) * 4000] == bytes([n]) * 4000 for n in range(60))


class Slow:
    """Answers no read until it is flushed, or never; everything else at once."""

    def __init__(self, *, answer_flush: bool = True, reply_first: bool = False) -> None:
        self.seen: list[Message] = []
        self._answer_flush = answer_flush
        self._reply_first = reply_first

    def __call__(self, tag: int, msg: Message) -> list[tuple[int, Message]]:
        self.seen.append(msg)
        match msg:
            case codec.Tread() | codec.Twalk():
                return []
            case codec.Tflush(oldtag):
                walked: list[tuple[int, Message]] = [(oldtag, codec.Rwalk((QID,)))] if self._reply_first else []
                return [*walked, (tag, codec.Rflush())] if self._answer_flush else []
            case codec.Tclunk():
                return [(tag, codec.Rclunk())]
        raise AssertionError(msg)


def test_a_timeout_flushes() -> None:
    slow = Slow()
    with answering(slow) as transport:
        client = Client(transport)
        pending = client.submit(codec.Tread(1, 0, 10), codec.Rread)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="Tread"):
            pending.result(0.1)
        assert time.monotonic() - began < 5
        assert slow.seen[-1] == codec.Tflush(pending.tag)
        client.clunk(client.new_fid())


def test_a_reply_before_rflush_counts() -> None:
    with answering(Slow(reply_first=True)) as transport:
        pending = Client(transport).submit(codec.Twalk(0, 1, (b"a",)), codec.Rwalk)
        assert not pending.cancel()
        assert pending.result().wqids == (QID,)


async def cancelled_walk(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.walk(0, b"a")


@pytest.mark.parametrize("reply_first", [False, True])
def test_cancelling_flushes_and_takes_the_fid_back(reply_first: bool) -> None:
    slow = Slow(reply_first=reply_first)

    async def main(transport: Transport) -> None:
        async with AsyncClient(transport) as client:
            taken = client.new_fid()
            await cancelled_walk(client)
            async with asyncio.timeout(5):
                while client.in_flight:
                    await asyncio.sleep(0.01)
            walked = next(m for m in slow.seen if isinstance(m, codec.Twalk)).newfid
            clunked = [m.fid for m in slow.seen if isinstance(m, codec.Tclunk)]
            assert clunked == ([walked] if reply_first else [])
            assert client.new_fid() == walked != taken

    with answering(slow) as transport:
        asyncio.run(main(transport))


def test_a_tag_stays_taken_until_rflush() -> None:
    slow = Slow(answer_flush=False)

    async def main(transport: Transport) -> None:
        async with AsyncClient(transport) as client:
            await cancelled_walk(client)
            await asyncio.sleep(0.05)
            assert client.in_flight == 2  # the walk and its flush
            assert client.new_fid() == 1  # 0 is the walk's still
            client._next_tag = 0
            assert client._new_tag() == 2

    with answering(slow) as transport:
        asyncio.run(main(transport))


def test_a_lost_connection_fails_what_is_under_way() -> None:
    said: list[BaseException] = []

    def hang_up(tag: int, msg: Message) -> list[tuple[int, Message]]:
        raise EOFError

    async def main(transport: Transport) -> None:
        client = AsyncClient(transport, lost=said.append)
        results = await asyncio.gather(*(client.read(1, 0, 1) for _ in range(3)), return_exceptions=True)
        assert [type(r) for r in results] == [ConnectionAbortedError] * 3
        with pytest.raises(ConnectionAbortedError):
            await client.clunk(1)
        client.close()

    with answering(hang_up) as transport:
        asyncio.run(main(transport))
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_asyncio_over_real_servers(export: Path, kind: str) -> None:
    """Two hundred tasks make, fill, read and remove a file each."""
    one_byte_more = 200_001

    async def work(client: AsyncClient, root: int, n: int) -> None:
        name = b"f%d" % n
        fid = await client.walk(root)
        await client.lcreate(fid, name, os.O_RDWR)
        data = bytes([n]) * (one_byte_more if n % 20 == 0 else 100 + n)
        await client.write_all(fid, 0, data)
        assert await client.read_exactly(fid, 0, 300_000) == data
        await client.clunk(fid)
        await client.unlinkat(root, name)

    async def main(transport: Transport) -> None:
        client, root = await AsyncClient.connect(transport)
        await asyncio.gather(*(work(client, root, n) for n in range(200)))
        with pytest.raises(FileNotFoundError):
            await client.walk(root, b"nobody")
        assert client.new_fid() <= 201
        client.close()

    if kind == "ring":
        with serve_memory(export, order=5) as (rings, _):
            asyncio.run(main(MemoryRingTransport(rings[0])))
    else:
        ours, theirs = socket.socketpair()
        served = Served(export)
        served.device.add_stream(theirs)
        served.start()
        asyncio.run(main(SocketTransport(ours)))
        served.close()
        theirs.close()
    assert list(export.iterdir()) == []


def test_extended_attributes_for_asyncio(export: Path) -> None:
    """Also a value that takes several messages, each after the one before; the file system may have no room for it."""
    (export / "f").touch()
    value = os.urandom(60_000)
    says = 0
    try:
        os.setxattr(export / "f", "user.large", value)
    except OSError as error:
        says = error.errno or 0

    async def main(transport: Transport) -> None:
        client, root = await AsyncClient.connect(transport, msize=4096)
        fid = await client.walk(root, b"f")
        for _ in range(5):
            with pytest.raises(OSError, match=os.strerror(says)) if says else nullcontext():
                await client.setxattr(fid, b"user.large", value)
        assert says or await client.getxattr(fid, b"user.large") == value
        await client.setxattr(fid, b"user.a", value[:900])
        assert await client.getxattr(fid, b"user.a") == value[:900]
        await client.setxattr(fid, b"user.empty", b"")
        with pytest.raises(FileExistsError):
            await client.setxattr(fid, b"user.empty", b"x", os.XATTR_CREATE)
        assert {b"user.a", b"user.empty"} <= set((await client.getxattr(fid)).split(b"\0"))
        await client.setxattr(fid, b"user.a", b"", os.XATTR_REPLACE)
        assert client.new_fid() < 10
        client.close()

    with serve_memory(export) as (rings, _):
        asyncio.run(main(MemoryRingTransport(rings[0])))
    assert set(os.listxattr(export / "f")) - {"user.large"} == {"user.empty"}


def test_a_slow_request_delays_no_other(export: Path) -> None:
    (export / "f").write_bytes(b"data")

    async def main(transport: Transport) -> None:
        client, root = await AsyncClient.connect(transport)
        fid = await client.walk(root, b"f")
        await client.lopen(fid, os.O_RDWR)
        fsync = asyncio.ensure_future(client.fsync(fid))
        reads = await asyncio.gather(*(client.read(fid, 0, 4) for _ in range(20)))
        assert reads == [b"data"] * 20
        await fsync
        client.close()

    with serve_memory(export) as (rings, _):
        asyncio.run(main(MemoryRingTransport(rings[0])))


def test_errors_are_the_servers(export: Path) -> None:
    async def main(transport: Transport) -> None:
        client, root = await AsyncClient.connect(transport)
        await client.mkdir(root, b"d")
        for name, flags, err in ((b"d", 0, errno.EISDIR), (b"x", 0, errno.ENOENT)):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
                await client.unlinkat(root, name, flags)
            assert caught.value.errno == err
        client.close()

    with serve_memory(export) as (rings, _):
        asyncio.run(main(MemoryRingTransport(rings[0])))


def test_a_frontend_that_dies_is_noticed(export: Path) -> None:
    """The kernel of a dead frontend clears the order's byte and sends an event: the worker has nothing to wait for."""
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        rings[0].write_index(RING_ORDER, 0)
        rings[0].wake_backend()
        assert served.join() == Verdict.HANGUP
        client.close()
