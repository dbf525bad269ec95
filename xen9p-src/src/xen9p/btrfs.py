"""What btrfs tells of its trees by ioctls: generations, extents, checksums, subvolumes; and files by number, not name.

Sources: linux/btrfs.h and linux/btrfs_tree.h, btrfs-ioctl(2), open_by_handle_at(2), ioctl_fideduperange(2). All of
this takes CAP_SYS_ADMIN. Offsets, lengths and addresses are bytes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

# linux/btrfs.h: the numbers of the ioctls have the sizes of their arguments in them.
_TREE_SEARCH_V2: Final = 0xC0709411
_FS_INFO: Final = 0x8400941F
_SUBVOL_INFO: Final = 0x81F8943C
_SYNC: Final = 0x9408
_START_SYNC: Final = 0x80089418
_WAIT_SYNC: Final = 0x40089416
_DEDUPE_RANGE: Final = 0xC0189436  # linux/fs.h

OWN: Final = 0
"""In place of a tree's number: that of the subvolume itself."""
CSUM_TREE: Final = 7
UUID_TREE: Final = 9
INODE_ITEM: Final = 1
EXTENT_DATA: Final = 108
_EXTENT_CSUM: Final = 128
_UUID_SUBVOL: Final = 251
_CSUMS: Final = (1 << 64) - 10
FIRST_FREE: Final = 256
"""The number of a subvolume's top; its files have greater ones."""
LAST_FREE: Final = (1 << 64) - 256
MOST: Final = (1 << 64) - 1

INLINE, REGULAR, PREALLOCATED = 0, 1, 2
MAX_EXTENT: Final = 128 << 20
"""No extent is longer (BTRFS_MAX_EXTENT_SIZE)."""
MAX_CSUM_ITEM: Final = 4096
"""No item of the checksum tree has more (MAX_CSUM_ITEMS)."""

_KEY: Final = struct.Struct("=7Q4I32x")
_SIZE: Final = struct.Struct("=Q")
_HEADER: Final = struct.Struct("=3Q2I")
_EXTENT: Final = struct.Struct("=QQBBHB")  # generation, ram_bytes, compression, encryption, other_encoding, type
_ON_DISK: Final = struct.Struct("=4Q")  # disk_bytenr, disk_num_bytes, offset, num_bytes
_INODE: Final = struct.Struct("=5Q4I3Q32x12xqI")  # btrfs_inode_item up to its ctime
_DEDUPE: Final = struct.Struct("=QQHHIqQQiI")
_HANDLE: Final = struct.Struct("=IiQQI")
_HANDLE_TYPE: Final = 0x4D  # FILEID_BTRFS_WITHOUT_PARENT
_ROOM: Final = 1 << 18
"""Bytes of items that one search may bring."""
_SAME, _DIFFERS = 0, 1  # FILE_DEDUPE_RANGE_*

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A mounted btrfs."""

    id: UUID
    block: int
    """Bytes that a checksum stands for."""
    checksum: int
    """Bytes of a checksum."""


@dataclass(frozen=True, slots=True)
class Subvolume:
    """A tree of files. born and born_of: the generation in which it was made, and of what if it is a snapshot."""

    id: int
    uuid: UUID
    born_of: UUID
    born: int
    readonly: bool


@dataclass(frozen=True, slots=True)
class Inode:
    """A file. generation makes its number unique for ever; changed: its ctime, in seconds since 1970."""

    number: int
    generation: int
    size: int
    links: int
    mode: int
    changed: float
    no_checksums: bool


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a file, [start, start + length), and where it is on the disk.

    address and stored are of the whole extent on the disk, of which the file uses what is from offset on; of a
    compressed one, offset is in what it unpacks to, which has unpacked bytes. address is 0 for a hole. generation is
    that of the transaction that wrote the data: sharing does not change it.
    """

    start: int
    length: int
    generation: int
    kind: int
    compression: int = 0
    address: int = 0
    stored: int = 0
    offset: int = 0
    unpacked: int = 0

    @property
    def end(self) -> int:
        """Where the next begins."""
        return self.start + self.length


def filesystem(fd: int) -> Filesystem:
    """The btrfs that a descriptor is on. OSError ENOTTY: it is none."""
    # Which fields are wanted goes in where they come out: BTRFS_FS_INFO_FLAG_CSUM_INFO.
    buffer = bytearray(1024)
    struct.pack_into("=Q", buffer, 48, 1)
    fcntl.ioctl(fd, _FS_INFO, buffer)
    _, sector, _, _, size = struct.unpack_from("=IIIHH", buffer, 32)
    return Filesystem(UUID(bytes=bytes(buffer[16:32])), sector, size or 4)


