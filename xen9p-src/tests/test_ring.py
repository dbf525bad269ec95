"""Both halves of the ring: wrap-around, full rings, and a peer that lies about its indices."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import Served, memory_session, serve_memory
from xen9p import codec
from xen9p.client import Client
from xen9p.dataplane import Verdict
from xen9p.errors import Xen9pError
from xen9p.transport.memory import IN_CONS, OUT_PROD, MemoryRing, MemoryRingTransport

WRAP = 1 << 32
PER_EXAMPLE = [HealthCheck.function_scoped_fixture]


@settings(max_examples=25, deadline=None, suppress_health_check=PER_EXAMPLE)
@given(
    order=st.integers(2, 4),
    start=st.one_of(st.integers(0, WRAP - 1), st.integers(WRAP - 9000, WRAP - 1)),
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12),
)
def test_bytes_survive_any_wrap_around(export: Path, order: int, start: int, sizes: list[int]) -> None:
    with memory_session(export, order=order, start_at=start) as session:
        for size in sizes:
            data = os.urandom(size)
            session.client.write_file(session.root, b"f", data)
            assert session.client.read_file(session.root, b"f") == data


@settings(max_examples=25, deadline=None, suppress_health_check=PER_EXAMPLE)
@given(start=st.integers(WRAP - 30000, WRAP - 1), counts=st.lists(st.integers(1, 4000), max_size=40))
def test_many_replies_in_flight_never_overlap(export: Path, start: int, counts: list[int]) -> None:
    content = bytes(i * 7 % 251 for i in range(8000))
    (export / "f").write_bytes(content)
    with memory_session(export, order=2, start_at=start) as session:
        fid = session.client.walk(session.root, b"f")
        session.client.lopen(fid)
        for tag, count in enumerate(counts):
            session.client.send_raw(codec.encode(codec.Tread(fid, tag, count), tag))
        for _ in counts:
            tag, reply = codec.decode(session.client.recv_raw())
            assert reply.data == content[tag : tag + counts[tag]]  # type: ignore[attr-defined]


def test_msize_leaves_room_for_two_replies(export: Path) -> None:
    for order in (2, 5, 9):
        with memory_session(export, order=order) as session:
            assert session.client.msize == min(1 << (order + 10), 512 * 1024)


@pytest.mark.parametrize("lie", [1 << 17, 1 << 31, WRAP - 65537, 65537])
def test_an_index_out_of_range_ends_the_device(export: Path, lie: int) -> None:
    for field in (OUT_PROD, IN_CONS):
        with serve_memory(export, order=5) as (rings, served):
            client = Client(MemoryRingTransport(rings[0]))
            client.version()
            rings[0].write_index(field, rings[0].index(field) + lie)
            if field == IN_CONS:  # looked at when there is something to say
                client.transport.send(codec.encode(codec.Tversion(65536, b"9P2000.L"), codec.NOTAG))
            rings[0].wake_backend()
            assert served.join() == Verdict.PROTOCOL
            assert "out of range" in served.device.reason
            client.close()


@pytest.mark.parametrize("size", [0, 1, 6, 65537, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_message_size_out_of_range_ends_the_device(export: Path, size: int) -> None:
    with serve_memory(export) as (rings, served):
        client = Client(MemoryRingTransport(rings[0]))
        client.version()
        client.send_raw(size.to_bytes(4, "little") + bytes([codec.Tclunk.type]) + bytes(20))
        assert served.join() == Verdict.PROTOCOL
        assert f"message size {size}" in served.device.reason
        client.close()


def test_a_partial_message_waits_for_its_rest(export: Path) -> None:
    with serve_memory(export) as (rings, served):
        transport = MemoryRingTransport(rings[0])
        raw = codec.encode(codec.Tversion(65536, b"9P2000.L"), codec.NOTAG)
        transport.send(raw[:5])
        time.sleep(0.02)
        transport.send(raw[5:])
        assert codec.decode(transport.recv())[1] == codec.Rversion(32768, b"9P2000.L")
        assert served.verdict is None
        transport.close()


def test_a_peer_that_never_reads_stops_only_itself(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(bytes(4000))
    with memory_session(export, order=2) as lazy, memory_session(export, order=2) as other:
        fid = lazy.client.walk(lazy.root, b"f")
        lazy.client.lopen(fid)
        sent = 0
        transport = lazy.client.transport
        transport._timeout_ms = 300  # type: ignore[attr-defined]
        with suppress(TimeoutError):
            while sent < 5000:
                transport.send(codec.encode(codec.Tread(fid, 0, 4000), sent))
                sent += 1
        assert 1 < sent < 1000, "the server took requests whose replies nobody reads"
        for _ in range(20):
            assert len(other.client.read_file(other.root, b"f")) == 4000
        # Stopping must work while the replies wait for room (the fixture does it).


def test_contradicting_indices_are_refused() -> None:
    ring = MemoryRing(3)
    ring.write_index(OUT_PROD, 1 << 20)
    with pytest.raises(Xen9pError):
        MemoryRingTransport(ring)
    ring.close()


def test_a_dead_worker_is_replaced_on_the_same_ring(export: Path) -> None:
    """The indices live in the shared page: a second backend goes on where the first stopped."""
    ring = MemoryRing(4)
    transport = MemoryRingTransport(ring)
    for round_ in range(3):
        served = Served(export)
        ring.serve_with(served.device)
        served.start()
        client, root = Client.connect(transport)
        client.write_file(root, b"f", b"%d" % round_)
        served.close()
    assert (export / "f").read_bytes() == b"2"
    transport.close()
    ring.close()
