"""The backend's end of 9P rings: in memory, to try a server out, or shared by a guest. See the page: The ring.

Whole messages come out and whole messages go in. The peer can write all of the shared pages at any time: an index is
read once, checked, and used from the copy; our own two positions are kept here and only announced there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from xen9p.errors import ProtocolError
from xen9p.transport.memory import IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, PAGE, RING_ORDER, MemoryRing
from xen9p.xenbus import MAX_RING_ORDER

REFS: Final = 132
"""Offset in bytes of the data pages' grant references in the interface page."""
HEADER: Final = 7
PATIENCE: Final = 10.0  # seconds that a peer may take to make room for a reply

# linux/include/uapi/xen/gntdev.h and evtchn.h: _IOC(_IOC_NONE, type, number, size).
GNTDEV_MAP: Final = 0x184700  # struct ioctl_gntdev_map_grant_ref with one reference: 24 bytes
GNTDEV_UNMAP: Final = 0x104701
EVTCHN_BIND_INTERDOMAIN: Final = 0x084501
EVTCHN_NOTIFY: Final = 0x044504


class Ring:
    """One ring: takes requests out of its half `out`, puts replies into its half `in`.

    Args:
        page: the interface page.
        data: 2^order pages; `in` comes first.
        notify: tells the peer that something has changed.
    """

    def __init__(self, page: mmap.mmap, data: mmap.mmap, order: int, notify: Callable[[], None]) -> None:
        self.half = 1 << (order + 11)
        self._words = memoryview(page).cast("I")  # each word is read and written at once
        self._in = memoryview(data)[: self.half]
        self._out = memoryview(data)[self.half :]
        self._notify = notify
        # Where an earlier backend of this ring has stopped; both are 0 in a new one.
        self._taken = self._words[OUT_CONS // 4]
        self._put = self._words[IN_PROD // 4]

    def take(self, most: int) -> bytes | None:
        """The next request, None if there is no whole one.

        Raises:
            ProtocolError: an index or a size is out of range. most is the largest message in bytes.
        """
        there = self._distance(self._words[OUT_PROD // 4], self._taken)
        if there < HEADER:
            return None
        size = int.from_bytes(_copy(self._out, self._taken, 4), "little")
        if not HEADER <= size <= most:
            raise ProtocolError(f"a message of {size} bytes; it is {HEADER} to {most}")
        if there < size:
            return None
        message = _copy(self._out, self._taken, size)
        # Between our copy of the size and this one the peer may have changed it.
        message = size.to_bytes(4, "little") + message[4:]
        self._taken = (self._taken + size) & 0xFFFFFFFF
        self._words[OUT_CONS // 4] = self._taken
        self._notify()  # it may be waiting for room
        return message

    def put(self, message: bytes) -> None:
        """Puts a reply in, at once: a frontend reads all of it when it has seen the index.

        Raises:
            TimeoutError: the peer makes no room.
        """
        deadline = time.monotonic() + PATIENCE
        # One byte stays free: QEMU takes a full half for an empty one.
        while self.half - self._distance(self._put, self._words[IN_CONS // 4]) - 1 < len(message):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no room for a reply of {len(message)} bytes within {PATIENCE:g} s")
            time.sleep(0.001)
        at = self._put % self.half
        first = min(len(message), self.half - at)
        self._in[at : at + first] = message[:first]
        self._in[: len(message) - first] = message[first:]
        self._put = (self._put + len(message)) & 0xFFFFFFFF
        self._words[IN_PROD // 4] = self._put
        self._notify()

    def _distance(self, ahead: int, behind: int) -> int:
        """How far one index is before another; indices run free and wrap at 2^32."""
        distance = (ahead - behind) & 0xFFFFFFFF
        if distance > self.half:
            raise ProtocolError(f"indices {ahead} and {behind} are further apart than {self.half} bytes")
        return distance

    def release(self) -> None:
        """Lets go of the pages."""
        for view in (self._words, self._in, self._out):
            view.release()


def _copy(half: memoryview, position: int, size: int) -> bytes:
    at = position % len(half)
    first = min(size, len(half) - at)
    return bytes(half[at : at + first]) + bytes(half[: size - first])


class Link(Protocol):
    """All rings of one device, and how to wait for its peer."""

    @property
    def rings(self) -> Sequence[Ring]:
        """The rings, in the guest's order."""

    def wait(self, seconds: float) -> None:
        """Returns when the peer has said something, or after some seconds."""

    def close(self) -> None:
        """Lets go of everything."""


class MemoryLink:
    """A ring in memory; the client's end is a MemoryRingTransport on the same MemoryRing."""

    def __init__(self, ring: MemoryRing) -> None:
        self._ring = ring
        self.rings = [Ring(ring.page, ring.data, ring.order, lambda: os.eventfd_write(ring.to_front, 1))]

    def wait(self, seconds: float) -> None:
        """As Link says."""
        if select.select([self._ring.to_back], [], [], seconds)[0]:
            os.eventfd_read(self._ring.to_back)

    def close(self) -> None:
        """As Link says; the ring itself is its maker's."""
        for ring in self.rings:
            ring.release()


class XenLink:
    """Rings that a guest has shared with this host.

    Args:
        domid: the guest.
        offered: for each ring its grant reference and event channel, as the guest has published them.

    Raises:
        OSError: a grant cannot be mapped or an event channel not be bound.
        ProtocolError: a ring's order is out of range.
    """

    def __init__(self, domid: int, offered: Sequence[tuple[int, int]]) -> None:
        self._domid = domid
        self._grants = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
        self._events = os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CLOEXEC)
        self._maps: list[tuple[mmap.mmap, int, int]] = []
        self.rings: list[Ring] = []
        for ref, port in offered:
            self.rings.append(self._ring(ref, port))

    def _ring(self, ref: int, port: int) -> Ring:
        page = self._map([ref])
        order = int.from_bytes(page[RING_ORDER : RING_ORDER + 4], "little")
        if not 1 <= order <= MAX_RING_ORDER:
            raise ProtocolError(f"ring order {order} is not within 1..{MAX_RING_ORDER}")
        data = self._map(struct.unpack_from(f"<{1 << order}I", page[:PAGE], REFS))
        bind = bytearray(struct.pack("<II", self._domid, port))
        local = struct.pack("<I", fcntl.ioctl(self._events, EVTCHN_BIND_INTERDOMAIN, bind))
        return Ring(page, data, order, lambda: self._notify(local))

    def _notify(self, port: bytes) -> None:
        with suppress(OSError):  # the guest has gone, and nobody waits
            fcntl.ioctl(self._events, EVTCHN_NOTIFY, bytearray(port))

    def _map(self, refs: Sequence[int]) -> mmap.mmap:
        """Pages that the guest has granted, one behind the other."""
        words = [word for ref in refs for word in (self._domid, ref)]
        asked = bytearray(struct.pack(f"<IIQ{len(words)}I", len(refs), 0, 0, *words))
        fcntl.ioctl(self._grants, GNTDEV_MAP, asked)
        index = struct.unpack_from("<Q", asked, 8)[0]
        pages = mmap.mmap(self._grants, len(refs) * PAGE, offset=index)
        self._maps.append((pages, index, len(refs)))
        return pages

    def wait(self, seconds: float) -> None:
        """As Link says. Its event is unmasked first and the rings are looked at after that, so that none is missed."""
        if select.select([self._events], [], [], seconds)[0]:
            os.write(self._events, os.read(self._events, 64))

    def close(self) -> None:
        """As Link says; event channels end with their descriptor."""
        for ring in self.rings:
            ring.release()
        for pages, index, count in self._maps:
            pages.close()
            fcntl.ioctl(self._grants, GNTDEV_UNMAP, bytearray(struct.pack("<QII", index, count, 0)))
        os.close(self._events)
        os.close(self._grants)
