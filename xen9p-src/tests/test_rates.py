"""Rates and what the pool may hold: messages wait in the ring or the socket, nothing is lost, and nobody else waits."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from observed import host
from serving import OPENERS, Served, Session, memory_session, serve_memory, socket_session
from test_flush import gated_mkdir, receive, send
from xen9p import codec
from xen9p.client import Client
from xen9p.dataplane import Limits, Verdict
from xen9p.errors import Xen9pError
from xen9p.transport.memory import OUT_CONS, OUT_PROD, MemoryRing, MemoryRingTransport
from xen9p.users import Users
from xen9p.worker import limits as limits_of
from xen9p.workers import socket_path

BURST = 0.5  # seconds: limits.c


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def spent(session: Session) -> None:
    """Uses up what the device may do at once, so that from here on its rate counts."""
    for _ in range(2000):
        if session.served.device.stats()["throttled"]:
            return
        session.client.getattr(session.root)
    raise AssertionError("no limit")


@contextmanager
def two_clients(export: Path, limits: Limits) -> Iterator[tuple[Client, Client, int, Served]]:
    """A client on each of two rings of one device, and the root's fid, which both may use."""
    with serve_memory(export, rings=2, limits=limits) as (rings, served), ExitStack() as stack:
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        stack.callback(first.close)
        stack.callback(second.close)
        yield first, second, root, served


def opened(session: Session, name: bytes, flags: int = os.O_RDWR) -> int:
    fid = session.client.walk(session.root, name)
    session.client.lopen(fid, flags)
    return fid


# Rates.


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_messages_a_second(export: Path, kind: str) -> None:
    rate = 400
    with OPENERS[kind](export, limits=Limits(ops_per_second=rate)) as session:  # type: ignore[attr-defined]
        spent(session)
        before, began = session.served.device.stats()["requests"], time.monotonic()
        while time.monotonic() - began < 1.5:
            session.client.getattr(session.root)
        took = time.monotonic() - began
        done = session.served.device.stats()["requests"] - before
        # What is above the rate is what a pause has saved up; what is below is a machine with other work.
        assert 0.6 * rate * took < done < 1.1 * rate * took + 10
        stats = session.served.device.stats()
        assert stats["throttled"] > 20
        assert 0.5 * took < stats["throttled_us"] / 1e6 < took + 1


def test_bytes_a_second_with_reads_side_by_side(export: Path) -> None:
    """All that can be under way is, and still no more than the rate leaves."""
    rate, size = 2_000_000, 3_500_000
    (export / "f").write_bytes(os.urandom(size))
    with memory_session(export, order=7, limits=Limits(bytes_per_second=rate)) as session:
        fid = opened(session, b"f", os.O_RDONLY)
        began = time.monotonic()
        data = b"".join(session.client.read_all(fid))
        took = time.monotonic() - began
        assert data == (export / "f").read_bytes()
        # Half a second is free, and the last message pays when it has been taken.
        assert size / rate - BURST - 0.15 < took < 2.5 * size / rate
        assert session.served.device.stats()["throttled"] > 5


def test_bytes_that_wait_for_the_disk_are_charged_too(export: Path) -> None:
    """A directory is read in the pool: its reply is paid in advance, and what was too much comes back."""
    for i in range(300):
        (export / f"entry-{i:03}-{'x' * 200}").touch()
    with memory_session(export, order=7, limits=Limits(bytes_per_second=100_000)) as session:
        fid = session.client.walk(session.root)
        session.client.lopen(fid)
        began = time.monotonic()
        for _ in range(2):  # 68 kB each
            offset = 0
            while entries := session.client.readdir(fid, offset):
                offset = entries[-1].offset
        assert 0.3 < time.monotonic() - began < 5


