"""Files beneath a directory whose content is not trusted: no link is followed, and nothing is waited for.

As the data plane does (fs.c): openat2(2) from a descriptor, and names only of the last component.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import Final

_SYS_OPENAT2: Final = 437  # the same everywhere
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 2, 4, 8
_EXCHANGE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: bytes, flags: int = os.O_PATH) -> int:
    """A descriptor of a path beneath root; b"" is root itself. A FIFO or device does not hold it up.

    Raises:
        OSError: ELOOP, a component is a symbolic link; EXDEV, it leads out; ENOENT, ENOTDIR, ...
    """
    how = _How(flags | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if flags & os.O_PATH else os.O_NONBLOCK), 0, 0)
    how.resolve = _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS
    for _ in range(100):
        fd = int(_libc.syscall(_SYS_OPENAT2, root, path or b".", ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        err = ctypes.get_errno()
        if err != errno.EAGAIN:  # something was renamed meanwhile
            break
    raise OSError(err, os.strerror(err), os.fsdecode(path))


def open_parent(root: int, path: bytes) -> tuple[int, bytes]:
    """A descriptor of a path's directory, and the last component. Raises OSError."""
    folder, _, name = path.rpartition(b"/")
    return open_beneath(root, folder, os.O_PATH | os.O_DIRECTORY), name


def exchange(folder: int, name: str, other_folder: int, other: str) -> None:
    """Two names change places, at once or not at all. Raises OSError."""
    if _libc.renameat2(folder, os.fsencode(name), other_folder, os.fsencode(other), _EXCHANGE):
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err))


def remove(folder: int, name: bytes) -> None:
    """Removes a name with all that is below it; one that is gone already is well. Raises OSError."""
    try:
        found = os.lstat(name, dir_fd=folder)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=folder)
            return
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return
    try:
        for entry in os.listdir(fd):
            remove(fd, os.fsencode(entry))
    finally:
        os.close(fd)
    try:
        os.rmdir(name, dir_fd=folder)
    except FileNotFoundError:
        return
