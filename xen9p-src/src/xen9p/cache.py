"""What a FUSE mount may remember, as an interface to be replaced: `xen9p mount --cache MODULE:CLASS`.

The mount asks its cache before it asks the server, and tells it what it learns and what it changes. Everything is
called in one thread, between two messages, and must not block. A cache knows files by their inode number. It is free
to forget anything at any time; what it must never do is to go on saying what it has been told is no longer so.

What *others* change on the server nobody tells it, and how old an answer may be is the cache's decision: see opened().
Unless it is `coherent`: then the mount has leases (leases.py), the cache gets only what it may keep, and revoked() is
told what others are about to change.
"""

from __future__ import annotations

import importlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final

from xen9p.attributes import Attributes
from xen9p.codec import Dirent
from xen9p.errors import Xen9pError

BLOCK: Final = 128 * 1024
"""Bytes of data that TimedCache keeps or drops together."""


class Cache:
    """Remembers nothing, and is the base of caches that do: override what you want to remember.

    Args:
        seconds: how old an answer may be; from --cache-seconds.
    """

    kernel_seconds: float = 0.0
    """How long the guest's kernel may use names and attributes without asking the mount."""
    kernel_pages: bool = False
    """Whether the guest's kernel may keep data in its page cache. Shared mmap(2) needs it."""
    coherent: bool = False
    """Whether it is told what others change. The server has to give leases; how long the kernel may keep something is
    the lease's to say, and not kernel_seconds'."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds

    # Names.

    def lookup(self, parent: int, name: bytes) -> int | None:
        """The inode number of name in a directory, None to ask the server."""
        return None

    def put_lookup(self, parent: int, name: bytes, ino: int) -> None:
        """The server has said so."""

    def invalidate_lookup(self, parent: int, name: bytes) -> None:
        """The name has been removed or made, or now means another file."""

    def missing(self, parent: int, name: bytes) -> bool:
        """Whether there is no such name in a directory; False to ask the server."""
        return False

    def put_missing(self, parent: int, name: bytes) -> None:
        """The server has said so; asked for only in a cache that is coherent."""

    def listing(self, ino: int) -> Sequence[Dirent] | None:
        """All entries of a directory but . and .., None to ask the server."""
        return None

    def put_listing(self, ino: int, entries: Sequence[Dirent]) -> None:
        """The server has said so; invalidate_attr() ends it, too. Called only for a cache that is coherent."""

    # Attributes.

    def attr(self, ino: int) -> Attributes | None:
        """A file's attributes, None to ask the server."""
        return None

    def put_attr(self, ino: int, attr: Attributes) -> None:
        """The server has said so."""

    def invalidate_attr(self, ino: int) -> None:
        """They have changed; what they are now nobody has said."""

    # Data.

    def opened(self, ino: int, attr: Attributes) -> bool:
        """A file is being opened, these are its attributes now. Whether data from earlier may be used still."""
        return False

    def data(self, ino: int, offset: int, count: int) -> bytes | None:
        """count bytes from offset on, fewer only where the file ends; None to ask the server."""
        return None

    def put_data(self, ino: int, offset: int, data: bytes, at_end: bool) -> None:
        """The server has this data there; at_end: and nothing after it."""

    def invalidate_data(self, ino: int, offset: int = 0, count: int | None = None) -> None:
        """count bytes from offset on have been written; None: from there on everything may be different."""

    # The end.

    def revoked(self, files: Collection[int], names: Collection[tuple[int, bytes]]) -> None:
        """Others are about to change these files and names (directory, name): by now they may be different.

        Called only for a cache that is coherent. Unless it is overridden, the methods above are told.
        """
        for ino in files:
            self.invalidate_attr(ino)
            self.invalidate_data(ino)
        for parent, name in names:
            self.invalidate_lookup(parent, name)

    def forget(self, ino: int) -> None:
        """The kernel does not know the file any more: it will look it up before it asks for it again."""