def test_what_is_under_way_has_been_paid(export: Path) -> None:
    """Replies that cannot leave yet: whoever paid with the reply only would have them all at once."""
    (export / "f").write_bytes(bytes(60_000))
    with socket_session(export, limits=Limits(bytes_per_second=200_000)) as session:
        fid = opened(session, b"f", os.O_RDONLY)
        before = session.served.device.stats()["requests"]
        for tag in range(100, 150):
            send(session.client, codec.Tread(fid, 0, 60_000), tag)
        time.sleep(0.3)
        # What a second leaves, and one more.
        assert session.served.device.stats()["requests"] - before <= 4
        session.served.device.set_limits(Limits())
        assert {receive(session.client)[0] for _ in range(50)} == set(range(100, 150))


def test_a_burst_is_free(export: Path) -> None:
    with memory_session(export, limits=Limits(ops_per_second=1000)) as session:
        for _ in range(int(1000 * BURST) - 20):
            session.client.getattr(session.root)
        assert session.served.device.stats()["throttled"] == 0
        spent(session)
        time.sleep(BURST + 0.1)
        before = session.served.device.stats()["throttled"]
        for _ in range(int(1000 * BURST) - 20):
            session.client.getattr(session.root)
        assert session.served.device.stats()["throttled"] == before


def test_small_files_cost_what_they_have(export: Path) -> None:
    """Clients ask for as much as a message holds, whatever the file's size."""
    (export / "f").write_bytes(b"small")
    with memory_session(export, limits=Limits(bytes_per_second=100_000)) as session:
        fid = opened(session, b"f", os.O_RDONLY)
        for _ in range(300):
            assert session.client.read(fid, 0, 1 << 20) == b"small"
        assert session.served.device.stats()["throttled"] == 0


def test_a_message_larger_than_the_bucket_gets_through(export: Path) -> None:
    (export / "f").write_bytes(bytes(20_000))
    with memory_session(export, limits=Limits(bytes_per_second=20_000)) as session:
        fid = opened(session, b"f", os.O_RDONLY)
        assert session.client.read(fid, 0, 20_000) == bytes(20_000)
        assert session.client.read(fid, 0, 20_000) == bytes(20_000)


def test_giving_back_does_not_wait_for_bytes(export: Path) -> None:
    (export / "f").write_bytes(bytes(30_000))
    with two_clients(export, Limits(bytes_per_second=2000)) as (client, other, root, served):
        fid = client.walk(root, b"f")
        client.lopen(fid)
        client.read(fid, 0, 30_000)  # a quarter of a minute's worth
        client.flush(77)
        assert served.device.stats()["throttled"] == 0
        send(other, codec.Tread(fid, 0, 100), 900)
        until(lambda: served.device.stats()["throttled"] == 1)
        client.clunk(fid)
        assert served.device.stats()["throttled"] == 1
        served.device.set_limits(Limits())
        tag, reply = receive(other)
        assert (tag, type(reply)) == (900, codec.Rlerror)  # its fid is gone


def test_a_flush_of_what_is_held_back(export: Path) -> None:
    """It comes behind the request that it means, or waits for the reader to have passed it: never an endless wait."""
    with two_clients(export, Limits(ops_per_second=20)) as (first, second, root, served):
        for tag in range(100, 130):
            send(first, codec.Tgetattr(root, 0), tag)
        send(second, codec.Tflush(129), 900)
        got = [receive(first)[0] for _ in range(30)]
        assert got == list(range(100, 130))
        assert receive(second) == (900, codec.Rflush())
        assert served.device.stats()["throttled"] > 5


def test_tversion_while_messages_wait(export: Path) -> None:
    with memory_session(export, limits=Limits(ops_per_second=20)) as session:
        for tag in range(20):
            send(session.client, codec.Tgetattr(session.root, 0), tag)
        send(session.client, codec.Tversion(8192, codec.VERSION), codec.NOTAG)
        assert [receive(session.client)[0] for _ in range(21)] == [*range(20), codec.NOTAG]


# What it costs, and whom.


def test_waiting_costs_no_processor(export: Path) -> None:
    with memory_session(export, limits=Limits(ops_per_second=1)) as session:
        send(session.client, codec.Tgetattr(session.root, 0), 1)
        send(session.client, codec.Tgetattr(session.root, 0), 2)
        until(lambda: session.served.device.stats()["throttled"] > 0)
        busy = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - busy < 0.1, "a device that is held back spins"
        session.served.device.set_limits(Limits())
        assert {receive(session.client)[0] for _ in range(2)} == {1, 2}