def subvolume(fd: int) -> Subvolume:
    """The subvolume that a descriptor is in."""
    buffer = bytearray(504)
    fcntl.ioctl(fd, _SUBVOL_INFO, buffer)
    (tree,) = struct.unpack_from("=Q", buffer, 0)
    (flags,) = struct.unpack_from("=Q", buffer, 288)
    (born,) = struct.unpack_from("=Q", buffer, 352)
    uuid, parent = UUID(bytes=bytes(buffer[296:312])), UUID(bytes=bytes(buffer[312:328]))
    return Subvolume(tree, uuid, parent, born, bool(flags & 1))


def sync(fd: int) -> int:
    """Has all that was written on the disk; the generation that has it."""
    fcntl.ioctl(fd, _SYNC)
    buffer = bytearray(8)
    fcntl.ioctl(fd, _START_SYNC, buffer)
    fcntl.ioctl(fd, _WAIT_SYNC, buffer)
    return int(_SIZE.unpack(buffer)[0])


Key = tuple[int, int, int]
"""What an item is found by: a number (of an inode, mostly), a type, an offset."""


def search(
    fd: int, tree: int, first: Key, last: Key, *, newer: int = 0, room: int = _ROOM
) -> Iterator[tuple[Key, bytes]]:
    """The items of a tree from key to key, in order, without those in leaves older than generation *newer*.

    The kernel passes by whole branches that are older, so what did not change costs nothing.

    Args:
        tree: its number; OWN for that of the subvolume that fd is in.
        room: bytes of items that are fetched at a time.
    """
    buffer = bytearray(_KEY.size + _SIZE.size + room)
    at = first
    while at <= last:
        _KEY.pack_into(buffer, 0, tree, at[0], last[0], at[2], last[2], newer, MOST, at[1], last[1], 0xFFFFFFFF, 0)
        _SIZE.pack_into(buffer, _KEY.size, room)
        fcntl.ioctl(fd, _TREE_SEARCH_V2, buffer)
        count = _KEY.unpack_from(buffer)[9]
        if not count:
            return
        place = _KEY.size + _SIZE.size
        for _ in range(count):
            _, number, offset, kind, length = _HEADER.unpack_from(buffer, place)
            place += _HEADER.size
            at = (number, kind, offset)
            yield at, bytes(buffer[place : place + length])
            place += length
        at = _after(at)


