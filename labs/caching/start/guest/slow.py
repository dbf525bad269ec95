"""The cache that is to be beaten. It is never stale, for it keeps nothing from one open(2) to the next.

PYTHONPATH=. xen9p mount --cache slow:Slow slow /mnt/slow
"""

from __future__ import annotations

from xen9p.attributes import Attributes
from xen9p.cache import Cache


class Slow(Cache):
    """The guest's kernel may keep data while a file is open, and names and attributes not at all."""

    kernel_seconds = 0.0
    kernel_pages = True

    def opened(self, ino: int, attr: Attributes) -> bool:
        """A file is being opened: what was read of it before may be old by now."""
        return False
