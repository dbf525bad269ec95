"""What the data plane counts and mirrors, on real rings and sockets."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from serving import Served, Session, memory_session, serve_memory
from xen9p import codec
from xen9p.client import Client
from xen9p.codec import message_name
from xen9p.dataplane import DataPlane, Limits
from xen9p.histogram import BOUNDS, BUCKETS, GROUPS, STAGES, quantile, since, total
from xen9p.records import Exchange, unpack
from xen9p.transport.memory import MemoryRingTransport


def traced(device: DataPlane, least: int = 1) -> list[Exchange]:
    """What the trace holds, once at least so many records are in it."""
    found: list[Exchange] = []
    end = time.monotonic() + 5
    while len(found) < least and time.monotonic() < end:
        found += unpack(device.trace_read())
    return found


def named(exchanges: Sequence[Exchange]) -> list[str]:
    return [message_name(e.request.type) for e in exchanges]


def counted(device: DataPlane, group: str, stage: str) -> int:
    return sum(device.times().get(group, {}).get(stage, {"counts": []})["counts"])


def settled(device: DataPlane, requests: int) -> None:
    """A reply is out a moment before its request is counted."""
    end = time.monotonic() + 5
    while sum(total(device.times())) < requests and time.monotonic() < end:
        time.sleep(0.001)


def test_every_request_is_counted_once_in_its_group(session: Session) -> None:
    client, device = session.client, session.served.device
    client.write_file(session.root, b"f", b"x" * 10)
    assert client.read_file(session.root, b"f") == b"x" * 10
    client.mkdir(session.root, b"d", 0o755, 0)
    with pytest.raises(OSError, match="No such file"):
        client.walk(session.root, b"none")
    requests = device.stats()["requests"]
    settled(device, requests)
    by_type = {message_name(kind): n for kind, n in device.stats_by_type().items()}
    assert sum(by_type.values()) == requests == sum(total(device.times()))
    assert counted(device, "write", "total") == by_type["Twrite"] == 1
    assert counted(device, "read", "total") == by_type["Tread"]
    assert counted(device, "session", "total") == by_type["Tversion"] + by_type["Tattach"]
    assert counted(device, "change", "total") == by_type["Tlcreate"] + by_type["Tmkdir"]
    assert counted(device, "change", "queue") in (1, 2), "Tmkdir waits for a thread of Python's, Tlcreate may have to"
    assert device.errnos() == {errno.ENOENT: 2}, "the file was looked for before it was made"
    assert device.stats()["errors"] == 2


def test_a_lone_change_is_mostly_done_at_once(session: Session) -> None:
    """Handing it to the pool takes longer than it does; only after a slow one is it left to others for a while."""
    client, device = session.client, session.served.device
    for number in range(100):
        name = b"f%d" % number
        fid = client.walk(session.root)
        client.lcreate(fid, name, 2)
        client.write(fid, 0, b"x")
        client.clunk(fid)
        client.unlinkat(session.root, name)
    settled(device, device.stats()["requests"])
    assert counted(device, "change", "total") == 200
    assert counted(device, "change", "queue") < 100
    assert counted(device, "write", "queue") < 50
    assert not any(session.served.path.iterdir())


def test_the_end_of_a_listing_is_not_looked_for_again(session: Session) -> None:
    """A client asks until nothing more comes; only the first answer is the pool's. Beginning anew shows what is new."""
    client, device = session.client, session.served.device
    (session.served.path / "one").touch()
    listing = client.walk(session.root)
    client.lopen(listing)
    for asked, names in ((1, {b".", b"..", b"one"}), (2, {b".", b"..", b"one", b"two"})):
        entries = client.readdir(listing)
        assert {entry.name for entry in entries} == names
        (session.served.path / "two").touch()
        assert [client.readdir(listing, entries[-1].offset) for _ in range(3)] == [[]] * 3
        middle = client.readdir(listing, entries[0].offset)
        assert {entry.name for entry in middle} >= {entry.name for entry in entries[1:]}
        assert client.readdir(listing, middle[-1].offset) == []
        settled(device, device.stats()["requests"])
        assert counted(device, "readdir", "queue") == 2 * asked
        assert counted(device, "readdir", "total") == 6 * asked


