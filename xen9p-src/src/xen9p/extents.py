"""Where the bytes of a file are: its extents, and the places of these on the devices below.

Sources: Documentation/filesystems/fiemap.rst, linux/fiemap.h, linux/btrfs_tree.h, statfs(2). Offsets, lengths and
addresses are bytes. An extent's address is a byte of the device on ext4 and xfs; on btrfs it is one of the address
space over all devices, which the chunk tree maps to them (that takes CAP_SYS_ADMIN).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p import btrfs
from xen9p.errors import Xen9pError

_FIEMAP: Final = 0xC020660B
_DEV_INFO: Final = 0xD000941E
_REQUEST: Final = struct.Struct("=QQIIII")  # struct fiemap
_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # struct fiemap_extent
_CHUNK: Final = struct.Struct("=QQQQIIIHH")  # struct btrfs_chunk up to its stripes
_STRIPE: Final = struct.Struct("=QQ16x")
_CHUNK_TREE: Final = 3
_FIRST_CHUNK: Final = 256
_CHUNK_ITEM: Final = 228
_DEV_PATH: Final = 3072  # struct btrfs_ioctl_dev_info_args: where its path[1024] begins

UNKNOWN, DELALLOC, ENCODED, ENCRYPTED = 0x2, 0x4, 0x8, 0x80
INLINE, UNWRITTEN, SHARED = 0x200, 0x800, 0x2000
_FLAGS: Final = {
    0x1: "last",
    UNKNOWN: "unknown",
    DELALLOC: "delalloc",
    ENCODED: "encoded",
    ENCRYPTED: "encrypted",
    0x100: "not_aligned",
    INLINE: "inline",
    0x400: "tail",
    UNWRITTEN: "unwritten",
    0x1000: "merged",
    SHARED: "shared",
}
_WHY: Final = {
    DELALLOC: "not on the disk yet: sync gives it a place",
    INLINE: "inline: the bytes are within the metadata",
    UNWRITTEN: "unwritten: room is kept for it, it reads as zeros",
    ENCODED: "compressed: no byte of the device is this one",
    ENCRYPTED: "encrypted: no byte of the device is this one",
    UNKNOWN: "the filesystem does not say where it is",
}

BTRFS: Final = "btrfs"
_DIRECT: Final = {0xEF53: "ext4", 0x58465342: "xfs"}
_BTRFS_MAGIC: Final = 0x9123683E
_STRIPED: Final = {1 << 3: "raid0", 1 << 6: "raid10", 1 << 7: "raid5", 1 << 8: "raid6"}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a file, [start, start + length), and where it begins; flags are FIEMAP_EXTENT_*."""

    start: int
    length: int
    address: int
    flags: int

    @property
    def names(self) -> list[str]:
        """The flags by name, as filefrag(8) says them."""
        return [name for bit, name in _FLAGS.items() if self.flags & bit]

    @property
    def placeless(self) -> str:
        """Why the bytes of the file are at no byte of the store; "" if they are."""
        return next((why for bit, why in _WHY.items() if self.flags & bit), "")


@dataclass(frozen=True, slots=True)
class Place:
    """A byte of a device; devid is btrfs's number of it, 0 elsewhere."""

    device: str
    byte: int
    devid: int = 0


def extent_at(fd: int, offset: int) -> Extent | None:
    """The extent that a byte of a file is in; None for a hole.

    Nothing is written for this: what waits in memory has no place yet (DELALLOC).

    Raises:
        OSError: EOPNOTSUPP, this filesystem has no FIEMAP.
    """
    buffer = bytearray(_REQUEST.size + _EXTENT.size)
    _REQUEST.pack_into(buffer, 0, offset, 1, 0, 0, 1, 0)
    fcntl.ioctl(fd, _FIEMAP, buffer)
    if not _REQUEST.unpack_from(buffer)[3]:
        return None
    start, address, length, flags = _EXTENT.unpack_from(buffer, _REQUEST.size)
    return Extent(start, length, address, flags) if start <= offset < start + length else None


def filesystem_of(fd: int, path: str) -> str:
    """Btrfs, ext4 (or its elders) or xfs.

    Raises:
        Xen9pError: it is another one, whose extents mean something else.
    """
    buffer = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    magic = buffer[0] & 0xFFFFFFFF
    kind = BTRFS if magic == _BTRFS_MAGIC else _DIRECT.get(magic)
    if kind is None:
        raise Xen9pError(
            f"{path} is on a filesystem that is not followed (statfs type {magic:#x})", "have it on btrfs, ext4 or xfs"
        )
    return kind


def device_path(number: int) -> str:
    """/dev/NAME of a block device's number (st_dev, st_rdev), as the kernel calls it."""
    where = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path(f"/sys/dev/block/{where}/uevent").read_text().splitlines()
    except OSError:
        return where
    names = [line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")]
    return f"/dev/{names[0]}" if names else where


def chunk_places(fd: int, address: int) -> list[Place]:
    """Where on which devices a btrfs has the byte at an address: more than one place if it keeps copies.

    Raises:
        Xen9pError: the address is in no chunk, or in one that is striped over devices.
        OSError: EPERM, this takes CAP_SYS_ADMIN.
    """
    found: tuple[int, bytes] | None = None
    first, last = (_FIRST_CHUNK, _CHUNK_ITEM, 0), (_FIRST_CHUNK, _CHUNK_ITEM, address)
    # Keys are where chunks begin, and there is no search backwards: a large store has some thousands.
    for (_, _, start), data in btrfs.search(fd, _CHUNK_TREE, first, last):
        found = start, data
    if found is None:
        raise Xen9pError(f"btrfs has no chunk for address {address}", "run it again: it may have been moved (balance)")
    start, data = found
    length, _, _, kind, _, _, _, count, _ = _CHUNK.unpack_from(data)
    if address >= start + length:
        raise Xen9pError(f"btrfs has no chunk for address {address}", "run it again: it may have been moved (balance)")
    striped = [name for bit, name in _STRIPED.items() if kind & bit]
    if striped:
        raise Xen9pError(f"the store is {striped[0]}, whose stripes are not followed", "try a store of one device")
    stripes = (_STRIPE.unpack_from(data, _CHUNK.size + i * _STRIPE.size) for i in range(count))
    return [Place(_btrfs_device(fd, devid), begin + address - start, devid) for devid, begin in stripes]


def _btrfs_device(fd: int, devid: int) -> str:
    buffer = bytearray(4096)
    struct.pack_into("=Q", buffer, 0, devid)
    try:
        fcntl.ioctl(fd, _DEV_INFO, buffer)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return f"missing device {devid}"
        raise
    return bytes(buffer[_DEV_PATH:]).split(b"\0", 1)[0].decode(errors="backslashreplace")
