"""Rings in shared memory, with eventfds in place of event channels: the layout and the code of the Xen rings, no Xen.

Source of the layout: xen.git docs/misc/9pfs.pandoc. For the tests, and for whoever wants to learn from a ring at rest.
"""

from __future__ import annotations

import errno
import mmap
import os

from xen9p._dataplane import ffi, lib
from xen9p.dataplane import DataPlane
from xen9p.errors import Xen9pError
from xen9p.transport.ring_front import RingFront

PAGE = 4096
IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, RING_ORDER = 0, 4, 64, 68, 128
"""Offsets in bytes of the interface page's u32 fields."""


class MemoryRing:
    """One ring: an interface page and 2^order pages of data, `in` first, and an eventfd each way.

    Args:
        order: 1 to 9; each direction has 2^(order + 11) bytes.
    """

    def __init__(self, order: int = 5) -> None:
        self.order = order
        self.page = mmap.mmap(-1, PAGE)
        # By words, so that each is read and written at once, as the C side does: in bytes it would be a copy.
        self._words = memoryview(self.page).cast("I")
        self.data = mmap.mmap(-1, int(lib.x9_ring_data_bytes(order)))
        self.to_back = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.to_front = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.write_index(RING_ORDER, order)

    @property
    def half(self) -> int:
        """Bytes a direction."""
        return 1 << (self.order + 11)

    def index(self, offset: int) -> int:
        """A u32 of the interface page."""
        return self._words[offset // 4]

    def write_index(self, offset: int, value: int) -> None:
        """Overwrites a u32 of the interface page, as a hostile peer can."""
        self._words[offset // 4] = value & 0xFFFFFFFF

    def start_at(self, position: int) -> None:
        """Sets all four free-running indices, so that a test starts near their wrap-around."""
        for offset in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD):
            self.write_index(offset, position)

    def wake_backend(self) -> None:
        os.eventfd_write(self.to_back, 1)

    def serve_with(self, device: DataPlane) -> None:
        """Makes a device the backend of this ring."""
        device.add_memory_ring(self.page, self.data, self.order, self.to_back, self.to_front)

    def close(self) -> None:
        """Frees the ring; both its ends must be gone."""
        os.close(self.to_back)
        os.close(self.to_front)
        self._words.release()
        self.page.close()
        self.data.close()


class MemoryRingTransport(RingFront):
    """The frontend's end of a ring, for xen9p.client. Waits at most timeout seconds for its peer."""

    def __init__(self, ring: MemoryRing, timeout: float = 10.0) -> None:
        self._ring = ring
        self._page = ffi.from_buffer(ring.page, require_writable=True)
        self._data = ffi.from_buffer(ring.data, require_writable=True)
        front = lib.x9_front_new(
            ffi.cast("uint8_t *", self._page),
            ffi.cast("uint8_t *", self._data),
            ring.order,
            ring.to_front,
            ring.to_back,
        )
        if front == ffi.NULL:
            raise Xen9pError("the ring's indices contradict each other", errno=errno.EINVAL)
        super().__init__(front, ring.half, timeout)

    def close(self) -> None:
        """Gives up the ring; twice is allowed."""
        if self._front is not None:
            super().close()
            ffi.release(self._page)
            ffi.release(self._data)