def test_stages_add_up_and_a_slow_one_shows_where(export: Path) -> None:
    began = time.perf_counter()
    with memory_session(export) as session:
        session.client.write_file(session.root, b"f", b"x" * 100_000)
        fid = session.client.walk(session.root, b"f")
        session.client.lopen(fid, 2)
        session.client.fsync(fid)
        took = time.perf_counter() - began
        device = session.served.device
        settled(device, device.stats()["requests"])
        times = device.times()
    for stages in times.values():
        parts = sum(stages[stage]["seconds"] for stage in STAGES[:3] if stage in stages)
        assert parts <= stages["total"]["seconds"] + 1e-4
        assert sum(stages["total"]["counts"]) == sum(stages["ring"]["counts"])
    assert 0 < sum(stages["total"]["seconds"] for stages in times.values()) < took
    assert "queue" in times["sync"], "Tfsync is the pool's"


def test_waiting_in_the_ring_is_seen(export: Path) -> None:
    """Requests that lie in the ring while an earlier one is worked on."""
    with serve_memory(export, order=6) as (rings, served):
        transport = MemoryRingTransport(rings[0])
        _, root = Client.connect(transport)
        settled(served.device, 2)
        before = counted(served.device, "lookup", "ring")
        for tag in range(200):
            transport.send(codec.encode(codec.Tgetattr(root, codec.GETATTR_BASIC), tag))
        for _ in range(200):
            transport.recv()
        settled(served.device, 202)
        assert counted(served.device, "lookup", "ring") - before == 200
        assert served.device.times()["lookup"]["ring"]["seconds"] > 0
        transport.close()


def test_nothing_is_measured_where_nobody_wants_it(export: Path) -> None:
    with memory_session(export, limits=Limits(timing=0)) as session:
        session.client.write_file(session.root, b"f", b"x")
        assert session.served.device.times() == {}
        session.served.device.trace_start(0)
        session.client.getattr(session.root, 0)
        assert traced(session.served.device)[0].stages["total"] is not None, "a trace wants it"


def test_the_trace_shows_the_very_write(session: Session, export: Path) -> None:
    client, device = session.client, session.served.device
    before = time.time_ns()
    device.trace_start(8)
    client.write_file(session.root, b"notes", b"hello trace")
    assert client.read_file(session.root, b"notes") == b"hello trace"
    client.write_file(session.root, b"notes", b"")
    with pytest.raises(OSError, match="No such file"):
        client.walk(session.root, b"none", b"deeper")
    found = traced(device, 14)
    while not found[-1].target.endswith(b"deeper"):
        found += traced(device)
    write = next(e for e in found if e.request.type == codec.Twrite.type)
    assert isinstance(write.request.message, codec.Twrite)
    assert write.request.message.data == b"hello tr"
    assert write.request.data_size == 11
    assert write.request.size == 34
    assert write.path == write.target == b"/notes"
    assert write.reply is not None
    assert write.reply.message == codec.Rwrite(11)
    assert write.errno == 0
    assert (
        before <= write.began <= write.times[1] <= write.times[2] <= write.times[3] <= write.times[4] <= time.time_ns()
    )
    read = next(e for e in found if e.request.type == codec.Tread.type)
    assert read.reply is not None
    assert isinstance(read.reply.message, codec.Rread)
    assert read.reply.message.data == b"hello tr"
    assert read.reply.data_size == 11
    create = next(e for e in found if e.request.type == codec.Tlcreate.type)
    assert (create.path, create.target) == (b"/", b"/notes")
    failed = next(e for e in found if e.errno == errno.ENOENT and e.target.endswith(b"deeper"))
    assert failed.target == b"/none/deeper"
    device.trace_stop()
    time.sleep(0.05)  # the last reply is out a moment before its record is in
    while device.trace_read():
        pass
    client.getattr(session.root, 0)
    assert device.trace_read() == b""
    assert device.trace_dropped == 0


def test_the_path_of_a_file_that_is_gone(export: Path) -> None:
    with memory_session(export) as session:
        client, device = session.client, session.served.device
        for name in (b"gone", b"called so (deleted)"):
            client.write_file(session.root, name, b"x")
        fids = [client.walk(session.root, name) for name in (b"gone", b"called so (deleted)")]
        (export / "gone").unlink()
        device.trace_start(0)
        for fid in fids:
            client.getattr(fid, 0)
        assert [e.path for e in traced(device, 2)] == [b"/gone", b"/called so (deleted)"]


