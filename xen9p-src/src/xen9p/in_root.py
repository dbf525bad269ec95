"""Opening what is beneath a directory that somebody else fills, by openat2(2): never anything outside of it."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from typing import Final

_OPENAT2: Final = 437  # the same on every architecture
_HOW: Final = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_NO_MAGICLINKS: Final = 0x02
_IN_ROOT: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)


def resolve(root: int, path: bytes) -> int:
    """An O_PATH descriptor of a path, as if root were /: absolute links and .. stay in there.

    Raises:
        OSError: as open(2); ELOOP also for a magic link.
    """
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _IN_ROOT | _NO_MAGICLINKS)
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    for _ in range(16):
        got = int(_libc.syscall(_OPENAT2, root, path, how, ctypes.c_size_t(_HOW.size)))
        if got >= 0:
            return got
        code = ctypes.get_errno()
        # Somebody renames directories meanwhile; the kernel cannot be sure then that .. stayed inside.
        if code != errno.EAGAIN:
            break
    raise OSError(code, os.strerror(code))


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
