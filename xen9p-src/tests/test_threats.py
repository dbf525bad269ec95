"""Rows of the threat table that need no Xen: what a hostile peer sends, and what is left of the server."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import memory_session, serve_memory, socket_session
from xen9p import codec, server
from xen9p.client import Client
from xen9p.dataplane import Limits, Verdict
from xen9p.transport.memory import MemoryRingTransport

PER_EXAMPLE = [HealthCheck.function_scoped_fixture]
# Tlerror is a number and no message: nobody sends it.
REQUESTS = sorted(t for t in codec.MESSAGES if t % 2 == 0 and t != codec.Tlerror.type)


def raw(kind: int, tag: int, body: bytes) -> bytes:
    return (7 + len(body)).to_bytes(4, "little") + bytes([kind]) + tag.to_bytes(2, "little") + body


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


def test_replies_sent_to_the_server_end_the_device(export: Path) -> None:
    with serve_memory(export) as (rings, served):
        client, _ = Client.connect(MemoryRingTransport(rings[0]))
        client.send_raw(raw(codec.Rversion.type, 1, b""))
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


def test_many_requests_queue_up_to_a_bound(export: Path) -> None:
    limits = Limits(max_queued=4)
    with memory_session(export, order=5, limits=limits) as session:
        for tag in range(200):
            session.client.send_raw(codec.encode(codec.Tmkdir(session.root, b"d%d" % tag, 0o755, 0), tag))
            assert session.served.device.stats()["in_flight"] <= limits.max_queued
        got = {codec.decode(session.client.recv_raw())[0] for _ in range(200)}
        assert got == set(range(200))
        assert len(os.listdir(export)) == 200


def test_memory_stays_after_many_of_every_message(export: Path) -> None:
    """Repetition leaks nothing: the heap grows by less than a byte a message."""
    (export / "f").write_text("x" * 100)

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with memory_session(export) as session:
        client, root = session.client, session.root

        def everything() -> None:
            fid = client.walk(root, b"f")
            client.lopen(fid, os.O_RDWR)
            client.getattr(fid)
            client.read(fid, 0, 100)
            client.write(fid, 0, b"y" * 100)
            client.setattr(fid, mode=0o600)
            client.statfs(fid)
            client.flush(3)
            client.clunk(fid)
            client.mkdir(root, b"d")
            client.unlinkat(root, b"d", codec.AT_REMOVEDIR)
            for attempt in (lambda: client.xattrwalk(root, b"a"), lambda: client.walk(root, b"nope")):
                with pytest.raises(OSError, match=r"."):
                    attempt()

        for _ in range(300):
            everything()
        before = rss()
        for _ in range(1500):
            everything()
        assert rss() - before < 1_000_000
