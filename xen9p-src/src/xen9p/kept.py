"""What a mount's cache and its kernel keep, and how they are made to drop it.

Without leases (Kept) everything may be kept for as long as the cache says. With them (Leased) only what is leased may,
and nothing beyond the session's end; what the server revokes is dropped from both before it hears that it is.

Of the kernel (fs/fuse) this is known and used. Attributes are dropped without waiting, and an answer to GETATTR that
was under way then is not taken. An answer to LOOKUP would be, so only GETATTR gives attributes time. Dropping a name
waits for requests that hold its directory; if they in turn wait for us, the name's time runs out instead. Every read(2)
looks whether attributes are good and asks if not, so data of the page cache is as good as they are: it is enough to
drop it before GETATTR is answered.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Protocol

from xen9p.cache import Cache
from xen9p.leases import Leases

MOST_NAMES: Final = 1 << 18
"""Names that are kept under leases; those beyond are asked for every time."""
CONTENDED: Final = 10.0
"""Seconds for which the kernel gets no name that has just been revoked: dropping it may have to wait for it."""
PAGES: Final = 0.25
"""Seconds that a revocation waits for the page cache, which nobody reads before the attributes are asked for."""
_THREADS: Final = 4

Name = tuple[int, bytes]


class Kernel(Protocol):
    """What pyfuse3 offers to drop things from the kernel; each may block, and raises OSError for what is not there."""

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None: ...

    def invalidate_entry(self, inode_p: int, name: bytes) -> None: ...


class Kept:
    """Everything may be kept as long as the cache says."""

    leased = False

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def usable(self) -> bool:
        """Whether what the cache has may be used."""
        return True

    def mark(self) -> int:
        """A moment before a request."""
        return 0

    def learn(self, ino: int, key: int) -> None:
        """A file's lease key."""

    def file(self, ino: int, mark: int) -> bool:
        """Whether what has been asked about a file since a mark may be kept."""
        return True

    def name(self, parent: int, name: bytes, mark: int) -> bool:
        """Whether what has been asked about a name since a mark may be kept."""
        return True

    def name_seconds(self, parent: int, name: bytes) -> float:
        """For how long the kernel may keep what a name means, from now on."""
        return self._cache.kernel_seconds

    def attr_seconds(self, ino: int, *, asked: bool) -> float:
        """The same for attributes; asked: by GETATTR."""
        return self._cache.kernel_seconds

    def changed(self, parent: int, name: bytes) -> None:
        """We have changed a name: what was asked about it before is old."""

    def moving(self, old: Name, new: Name) -> None:
        """The kernel is moving a name, with the time that it has."""

    def writing(self, ino: int, change: int) -> None:
        """A write(2) begins (1) or ends (-1)."""

    async def stale(self, ino: int) -> None:
        """The kernel is getting data of a file that it may not keep."""

    async def settle(self, ino: int) -> None:
        """Returns when the kernel has no data of a file that it may not keep."""

    def forget(self, ino: int) -> None:
        """The kernel does not know a file any more."""