def test_a_stream_that_is_held_back_costs_no_processor(export: Path) -> None:
    with socket_session(export, limits=Limits(ops_per_second=1)) as session:
        for tag in range(100):
            send(session.client, codec.Tgetattr(session.root, 0), tag)
        until(lambda: session.served.device.stats()["throttled"] > 0)
        for tag in range(100, 200):  # these stay in the socket
            send(session.client, codec.Tgetattr(session.root, 0), tag)
        busy = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - busy < 0.1
        session.served.device.set_limits(Limits())
        assert [receive(session.client)[0] for _ in range(200)] == list(range(200))


def test_another_device_does_not_notice(export: Path, tmp_path: Path) -> None:
    quick = tmp_path / "quick"
    quick.mkdir()
    with memory_session(export) as slow, memory_session(quick) as other:
        slow.served.device.set_limits(Limits(ops_per_second=1, bytes_per_second=1))
        send(slow.client, codec.Tgetattr(slow.root, 0), 0)
        send(slow.client, codec.Tgetattr(slow.root, 0), 1)
        until(lambda: slow.served.device.stats()["throttled"] > 0)
        for _ in range(2000):
            other.client.getattr(other.root)
        assert other.served.device.stats()["throttled"] == other.served.device.stats()["throttled_us"] == 0
        assert slow.served.device.stats()["requests"] < 10
        slow.served.device.set_limits(Limits())


def test_replies_leave_while_messages_wait(export: Path) -> None:
    with gated_mkdir() as gates, memory_session(export, limits=Limits(ops_per_second=4)) as session:
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 1)
        for tag in range(2, 12):
            send(session.client, codec.Tgetattr(session.root, 0), tag)
        until(lambda: session.served.device.stats()["in_flight"] == 1)
        until(lambda: session.served.device.stats()["throttled"] > 0)
        gates[b"d"].set()
        got = [receive(session.client)[0] for _ in range(3)]
        assert 1 in got
        session.served.device.set_limits(Limits())
        assert sorted(got + [receive(session.client)[0] for _ in range(8)]) == list(range(1, 12))


def test_the_time_in_the_ring_is_counted(export: Path) -> None:
    with memory_session(export, limits=Limits(ops_per_second=10)) as session:
        spent(session)
        before = session.served.device.times()["lookup"]["ring"]["seconds"]
        for _ in range(5):
            session.client.getattr(session.root)
        assert 0.2 < session.served.device.times()["lookup"]["ring"]["seconds"] - before < 5


# Nothing is lost.


def test_writes_wait_in_the_ring_with_their_data(export: Path) -> None:
    part = 15_000
    with memory_session(export, limits=Limits(bytes_per_second=20_000)) as session:
        fid = session.client.walk(session.root)
        session.client.lcreate(fid, b"f", os.O_RDWR)
        transport = session.client.transport
        assert isinstance(transport, MemoryRingTransport)
        ring = transport._ring
        for i in range(4):
            send(session.client, codec.Twrite(fid, i * part, bytes([i + 1]) * part), i)
        until(lambda: session.served.device.stats()["throttled"] > 0)
        waiting = ring.index(OUT_PROD) - ring.index(OUT_CONS)
        assert waiting >= 2 * part, "they have been taken off the ring"
        time.sleep(0.05)
        assert len((export / "f").read_bytes()) <= 2 * part
        more = 4
        while transport.post(codec.encode(codec.Twrite(fid, 0, bytes([1]) * part), more)):
            more += 1
            assert more < 7, "the writer does not wait"
        session.served.device.set_limits(Limits())
        assert {receive(session.client)[0] for _ in range(more)} == set(range(more))
        assert (export / "f").read_bytes() == b"".join(bytes([i + 1]) * part for i in range(4))


