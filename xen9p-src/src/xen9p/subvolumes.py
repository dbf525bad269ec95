"""Making and deleting subvolumes of btrfs, by its ioctls (linux/btrfs.h), and where those are that are snapshots.

A process for each would cost more than the work itself: a snapshot takes milliseconds.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from xen9p.quota import SUBVOLUME, mount_of

TOP: Final = SUBVOLUME
"""The inode number of a subvolume's top."""
SNAPSHOTS: Final = ".snapshots"
"""The directory of all snapshots, at the top of a filesystem."""
META: Final = ".meta"
"""In there: what is known of them."""

_SNAP_CREATE_V2: Final = 0x50009417
_SNAP_DESTROY: Final = 0x5000940F
_FICLONE: Final = 0x40049409
_READ_ONLY: Final = 2
_VOL_ARGS: Final = 4096


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


def reflink(source: int, target: int) -> None:
    """Makes a file share all of another one's data. Raises OSError."""
    fcntl.ioctl(target, _FICLONE, source)