class TimedCache(Cache):
    """Names and attributes for some seconds; data as long as a file's time and size stay what they were at open(2).

    Data is dropped, least recently used first, above limit bytes.
    """

    kernel_pages = True

    def __init__(
        self, seconds: float = 1.0, limit: int = 64 << 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(seconds)
        self.kernel_seconds = seconds
        self._limit = limit
        self._clock = clock
        self._names: dict[tuple[int, bytes], tuple[float, int]] = {}
        self._names_in: dict[int, set[bytes]] = {}
        self._attrs: dict[int, tuple[float, Attributes]] = {}
        self._versions: dict[int, tuple[int, int]] = {}
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._blocks_of: dict[int, set[int]] = {}
        self._bytes = 0

    def lookup(self, parent: int, name: bytes) -> int | None:
        """As Cache says."""
        until, ino = self._names.get((parent, name), (0.0, 0))
        return ino if self._clock() < until else None

    def put_lookup(self, parent: int, name: bytes, ino: int) -> None:
        """As Cache says."""
        self._names[parent, name] = (self._clock() + self.seconds, ino)
        self._names_in.setdefault(parent, set()).add(name)

    def invalidate_lookup(self, parent: int, name: bytes) -> None:
        """As Cache says."""
        self._names.pop((parent, name), None)
        self._names_in.get(parent, set()).discard(name)

    def attr(self, ino: int) -> Attributes | None:
        """As Cache says."""
        until, attr = self._attrs.get(ino, (0.0, None))
        return attr if self._clock() < until else None

    def put_attr(self, ino: int, attr: Attributes) -> None:
        """As Cache says."""
        self._attrs[ino] = (self._clock() + self.seconds, attr)

    def invalidate_attr(self, ino: int) -> None:
        """As Cache says."""
        self._attrs.pop(ino, None)

    def opened(self, ino: int, attr: Attributes) -> bool:
        """As Cache says."""
        version = (attr.mtime_ns, attr.size)
        if self._versions.get(ino) == version:
            return True
        self._drop(ino, 0, None)
        self._versions[ino] = version
        return False

    def data(self, ino: int, offset: int, count: int) -> bytes | None:
        """As Cache says."""
        out = bytearray()
        while len(out) < count:
            at = offset + len(out)
            block = self._blocks.get((ino, at // BLOCK))
            if block is None:
                return None
            self._blocks.move_to_end((ino, at // BLOCK))
            out += block[at % BLOCK : at % BLOCK + count - len(out)]
            if len(block) < BLOCK:  # the file ends here
                break
        return bytes(out)

    def put_data(self, ino: int, offset: int, data: bytes, at_end: bool) -> None:
        """Keeps the whole blocks in it, and the last of the file."""
        for number in range(-(-offset // BLOCK), (offset + len(data)) // BLOCK + 1):
            start = number * BLOCK - offset
            block = data[start : start + BLOCK]
            if len(block) < BLOCK and not at_end:
                break
            self._drop(ino, number * BLOCK, BLOCK)
            self._blocks[ino, number] = block
            self._blocks_of.setdefault(ino, set()).add(number)
            self._bytes += len(block)
        while self._bytes > self._limit:
            (file, number), block = self._blocks.popitem(last=False)
            self._blocks_of[file].discard(number)
            self._bytes -= len(block)

    def invalidate_data(self, ino: int, offset: int = 0, count: int | None = None) -> None:
        """As Cache says; the file's time changes with it, so the next open(2) begins anew."""
        self._versions.pop(ino, None)
        self._drop(ino, offset, count)

    def _drop(self, ino: int, offset: int, count: int | None) -> None:
        first = offset // BLOCK
        last = None if count is None else (offset + count - 1) // BLOCK
        # A short block says where the file ends: a write behind it makes that wrong.
        gone = [
            n
            for n in self._blocks_of.get(ino, ())
            if (n >= first and (last is None or n <= last)) or len(self._blocks[ino, n]) < BLOCK
        ]
        for number in gone:
            self._bytes -= len(self._blocks.pop((ino, number)))
            self._blocks_of[ino].discard(number)

    def forget(self, ino: int) -> None:
        """As Cache says."""
        self.invalidate_attr(ino)
        for name in self._names_in.pop(ino, ()):
            self._names.pop((ino, name), None)
        self._drop(ino, 0, None)
        self._blocks_of.pop(ino, None)
        self._versions.pop(ino, None)


class CoherentCache(Cache):
    """Names, attributes and directories as long as nobody changes them; data is left to the kernel's page cache."""

    kernel_pages = True
    coherent = True

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__(seconds)
        self._names: dict[tuple[int, bytes], int | None] = {}  # None: there is no such name
        self._names_in: dict[int, set[bytes]] = {}
        self._attrs: dict[int, Attributes] = {}
        self._listings: dict[int, Sequence[Dirent]] = {}

    def lookup(self, parent: int, name: bytes) -> int | None:
        """As Cache says."""
        return self._names.get((parent, name))

    def missing(self, parent: int, name: bytes) -> bool:
        """As Cache says."""
        return self._names.get((parent, name), 0) is None

    def put_lookup(self, parent: int, name: bytes, ino: int) -> None:
        """As Cache says."""
        self._put(parent, name, ino)

    def put_missing(self, parent: int, name: bytes) -> None:
        """As Cache says."""
        self._put(parent, name, None)

    def _put(self, parent: int, name: bytes, ino: int | None) -> None:
        self._names[parent, name] = ino
        self._names_in.setdefault(parent, set()).add(name)

    def invalidate_lookup(self, parent: int, name: bytes) -> None:
        """As Cache says."""
        self._names.pop((parent, name), None)
        self._names_in.get(parent, set()).discard(name)

    def listing(self, ino: int) -> Sequence[Dirent] | None:
        """As Cache says."""
        return self._listings.get(ino)

    def put_listing(self, ino: int, entries: Sequence[Dirent]) -> None:
        """As Cache says."""
        self._listings[ino] = entries

    def attr(self, ino: int) -> Attributes | None:
        """As Cache says."""
        return self._attrs.get(ino)

    def put_attr(self, ino: int, attr: Attributes) -> None:
        """As Cache says."""
        self._attrs[ino] = attr

    def invalidate_attr(self, ino: int) -> None:
        """As Cache says."""
        self._attrs.pop(ino, None)
        self._listings.pop(ino, None)

    def opened(self, ino: int, attr: Attributes) -> bool:
        """As Cache says: the mount has dropped from the kernel what is no good any more."""
        return True

    def forget(self, ino: int) -> None:
        """As Cache says."""
        self.invalidate_attr(ino)
        for name in self._names_in.pop(ino, ()):
            self._names.pop((ino, name), None)


BUILT_IN: Final[dict[str, type[Cache]]] = {"none": Cache, "timed": TimedCache, "coherent": CoherentCache}


def load(name: str, seconds: float) -> Cache:
    """The cache that --cache names: a built-in one, or MODULE:CLASS from Python's search path.

    Raises:
        Xen9pError: there is none, or it is no Cache.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](seconds)
    module, colon, cls = name.partition(":")
    if not colon or not module or not cls:
        raise Xen9pError(f"no cache {name}", hint=f"write {', '.join(BUILT_IN)} or MODULE:CLASS")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise Xen9pError(f"cache {name}: {error}", hint="is its directory in PYTHONPATH?") from None
    if not isinstance(found, type) or not issubclass(found, Cache):
        raise Xen9pError(f"cache {name} is no class made from xen9p.cache.Cache", hint="see docs: the client")
    try:
        return found(seconds)
    except TypeError as error:
        raise Xen9pError(f"cache {name} cannot be made: {error}", hint="it gets one argument: seconds") from None
