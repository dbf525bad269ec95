"""A device stands still for a snapshot: what runs ends, what comes waits, nothing fails, and nobody prolongs it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from observed import host
from serving import OPENERS, memory_session, serve_memory
from test_flush import gated_mkdir, receive, send
from test_rates import until
from xen9p import codec, worker
from xen9p.client import Client
from xen9p.dataplane import Limits
from xen9p.transport.memory import MemoryRingTransport
from xen9p.workers import socket_path


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_what_comes_waits_and_nothing_fails(export: Path, kind: str) -> None:
    with OPENERS[kind](export) as session:  # type: ignore[attr-defined]
        client, device = session.client, session.served.device
        for round_ in range(20):
            device.pause(5)
            assert device.quiet(1) == 0
            for tag in range(10):
                send(client, codec.Tmkdir(session.root, b"%d-%d" % (round_, tag), 0o755, 0), tag)
            if round_ < 3:
                time.sleep(0.1)
            assert len(os.listdir(export)) == 10 * round_
            assert device.resume()
            assert {receive(client)[0] for _ in range(10)} == set(range(10))
        assert len(os.listdir(export)) == 200


def test_what_runs_ends_first_and_what_waits_is_not_begun(export: Path) -> None:
    limits = Limits(python_threads=1)
    with gated_mkdir() as gates, memory_session(export, limits=limits) as session:
        client, device = session.client, session.served.device
        for tag in range(3):
            send(client, codec.Tmkdir(session.root, b"d%d" % tag, 0o755, 0), tag)
        until(lambda: device.stats()["in_flight"] == 3)
        gates[b"d1"].set()
        gates[b"d2"].set()
        device.pause(5)
        began = time.monotonic()
        assert device.quiet(0.2) == 1
        assert time.monotonic() - began >= 0.2
        gates[b"d0"].set()
        assert device.quiet(2) == 0
        time.sleep(0.05)
        assert os.listdir(export) == ["d0"]
        assert device.resume()
        assert [receive(client)[0] for _ in range(3)] == [0, 1, 2]


def test_what_changes_nothing_holds_nothing_up(export: Path) -> None:
    """A request that only looks may take as long as it likes."""
    original = worker.server._HANDLERS[codec.Tattach]
    with memory_session(export) as session:
        gates: list[float] = []

        def slow(device: Any, message: Any) -> Any:
            gates.append(time.monotonic())
            time.sleep(0.5)
            return original(device, message)

        worker.server._HANDLERS[codec.Tattach] = slow
        try:
            send(session.client, codec.Tattach(77, codec.NOFID, b"", b"", 0), 5)
            until(lambda: bool(gates))
            session.served.device.pause(5)
            assert session.served.device.quiet(0.3) == 0
            session.served.device.resume()
            assert receive(session.client)[0] == 5
        finally:
            worker.server._HANDLERS[codec.Tattach] = original


def test_waiting_for_a_snapshot_is_time_in_the_ring(export: Path) -> None:
    with memory_session(export) as session:
        device = session.served.device
        device.pause(5)
        assert device.quiet(1) == 0
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
        time.sleep(0.3)
        assert device.resume()
        assert receive(session.client)[0] == 7
        until(lambda: "change" in device.times())
        assert 0.2 < device.times()["change"]["ring"]["seconds"] < 3


def test_it_goes_on_by_itself(export: Path) -> None:
    with memory_session(export) as session:
        device = session.served.device
        device.pause(0.3)
        assert device.quiet(1) == 0
        began = time.monotonic()
        session.client.mkdir(session.root, b"d")
        assert 0.15 < time.monotonic() - began < 3
        assert not device.resume(), "the pause did not hold, and nobody was told"
        assert not device.resume()


@pytest.mark.parametrize("message", [codec.Tread(1, 0, 1000), codec.Tsetattr(1, 1, 0o600, 0, 0, 0, 0, 0, 0, 0)])
def test_a_peer_that_reads_no_replies_holds_nothing_up(export: Path, message: codec.Message) -> None:
    """Whether the reader waits for room in the ring, or the threads do: what they had to do is done."""
    (export / "f").write_bytes(b"x" * 4096)
    many = 3000 if isinstance(message, codec.Tsetattr) else 30
    with serve_memory(export, order=2) as (rings, served):
        client, root = Client.connect(MemoryRingTransport(rings[0], timeout=0.3))
        assert client.walk(root, b"f") == message.fid  # type: ignore[attr-defined]
        client.lopen(message.fid)  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):  # the ring is full at last
            for tag in range(many):
                send(client, message, tag)
        done = served.device.stats()["requests"]
        served.device.pause(5)
        assert served.device.quiet(2) == 0
        assert served.device.stats()["requests"] < 4 + many, f"there was room for all ({done})"
        assert served.device.resume()
        client.close()


def test_it_ends_while_it_stands_still(export: Path) -> None:
    with memory_session(export) as session:
        session.served.device.pause(10)
        assert session.served.device.quiet(1) == 0
        began = time.monotonic()
        session.served.device.stop()
        session.served.join()
        assert time.monotonic() - began < 3


def test_a_device_that_does_not_serve_yet(export: Path) -> None:
    """It stands still, and begins by standing still."""
    from serving import Served  # noqa: PLC0415

    served = Served(export)
    served.device.pause(5)
    assert served.device.quiet(1) == 0
    ours, theirs = socket.socketpair()
    served.device.add_stream(theirs)
    served.start()
    with ours:
        ours.sendall(codec.encode(codec.Tversion(8192, codec.VERSION), codec.NOTAG))
        ours.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ours.recv(100)
        assert served.device.resume()
        ours.settimeout(5)
        assert ours.recv(100)
    served.join()
    served.close()
    theirs.close()


# The worker's orders.


class Order:
    """A conversation with a worker."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("rb")
        self.hello = self.read()

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.lines.readline())
        return found

    def __call__(self, what: str) -> dict[str, Any]:
        self.sock.sendall(json.dumps({"do": what}).encode() + b"\n")
        return self.read()

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