def test_a_stop_leaves_what_waits_to_the_next(export: Path) -> None:
    """A worker that is replaced while its guest is held back: every message is answered, once."""
    ring = MemoryRing(5)
    served = Served(export, limits=Limits(ops_per_second=8))
    ring.serve_with(served.device)
    served.start()
    client, root = Client.connect(MemoryRingTransport(ring))
    for tag in range(40):
        send(client, codec.Tmkdir(root, b"d%d" % tag, 0o755, 0), tag)
    until(lambda: served.device.stats()["throttled"] > 0)
    began = time.monotonic()
    served.close()
    assert served.verdict == Verdict.STOPPED
    assert time.monotonic() - began < 1
    made = len(list(export.iterdir()))
    assert made < 10
    successor = Served(export)
    ring.serve_with(successor.device)
    successor.start()
    try:
        replies = [receive(client) for _ in range(40)]
        assert sorted(tag for tag, _ in replies) == list(range(40))
        # The next worker knows neither the session nor its fids.
        assert sum(isinstance(reply, codec.Rmkdir) for _, reply in replies) == made
        assert not has_more(client)
    finally:
        client.close()
        successor.close()
        ring.close()


def has_more(client: Client) -> bool:
    time.sleep(0.05)
    return client.transport.poll() is not None


def test_what_a_client_sent_before_it_left_is_done(export: Path) -> None:
    ours, theirs = socket.socketpair()
    served = Served(export, limits=Limits(ops_per_second=100))
    served.device.add_stream(theirs)
    served.start()
    messages: list[codec.Message] = [codec.Tversion(8192, codec.VERSION), codec.Tattach(0, codec.NOFID, b"", b"", 0)]
    with ours:
        for tag, message in enumerate(messages):
            ours.sendall(codec.encode(message, tag))
        time.sleep(0.1)
        ours.sendall(b"".join(codec.encode(codec.Tgetattr(0, 0), tag) for tag in range(60)))
        until(lambda: served.device.stats()["throttled"] > 0)
        ours.shutdown(socket.SHUT_WR)
        assert served.join() == Verdict.HANGUP
        assert served.device.stats()["requests"] == 62
    served.close()
    theirs.close()


def test_a_frontend_that_dies_while_it_is_held_back(export: Path) -> None:
    with serve_memory(export, limits=Limits(ops_per_second=1)) as (rings, served), ExitStack() as stack:
        client = Client(MemoryRingTransport(rings[0]))
        stack.callback(client.close)
        for tag in range(20):
            send(client, codec.Tflush(5), tag)
        until(lambda: served.device.stats()["throttled"] > 0)
        rings[0].write_index(128, 0)  # ring_order, as its kernel does
        rings[0].wake_backend()
        assert served.join() == Verdict.HANGUP


# Changes while it serves.


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_limits_change_while_messages_wait(export: Path, kind: str) -> None:
    """From one message a day to none of it, at once, and back."""
    with OPENERS[kind](export, limits=Limits(ops_per_second=50)) as session:  # type: ignore[attr-defined]
        device = session.served.device
        device.set_limits(Limits(ops_per_second=1, bytes_per_second=1))
        for tag in range(30):
            send(session.client, codec.Tgetattr(session.root, 0), tag)
        until(lambda: device.stats()["throttled"] > 0)
        time.sleep(0.05)
        assert device.stats()["throttled_us"] > 40_000, "what waits now is not counted"
        began = time.monotonic()
        device.set_limits(Limits())
        assert [receive(session.client)[0] for _ in range(30)] == list(range(30))
        assert time.monotonic() - began < 1
        throttled = device.stats()["throttled"]
        for _ in range(200):
            session.client.getattr(session.root)
        assert device.stats()["throttled"] == throttled
        device.set_limits(Limits(ops_per_second=200))
        spent_at = time.monotonic()
        while device.stats()["throttled"] == throttled and time.monotonic() - spent_at < 5:
            session.client.getattr(session.root)
        assert time.monotonic() - spent_at < 5


