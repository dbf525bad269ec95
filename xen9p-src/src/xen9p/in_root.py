"""Opening what is beneath a directory that somebody else fills, by openat2(2): never anything outside of it."""

from __future__ import annotations

import os
import stat
from typing import Final

from xen9p.beneath import NO_MAGICLINKS, openat2

_IN_ROOT: Final = 0x10  # RESOLVE_IN_ROOT


def resolve(root: int, path: bytes) -> int:
    """An O_PATH descriptor of a path, as if root were /: absolute links and .. stay in there.

    Raises:
        OSError: as open(2); ELOOP also for a magic link.
    """
    # Somebody renames directories meanwhile; the kernel cannot be sure then that .. stayed inside.
    return openat2(root, path, os.O_PATH, _IN_ROOT | NO_MAGICLINKS, 16)


def open_regular(fd: int) -> int | None:
    """A descriptor for reading of an O_PATH one, if that is a regular file; None if it is another thing.

    Opening a FIFO could wait, opening a device could do anything: neither is opened.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOATIME)


def name_of(fd: int) -> bytes:
    """Where the kernel says that a descriptor's file is now."""
    return os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))