class Leased(Kept):
    """What is leased may be kept.

    Args:
        gone: called with files of which nothing is known any more.
    """

    leased = True

    def __init__(self, cache: Cache, kernel: Kernel, gone: Callable[[Collection[int]], None]) -> None:
        super().__init__(cache)
        self.leases: Leases | None = None
        self._kernel = kernel
        self._gone = gone
        # Apart, so that what may have to wait for a request of the kernel's keeps nothing else from being dropped.
        self._for_names = ThreadPoolExecutor(2 * _THREADS, "names")
        self._for_attributes = ThreadPoolExecutor(_THREADS, "attributes")
        self._for_data = ThreadPoolExecutor(_THREADS, "data")
        self._keys: dict[int, int] = {}
        self._files: defaultdict[int, set[int]] = defaultdict(set)  # by bucket
        self._names: defaultdict[int, set[Name]] = defaultdict(set)
        self._names_in: defaultdict[int, set[bytes]] = defaultdict(set)
        self._granted: dict[Name, float] = {}  # until when the kernel may use a name
        self._contended: dict[Name, float] = {}
        self._count = 0
        self._stale: dict[int, int] = {}  # how often that has been said
        self._clean: dict[int, int] = {}  # in which session data of a file came to be good
        self._session = 0
        self._writes: defaultdict[int, int] = defaultdict(int)

    @property
    def _with(self) -> Leases:
        assert self.leases is not None
        return self.leases

    def usable(self) -> bool:
        """As Kept says."""
        return self._with.remaining() > 0

    def mark(self) -> int:
        """As Kept says."""
        return self._with.mark()

    def learn(self, ino: int, key: int) -> None:
        """As Kept says."""
        self._keys[ino] = key

    def file(self, ino: int, mark: int) -> bool:
        """As Kept says."""
        key = self._keys.get(ino)
        if not key or not self._with.holds(mark, bucket := self._with.file(key)):
            return False
        self._files[bucket].add(ino)
        return True

    def name(self, parent: int, name: bytes, mark: int) -> bool:
        """As Kept says."""
        key = self._keys.get(parent)
        if not key or not self._with.holds(mark, bucket := self._with.name(key, name)):
            return False
        if (parent, name) not in self._names[bucket]:
            if self._count >= MOST_NAMES:
                self._drop_cold()
            if self._count >= MOST_NAMES:
                return False
            self._hold((parent, name), bucket)
        return True

    def _drop_cold(self) -> None:
        """Forgets the names that the kernel does not use."""
        now = time.monotonic()
        for bucket, names in list(self._names.items()):
            for name in list(names):
                if self._granted.get(name, 0.0) < now:
                    self._let_go(name, bucket)
                    self._granted.pop(name, None)
                    self._cache.invalidate_lookup(*name)
            if not names:
                del self._names[bucket]
        self._contended = {name: until for name, until in self._contended.items() if until > now}

    def _hold(self, name: Name, bucket: int) -> None:
        if name not in self._names[bucket]:
            self._names[bucket].add(name)
            self._names_in[name[0]].add(name[1])
            self._count += 1

    def _let_go(self, name: Name, bucket: int) -> None:
        if name in self._names[bucket]:
            self._names[bucket].discard(name)
            self._names_in[name[0]].discard(name[1])
            self._count -= 1

    def _bucket(self, name: Name) -> int | None:
        key = self._keys.get(name[0])
        return self._with.name(key, name[1]) if key else None

    def name_seconds(self, parent: int, name: bytes) -> float:
        """As Kept says; none for a name that is not held, or that others have just changed."""
        which = (parent, name)
        bucket = self._bucket(which)
        if bucket is None or which not in self._names[bucket]:
            return 0.0
        now = time.monotonic()
        if which in self._contended:
            if now < self._contended[which]:
                return 0.0
            del self._contended[which]
        left = self._with.remaining()
        self._granted[which] = max(self._granted.get(which, 0.0), now + left)
        return left

    def attr_seconds(self, ino: int, *, asked: bool) -> float:
        """As Kept says."""
        key = self._keys.get(ino)
        if not asked or not key or ino not in self._files[self._with.file(key)] or ino in self._stale:
            return 0.0
        return self._with.remaining()

    def changed(self, parent: int, name: bytes) -> None:
        """As Kept says; the server revokes only what others change."""
        bucket = self._bucket((parent, name))
        if bucket is not None:
            self._with.touch(bucket)

    def moving(self, old: Name, new: Name) -> None:
        """As Kept says; before the server is asked, for the name may be revoked from then on."""
        bucket = self._bucket(new)
        if bucket is not None and old in self._granted:
            self._hold(new, bucket)
            self._granted[new] = max(self._granted.get(new, 0.0), self._granted[old])

    def writing(self, ino: int, change: int) -> None:
        """As Kept says."""
        self._writes[ino] += change
        if not self._writes[ino]:
            del self._writes[ino]

    async def stale(self, ino: int) -> None:
        """As Kept says: the kernel has to ask before it uses it."""
        if self._cache.kernel_pages:
            self._spoil(ino)
            await self._drop_attributes((ino,))

    async def settle(self, ino: int) -> None:
        """As Kept says. Not from a request that holds pages of the file: read(2) and write(2)."""
        if not self._cache.kernel_pages:
            return
        if not self.usable() or self._clean.get(ino) != self._session:
            self._spoil(ino)
        while ino in self._stale:
            await self._clear((ino,))

    def _spoil(self, ino: int) -> None:
        self._stale[ino] = self._stale.get(ino, 0) + 1

    async def _clear(self, files: Collection[int]) -> None:
        """Has the kernel drop data; what is spoiled meanwhile stays so."""
        session, before = self._session, {ino: self._stale.get(ino) for ino in files}
        await self._run(self._for_data, self._invalidate, tuple(files), False)
        for ino, count in before.items():
            self._clean[ino] = session
            if self._stale.get(ino) == count:
                self._stale.pop(ino, None)

    def forget(self, ino: int) -> None:
        """As Kept says."""
        key = self._keys.get(ino)
        if key is not None:
            self._files[self._with.file(key)].discard(ino)
            for name in list(self._names_in.pop(ino, ())):
                bucket = self._with.name(key, name)
                self._names[bucket].discard((ino, name))
                self._count -= 1
                self._granted.pop((ino, name), None)
                self._contended.pop((ino, name), None)
            del self._keys[ino]
        self._stale.pop(ino, None)
        self._clean.pop(ino, None)

    async def revoked(self, buckets: Collection[int] | None) -> None:
        """Returns when neither cache nor kernel use anything of these buckets any more; None means all."""
        if buckets is None:
            self._session += 1
            files, names = set(self._keys), {name for held in self._names.values() for name in held}
        else:
            files = {ino for bucket in buckets for ino in self._files.get(bucket, ())}
            names = {name for bucket in buckets for name in self._names.get(bucket, ())}
        if buckets is None:
            self._files.clear()
        for ino in files:
            if buckets is not None:
                self._files[self._with.file(self._keys[ino])].discard(ino)
            if self._cache.kernel_pages:
                self._spoil(ino)
        for name in names:
            bucket = self._bucket(name)
            if bucket is not None:
                self._let_go(name, bucket)
        if buckets is None:
            self._names.clear()
        self._cache.revoked(files, names)
        self._gone(files)
        await asyncio.gather(self._drop_names(names), self._drop_files(files))

    async def _drop_names(self, names: Iterable[Name]) -> None:
        now = time.monotonic()
        last, by_parent = now, defaultdict[int, list[bytes]](list)
        for name in names:
            until = self._granted.pop(name, 0.0)
            if until > now:
                by_parent[name[0]].append(name[1])
                self._contended[name] = now + CONTENDED
                last = max(last, until)
        if by_parent:
            work = [asyncio.ensure_future(self._run(self._for_names, self._drop, p, n)) for p, n in by_parent.items()]
            await asyncio.wait(work, timeout=last - now)

    async def _drop_files(self, files: Collection[int]) -> None:
        if not files:
            return
        await self._drop_attributes(files)
        # A page that is being written is locked until the server has answered, and that may wait for others.
        quiet = tuple(ino for ino in files if ino in self._stale and ino not in self._writes)
        if quiet:
            await asyncio.wait((asyncio.ensure_future(self._clear(quiet)),), timeout=PAGES)

    # On threads: the kernel may have us wait for what it waits for from us.

    @staticmethod
    async def _run(threads: ThreadPoolExecutor, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(threads, work, *args)

    async def _drop_attributes(self, files: Collection[int]) -> None:
        await self._run(self._for_attributes, self._invalidate, tuple(files), True)

    def _drop(self, parent: int, names: Iterable[bytes]) -> None:
        for name in names:
            with suppress(OSError):
                self._kernel.invalidate_entry(parent, name)

    def _invalidate(self, files: Iterable[int], attr_only: bool) -> None:
        for ino in files:
            with suppress(OSError):
                self._kernel.invalidate_inode(ino, attr_only)
