"""Tflush: what waits is never run, what runs is answered before Rflush, and after Rflush nothing comes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import serve_memory
from xen9p import codec, server
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.transport.memory import IN_CONS, IN_PROD, MemoryRing, MemoryRingTransport


def send(client: Client, message: codec.Message, tag: int) -> None:
    client.send_raw(codec.encode(message, tag))


def receive(client: Client) -> tuple[int, codec.Message]:
    return codec.decode(client.recv_raw())


@contextmanager
def gated_mkdir() -> Iterator[dict[bytes, threading.Event]]:
    """Tmkdir of a name waits in its handler until that name's event is set."""
    gates: dict[bytes, threading.Event] = defaultdict(threading.Event)
    original = server._HANDLERS[codec.Tmkdir]

    def wait(device: DataPlane, message: codec.Message) -> codec.Message:
        gates[message.name].wait(10)  # type: ignore[attr-defined]
        return original(device, message)

    server._HANDLERS[codec.Tmkdir] = wait
    try:
        yield gates
    finally:
        server._HANDLERS[codec.Tmkdir] = original


def test_a_request_that_lies_in_the_other_ring(export: Path) -> None:
    """Rings have no order among themselves: the server meets the Tflush before the request that it means."""
    limits = Limits(max_queued=2, python_threads=1)
    with gated_mkdir() as gates, serve_memory(export, rings=2, limits=limits) as (rings, served):
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        gates[b"flushed"].set()
        for tag in range(3):  # one runs, one waits, and the reader stands still with the third
            send(first, codec.Tmkdir(root, b"%d" % tag, 0o755, 0), tag)
        end = time.monotonic() + 10
        while served.device.stats()["requests"] < 5:
            assert time.monotonic() < end
            time.sleep(0.001)
        send(second, codec.Tmkdir(root, b"flushed", 0o755, 0), 901)
        send(first, codec.Tflush(901), 900)
        gates[b"0"].set()  # the reader goes on, to the Tflush and to a full queue
        assert receive(first)[0] == 0
        time.sleep(0.05)
        assert rings[0].index(IN_PROD) == rings[0].index(IN_CONS), "Rflush, while the request is still to come"
        gates[b"1"].set()
        gates[b"2"].set()
        assert {receive(first)[0] for _ in range(3)} == {1, 2, 900}
        at = rings[1].index(IN_PROD)
        second.statfs(root)
        assert not (export / "flushed").exists() or rings[1].index(IN_PROD) - at == 67
        first.close()
        second.close()


class Ears:
    """Reads a ring's replies and knows where in the ring each of them stood."""

    def __init__(self, ring: MemoryRing, client: Client) -> None:
        self.ring = ring
        self.client = client
        self.at = ring.index(IN_PROD)
        self.got: dict[int, int] = {}  # tag: where its reply began

    def pending(self) -> bool:
        return self.ring.index(IN_PROD) != self.at

    def hear(self) -> None:
        raw = self.client.recv_raw()
        tag, _ = codec.decode(raw)
        assert tag not in self.got, "answered twice"
        self.got[tag] = self.at
        self.at = (self.at + len(raw)) & 0xFFFFFFFF


def test_after_rflush_nothing_comes(export: Path) -> None:
    """Requests of every kind over two rings, and the Tflush of each on either ring at some moment."""
    dice = random.Random(5)
    (export / "f").write_bytes(bytes(100_000))
    limits = Limits(max_queued=8, pool_threads=2)
    outcomes = {"answered": 0, "cancelled": 0}
    with serve_memory(export, rings=2, order=4, limits=limits) as (rings, served):
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        clients = [first, Client(MemoryRingTransport(rings[1]), msize=first.msize)]
        fid = first.walk(root, b"f")
        first.lopen(fid, os.O_RDWR)
        folder = first.walk(root)
        first.lopen(folder)
        kinds = [
            lambda tag: codec.Twrite(fid, tag * 10, bytes(2000)),
            lambda tag: codec.Tread(fid, 0, 3000),
            lambda tag: codec.Tmkdir(root, b"%d" % tag, 0o755, 0),
            lambda tag: codec.Tfsync(fid, 1),
            lambda tag: codec.Treaddir(folder, 0, 500),
            lambda tag: codec.Tsetattr(fid, codec.SETATTR_MODE, 0o600, 0, 0, 0, 0, 0, 0, 0),
            lambda tag: codec.Tstatfs(root),
        ]
        for _ in range(60):
            ears = [Ears(ring, client) for ring, client in zip(rings, clients, strict=True)]
            requests = {tag: dice.randrange(2) for tag in range(0, 24, 2)}
            for tag, where in requests.items():
                send(clients[where], dice.choice(kinds)(tag), tag)
                send(clients[dice.randrange(2)], codec.Tflush(tag), tag + 1)
            # Where the other ring stood when an Rflush was there: no reply to the flushed request may begin later.
            borders: dict[int, int] = {}
            while len(borders) < len(requests):
                for ear in ears:
                    if ear.pending():
                        ear.hear()
                for tag, where in requests.items():
                    if tag not in borders and any(tag + 1 in ear.got for ear in ears):
                        borders[tag] = rings[where].index(IN_PROD)
            time.sleep(0.002)
            for ear in ears:
                while ear.pending():
                    ear.hear()
            for tag, where in requests.items():
                begun = ears[where].got.get(tag)
                outcomes["cancelled" if begun is None else "answered"] += 1
                assert begun is None or (borders[tag] - begun) & 0xFFFFFFFF < 1 << 31, "answered after Rflush"
                assert begun is None or begun != borders[tag], "answered after Rflush"
            assert served.device.stats()["in_flight"] == 0
        for client in clients:
            client.close()
    assert outcomes["cancelled"], outcomes
    assert outcomes["answered"], outcomes