def test_the_same_rate_again_forgives_nothing(export: Path) -> None:
    limits = Limits(ops_per_second=100)
    with memory_session(export, limits=limits) as session:
        spent(session)
        held = 0
        for _ in range(20):
            before = session.served.device.stats()["throttled"]
            session.served.device.set_limits(limits)
            for _ in range(5):
                session.client.getattr(session.root)
            held += session.served.device.stats()["throttled"] > before
        # Not 20: a machine that is busy elsewhere for 50 ms earns some. Were the debt forgiven, none were held.
        assert held >= 5


def test_fids_and_queue_change_too(export: Path) -> None:
    with gated_mkdir() as gates, memory_session(export, limits=Limits(max_fids=10, max_queued=2)) as session:
        client, device = session.client, session.served.device
        fids = [client.walk(session.root) for _ in range(9)]
        with pytest.raises(OSError) as full:  # noqa: PT011 - the number is what counts
            client.walk(session.root)
        assert full.value.errno == errno.EMFILE
        device.set_limits(Limits(max_fids=12, max_queued=4))
        fids += [client.walk(session.root) for _ in range(2)]
        device.set_limits(Limits(max_fids=5, max_queued=4))
        assert client.getattr(fids[-1]).qid == client.getattr(session.root).qid, "a lower limit took fids away"
        for _ in range(7):
            client.clunk(fids.pop())
        with pytest.raises(OSError):  # noqa: PT011
            client.walk(session.root)
        for tag in range(100, 110):
            send(client, codec.Tmkdir(session.root, b"d%d" % tag, 0o755, 0), tag)
        until(lambda: device.stats()["in_flight"] == 4)
        device.set_limits(Limits(max_queued=7))
        until(lambda: device.stats()["in_flight"] == 7)
        for tag in range(100, 110):
            gates[b"d%d" % tag].set()
        assert {receive(client)[0] for _ in range(10)} == set(range(100, 110))


# What the pool may hold.


def test_bytes_in_the_pool_are_bounded(export: Path) -> None:
    size = len(codec.encode(codec.Tmkdir(0, b"d100" + b"x" * 200, 0o755, 0), 0))
    with gated_mkdir() as gates, memory_session(export, limits=Limits(max_bytes=3 * size)) as session:
        client, device = session.client, session.served.device
        names = {tag: b"d%d" % tag + b"x" * 200 for tag in range(100, 120)}
        for tag, name in names.items():
            send(client, codec.Tmkdir(session.root, name, 0o755, 0), tag)
        until(lambda: device.stats()["in_flight"] == 3)
        time.sleep(0.05)
        stats = device.stats()
        assert (stats["in_flight"], stats["bytes"]) == (3, 3 * size)
        assert stats["throttled"] > 0
        device.set_limits(Limits(max_bytes=5 * size))
        until(lambda: device.stats()["bytes"] == 5 * size)
        for name in names.values():
            gates[name].set()
        assert {receive(client)[0] for _ in names} == set(names)
        until(lambda: device.stats()["bytes"] == 0)
        assert len(list(export.iterdir())) == len(names)


def test_data_that_is_asked_for_counts(export: Path) -> None:
    """A request of 23 bytes that makes the server hold 30,000 does not fit into 20,000, unless it is alone."""
    with gated_mkdir() as gates, memory_session(export, limits=Limits(max_bytes=20_000)) as session:
        client, device = session.client, session.served.device
        folder = client.walk(session.root)
        client.lopen(folder)
        send(client, codec.Tmkdir(session.root, b"d", 0o755, 0), 1)
        send(client, codec.Treaddir(folder, 0, 30_000), 2)
        until(lambda: device.stats()["throttled"] == 1)
        time.sleep(0.1)
        assert device.stats()["in_flight"] == 1
        assert not has_more(client), "it was served beside the other"
        gates[b"d"].set()
        assert {receive(client)[0] for _ in range(2)} == {1, 2}


def test_one_request_larger_than_all_of_it_is_served(export: Path) -> None:
    with memory_session(export, limits=Limits(max_bytes=1)) as session:
        fid = session.client.walk(session.root)
        session.client.lcreate(fid, b"f", os.O_RDWR)
        session.client.write_all(fid, 0, bytes(100_000))
        session.client.mkdir(session.root, b"d")
        assert {e.name for e in session.client.listdir(session.root)} == {b"d", b"f"}
        assert session.client.read_file(session.root, b"f") == bytes(100_000)


