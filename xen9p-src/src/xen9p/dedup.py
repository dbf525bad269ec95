"""De-duplication of a store: finds equal stretches of files by btrfs's own checksums, and has the kernel share them.

No data is read to find out what is equal: btrfs keeps a checksum of each block of data, and those of a chunk of 32 KiB
together name its content. Only what seems equal is read, and the kernel compares it once more while it holds both
files (ioctl_fideduperange(2)), so neither a guest that writes meanwhile nor one that has made two blocks with the same
checksum can have bytes changed. Files are opened by number and not by name, so names and links lead nowhere.

Lengths and addresses are bytes. What is done can be done again: after a kill the next run goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Final

from xen9p import btrfs
from xen9p.btrfs import MAX_CSUM_ITEM, Extent, Inode, Subvolume, Trees
from xen9p.dedup_options import SETTLE
from xen9p.dedup_state import ALTERNATIVES, MOST_USES, Place, Progress, State
from xen9p.errors import Xen9pError
from xen9p.policy import Export

CHUNK: Final = 32 << 10
"""What is compared and shared begins at multiples of this, and is as long, or as what the file has left."""
STRETCH: Final = 8 << 20
"""So much of a file is looked at at once."""
CALL: Final = 1 << 20
"""At most so much is shared by one call: while it lasts, who writes to one of the files waits."""
COMMIT: Final = 1.0
"""Seconds after which what was done is made sure of."""
_KEPT: Final = 16
"""So many descriptors, and so many stretches of files that are compared with, are kept."""
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LOWEST: Final = 2 << 13 | 7  # IOPRIO_CLASS_BE


@dataclass(slots=True)
class Tree:
    """A subvolume to work on. members: the files of the exports in it, if these are not the whole subvolume.

    roots: the directories of these exports.
    """

    name: str
    subvolume: Subvolume
    members: set[int] | None = None
    exports: list[str] = field(default_factory=list)
    roots: set[Path] = field(default_factory=set)

    @property
    def covered(self) -> str:
        """What a run looks at, as in `Progress.covered`."""
        return "" if self.members is None else "\n".join(sorted(map(str, self.roots)))

    @property
    def id(self) -> int:
        """Its number."""
        return self.subvolume.id


Where = tuple[tuple[int, ...], ...]
"""Where a chunk is on the disk: equal for two that are shared already."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a file, what names its content, and where it is on the disk."""

    start: int
    length: int
    digest: bytes
    where: Where


@dataclass(slots=True)
class Counts:
    """What a run did, in bytes (files: how many).

    looked: of chunks that were new. equal: of these, what seemed equal to something else. shared: what the kernel
    has shared. already: what was shared before. data: read of files. metadata: read of btrfs's trees. changed: what was
    something else when it came to comparing. later: files that are being written. failed: what the kernel did not want
    to share.
    """

    files: int = 0
    later: int = 0
    looked: int = 0
    equal: int = 0
    shared: int = 0
    already: int = 0
    changed: int = 0
    failed: int = 0
    data: int = 0
    metadata: int = 0

    @property
    def scanned(self) -> int:
        """All that was read."""
        return self.data + self.metadata

    def plain(self) -> dict[str, int | float | None]:
        """For JSON."""
        per = round(self.scanned / self.shared, 3) if self.shared else None
        return {**asdict(self), "scanned": self.scanned, "scanned_per_saved": per}


@dataclass(frozen=True, slots=True)
class Options:
    """How to run. limit: bytes of file data a second that are read; 0 for as many as come. settle: seconds."""

    full: bool = False
    dry_run: bool = False
    limit: int = 0
    settle: float = SETTLE


@dataclass(slots=True)
class Run:
    """A stretch of one file that is to be shared with one of another."""

    source: tuple[int, Inode]
    start: int
    target: tuple[int, Inode]
    at: int
    length: int
    places: list[Place]


Tell = Callable[[str], None]
"""Gets a line about how far a run is."""


