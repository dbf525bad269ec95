"""A file that is as slow as a hard disk, by FUSE: for a loop device on it, where the kernel has no dm-delay.

One arm: requests are served one after the other. What does not begin where the last one ended waits for the arm, longer
if it is far away; the rest is transfer. Writes are as fast as the file's own.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import stat
import sys
import time
from pathlib import Path

import pyfuse3
import pyfuse3_asyncio

NAME = b"disk"
NEAR = 1 << 20
"""Bytes between two requests that are a short way for the arm."""
SHORT, LONG = 0.002, 0.008
"""Seconds that the arm and the platter take for a short way and for a long one."""
RATE = 120 << 20
"""Bytes a second."""
DISK = int(pyfuse3.ROOT_INODE) + 1


class Disk(pyfuse3.Operations):  # type: ignore[misc]  # its stubs have no types
    """A directory with one file."""

    def __init__(self, backing: Path) -> None:
        super().__init__()
        self._fd = os.open(backing, os.O_RDWR)
        self._arm = 0

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else os.fstat(self._fd).st_size
        entry.st_nlink = 1
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(DISK)

    async def setattr(self, inode: int, *_: object) -> pyfuse3.EntryAttributes:
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        away = abs(off - self._arm)
        seconds = size / RATE + (0.0 if not away else SHORT if away <= NEAR else LONG)
        self._arm = off + size
        time.sleep(seconds)  # there is one arm
        return os.pread(self._fd, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(self._fd, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        os.fdatasync(self._fd)


def main() -> int:
    """Serves until it is unmounted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backing", type=Path, metavar="FILE", help="what it shows, as DIR/disk")
    parser.add_argument("point", type=Path, metavar="DIR", help="where it is mounted")
    given = parser.parse_args()
    pyfuse3_asyncio.enable()
    pyfuse3.init(Disk(given.backing), str(given.point), {"fsname=slow_disk"})
    try:
        asyncio.run(pyfuse3.main())
    finally:
        pyfuse3.close(unmount=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
