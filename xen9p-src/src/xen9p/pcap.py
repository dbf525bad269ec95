"""A trace as a capture file: the messages as if they had come over TCP, for programs that take 9P apart.

A request has the time at which it was taken off the ring, a reply that at which the filesystem was done.

There is no TCP on a ring. Each device becomes one connection from an address made of its domain and number to port
564 of 10.9.0.1, with a handshake, sequence numbers and checksums. Data that the trace has cut is missing from the
packets and counted in their lengths, as in a capture with a limited snapshot length.

Format: pcap with nanoseconds, link type RAW (IPv4 headers first); draft-ietf-opsawg-pcap.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from dataclasses import dataclass, field
from typing import Final

from xen9p.records import Exchange, Half

MAGIC_NS: Final = 0xA1B23C4D
LINKTYPE_RAW: Final = 101
PORT: Final = 564
SERVER: Final = bytes((10, 9, 0, 1))
SNAPLEN: Final = 262144
MOST_PAYLOAD: Final = 65495
"""Bytes of TCP payload in an IPv4 packet: 65535 with two headers of 20."""
HOLD_NS: Final = 1_000_000_000
"""How long packets are held back, so that they are in the order of their times."""
_FIN, _SYN, _PSH, _ACK = 0x01, 0x02, 0x08, 0x10
_GLOBAL: Final = struct.Struct("<IHHiIII")
_RECORD: Final = struct.Struct("<IIII")
_IP: Final = struct.Struct(">BBHHHBBH4s4s")
_TCP: Final = struct.Struct(">HHIIBBHHH")


@dataclass
class _Connection:
    client: bytes
    port: int
    sent: list[int] = field(default_factory=lambda: [0, 0])  # the next sequence number of client and of server


class Pcap:
    """Makes a capture file; see traceformat.Format."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}
        self._held: list[tuple[int, int, str, bool, Half]] = []
        self._order = itertools.count()
        self._latest = 0

    def start(self) -> bytes:
        return _GLOBAL.pack(MAGIC_NS, 2, 4, 0, 0, SNAPLEN, LINKTYPE_RAW)

    def one(self, device: str, exchange: Exchange) -> bytes:
        """The packets that are old enough by now; those of this exchange come later."""
        # These two keep a reply before the request that it has led to; the other times may not.
        taken, done = exchange.times[1], exchange.times[3]
        self._hold(taken, device, True, exchange.request)
        if exchange.reply is not None:
            self._hold(max(taken, done), device, False, exchange.reply)
        return self._flush(self._latest - HOLD_NS)

    def end(self) -> bytes:
        return self._flush(self._latest)

    def _hold(self, at: int, device: str, is_request: bool, part: Half) -> None:
        self._latest = max(self._latest, at)
        heapq.heappush(self._held, (at, next(self._order), device, is_request, part))

    def _flush(self, until: int) -> bytes:
        out = []
        while self._held and self._held[0][0] <= until:
            at, _, device, is_request, part = heapq.heappop(self._held)
            out.append(self._message(at, device, is_request, part))
        return b"".join(out)

    def _message(self, at: int, device: str, is_request: bool, part: Half) -> bytes:
        opening = b""
        connection = self._connections.get(device)
        if connection is None:
            number = len(self._connections)
            connection = _Connection(bytes((10, 9, 1 + number // 250, 1 + number % 250)), 49152 + number % 16384)
            self._connections[device] = connection
            opening = (
                _packet(at, connection, True, _SYN)
                + _packet(at, connection, False, _SYN | _ACK)
                + _packet(at, connection, True, _ACK)
            )
        packets = [opening]
        for start in range(0, part.size, MOST_PAYLOAD):
            size = min(MOST_PAYLOAD, part.size - start)
            payload = part.raw[start : start + size]
            last = start + size == part.size
            packets.append(
                _packet(at, connection, is_request, _ACK | (_PSH if last else 0), payload=payload, size=size)
            )
        return b"".join(packets)


def _packet(
    at: int, connection: _Connection, from_client: bool, flags: int, *, payload: bytes = b"", size: int = 0
) -> bytes:
    """One packet with size bytes of payload, of which payload is there."""
    mine, theirs = (0, 1) if from_client else (1, 0)
    ports = (connection.port, PORT) if from_client else (PORT, connection.port)
    addresses = (connection.client, SERVER) if from_client else (SERVER, connection.client)
    sequence, acknowledged = connection.sent[mine], connection.sent[theirs]
    connection.sent[mine] = (sequence + size + (1 if flags & (_SYN | _FIN) else 0)) & 0xFFFFFFFF
    tcp = _TCP.pack(*ports, sequence, acknowledged if flags & _ACK else 0, 5 << 4, flags, 65535, 0, 0)
    pseudo = b"".join(addresses) + struct.pack(">BBH", 0, 6, len(tcp) + size)
    tcp = tcp[:16] + _checksum(pseudo + tcp + payload).to_bytes(2, "big") + tcp[18:]
    ip = _IP.pack(0x45, 0, 40 + size, 0, 0x4000, 64, 6, 0, *addresses)
    ip = ip[:10] + _checksum(ip).to_bytes(2, "big") + ip[12:]
    seconds, nanoseconds = divmod(at, 1_000_000_000)
    there = 40 + len(payload)
    return _RECORD.pack(seconds, nanoseconds, there, 40 + size) + ip + tcp + payload


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