# What limits there are, and the worker's order.


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"ops_per_second": -1}, "ops_per_second is -1"),
        ({"max_fids": 0}, "max_fids is 0"),
        ({"bytes_per_second": 10**13}, "from 0 to 1000000000000"),
        ({"max_queued": "many"}, "max_queued is 'many'"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"bytes_an_hour": 1}, "no limit called bytes_an_hour"),
    ],
)
def test_limits_that_are_none(wanted: dict[str, int], says: str) -> None:
    with pytest.raises(Xen9pError, match=says):
        limits_of(wanted)


def test_no_more_fids_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the policy says so: a worker without descriptors does not hear its supervisor."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    assert [limits_of(wanted).max_fids for wanted in (None, {"max_fids": 5000}, {"max_fids": 100})] == [436, 436, 100]


def test_a_workers_limits_change_by_order(tmp_path: Path) -> None:
    with host(tmp_path, "g1:home", "g2:home") as lab, socket.socket(socket.AF_UNIX) as worker:
        worker.settimeout(10)
        worker.connect(str(socket_path(tmp_path, 3, 0)))
        lines = worker.makefile("rb")

        def order(**what: object) -> None:
            worker.sendall(json.dumps(what).encode() + b"\n")

        def answered() -> dict[str, int]:
            order(do="stats")
            while (event := json.loads(lines.readline()))["event"] != "stats":
                pass
            return dict(event)

        def limit(limits: object) -> None:
            order(do="settle", users=Users().plain(), limits=limits)

        first, second = (device.session for device in lab.devices)
        limit({"ops_per_second": 100})
        answered()
        spent(first)
        assert answered()["throttled"] > 0
        for wrong in ({"ops_per_second": -5}, {"nonsense": 1}, 1, [1]):
            limit(wrong)
        before = answered()["throttled"]
        for _ in range(20):
            first.client.getattr(first.root)
        assert answered()["throttled"] > before, "a bad order took the limits away"
        limit({})
        before = answered()["throttled"]
        for _ in range(300):
            first.client.getattr(first.root)
        assert answered()["throttled"] == before
        assert second.served.device.stats()["throttled"] == 0
        lines.close()


def test_many_at_once_on_two_rings(export: Path) -> None:
    """Limits that change all the time under a load: everything is answered, and the books are even at the end."""
    (export / "f").write_bytes(bytes(50_000))
    with two_clients(export, Limits(bytes_per_second=10**7)) as (client, other, root, served):
        fid = client.walk(root, b"f")
        client.lopen(fid, os.O_RDWR)
        over = threading.Event()

        def change() -> None:
            turn = 0
            while not over.is_set():
                turn += 1
                rate = (0, 10**6, 3 * 10**6, 10**9)[turn % 4]
                served.device.set_limits(
                    Limits(bytes_per_second=rate, ops_per_second=turn % 3 * 5000, max_bytes=turn % 5 * 20_000)
                )
                time.sleep(0.003)

        def work(ring: int) -> None:
            mine = (client, other)[ring]
            ahead = []
            for n in range(300):
                tag = ring * 1000 + n
                message = codec.Tread(fid, 0, 8000) if n % 2 else codec.Twrite(fid, 0, bytes(3000))
                ahead.append(mine.submit(message, codec.Rread if n % 2 else codec.Rwrite, tag))  # type: ignore[arg-type]
            for pending in ahead:
                pending.result()

        changer = threading.Thread(target=change)
        workers = [threading.Thread(target=work, args=(ring,)) for ring in range(2)]
        for thread in (changer, *workers):
            thread.start()
        for thread in workers:
            thread.join(30)
        over.set()
        changer.join()
        served.device.set_limits(Limits())
        stats = served.device.stats()
        assert stats["errors"] == 0
        until(lambda: served.device.stats()["bytes"] == served.device.stats()["in_flight"] == 0)