def test_orders_of_a_worker(tmp_path: Path) -> None:
    with host(tmp_path, "g1:home") as lab:
        session = lab.devices[0].session
        export = session.served.path
        order = Order(socket_path(tmp_path, 3, 0))
        assert order.hello["pauses"] is True
        assert order("pause") == {"event": "paused", "id": 0, "left": 0}
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
        time.sleep(0.1)
        assert os.listdir(export) == []
        other = Order(socket_path(tmp_path, 3, 0))
        assert other("resume") == {"event": "resumed", "held": False}, "it is not its pause"
        assert os.listdir(export) == []
        other.close()
        assert order("resume") == {"event": "resumed", "held": True}
        assert receive(session.client)[0] == 7
        order.close()


def test_a_pause_ends_with_the_one_who_asked_for_it(tmp_path: Path) -> None:
    with host(tmp_path, "g1:home") as lab:
        session = lab.devices[0].session
        order = Order(socket_path(tmp_path, 3, 0))
        assert order("pause")["left"] == 0
        began = time.monotonic()
        order.close()
        session.client.mkdir(session.root, b"d")
        assert time.monotonic() - began < worker.STAND_STILL / 2


def test_a_request_that_does_not_end_is_told(tmp_path: Path) -> None:
    with gated_mkdir() as gates, host(tmp_path, "g1:home") as lab:
        session = lab.devices[0].session
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
        stats = session.served.device.stats
        until(lambda: stats()["in_flight"] == 1 and stats()["queued"] == 0)  # else it waits for the pause's end
        order = Order(socket_path(tmp_path, 3, 0))
        began = time.monotonic()
        assert order("pause") == {"event": "paused", "id": 0, "left": 1}
        assert time.monotonic() - began < 2 * worker.FINISH
        order.close()
        gates[b"d"].set()
        assert receive(session.client)[0] == 7