class Trees:
    """Looks into the trees of the filesystem that a descriptor is on. read counts the bytes that this took."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.there = filesystem(fd)
        self.read = 0

    def search(
        self, tree: int, first: Key, last: Key, newer: int = 0, room: int = _ROOM
    ) -> Iterator[tuple[Key, bytes]]:
        """search() in a tree of this filesystem, counted."""
        for key, data in search(self.fd, tree, first, last, newer=newer, room=room):
            self.read += len(data)
            yield key, data

    def _item(self, tree: int, key: Key) -> bytes | None:
        """One item that is not large."""
        return next((data for _, data in self.search(tree, key, key, room=4096)), None)

    def subvolume_of(self, uuid: UUID) -> int | None:
        """The number of the subvolume with that uuid, if it is there."""
        low, high = struct.unpack("=QQ", uuid.bytes)
        data = self._item(UUID_TREE, (low, _UUID_SUBVOL, high))
        return None if data is None else int(_SIZE.unpack_from(data)[0])

    def inode(self, tree: int, number: int) -> Inode | None:
        """A file of a subvolume by its number."""
        data = self._item(tree, (number, INODE_ITEM, 0))
        if data is None:
            return None
        born, _, size, _, _, links, _, _, mode, _, flags, _, seconds, ns = _INODE.unpack_from(data)
        return Inode(number, born, size, links, mode, seconds + ns / 1e9, bool(flags & 1))

    def changes(self, tree: int, newer: int, first: int = FIRST_FREE) -> Iterator[tuple[int, Extent]]:
        """Every extent whose data, or whose file, is of generation *newer* or later, with the number of the file.

        In order of the files, from number *first* on.
        """
        last = (LAST_FREE, EXTENT_DATA, MOST)
        fresh = 0
        for (number, kind, start), data in self.search(tree, (max(first, FIRST_FREE), 0, 0), last, newer):
            if kind == INODE_ITEM and _SIZE.unpack_from(data)[0] >= newer:
                fresh = number  # what a new file has of old extents came by a clone, as cp --reflink makes them
            elif kind == EXTENT_DATA:
                found = _extent(start, data)
                # A leaf is new as a whole when one of its items is; the extent itself says when its data was written.
                if found.generation >= newer or number == fresh:
                    yield number, found

    def extents(self, tree: int, number: int, start: int, end: int) -> Iterator[Extent]:
        """The extents of a file that have something of [start, end), in order."""
        first = (number, EXTENT_DATA, self._covering(tree, number, start))
        for (_, _, at), data in self.search(tree, first, (number, EXTENT_DATA, max(end - 1, 0)), room=1 << 14):
            found = _extent(at, data)
            if found.end > start:
                yield found

    def _covering(self, tree: int, number: int, place: int) -> int:
        """Where the extent begins that has a place in a file; the place itself if none can have it.

        There is no search backwards. Short steps first: a guest may make files with very many short extents.
        """
        back = 256 << 10
        while place:
            first, last = max(0, place - back), place
            for (_, _, at), _ in self.search(
                tree, (number, EXTENT_DATA, first), (number, EXTENT_DATA, place), room=1 << 14
            ):
                last = at
                back = 0
            if not back or not first or back >= MAX_EXTENT:
                return last
            back = min(back * 8, MAX_EXTENT)
        return place

    def checksums(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """The checksums of the blocks at the disk addresses [start, end): where they begin, and theirs in a row.

        The first may begin before start, and the last end after end.
        """
        first = (_CSUMS, _EXTENT_CSUM, max(0, start - MAX_CSUM_ITEM * self.there.block))
        for (_, _, address), data in self.search(CSUM_TREE, first, (_CSUMS, _EXTENT_CSUM, end - 1), room=1 << 16):
            if address + len(data) // self.there.checksum * self.there.block > start:
                yield address, data


def _after(key: Key) -> Key:
    number, kind, offset = key
    if offset < MOST:
        return number, kind, offset + 1
    return (number, kind + 1, 0) if kind < 255 else (number + 1, 0, 0)


def _extent(start: int, data: bytes) -> Extent:
    generation, unpacked, compression, _, _, kind = _EXTENT.unpack_from(data)
    if kind == INLINE:
        return Extent(start, unpacked, generation, kind, compression)
    address, stored, offset, length = _ON_DISK.unpack_from(data, _EXTENT.size)
    return Extent(start, length, generation, kind, compression, address, stored, offset, unpacked)


def open_file(fd: int, tree: int, number: int, generation: int) -> int:
    """A descriptor, for reading, of a file by its numbers, whatever its names are now; fd is any on its filesystem.

    No name is looked at, so nothing that a guest does to names or symbolic links leads elsewhere.

    Raises:
        OSError: ESTALE, it is gone.
    """
    handle = _HANDLE.pack(_HANDLE.size - 8, _HANDLE_TYPE, number, tree, generation)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME
    got = int(_libc.open_by_handle_at(fd, handle, flags))
    if got < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return got


def share(source: int, start: int, target: int, at: int, length: int) -> int:
    """Has a stretch of one open file use the blocks of another's, if the kernel finds their bytes equal.

    Returns:
        Bytes that are shared now; 0 if the bytes differ.

    Raises:
        OSError: EROFS, the target's subvolume is read-only; ENOSPC; EINVAL, one is shorter by now, and others.
    """
    buffer = bytearray(_DEDUPE.pack(start, length, 1, 0, 0, target, at, 0, 0, 0))
    fcntl.ioctl(source, _DEDUPE_RANGE, buffer)
    *_, done, status, _ = _DEDUPE.unpack(buffer)
    if status == _DIFFERS:
        return 0
    if status != _SAME:
        raise OSError(-status, os.strerror(-status))
    return int(done)


def explain(error: OSError, path: object) -> tuple[str, str]:
    """What an error of these calls means for a directory, and what to do about it."""
    if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
        return f"{path} is not on btrfs", "have it on btrfs, as roles/store does: xen9p dedup shares extents of btrfs"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"{path}: {error.strerror}", "run it as root"
    return f"{path}: {error.strerror}", "create it or correct the path in the policy"