class Checksums:
    """btrfs's checksums by disk address, a few windows of them in memory."""

    _KEPT: Final = 64

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._block, self._size = trees.there.block, trees.there.checksum
        self._span = MAX_CSUM_ITEM * self._block
        self._windows: OrderedDict[int, tuple[bytearray, bytearray]] = OrderedDict()

    def get(self, start: int, end: int) -> bytes | None:
        """Those of the blocks at [start, end); None if one has none."""
        return self._get(start, end) or self._get(start, end, fresh=True)

    def clear(self) -> None:
        """Forgets what may be old."""
        self._windows.clear()

    def _get(self, start: int, end: int, *, fresh: bool = False) -> bytes | None:
        parts = []
        while start < end:
            number, place = divmod(start, self._span)
            upto = min(end, (number + 1) * self._span)
            if fresh:
                self._windows.pop(number, None)
            sums, there = self._window(number)
            first, last = place // self._block, (place + upto - start) // self._block
            if 0 in there[first:last]:
                return None
            parts.append(sums[first * self._size : last * self._size])
            start = upto
        return b"".join(parts)

    def _window(self, number: int) -> tuple[bytearray, bytearray]:
        found = self._windows.get(number)
        if found is None:
            found = bytearray(MAX_CSUM_ITEM * self._size), bytearray(MAX_CSUM_ITEM)
            base = number * self._span
            for address, data in self._trees.checksums(base, base + self._span):
                first = (address - base) // self._block
                skip = max(0, -first)
                count = min(len(data) // self._size, MAX_CSUM_ITEM - first)
                begin, end = first + skip, first + count
                found[0][begin * self._size : end * self._size] = data[skip * self._size : count * self._size]
                found[1][begin:end] = b"\1" * (end - begin)
            self._windows[number] = found
            while len(self._windows) > self._KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return found


def survey(exports: Iterable[Export], fd: int) -> list[Tree]:
    """The subvolumes that exports are on, all of one filesystem, and before them the read-only ones they are clones of.

    Args:
        exports: of which the directories exist.
        fd: a descriptor on the filesystem.
    """
    trees = Trees(fd)
    found: dict[int, Tree] = {}
    for export in exports:
        top = open_directory(export)
        try:
            here = btrfs.subvolume(top)
            whole = os.fstat(top).st_ino == btrfs.FIRST_FREE
        finally:
            os.close(top)
        tree = found.setdefault(here.id, Tree(export.name, here, set()))
        tree.exports.append(export.name)
        tree.roots.add(export.path)
        if whole:
            tree.name, tree.members = export.name, None
        elif tree.members is not None:
            tree.members |= members(export.path)
    origins: dict[int, Tree] = {}
    for tree in list(found.values()):
        number = trees.subvolume_of(tree.subvolume.born_of) if tree.subvolume.born_of.int else None
        if number is None or number in found or number in origins:
            continue
        with contextlib.suppress(OSError):  # it is being deleted
            top = btrfs.open_file(fd, number, btrfs.FIRST_FREE, 0)
            try:
                here = btrfs.subvolume(top)
            finally:
                os.close(top)
            if here.readonly:  # only then it still has what its clones began with
                origins[number] = Tree(f"origin of {tree.name}", here)
    return [*origins.values(), *found.values()]


def open_directory(export: Export) -> int:
    """A descriptor of an export.

    Raises:
        Xen9pError: it is missing, or no directory.
    """
    try:
        return os.open(export.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Xen9pError(
            f"export {export.name}: {export.path}: {error.strerror}", "create it or correct the path in the policy"
        ) from None


def members(path: Path) -> set[int]:
    """The numbers of the regular files below a directory that is no subvolume of its own.

    Goes by descriptors and follows no link; what a guest moves meanwhile is found the next time.
    """
    found: set[int] = set()
    device = path.stat().st_dev
    for _, folders, names, fd in os.fwalk(path, follow_symlinks=False):
        for name in names:
            with contextlib.suppress(OSError):
                one = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISREG(one.st_mode):
                    found.add(one.st_ino)
        for name in folders[:]:
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=fd, follow_symlinks=False).st_dev != device:
                    folders.remove(name)
    return found


class Deduper:
    """One run over the trees of one store.

    Args:
        fd: a descriptor on the filesystem.
        state: in a transaction; is committed now and then.
        trees: as survey() has them.
        tell: is told how far it is, in words; often.
    """

    def __init__(self, fd: int, state: State, trees: Sequence[Tree], options: Options, tell: Tell) -> None:
        self.counts: dict[str, Counts] = {}
        self._fd = fd
        self._look = Trees(fd)
        self._sums = Checksums(self._look)
        self._state = state
        self._trees = trees
        self._readonly = {tree.id for tree in trees if tree.subvolume.readonly}
        self._options = options
        self._tell = tell
        self._now = Counts()
        self._read_before = 0
        self._files: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        self._stretches: OrderedDict[tuple[int, int, int], dict[int, Chunk]] = OrderedDict()
        self._run: Run | None = None
        self._committed = self._began = time.monotonic()
        self._here: tuple[Tree, Progress, int, str] | None = None

    def run(self, *, everything: bool) -> None:
        """Looks at all that has changed since the last run, and shares what is equal.

        Args:
            everything: whether these are all the trees that there are to be: what is not among them is forgotten.

        Raises:
            Xen9pError: the store is full.
        """
        try:
            target = btrfs.sync(self._fd)
            self._tidy(target, everything=everything)
            if not self._options.dry_run:
                self._state.commit()
            for number, tree in enumerate(self._trees, 1):
                self.counts[tree.name] = self._now = Counts()
                self._read_before = self._look.read
                self._sums.clear()
                with contextlib.suppress(FileNotFoundError):  # it was deleted a moment ago
                    self._tree(tree, target, f"{tree.name} ({number} of {len(self._trees)})")
        finally:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def _tidy(self, target: int, *, everything: bool) -> None:
        """Forgets trees that are gone. What the index knew of them others may have, so these are looked at anew."""
        wanted = {tree.id: tree.subvolume.uuid for tree in self._trees}
        lost = False
        for tree, uuid in self._state.trees():
            newer = self._state.progress(tree, uuid).base > target  # the store is an older copy of itself
            gone = wanted.get(tree, uuid) != uuid or self._look.subvolume_of(uuid) != tree
            if newer or gone or (everything and tree not in wanted):
                lost = self._state.forget(tree) or lost
        if lost or self._options.full:
            self._state.restart()

    def _tree(self, tree: Tree, target: int, title: str) -> None:
        """Looks at one tree, up to a generation."""
        uuid = tree.subvolume.uuid
        progress = self._state.progress(tree.id, uuid)
        if not progress.covers(tree.covered):
            # A part of it was never looked at: what is new would leave that out.
            progress.base = progress.target = progress.cursor = 0
        progress.covered = tree.covered
        if progress.base == 0 and not self._options.full:
            progress.base = self._base_of_clone(tree)
        hold = False
        for number, base in self._state.waiting(tree.id):
            # No commit until it is done, or waits again: a kill must not lose it.
            self._state.waited(tree.id, number)
            hold |= not self._file(tree, number, base, self._ranges_of(tree, number, base))
        # A run that was cut off: first what it had not reached, and then what is newer than what it was to reach.
        passes = [progress.target, target] if progress.cursor and progress.target else [target]
        for upto in passes:
            first = progress.cursor if upto != target or len(passes) == 1 else 0
            progress.target = upto
            for number, ranges in _by_file(self._look.changes(tree.id, progress.base + 1, first)):
                # What was held back has to be looked at again from the beginning.
                self._here = tree, progress, 0 if hold else number, title
                hold |= not self._file(tree, number, progress.base, ranges)
                self._here = tree, progress, 0 if hold else number, title
                self._breathe()
            self._share_run()
            self._here = None
            if not hold:
                progress.base = upto
            progress.target = progress.cursor = 0
        progress.finished = time.time()
        self._commit(tree, progress, 0, title)

    def _base_of_clone(self, tree: Tree) -> int:
        """What a clone of a tree that has been looked at begins with is known."""
        for origin in self._trees:
            if origin.subvolume.uuid == tree.subvolume.born_of and origin.subvolume.readonly:
                known = self._state.progress(origin.id, origin.subvolume.uuid)
                return min(known.base, tree.subvolume.born)
        return 0

    def _breathe(self) -> None:
        """Makes sure of what has been done, now and then."""
        if self._here is not None and time.monotonic() - self._committed >= COMMIT:
            self._commit(*self._here)

    def _commit(self, tree: Tree, progress: Progress, cursor: int, title: str) -> None:
        """Writes down what has been done of a tree: all files before the one with number *cursor*."""
        self._share_run()
        self._committed = moment = time.monotonic()
        self._now.metadata = self._look.read - self._read_before
        c = self._now
        self._tell(
            f"{title}: {c.files} files, {c.scanned >> 10} KiB read, {c.shared >> 10} KiB shared,"
            f" {moment - self._began:.0f} s"
        )
        saved = Progress(
            progress.base, progress.target, cursor, progress.shared + c.shared, progress.scanned + c.scanned,
            progress.finished, progress.covered,
        )  # fmt: skip
        self._state.note(tree.id, tree.subvolume.uuid, saved)
        if not self._options.dry_run:
            self._state.commit()

    # One file.

    def _ranges_of(self, tree: Tree, number: int, base: int) -> Iterator[tuple[int, int]]:
        found = self._look.inode(tree.id, number)
        if found is not None:
            extents = self._look.extents(tree.id, number, 0, max(found.size, 1))
            yield from _ranges(one for one in extents if max(one.generation, found.generation) > base)

    def _file(self, tree: Tree, number: int, base: int, ranges: Iterator[tuple[int, int]]) -> bool:
        """Looks at ranges of a file; False if that has to be done another time, and there is no room to note it."""
        if tree.members is not None and number not in tree.members:
            return True
        inode = self._look.inode(tree.id, number)
        if inode is None or not stat.S_ISREG(inode.mode) or inode.no_checksums or not inode.links:
            return True
        if not tree.subvolume.readonly and 0 <= time.time() - inode.changed < self._options.settle:
            self._now.later += 1
            return self._state.wait(tree.id, number, base)
        self._now.files += 1
        for start, end in ranges:
            for at in range(start, min(end, inode.size), STRETCH):
                for chunk in self._chunks(tree.id, inode, at, min(end, at + STRETCH)):
                    self._chunk(tree, inode, chunk)
                self._breathe()
        self._share_run()
        return True

    def _chunks(self, tree: int, inode: Inode, start: int, end: int) -> Iterator[Chunk]:
        """The chunks in [start, end) of a file that are data on the disk throughout."""
        block = self._look.there.block
        size = -(-inode.size // block) * block
        extents = list(self._look.extents(tree, inode.number, start, min(end, size)))
        index = 0
        for at in range(start, min(end, inode.size), CHUNK):
            upto = min(at + CHUNK, size)
            while index < len(extents) and extents[index].end <= at:
                index += 1
            content = self._content(extents, index, at, upto)
            if content is not None:
                length = min(upto, inode.size) - at
                digest = blake2b(content[0], digest_size=16, salt=length.to_bytes(4, "little")).digest()
                yield Chunk(at, length, digest, content[1])

    def _content(self, extents: Sequence[Extent], index: int, at: int, upto: int) -> tuple[bytes, Where] | None:
        parts: list[bytes] = []
        where: list[tuple[int, ...]] = []
        while at < upto:
            if index >= len(extents):
                return None
            one = extents[index]
            if one.start > at or one.kind != btrfs.REGULAR or not one.address:
                return None
            end, offset = min(one.end, upto), one.offset + at - one.start
            if one.compression:
                # Its checksums are of what is stored, so equal content is seen only if it was packed alike.
                sums = self._sums.get(one.address, one.address + one.stored)
                parts.append(b"%d %d %d %d" % (one.compression, one.unpacked, offset, end - at))
                where.append((one.address, end - at, offset, one.compression))
            else:
                first = one.address + offset
                sums = self._sums.get(first, first + end - at)
                if where and len(where[-1]) == 2 and sum(where[-1]) == first:
                    where[-1] = (where[-1][0], where[-1][1] + end - at)
                else:
                    where.append((first, end - at))
            if sums is None:
                return None
            parts.append(sums)
            at = end
            index += 1
        return b"".join(parts), tuple(where)

    # One chunk.

    def _chunk(self, tree: Tree, inode: Inode, chunk: Chunk) -> None:
        self._now.looked += chunk.length
        places = self._state.find(chunk.digest)
        mine, source, tired = False, None, None
        for place in places[:]:
            if (place.tree, place.number, place.start) == (tree.id, inode.number, chunk.start):
                mine = True
                continue
            there = self._there(place)
            if there is None or there[1].digest != chunk.digest:
                self._state.drop(place)
                places.remove(place)
            elif there[1].where == chunk.where:
                self._now.already += chunk.length
                source = tired = None
                break
            elif place.uses >= MOST_USES:
                tired = tired or place
            elif source is None:
                source = (place, *there)
        if source is None and tired is not None and not mine:
            self._state.drop(tired)  # this one takes its place
            places.remove(tired)
        if source is not None:
            self._now.equal += chunk.length
            self._plan(source[0], source[1], tree.id, inode, chunk)
        if not mine and len(places) < ALTERNATIVES:
            self._state.add(chunk.digest, tree.id, inode.number, inode.generation, chunk.start)

    def _there(self, place: Place) -> tuple[Inode, Chunk] | None:
        """What is at a place now."""
        try:
            inode = self._look.inode(place.tree, place.number)
        except FileNotFoundError:  # the whole tree is gone
            return None
        if inode is None or inode.generation != place.generation or not inode.links:
            return None
        start = place.start // STRETCH * STRETCH
        key = (place.tree, place.number, start)
        found = self._stretches.get(key)
        if found is None:
            found = {one.start: one for one in self._chunks(place.tree, inode, start, start + STRETCH)}
            self._stretches[key] = found
            while len(self._stretches) > _KEPT:
                self._stretches.popitem(last=False)
        self._stretches.move_to_end(key)
        chunk = found.get(place.start)
        return (inode, chunk) if chunk else None

    def _plan(self, place: Place, source: Inode, tree: int, inode: Inode, chunk: Chunk) -> None:
        """Adds a chunk to what is shared by the next call, or begins another."""
        run = self._run
        if (
            run is not None
            and (run.source[0], run.source[1].number) == (place.tree, source.number)
            and (run.target[0], run.target[1].number) == (tree, inode.number)
            and run.start + run.length == place.start
            and run.at + run.length == chunk.start
            and run.length + chunk.length <= CALL
        ):
            run.length += chunk.length
            run.places.append(place)
            return
        self._share_run()
        self._run = Run((place.tree, source), place.start, (tree, inode), chunk.start, chunk.length, [place])

    # Sharing.

    def _share_run(self) -> None:
        """Shares what is planned. What cannot be shared stays as it is."""
        run, self._run = self._run, None
        if run is None or self._options.dry_run:
            return
        (source, start), (target, at) = (run.source, run.start), (run.target, run.at)
        if target[0] in self._readonly and source[0] not in self._readonly:
            (source, start), (target, at) = (target, at), (source, start)
        try:
            with contextlib.ExitStack() as held:
                one = held.enter_context(self._opened(*source))
                other = held.enter_context(self._opened(*target))
                # Read here, the kernel does not wait for the disk while it keeps writers out.
                for first, length in self._equal(one, start, other, at, run.length):
                    done = 0
                    while done < length:
                        offset = first + done
                        got = btrfs.share(one, start + offset, other, at + offset, length - done)
                        if not got:
                            self._now.changed += length - done
                            break
                        done += got
                        self._now.shared += got
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise Xen9pError(
                    "the store is full: sharing takes some room for metadata", "make room and run it again"
                ) from None
            if error.errno in (errno.ESTALE, errno.EINVAL, errno.ENOENT):  # removed, or shorter by now
                self._now.changed += run.length
            else:
                self._now.failed += run.length
            return
        for key in [key for key in self._stretches if key[:2] == (target[0], target[1].number)]:
            del self._stretches[key]  # it is elsewhere on the disk now
        for place in run.places:
            self._state.used(place)

    def _equal(self, one: int, start: int, other: int, at: int, length: int) -> Iterator[tuple[int, int]]:
        """What is equal in a stretch of two files, as (from, length), chunk by chunk if not all of it is."""
        self._throttle()
        first, second = os.pread(one, length, start), os.pread(other, length, at)
        self._now.data += len(first) + len(second)
        if first == second and len(first) == length:
            yield 0, length
            return
        for place in range(0, length, CHUNK):
            size = min(CHUNK, length - place)
            piece = first[place : place + size]
            if piece == second[place : place + size] and len(piece) == size:
                yield place, size
            else:
                self._now.changed += size

    def _throttle(self) -> None:
        if self._options.limit:
            read = sum(one.data for one in self.counts.values())
            wait = read / self._options.limit - (time.monotonic() - self._began)
            while wait > 0:
                time.sleep(min(wait, 1.0))
                wait = read / self._options.limit - (time.monotonic() - self._began)

    @contextlib.contextmanager
    def _opened(self, tree: int, inode: Inode) -> Iterator[int]:
        """A descriptor of a file; a few are kept open."""
        key = (tree, inode.number, inode.generation)
        fd = self._files.pop(key, None)
        if fd is None:
            fd = btrfs.open_file(self._fd, *key)
        self._files[key] = fd
        while len(self._files) > _KEPT:
            os.close(self._files.popitem(last=False)[1])
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        yield fd


def _ranges(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """The chunks that extents touch, put together where they follow each other."""
    begin = end = 0
    for one in extents:
        if one.kind != btrfs.REGULAR or not one.address:
            continue
        first, last = one.start // CHUNK * CHUNK, -(-one.end // CHUNK) * CHUNK
        if first > end:
            if end > begin:
                yield begin, end
            begin = first
        end = max(end, last)
    if end > begin:
        yield begin, end


def _by_file(changes: Iterator[tuple[int, Extent]]) -> Iterator[tuple[int, Iterator[tuple[int, int]]]]:
    """Changes, file by file. What the caller leaves of one's ranges is passed by."""
    for number, group in groupby(changes, key=lambda change: change[0]):
        yield number, _ranges(extent for _, extent in group)


def be_gentle() -> None:
    """Has this process come after others for processor and disk. Not after all others: a writer may wait for us."""
    os.nice(10)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST)


# What there is.


@dataclass(slots=True)
class Usage:
    """What a tree has: logical, all data of its files; exclusive: of that, on blocks that are of no other tree here.

    changed: what is newer than the last run has seen.
    """

    logical: int = 0
    exclusive: int = 0
    changed: int = 0

    @property
    def shared(self) -> int:
        """What it has in common with others."""
        return self.logical - self.exclusive


def usage(fd: int, trees: Sequence[Tree], bases: dict[int, int]) -> dict[int, Usage]:
    """What each tree has, by its number. bases: what the last run has seen of each. Reads metadata alone."""
    look = Trees(fd)
    owner: dict[int, int] = {}
    used: dict[int, dict[int, int]] = {}
    found: dict[int, Usage] = {}
    for tree in trees:
        mine: dict[int, int] = {}
        one = Usage()
        for number, extent in look.changes(tree.id, 0):
            if tree.members is not None and number not in tree.members:
                continue
            if extent.kind == btrfs.INLINE:
                one.logical += extent.length
                one.exclusive += extent.length
            elif extent.address and extent.kind == btrfs.REGULAR:
                one.logical += extent.length
                mine[extent.address] = mine.get(extent.address, 0) + extent.length
                if extent.generation > bases.get(tree.id, 0):
                    one.changed += extent.length
        for address in mine:
            owner[address] = 0 if address in owner else tree.id
        used[tree.id], found[tree.id] = mine, one
    for number, mine in used.items():
        found[number].exclusive += sum(length for address, length in mine.items() if owner[address] == number)
    return found