def test_data_is_mirrored_before_its_place_is_used_again(export: Path) -> None:
    """Writes that wait in the ring, and one that goes over its end."""
    with serve_memory(export, order=1, start_at=2**32 - 1500) as (rings, served):
        client, root = Client.connect(MemoryRingTransport(rings[0]), msize=4096)
        fid = client.walk(root)
        client.lcreate(fid, b"f", 2, 0o644, 0)
        served.device.trace_start(4096)
        sent = [bytes([i]) * 1000 for i in range(1, 30)]
        for i, data in enumerate(sent):
            assert client.write(fid, i * 1000, data) == 1000
        assert client.read(fid, 0, 2000) == sent[0] + sent[1]
        found = traced(served.device, 30)
        writes = [e.request.message for e in found if e.request.type == codec.Twrite.type]
        assert sorted(m.data for m in writes if isinstance(m, codec.Twrite)) == sent
        reads = [e.reply.message for e in found if e.request.type == codec.Tread.type and e.reply]
        assert reads == [codec.Rread(sent[0] + sent[1])]
        client.close()


def test_a_trace_that_nobody_reads_costs_records_and_no_request(export: Path) -> None:
    with memory_session(export) as session:
        device = session.served.device
        device.trace_start(0)
        for _ in range(4096 + 100):
            session.client.getattr(session.root, codec.GETATTR_BASIC)
        end = time.monotonic() + 5
        while device.trace_dropped < 100 and time.monotonic() < end:
            time.sleep(0.001)
        assert device.trace_dropped == 100
        assert len(traced(device, 4096)) == 4096
        with pytest.raises(OSError, match="busy"):
            device.trace_start(0)
        device.trace_stop()
        device.trace_start(0)
        assert device.trace_dropped == 0
        session.client.getattr(session.root, 0)
        assert named(traced(device))[-1:] == ["Tgetattr"]


def test_a_trace_left_open_leaks_nothing(export: Path, tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    before = len(list(fds.iterdir()))
    for _ in range(3):
        with memory_session(export) as session:
            session.served.device.trace_start(64)
            for i in range(50):
                session.client.write_file(session.root, b"f%d" % i, b"x")
    assert len(list(fds.iterdir())) == before


def test_a_message_that_ends_the_device_is_in_the_trace(export: Path) -> None:
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        served.device.trace_start(64)
        client.send_raw(bytes.fromhex("0800000078010000"))  # a Tclunk that is cut
        served.join()
        found = traced(served.device)
        assert [(e.request.type, e.request.message, e.reply) for e in found] == [(120, None, None)]
        client.close()


def test_starting_and_stopping_under_load(export: Path) -> None:
    """The switch is thrown while messages are on their way; nothing breaks and nothing wrong is read."""
    with serve_memory(export, rings=2) as (rings, served):
        client, root = Client.connect(MemoryRingTransport(rings[0]))
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                client.write_file(root, b"f", b"y" * 3000)

        thread = threading.Thread(target=load)
        thread.start()
        seen = 0
        try:
            for _ in range(100):
                served.device.trace_start(100)
                time.sleep(0.002)
                found = list(unpack(served.device.trace_read()))
                assert all(e.request.message is not None for e in found)
                seen += len(found)
                served.device.trace_stop()
        finally:
            over.set()
            thread.join()
        assert seen
        client.close()


def test_flushed_requests_are_told_as_unanswered(export: Path) -> None:
    served = Served(export, limits=Limits(python_threads=0))
    with serve_memory(export, limits=Limits(python_threads=0)) as (rings, serving):
        transport = MemoryRingTransport(rings[0])
        transport.send(codec.encode(codec.Tversion(8192, codec.VERSION), codec.NOTAG))
        transport.recv()
        serving.device.trace_start(0)
        transport.send(codec.encode(codec.Tattach(0, codec.NOFID, b"", b"", 0), 1))
        transport.send(codec.encode(codec.Tflush(1), 2))
        assert codec.decode(transport.recv()) == (2, codec.Rflush())
        found = traced(serving.device, 2)
        assert [(message_name(e.request.type), e.reply is None) for e in found] == [
            ("Tattach", True),
            ("Tflush", False),
        ]
        assert found[0].stages["total"] is None
        transport.close()
    served.device.close()


def test_histograms() -> None:
    counts = [0] * BUCKETS
    assert quantile(counts, 0.5) is None
    counts[3] = 98
    counts[10] = 2
    assert quantile(counts, 0.5) == BOUNDS[3] == 8e-6
    assert quantile(counts, 0.99) == BOUNDS[10]
    counts[-1] = 1000
    assert quantile(counts, 0.99) == BOUNDS[-1], "all that is known"
    assert since([3, 5], [1, 5]) == [2, 0]
    assert since([1, 0], [4, 2]) == [1, 0], "a new worker counts from 0"
    assert len(GROUPS) == 10
