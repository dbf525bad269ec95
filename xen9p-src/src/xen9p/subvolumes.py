"""What btrfs can do that other filesystems cannot, by its ioctls (Linux include/uapi/linux/btrfs.h, btrfs_tree.h).

A process for each would cost more than the work itself: a snapshot takes milliseconds.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from xen9p.quota import SUBVOLUME, mount_of

TOP: Final = SUBVOLUME
"""The inode number of a subvolume's top."""
MOST: Final = (1 << 64) - 1
SNAPSHOTS: Final = ".snapshots"
"""The directory of all snapshots, at the top of a filesystem."""
META: Final = ".meta"
"""In there: what is known of them."""
FIRST, LAST = 256, MOST - 255
"""Between them are the numbers of files."""

# Types of items in a subvolume's tree.
INODE_ITEM, INODE_REF, INODE_EXTREF, XATTR_ITEM, DIR_INDEX, EXTENT_DATA = 1, 12, 13, 24, 96, 108

_SNAP_CREATE_V2: Final = 0x50009417
_SNAP_DESTROY: Final = 0x5000940F
_SYNC: Final = 0x9408
_GET_SUBVOL_INFO: Final = 0x81F8943C
_TREE_SEARCH_V2: Final = 0xC0709411
_FICLONE: Final = 0x40049409
_READ_ONLY: Final = 2
_VOL_ARGS: Final = 4096

_KEY: Final = struct.Struct("=7Q4I4Q")
_ITEM: Final = struct.Struct("=QQQII")
_BUFFER: Final = 1 << 16
_INFO: Final = struct.Struct("=Q256s4Q16s16s16s4Q")


@dataclass(frozen=True, slots=True)
class Info:
    """What a subvolume says of itself. Generations count the filesystem's transactions, and never go back."""

    generation: int
    uuid: UUID
    parent: UUID | None
    """What it is a snapshot of, which may be gone."""
    made: int
    """The generation in which it was made: what is in it later has a higher one."""
    readonly: bool


@contextmanager
def opened(path: Path | str | bytes, flags: int = os.O_DIRECTORY, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor for as long as the block runs; a link at the end of the path is not followed."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def is_subvolume(path: Path) -> bool:
    """Whether a directory is the top of a btrfs subvolume. Raises OSError, it is missing."""
    return path.stat().st_ino == TOP and mount_of(path).kind == "btrfs"


def place(export: str, path: Path) -> Path:
    """The directory of an export's snapshots, whether there are any or not. Raises OSError, the export is missing."""
    return mount_of(path).point / SNAPSHOTS / export


def snapshot(source: int, folder: int, name: str, *, readonly: bool) -> None:
    """Makes a snapshot of the subvolume behind source, as a name in a directory: all of it, or nothing.

    Other threads go on meanwhile. What is in the page cache of the source is in it.

    Raises:
        OSError: EEXIST, ENOSPC, EDQUOT, EXDEV (another filesystem), EINVAL (no subvolume), ENOTTY (no btrfs), ...
    """
    args = bytearray(struct.pack("=qQQ32x", source, 0, _READ_ONLY if readonly else 0) + os.fsencode(name))
    fcntl.ioctl(folder, _SNAP_CREATE_V2, args.ljust(_VOL_ARGS, b"\0"))


def destroy(folder: int, name: str) -> None:
    """Deletes a subvolume at once; its room comes back in the course of time. Raises OSError."""
    args = bytearray(struct.pack("=q", 0) + os.fsencode(name))
    fcntl.ioctl(folder, _SNAP_DESTROY, args.ljust(_VOL_ARGS, b"\0"))


def sync(fd: int) -> None:
    """Has all that the filesystem holds in memory written. Raises OSError."""
    fcntl.ioctl(fd, _SYNC)


def info(fd: int) -> Info:
    """What the subvolume says that fd is in. Raises OSError."""
    raw = bytearray(504)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, raw)
    _, _, _, _, generation, flags, uuid, parent, _, _, made, _, _ = _INFO.unpack_from(raw)
    above = UUID(bytes=parent)
    return Info(generation, UUID(bytes=uuid), above if above.int else None, made, bool(flags & 1))


def reflink(source: int, target: int) -> None:
    """Makes a file share all of another one's data. Raises OSError."""
    fcntl.ioctl(target, _FICLONE, source)


def search(
    fd: int, first: tuple[int, int, int], last: tuple[int, int, int], newer: int = 0, room: int = _BUFFER
) -> Iterator[tuple[int, int, int, bytes]]:
    """The items (number, type, offset, content) of a subvolume's tree from one key to another, in their order.

    Args:
        newer: leaves out what is in parts of the tree that were last changed in a generation before this one: it
            costs nothing, whatever its size.
        room: bytes that are fetched at a time.

    Raises:
        OSError: EPERM (root may), ENOTTY (no btrfs), ...
    """
    buffer = bytearray(_KEY.size + 8 + room)
    view = memoryview(buffer)
    while first <= last:
        key = (0, first[0], last[0], first[2], last[2], newer, MOST, first[1], last[1], 0xFFFFFFFF, 0, 0, 0, 0, 0)
        _KEY.pack_into(buffer, 0, *key)
        struct.pack_into("=Q", buffer, _KEY.size, room)
        fcntl.ioctl(fd, _TREE_SEARCH_V2, buffer)
        count = _KEY.unpack_from(buffer)[9]
        if not count:
            return
        at = _KEY.size + 8
        for _ in range(count):
            _, number, offset, kind, size = _ITEM.unpack_from(buffer, at)
            at += _ITEM.size
            yield number, kind, offset, bytes(view[at : at + size])
            at += size
        if offset < MOST:
            first = (number, kind, offset + 1)
        elif kind < 255:
            first = (number, kind + 1, 0)
        else:
            first = (number + 1, 0, 0)
